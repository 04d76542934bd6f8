"""Every kernel timed on a GPU: ``python -m engines.native.bench_kernels``."""
