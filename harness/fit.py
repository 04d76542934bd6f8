"""``python -m harness.fit``: what fits on cards of 8 to 80 GiB, with which settings, at what speed; answered without training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness.compose import CONF
from harness.config import Config, single
from harness.errors import ConfigError, HarnessError, nearest
from harness.exits import leave_with
from harness.record import Record
from harness.store import load
from harness.tune.fitting import SIZES_GIB, Line, lines
from harness.tune.lessons import usable

USAGE = """python -m harness.fit [gib=8,12,16,24,48,80] [engines=hf,fused] [gpu=H100] [OVERRIDE ...]

  python -m harness.fit model=llama3_8b method=qlora data=dense data.sequence_length=2048
  python -m harness.fit model=llama3_1b method=lora gib=24
  python -m harness.fit engines=fused,fused/sharded engine.processes=8 model=llama3_8b train.samples_per_step=32

For each size of card and each engine: the fastest setting that is predicted to fit, from models of memory and time that the records under
results/ and runs=… calibrate. A line says whether its figures are measured, on the GPU named above the table (the median of so many runs,
as in reports), predicted, with how far the speed was off in nine of ten foretold settings, or "extrapolated": predicted far from every
record of this engine (another method, a model of another size). "reserved GiB" is the most that the allocator holds, which has to fit
beside 1 GiB of context (so that what was measured under a cap of 8 GiB is what a card of 9 does); reports show what of it was allocated,
which is less. Samples are taken to be as long as data.sequence_length allows. Trains nothing, needs no GPU."""
RESULTS = Path(__file__).resolve().parent.parent / "results"
_ENGINES = ("fused", "hf", "unsloth", "axolotl")  # on one card
_GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table. Returns 0, or 2 for a wrong command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    try:
        print("\n".join(_answer(words)))
    except HarnessError as error:
        print(f"error: {error}" if "\n" not in str(error) else f"error:\n{error}", file=sys.stderr)
        return 2
    return 0


def _answer(words: Sequence[str]) -> list[str]:
    own = {"gib": ",".join(map(str, SIZES_GIB)), "engines": ",".join(_ENGINES), "gpu": ""}
    overrides = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "engine" or key.startswith("engine.knobs."):
            raise ConfigError(f"{word}: fit chooses engines and their knobs itself; engines=hf,fused names engines")
        if key in own:
            own[key] = value
        else:
            overrides.append(word)
    sizes = _sizes(own["gib"])
    device = [] if any(word.startswith("machine=") for word in overrides) else ["machine=cuda"]
    configs = {name: single([*device, *overrides, f"engine={name}"]) for name in own["engines"].split(",") if _exists(name)}
    first = next(iter(configs.values()))
    if first.model.config is None:
        raise ConfigError(f"model={first.model.name}: its shape is known only once its weights are open; choose a model with model.config")
    records = [stored.record for stored in load(RESULTS, Path(first.runs).expanduser()).stored]
    known = usable(records, own["gpu"] or None)
    about = f"speed as on {known.gpu}" if known else f"{_no_record(records, own['gpu'])}: memory from shapes alone, speed not known"
    found, notes = lines(configs, first.model.config, known, sizes)
    width = max(map(len, configs))
    told = [f"not considered: {reason}" for reason in notes.left_out] + [f"not installed here: {reason}" for reason in notes.absent]
    return [*_head(first, about, width), *(_text(line, width) for line in found), *told]


def _no_record(records: Sequence[Record], gpu: str) -> str:
    names = ", ".join(sorted({record.machine.name for record in records if record.machine.device == "cuda"}))
    return f"no record of gpu='{gpu}', there are some of {names}" if gpu and names else "no record to calibrate by"


def _exists(name: str) -> bool:
    if not (CONF / "engine" / f"{name}.yaml").is_file():
        known = (str(path.relative_to(CONF / "engine").with_suffix("")) for path in (CONF / "engine").rglob("*.yaml"))
        raise ConfigError(f"engines: there is no engine '{name}'; {nearest(name, known)}")
    return True


def _sizes(text: str) -> list[int]:
    if not all(size.strip().isdecimal() and int(size) for size in text.split(",")):
        raise ConfigError(f"gib={text}: expected sizes of cards in GiB, whole numbers, as gib=16,24")
    return [int(size) for size in text.split(",")]


def _head(config: Config, about: str, width: int) -> list[str]:
    length, samples, processes = config.data.sequence_length, config.train.samples_per_step, config.engine.processes
    on = f" of {processes} GPUs, memory and tokens/s of one of them" if processes > 1 else ""
    return [
        f"{config.model.name} {config.method.name}, samples of {length} tokens, {samples} a step{on}; {about}",
        f"{'GiB':>4}  {'engine':<{width}} {'reserved GiB':>12} {'tokens/s':>9}  {'':<36} setting",
    ]


def _text(line: Line, width: int) -> str:
    place = f"{line.size_gib:>4}  {line.engine:<{width}}"
    if line.setting is None:
        return f"{place} does not fit: needs at least {line.needs_bytes / _GIB:.1f} GiB (predicted)"
    peak = f"{line.peak_bytes / _GIB:.1f}" if line.peak_bytes else "?"
    rate = f"{line.tokens_per_second:,.0f}" if line.tokens_per_second else "?"
    return f"{place} {peak:>12} {rate:>9}  {_how(line):<36} {line.setting}"


def _how(line: Line) -> str:
    if line.num_runs:
        return f"measured, {'once' if line.num_runs == 1 else f'median of {line.num_runs}'}"
    spread = f" ± {100 * line.spread:.0f} %" if line.spread is not None else ""
    return "predicted" + (", extrapolated" if line.beyond else "") + ("" if line.sure else ", may not fit") + spread


if __name__ == "__main__":
    leave_with(main)
