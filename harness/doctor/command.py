"""The doctor's command line: findings by default, ``--cache`` and ``--purge`` for what prepare keeps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from harness.compose import CONF, compose_one, plain, searchpath
from harness.doctor.caches import Entry, entries, purge, select, storage_findings
from harness.doctor.finding import Finding
from harness.doctor.hardware import gpu_findings, machine_findings
from harness.doctor.runnable import demo_finding, engine_findings, hub_finding, model_findings
from harness.doctor.show import entries_json, findings_json, print_entries, print_findings
from harness.doctor.software import software_findings
from harness.errors import HarnessError

OK, DEMO_CANNOT_RUN, USAGE = 0, 1, 2


def run(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when the demo can run here (or the cache was shown or purged), 1 when it cannot, 2 when the command is wrong."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console(soft_wrap=False)
    try:
        if options.config_dir:
            options.overrides.insert(0, searchpath(options.config_dir))
        runs, cache = _folders(options.overrides)
        if options.cache or options.purge:
            return _cache(options, runs, cache, console)
        findings = examine(options.overrides, runs, cache, [CONF, *filter(None, [options.config_dir])])
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    if options.json:
        print(findings_json(findings))
    else:
        print_findings(findings, console)
    return DEMO_CANNOT_RUN if any(finding.blocks for finding in findings) else OK


def examine(overrides: Sequence[str], runs: Path, cache: Path, folders: Sequence[Path] = (CONF,)) -> list[Finding]:
    """Everything, in the order in which it depends on each other."""
    return [
        *machine_findings(),
        *gpu_findings(),
        *software_findings(),
        *storage_findings(runs, cache),
        *model_findings(),
        hub_finding(),
        *engine_findings(overrides, folders),
        demo_finding(overrides),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.doctor", description="What this machine can run, and what to do about the rest."
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of python -m harness: another workload, runs=DIR, cache=DIR")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder of your own options, as of python -m harness")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--cache", action="store_true", help="only list what prepare keeps: base weights, initial adapters, tokens")
    parser.add_argument(
        "--purge",
        nargs="?",
        const="all",
        metavar="WHAT",
        help="list, then delete: all (default), base, adapter, tokens, unfinished, or a name",
    )
    parser.add_argument("--yes", action="store_true", help="with --purge: do not ask")
    return parser


def _folders(overrides: Sequence[str]) -> tuple[Path, Path]:
    config = plain(compose_one([one for one in overrides if one.startswith(("runs=", "cache=", "hydra."))]))
    return Path(config["runs"]).expanduser().resolve(), Path(config["cache"]).expanduser().resolve()


def _cache(options: argparse.Namespace, runs: Path, cache: Path, console: Console) -> int:
    held = entries(cache, runs)
    chosen = select(held, options.purge) if options.purge else held
    if options.json:
        print(entries_json(chosen))
    else:
        print_entries(chosen, console)
    if not options.purge or not chosen:
        return OK
    if not options.yes and not _agreed(chosen, cache):
        print("nothing was deleted: answer y, or add --yes", file=sys.stderr)
        return USAGE
    purge(chosen, cache, runs)
    print(f"deleted {len(chosen)} entries of {cache}; what is needed is made again", file=sys.stderr)
    return OK


def _agreed(chosen: Sequence[Entry], cache: Path) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(f"delete these {len(chosen)} entries of {cache}? [y/N] ").strip().lower() == "y"
