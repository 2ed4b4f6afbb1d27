"""The paged KV cache as accounting: which block holds what. Pure: no I/O, no clock, no torch."""
