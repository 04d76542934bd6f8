"""What became of a workload's rows, as numbers: read from the token file, stored in every record."""

from __future__ import annotations

from harness.spec import Spec


class FileCounts(Spec):
    """One file, in the order of ``data.path``. ``layout``: as declared or found; ``samples_train``: its part of an epoch."""

    layout: str
    rows: int
    rows_bad: int
    samples_train: int


class DataCounts(Spec):
    """All files together. Every row is accounted for::

        rows = rows_bad + samples_dropped + samples_held_out + samples_unused + samples_left_out + samples_train - samples_repeated

    ``rows_bad``: skipped (``data.on_bad_row=skip``). ``samples_train``: samples of one epoch; ``samples_repeated`` of them and
    ``samples_left_out`` come from the weights of the files. ``samples_unused``: held out beyond ``data.held_out_samples``.
    ``samples_dropped``: truncated before their first supervised token. ``samples_truncated`` and ``tokens_truncated`` count each row
    once, wherever it went. ``tokens_input`` and ``tokens_loss`` (supervised) are of one epoch.
    """

    rows: int
    rows_bad: int
    samples_train: int
    samples_repeated: int
    samples_left_out: int
    samples_held_out: int
    samples_unused: int
    samples_dropped: int
    samples_truncated: int
    tokens_truncated: int
    tokens_input: int
    tokens_loss: int
    files: tuple[FileCounts, ...]

    @property
    def layouts(self) -> str:
        """The layouts of all files, each once; ``dense`` where there is no file."""
        return ", ".join(dict.fromkeys(file.layout for file in self.files)) or "dense"

    def sentence(self) -> str:
        """The counts that are not zero, for people."""
        always, never = ("rows", "samples_train"), ("tokens_input", "tokens_loss", "files")
        said = {name: value for name, value in self if name not in never and (value or name in always)}
        return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in said.items())
