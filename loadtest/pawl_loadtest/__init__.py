"""Load tests and benchmarks of pawl."""
