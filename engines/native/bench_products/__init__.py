"""What torch picks for every product of a step, beside the best of the ways that cuBLASLt offers; see ``__main__``."""
