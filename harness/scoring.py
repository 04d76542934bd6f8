"""What comes after training: held-out scores, updates compared with the reference's, and weights nobody needs any more deleted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.adapters import adapter_folder, drop_adapter, is_kept_for_good
from harness.anchors import anchors, is_yardstick
from harness.comparable import Run, by_workload, in_fp32, measured, runs, unusable
from harness.data.tokens import TokenFile
from harness.deviations import loss_floor
from harness.errors import HarnessError, StoreError
from harness.launch import run_door
from harness.places import PairItem, Prepared, RoundingItem, ScoreItem, ScoreRequest
from harness.record import Record, loads_score
from harness.spec import LoraFp8, Workload
from harness.store import Results, pair_path, read_pair, read_rounding, rounding_path, save_pair, save_rounding, save_score, score_path

Item = ScoreItem | PairItem | RoundingItem


@dataclass(frozen=True, slots=True)
class Trained:
    """The records of one workload whose weights are to be judged, and where they and their inputs lie."""

    root: Path
    workload: Workload
    prepared: Prepared
    records: Sequence[Record]
    device: str

    @property
    def kept(self) -> list[str]:
        """Hashes of the weights that are still there."""
        return sorted({sha for record in self.records if (sha := kept(self.root, record))})

    @property
    def can_be_scored(self) -> bool:
        """Whether there are held-out rows; without them nothing can be judged in full."""
        return len(TokenFile.open(Path(self.prepared.tokens)).held_out) > 0


def kept(root: Path, record: Record) -> str | None:
    """The hash of the weights that this record left and that are still there."""
    sha = record.measurement.artifacts.adapter_sha256 if record.measurement else None
    return sha if sha and adapter_folder(root, sha).exists() else None


def is_unjudged(root: Path, record: Record) -> bool:
    """Whether weights are still there that have no score; those of a first step, that have not been compared."""
    sha = kept(root, record)
    if sha is None:
        return False
    made = measured(Run(record)).artifacts
    if record.cell.workload.is_first_step:
        folder = pair_path(root, made.adapter_init_sha256 or made.base_sha256, sha, sha).parent
        return not any(folder.glob(f"*{sha[:16]}*"))
    return not score_path(root, made.base_sha256, made.tokens_sha256, sha).exists()


def judge_weights(trained: Trained, held: int, say: Callable[[str], None]) -> set[str | None]:
    """Score what has no score yet (the base too), compare each update with the reference's; both are stored at once.

    Returns the hashes (None: the base) of weights with which that failed, each named through ``say`` with the reason. Raises
    StoreError when results cannot be written.
    """
    if not trained.kept or not trained.can_be_scored:
        return set()
    root, work = trained.root, trained.root / "work" / "score"
    items: list[Item] = [*_scores_to_make(trained, work), *_pairs_to_make(trained, work), *rounding_to_make(trained, work)]
    failed: set[str | None] = set()
    if items:
        num_scores, num_pairs = (sum(isinstance(item, kind) for item in items) for kind in (ScoreItem, PairItem))
        rounding = ", measuring how far rounding moves the first loss" if len(items) > num_scores + num_pairs else ""
        say(f"scoring {num_scores} set(s) of weights of {trained.workload.label}, comparing {num_pairs} pair(s) of updates{rounding}")
        shutil.rmtree(work, ignore_errors=True)
    while items:
        request = ScoreRequest(
            workload=trained.workload,
            prepared=trained.prepared,
            items=tuple(item for item in items if isinstance(item, ScoreItem)),
            pairs=tuple(item for item in items if isinstance(item, PairItem)),
            rounding=next((item for item in items if isinstance(item, RoundingItem)), None),
            device=trained.device,
        )
        reason = "nothing was written"
        try:
            run_door("harness.score", request, work / f"{trained.workload.key}.json", held=held)
        except StoreError:
            raise
        except HarnessError as error:
            reason = str(error)
        made = [item for item in items if Path(item.out).exists()]
        for item in made:
            _keep(item, root)
        items = [item for item in items if item not in made]
        if items:  # they are made in this order: the first one that is absent is the one that failed
            first = items.pop(0)
            say(f"  not scored   {_names(first)}: {reason}")
            failed |= _weights(first)
    return failed


def needed_later(results: Results) -> set[str]:
    """Adapters that later runs are to be compared with: of the references and of their first steps. Full weights are too large to keep."""
    able = [run for run in runs(results) if run.record.cell.workload.method.name != "full"]
    found = [
        anchor.run
        for key, mine in by_workload(able).items()
        for machine in {run.record.machine.key for run in mine if run.score is not None}
        for anchor in anchors(mine, key, machine)
    ]
    records = [record for run in found for record in (run.record, run.first) if record is not None]
    return {sha for record in records if (sha := measured(Run(record)).artifacts.adapter_sha256)}


def drop(trained: Trained, but: set[str]) -> None:
    """Delete the weights of these records except those in ``but`` and those that somebody asked for."""
    for sha in trained.kept:
        if sha not in but and not is_kept_for_good(trained.root, sha):
            drop_adapter(trained.root, sha)


def _scores_to_make(trained: Trained, work: Path) -> Iterator[ScoreItem]:
    """Of a first step only the update is of interest."""
    root, place = trained.root, trained.prepared
    for sha in () if trained.workload.is_first_step else (None, *trained.kept):
        if not score_path(root, place.base_sha256, Path(place.tokens).stem, sha).exists():
            folder = str(adapter_folder(root, sha)) if sha else None
            yield ScoreItem(adapter=folder, adapter_sha256=sha, out=str(work / f"{sha or 'base'}.json"))


def _pairs_to_make(trained: Trained, work: Path) -> Iterator[PairItem]:
    root, place, there = trained.root, trained.prepared, trained.kept
    start = place.adapter_init_sha256 or place.base_sha256
    references = {sha for record in trained.records if is_yardstick(record) and (sha := kept(root, record))}
    pairs = {(min(one, other), max(one, other)) for one in references for other in there if one != other}
    for one, other in sorted(pairs):
        if not pair_path(root, start, one, other).exists():
            out = str(work / f"{one[:16]}-{other[:16]}.json")
            yield PairItem(trained=(str(adapter_folder(root, one)), str(adapter_folder(root, other))), trained_sha256=(one, other), out=out)


def rounding_to_make(trained: Trained, work: Path) -> Iterator[RoundingItem]:
    """Only where a first loss that rounds strays from the truth's by more than the floor: nothing else asks how far rounding moves it."""
    workload, base = trained.workload, trained.prepared.base_sha256
    if workload.is_first_step or isinstance(workload.method, LoraFp8):  # what 8 bits do to a loss is not rounding to bf16
        return
    able = [run for record in trained.records if not unusable(run := Run(record)) and measured(run).artifacts.base_sha256 == base]
    truth = next((measured(run).steps for run in able if is_yardstick(run.record) and in_fp32(run)), None)
    if truth is None:
        return
    off = (abs(measured(run).steps.losses[0] - truth.losses[0]) for run in able if not in_fp32(run))
    strays = any(one > loss_floor(truth.tokens_loss[0]) for one in off)
    if strays and not rounding_path(trained.root, base, truth.stream_sha256[0]).exists():
        yield RoundingItem(out=str(work / "rounding.json"))


def _weights(item: Item) -> set[str | None]:
    """The hashes of the weights that ``item`` is about."""
    if isinstance(item, RoundingItem):
        return set()
    return {item.adapter_sha256} if isinstance(item, ScoreItem) else set(item.trained_sha256)


def _keep(item: Item, root: Path) -> None:
    out = Path(item.out)
    if isinstance(item, ScoreItem):
        save_score(loads_score(out.read_text(encoding="utf-8"), item.out), root)
    elif isinstance(item, RoundingItem):
        save_rounding(read_rounding(out, item.out), root)
    else:
        save_pair(read_pair(out, item.out), root)
    out.unlink()


def _names(item: Item) -> str:
    if isinstance(item, ScoreItem):
        return (item.adapter_sha256 or "the base")[:16]
    if isinstance(item, RoundingItem):
        return "how far rounding moves the first loss"
    return f"the updates of {' and '.join(sha[:16] for sha in item.trained_sha256)}"
