"""What a workload is called on the page: its title, what else it is, and where its section stands."""

from __future__ import annotations

import re

from harness.rank import Group
from harness.spec import Data, Train

MOST_LETTERS = 40  # of a file's name in a title


def identifier(group: Group) -> str:
    """Where the section of ``group`` is on the page."""
    return f"{group.workload.key}-{group.machine.key}"


def title(group: Group) -> str:
    """``llama3_8b · lora · dense · 4 × 2,048``: samples a step by their greatest length in tokens."""
    work = group.workload
    return f"{work.model.name} · {work.method.name} · {data_name(work.data)} · {shape(group)}"


def data_name(data: Data) -> str:
    """``gsm8k``, and ``jsonl train.jsonl`` where the name of its files says something else than its own."""
    names = [re.split(r"[/\\:]", entry.path)[-1] for entry in data.files]
    if all(name.partition(".")[0] == data.name for name in names):
        return data.name
    shown = [name if len(name) <= MOST_LETTERS else f"{name[:MOST_LETTERS]}…" for name in names]
    return f"{data.name} {shown[0]}{'' if len(shown) == 1 else f' and {len(shown) - 1} more'}"


def steps(train: Train) -> str:
    """``60 steps``, ``8 of 60 steps`` of a run that is ended before the schedule is."""
    whole = counted(train.steps, "step")
    return whole if train.num_steps == train.steps else f"{train.num_steps:,} of {whole}"


def shape(group: Group) -> str:
    """``4 × 2,048``: samples a step by their greatest length."""
    return f"{group.workload.train.samples_per_step}\u00a0×\u00a0{group.workload.data.sequence_length:,}"


def facts(group: Group) -> tuple[str, ...]:
    """What else a workload is, in words, and what the figures of its title are."""
    work = group.workload
    length = f"{'' if work.data.source == 'dense' else 'at most '}{work.data.sequence_length:,} tokens"
    return (
        f"{counted(work.train.samples_per_step, 'sample')} a step of {length}",
        steps(work.train),
        f"seed {work.train.seed}",
        *([f"data sha-256 {work.data.sha256[:8]}"] if work.data.sha256 and data_name(work.data) != work.data.name else []),
    )


def counted(count: int, name: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"
