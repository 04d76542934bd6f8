"""``python -m harness.tune``: search engines and their knobs for the fastest way to make a planned run on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError, HarnessError

USAGE = """python -m harness.tune [budget_minutes=20] [memory_gib=16] [engines=hf,fused] [OVERRIDE ...]

  python -m harness.tune model=llama3_8b method=lora data=dense train=default budget_minutes=20
  python -m harness.tune model=smollm2_135m data=python_docs engines=hf,fused
  python -m harness engine=best model=llama3_8b …         train with what was found; the adapter is kept

The overrides are those of python -m harness but for the engine: they say which run is planned. Its steps or epochs count: what compiles
for long pays in a long run only. With save_every only engines that write checkpoints are searched. Cells are looked at for few steps on the
planned schedule and recorded under runs=…; the same command after Ctrl-C goes on. memory_gib emulates a smaller GPU. What is found is
written to <runs>/tuned/<machine>/. Exit code 0: found, 2: the command is wrong, 6: nothing ran, 130: interrupted."""
_TAKEN = ("engine=", "engine.", "repeat=", "plan=", "lane=", "score=", "train.stop_after=", "machine.memory_cap_gib=")


@dataclass(frozen=True, slots=True)
class Asked:
    """The command line: overrides of the planned run, and what only tune knows."""

    overrides: tuple[str, ...]
    engines: tuple[str, ...]
    budget_seconds: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, show how it goes, write what was found."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    try:
        return _run(asked(words))
    except HarnessError as error:
        print(f"error: {error}" if "\n" not in str(error) else f"error:\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped. Every finished cell is recorded: the same command goes on where this one ended.", file=sys.stderr)
        return 130


def asked(words: Sequence[str]) -> Asked:
    """Parse the command line. Raises ConfigError naming every word that has no place here."""
    own = {"budget_minutes": "", "memory_gib": "", "engines": ""}
    overrides, problems = [], []
    for word in words:
        key, _, value = word.partition("=")
        if key in own:
            own[key] = value
        elif word.lstrip("+~").startswith(_TAKEN):
            problems.append(f"{word}: tune decides this itself; engines=hf,fused names engines, memory_gib=16 caps the memory")
        else:
            overrides.append(word)
    if own["budget_minutes"] and not _positive(own["budget_minutes"]):
        problems.append(f"budget_minutes={own['budget_minutes']}: expected a number above 0")
    if own["memory_gib"] and not (own["memory_gib"].isdecimal() and int(own["memory_gib"])):
        problems.append(f"memory_gib={own['memory_gib']}: expected whole GiB, as memory_gib=16")
    if problems:
        raise ConfigError("\n".join(problems))
    cap = [f"machine.memory_cap_gib={own['memory_gib']}"] if own["memory_gib"] else []
    budget = 60 * float(own["budget_minutes"]) if own["budget_minutes"] else None
    return Asked((*overrides, *cap), tuple(filter(None, own["engines"].split(","))), budget)


def _positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def _run(asked: Asked) -> int:
    from rich.console import Console

    from harness.config import Settings
    from harness.preparing import counting
    from harness.tune.asked import View
    from harness.tune.entrants import entrants
    from harness.tune.runner import Looked, Runner
    from harness.tune.scale import capacity_bytes
    from harness.tune.show import nothing, state, summary
    from harness.tuned import save

    console = Console()

    def say(lines: Sequence[str]) -> None:
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    found = entrants(asked.overrides, asked.engines, counting(lambda line: say([line])))
    config = found.first
    if config.machine.device == "cpu" and config.machine.memory_cap_gib is not None:
        raise ConfigError("memory_gib caps the allocator of a GPU; on a CPU leave it out")

    steps = config.train.num_steps
    settings = Settings(**{name: getattr(config, name) for name in Settings.model_fields})
    budget = asked.budget_seconds

    def show(view: View, looked: Sequence[Looked], spent: float) -> None:
        say(state(view, looked, spent, budget, steps, runner.experience))

    runner = Runner(found, settings, console, budget, show)
    tuned, path = runner.run()
    if tuned is None:
        say([*nothing(runner, capacity_bytes(runner.machine)), *found.left_out])
        return 6
    save(tuned, path)
    say([*summary(tuned), f"written to {_shown(path)}; python -m harness engine=best … trains with it"])
    return 0


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
