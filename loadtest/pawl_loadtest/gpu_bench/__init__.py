"""`python -m pawl_loadtest.gpu_bench`: pawl on one GPU against its byte bound and against transformers, in one run."""
