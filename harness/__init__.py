"""Run one fine-tune through interchangeable engines, measure it, judge it. Start reading at spec.py."""

__version__ = "0.1.0"
