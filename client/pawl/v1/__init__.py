"""Generated stubs of `pawl.v1`; `make protos` makes them."""
