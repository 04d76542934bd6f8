"""Base model sources and their content hashes; importing this package loads neither torch nor transformers."""

from harness.weights.sources import fingerprint, resolve_source
from harness.weights.tensors import adapter_sha256

__all__ = ["adapter_sha256", "fingerprint", "resolve_source"]
