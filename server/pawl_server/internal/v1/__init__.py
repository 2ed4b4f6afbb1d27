"""Generated stubs of `pawl_server.internal.v1`; `make protos` makes them."""
