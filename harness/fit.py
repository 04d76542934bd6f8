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
results/ and runs=… calibrate. A line says whether its figures are measured, on the GPU named above the table, predicted, with how far the
speed may be off, or "extrapolated": predicted far from every record of this engine (another method, a model of another size). Samples are
taken to be as long as data.sequence_length allows. Trains nothing, needs no GPU."""
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
    found, absent = lines(configs, first.model.config, known, sizes)
    return [*_head(first, about), *map(_text, found), *(f"not considered: {reason}" for reason in absent)]


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
        raise ConfigError(f"gib={text}: expected sizes of cards in GiB, as gib=16,24")
    return [int(size) for size in text.split(",")]


def _head(config: Config, about: str) -> list[str]:
    length, samples, processes = config.data.sequence_length, config.train.samples_per_step, config.engine.processes
    on = f" of {processes} GPUs, peak and tokens/s of one of them" if processes > 1 else ""
    return [
        f"{config.model.name} {config.method.name}, samples of {length} tokens, {samples} a step{on}; {about}",
        f"{'GiB':>4}  {'engine':<13} {'peak GiB':>9} {'tokens/s':>9}  {'':<36} setting",
    ]


def _text(line: Line) -> str:
    if line.setting is None:
        return f"{line.size_gib:>4}  {line.engine:<13} does not fit: needs at least {line.needs_bytes / _GIB:.1f} GiB (predicted)"
    peak = f"{line.peak_bytes / _GIB:.1f}" if line.peak_bytes else "?"
    rate = f"{line.tokens_per_second:,.0f}" if line.tokens_per_second else "?"
    spread = f" ± {100 * line.deviation:.0f} %" if line.deviation is not None else ""
    how = "measured" if line.measured else "predicted, extrapolated" if line.beyond else "predicted"
    how += "" if line.sure or line.measured else ", may not fit"
    return f"{line.size_gib:>4}  {line.engine:<13} {peak:>9} {rate:>9}  {how + spread:<36} {line.setting}"


if __name__ == "__main__":
    leave_with(main)
