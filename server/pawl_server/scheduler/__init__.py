"""Continuous batching as a pure state machine: events in, plans out. No I/O, no clock, no torch."""
