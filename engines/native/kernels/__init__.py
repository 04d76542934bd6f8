"""One fused operation a file: its formula, what it keeps, its kernels, and a public function that validates."""
