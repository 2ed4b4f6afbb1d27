"""The compiled CPU kernels: C sources with a plain C ABI, built once and loaded through ctypes."""
