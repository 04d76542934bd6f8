"""The report: what was measured, who is fastest, how sure that is, and how to do it again."""

from harness.report.judged import judged
from harness.report.page import markdown, write
from harness.report.text import rows, table

__all__ = ["judged", "markdown", "rows", "table", "write"]
