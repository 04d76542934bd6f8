"""``python -m harness``: run one cell, or with ``-m`` a sweep of them; ``--help`` and ``--cfg job`` run nothing."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import __version__
from harness.errors import HarnessError

USAGE = """python -m harness [-m] [--cfg job] [OVERRIDE ...]

  python -m harness engine=fused model=smollm2_135m method=lora data=python_docs
  python -m harness -m engine=hf,fused 'repeat=range(3)'          several values, with -m: a sweep of all combinations
  python -m harness -m +sweep=demo                                a sweep from conf/sweep/
  python -m harness data=jsonl data.path=my.jsonl 'data.fields={prompt: question, completion: answer}'
  python -m harness engine=best train.epochs=3 save_every=100 …   train for use with what tune found; says where the adapter is
  python -m harness plan=only …                                   what would run, what cannot and why; runs nothing

An override is group=option, key=value, +key=value or ~key, in Hydra's grammar.
--config-dir DIR adds a folder of your own options (DIR/engine/mine.yaml); --cfg job [--resolve] prints the configuration."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, compose, run. Returns the exit code; see ``harness.sweep.Exit``."""
    options = _parser().parse_intermixed_args(arguments)
    if options.help:
        print(_help())
        return 0
    try:
        if options.config_dir:
            from harness.compose import searchpath

            options.overrides.insert(0, searchpath(options.config_dir))
        return _show(options) if options.cfg else _run(options)
    except HarnessError as error:
        print(f"error: {error}" if "\n" not in str(error) else f"error:\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped. Every finished cell is recorded: the same command goes on where this one ended.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--version", action="version", version=f"engine-room {__version__}")
    parser.add_argument("overrides", nargs="*")
    return parser


def _help() -> str:
    conf = Path(__file__).resolve().parent.parent / "conf"
    lines = [USAGE, "", "groups and their options:"]
    for folder in sorted(path for path in conf.iterdir() if path.is_dir()):
        prefix = "+" if folder.name == "sweep" else ""
        options = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
        lines.append(f"  {prefix}{folder.name}={'|'.join(options)}")
    lines += ["", "defaults and single values: conf/config.yaml, or python -m harness --cfg job"]
    return "\n".join(lines)


def _show(options: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from harness.compose import compose_one

    print(OmegaConf.to_yaml(compose_one(options.overrides), resolve=options.resolve), end="")
    return 0


def _run(options: argparse.Namespace) -> int:
    gc.disable()  # nothing of what is imported is garbage: looking for it while importing takes a tenth of the start
    from rich.console import Console

    from harness.config import requests
    from harness.preparing import counting
    from harness.sweep import run

    gc.freeze()
    gc.enable()
    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    settings, found = requests(options.overrides, multirun=options.multirun, count=counting(say), say=say)
    return int(run(settings, found, console))


if __name__ == "__main__":
    sys.exit(main())
