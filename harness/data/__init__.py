"""From JSONL rows to one token file that every engine reads: the same bytes, the same samples in every step."""

from harness.data.tokens import Batch, Sample, Split, StepTokens, TokenFile, chunks, pack, pad

__all__ = ["Batch", "Sample", "Split", "StepTokens", "TokenFile", "chunks", "pack", "pad"]
