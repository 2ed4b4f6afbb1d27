"""The GPU kernels, in Triton. Imported only where they are asked for: a machine without a GPU needs no triton."""
