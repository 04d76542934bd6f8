"""The harness's own costs, measured: start-up, a cell, planning, composing, a report and tokenisation, each as one figure."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.compose import CONF
from harness.config import Request, requests
from harness.engine import Machine
from harness.fingerprint import engine_fingerprint
from harness.machine import detect
from harness.plan import plan
from harness.record import Artifacts, Measurement, Provenance, Record, Startup, Steps
from harness.store import load, save

TREE = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "peft", "triton")
TINY = ("model=tiny_llama", "data=dense", "data.sequence_length=16", "data.num_samples=8", "train.steps=4", "train.samples_per_step=2")
FAKE = ("--config-dir", str(TREE / "tests" / "fakes" / "conf"), "engine=trivial", "machine=cpu", *TINY)
REPEATS = 5  # of every variant in a report
JOINED = 7  # rows of the shipped sample make one of a usual length
NUM_STEPS = 20  # of a synthetic record
BARE = """
import hydra
@hydra.main(version_base="1.3", config_path={conf!r}, config_name="config")
def main(config): pass
main()
"""
LOADED = """
import contextlib, io, runpy, sys
sys.argv = ["harness", *sys.argv[1:]]
with contextlib.redirect_stdout(io.StringIO()):
    try:
        runpy.run_module("harness", run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, ended.code
print(*sys.modules)
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure. ``at_least``: the target is a floor; otherwise the value must stay at or below it."""

    name: str
    value: float
    target: float
    unit: str
    how: str
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """Whether the target is met."""
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. ``rounds``: repetitions of what takes seconds; ``starts``: of what takes less than one."""

    starts: int = 15
    rounds: int = 3
    cells: int = 8
    repeats_planned: int = 100  # of 100 variants
    repeats_composed: int = 10  # of 200 variants
    models_composed: tuple[str, ...] = ("smollm2_135m", "llama3_1b", "llama3_8b", "qwen3_4b", "mistral_7b")
    reports: tuple[tuple[int, int], ...] = ((1, 200), (20, 10), (50, 4))  # workloads, variants of each; five repeats
    rows: int = 50_000


SMALL = Sizes(
    starts=1, rounds=1, cells=2, repeats_planned=1, repeats_composed=1, models_composed=("llama3_1b",), reports=((2, 2),), rows=300
)


def start_figures(sizes: Sizes, folder: Path) -> Iterable[Figure]:
    """What our start adds to bare Hydra's, for the two commands that run nothing."""
    bare = folder / "bare.py"
    bare.write_text(BARE.format(conf=str(CONF)))
    for arguments in (["--help"], ["--cfg", "job"]):
        added = []
        for _ in range(sizes.starts):
            theirs = _wall([sys.executable, str(bare), *arguments], folder)
            added.append(_wall([sys.executable, "-m", "harness", *arguments], folder) - theirs)
        command = f"python -m harness {' '.join(arguments)}"
        how = (
            f"wall time less that of a bare hydra.main over the same conf/ with the same arguments; median of {sizes.starts} pairs"
            f"{' (ours composes nothing)' if arguments == ['--help'] else ''}"
        )
        yield Figure(f"`{command}`: added to bare Hydra", statistics.median(added), 0.35, "s", how)


def import_figures(sizes: Sizes, folder: Path) -> Iterable[Figure]:
    """Whether anything heavy is imported before a worker is."""
    runs, cache = folder / "imports" / "runs", folder / "imports" / "cache"
    planning = ["plan=only", "machine=cpu", f"runs={runs}", f"cache={cache}"]
    _, found = requests(planning, multirun=False)
    save(_record(found[0], 0, detect("cpu"), "stale"), runs)
    for arguments in (["--help"], ["--cfg", "job"], planning):
        done = subprocess.run([sys.executable, "-c", LOADED, *arguments], cwd=TREE, capture_output=True, text=True, check=True)
        loaded = [name for name in HEAVY if name in done.stdout.split()]
        shown = " ".join(word for word in arguments if "/" not in word)
        how = f"how many of {', '.join(HEAVY)} are in sys.modules at the end"
        yield Figure(f"`python -m harness {shown}`: heavy imports", len(loaded), 0, "", how)


def cell_figures(sizes: Sizes, folder: Path) -> Iterable[Figure]:
    """What the harness adds to a cell beyond its worker's interpreter, imports and steps: guard, set-up and waiting are its own."""
    cache = folder / "cells" / "cache"
    _sweep(folder / "cells" / "warm", cache, 1)
    alone, further = [], []
    for round_ in range(sizes.rounds):
        imports = _wall([sys.executable, "-c", "import harness.worker"], TREE)
        one, own = _sweep(folder / "cells" / f"one-{round_}", cache, 1)
        many, _ = _sweep(folder / "cells" / f"many-{round_}", cache, sizes.cells)
        alone.append(one - own - imports)
        further.append((many - one) / (sizes.cells - 1) - own - imports)
    what = (
        "the worker's own time (a bare `import harness.worker`, and from its record the engine's imports and the steps); "
        "engine trivial on random data: nothing is scored"
    )
    how = f"wall time of a command that runs one cell, caches warm, report included, less {what}; median of {sizes.rounds}"
    yield Figure("a cell alone: added by the harness", statistics.median(alone), 1.5, "s", how)
    how = f"(wall of {sizes.cells} cells − wall of one) ÷ {sizes.cells - 1}, less {what}; median of {sizes.rounds}"
    yield Figure("each further cell of a sweep: added by the harness", statistics.median(further), 1.5, "s", how)


def plan_figures(sizes: Sizes, folder: Path) -> Iterable[Figure]:
    """Planning composed cells against a store that has a record of each."""
    _, variants = requests([*_variants(folder), "train.seed=0,1,2,3,4"], multirun=True)
    cells = [_repeat(request, repeat) for request in variants for repeat in range(sizes.repeats_planned)]
    machine, runs = detect("cpu"), folder / "planned"
    now = {one.cell.engine.module: engine_fingerprint(one.cell.engine.module, one.python, one.packages) for one in variants}
    for place, request in enumerate(cells):
        save(_record(request, place, machine, now[request.cell.engine.module] if place % 2 else "stale"), runs)
    seconds = _median(lambda: plan(cells, [stored.record for stored in load(runs).stored], "stale"), sizes.rounds)
    how = f"load() and plan(), engines hf and fused, every other record stale; {NUM_STEPS} steps a record; median of {sizes.rounds}"
    yield Figure(f"planning {len(cells):,} composed cells against {len(cells):,} records", seconds, 10, "s", how)


def compose_figures(sizes: Sizes, folder: Path) -> Iterable[Figure]:
    """Composing a product sweep over groups and knobs."""
    groups = [f"model={','.join(sizes.models_composed)}", "data=python_docs,dense"]
    sweep = [*_variants(folder), *groups, f"repeat=range({sizes.repeats_composed})"]
    _, found = requests(sweep, multirun=True)
    seconds = _median(lambda: requests(sweep, multirun=True), sizes.rounds)
    choices = len(found) // 5 // sizes.repeats_composed
    how = f"command line to validated requests: {choices} choices of groups, 5 values of a knob, repeats; median of {sizes.rounds}"
    yield Figure(f"composing a sweep of {len(found):,} cells", seconds, 60, "s", how)


def report_figures(sizes: Sizes, folder: Path) -> Iterable[Figure]:
    """A report, in shapes that stress its parts: ranking, both, and plotting."""
    _, (base,) = requests(["machine=cpu", f"cache={folder / 'cache'}"], multirun=False)
    machine = detect("cpu")
    for num_workloads, num_variants in sizes.reports:
        runs = folder / f"reported-{num_workloads}"
        cells = [
            _repeat(_variant(base, variant, workload), repeat)
            for workload in range(num_workloads)
            for variant in range(num_variants)
            for repeat in range(REPEATS)
        ]
        for place, request in enumerate(cells):
            save(_record(request, place, machine, "f" * 12), runs)
        command = [sys.executable, "-m", "harness.report", str(runs), "--out", str(runs / "out")]
        seconds = _median(lambda command=command: _wall(command, TREE), sizes.rounds)  # type: ignore[misc]
        how = f"wall time of python -m harness.report (HTML, Markdown and table), {REPEATS} repeats; median of {sizes.rounds}"
        shape = f"{num_workloads} workload{'s' if num_workloads > 1 else ''} × {num_variants} variants"
        yield Figure(f"a report of {len(cells):,} records, {shape}", seconds, 10, "s", how)


def tokenise_figures(sizes: Sizes, folder: Path) -> Iterable[Figure]:
    """Our tokenisation against the tokenizer alone."""
    long, short = _tokenised(sizes, folder, JOINED), _tokenised(sizes, folder, 1)
    how = (
        f"the shipped sample's text in rows of {long['tokens_per_row']:.0f} tokens, SmolLM2's tokenizer; ours, from JSONL lines to samples "
        f"with their answers marked: {long['ours']:,.0f} tokens/s; the fast tokenizer called with batches of texts rendered before: "
        f"{long['bare']:,.0f}; medians of {sizes.rounds} alternated rounds. With what preparing does besides, checking all lines and "
        f"writing the token file: {long['file']:,.0f}, {100 * long['file'] / long['bare']:.0f} %. In the sample's own rows, "
        f"{short['tokens_per_row']:.0f} tokens each, where rendering weighs more: {short['ours']:,.0f} and {short['bare']:,.0f}, "
        f"{100 * short['ours'] / short['bare']:.0f} %"
    )
    share = 100 * long["ours"] / long["bare"]
    yield Figure("tokenisation: share of the bare fast tokenizer's batch speed", share, 80, "%", how, at_least=True)


def _tokenised(sizes: Sizes, folder: Path, joined: int) -> dict[str, float]:
    command = [sys.executable, "-m", "scripts.bench_tokenise", str(folder), str(sizes.rows), str(joined), str(sizes.rounds)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, cwd=TREE, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: statistics.median(found[name]) for name in ("bare", "ours", "file")} | {"tokens_per_row": found["tokens_per_row"]}


def _variants(folder: Path) -> list[str]:
    """20 variants, and where nothing of the user's is touched."""
    knobs = ["engine=hf,fused", "method=lora,full", "engine.knobs.micro_batch=1,2,4,8,16"]
    return [*knobs, "machine=cpu", f"cache={folder / 'cache'}", f"runs={folder / 'none'}"]


def _repeat(request: Request, repeat: int) -> Request:
    return request.model_copy(update={"cell": request.cell.model_copy(update={"repeat": repeat})})


def _variant(request: Request, micro_batch: int, seed: int) -> Request:
    cell = request.cell
    engine = cell.engine.model_copy(update={"knobs": {**cell.engine.knobs, "micro_batch": micro_batch + 1}})
    train = cell.workload.train.model_copy(update={"seed": seed})
    changed = {"engine": engine, "workload": cell.workload.model_copy(update={"train": train})}
    return request.model_copy(update={"cell": cell.model_copy(update=changed)})


def _record(request: Request, place: int, machine: Machine, fingerprint: str) -> Record:
    """A record as a run would leave it; rates differ a little, so that there is something to rank."""
    rate = 1000 + 3 * (place % 97)
    tokens = tuple(3000 + step for step in range(NUM_STEPS))
    steps = Steps(
        seconds=tuple(count / rate for count in tokens),
        losses=tuple(3.0 - step / NUM_STEPS for step in range(NUM_STEPS)),
        grad_norms=(1.0,) * NUM_STEPS,
        tokens_input=tokens,
        tokens_loss=(900,) * NUM_STEPS,
        tokens_processed=tokens,
        stream_sha256=("a" * 64,) * NUM_STEPS,
    )
    artifacts = Artifacts(tokens_sha256="b" * 64, base_sha256="c" * 64, adapter_init_sha256="d" * 64, adapter_sha256="e" * 64)
    startup = Startup(process_seconds=0.2, setup_seconds=4.0)
    return Record(
        cell=request.cell,
        machine=machine,
        status="ok",
        measurement=Measurement(startup=startup, steps=steps, memory=(), artifacts=artifacts),
        provenance=Provenance(
            started_utc=f"2026-01-01T{place // 3600:02d}:{place // 60 % 60:02d}:{place % 60:02d}.000+00:00",
            wall_seconds=60.0,
            commit="0" * 40,
            dirty=False,
            engine_fingerprint=fingerprint,
            python="3.11.9",
            packages={},
            driver=None,
            host="synthetic",
        ),
    )


def _sweep(runs: Path, cache: Path, num_cells: int) -> tuple[float, float]:
    """Wall seconds of a sweep of the fake engine, and the median of what its workers' engines took for imports and steps."""
    repeats = f"repeat={','.join(map(str, range(num_cells)))}"
    wall = _wall([sys.executable, "-m", "harness", "-m", *FAKE, repeats, f"runs={runs}", f"cache={cache}"], TREE)
    own = []
    for stored in load(runs).stored:
        assert stored.record.measurement is not None
        imports = stored.record.measurement.startup.import_seconds
        own.append((imports or 0.0) + sum(stored.record.measurement.steps.seconds))
    return wall, statistics.median(own)


def _wall(command: Sequence[str], folder: Path) -> float:
    """Wall seconds of ``command``, which must succeed. Our tree is importable from anywhere."""
    environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(TREE)}
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _median(work: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
