"""``python -m harness.check``: is this tree slower, hungrier or different from another?"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.check.command import Asked, run
from harness.check.facts import GATES
from harness.check.judge import LEAST_RUNS
from harness.check.outcome import Exit
from harness.errors import HarnessError

USAGE = "python -m harness.check (--base REV|PATH | --records DIR [--candidate DIR]) [options] [OVERRIDE …]"
EXAMPLES = """
  python -m harness.check --base main                          this tree against a revision, side by side on this machine
  python -m harness.check --base ../other --gates              counts only: bytes, operations, launches; no times, no statistics
  python -m harness.check --base HEAD~1 engine=fused model=llama3_1b data=dense
  python -m harness.check --records results                    this tree, measured now, against stored records of this machine
  python -m harness.check --records DIR --candidate DIR        two folders of records; measures nothing
  python -m harness.check --self-test                          error rates of the rule, simulated

Exit code 0: fine, 1: internal, 2: the command is wrong, 3: a regression, 4: an open question (with --strict), 5: cells failed,
6: nothing was measured, 7: not the same work, 130: stopped. docs/check.md has the rule."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print the outcome, write what was asked for. Returns the exit code; see ``harness.check.outcome.Exit``."""
    options = _parser().parse_intermixed_args(arguments)
    if options.self_test:
        from harness.check.simulate import self_test

        said, holds = self_test()
        print(said)
        return Exit.FINE if holds else Exit.INTERNAL
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(run(_asked(options)))
    except HarnessError as error:
        print(f"error: {error}" if "\n" not in str(error) else f"error:\n{error}", file=sys.stderr)
        return Exit.USAGE
    except KeyboardInterrupt:
        print("\nstopped; nothing was judged", file=sys.stderr)
        return Exit.INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    """A polite kill cleans up as Ctrl-C does: the base's checkout must go."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.check", usage=USAGE, description=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--base", metavar="REV|PATH", help="a revision of this repository, or the folder of another tree")
    what.add_argument("--records", type=Path, metavar="DIR", help="stored records of the base")
    what.add_argument("--self-test", action="store_true", help="simulate the rule and print its error rates")
    parser.add_argument("--candidate", type=Path, metavar="DIR", help="with --records: stored records of the candidate; measure nothing")
    parser.add_argument("--pairs", type=_pairs, metavar="N", help="runs of each tree and cell (default: what the simulation asks for)")
    parser.add_argument("--gates", action="store_true", help="only count, do not time")
    parser.add_argument("--strict", action="store_true", help="exit code 4 when a question stays open")
    parser.add_argument("--allow", default="", metavar="GATES", help=f"counts that may rise, with commas: {', '.join(GATES)}")
    parser.add_argument("--environment", choices=["auto", "share", "own"], default="auto", help="the base's: own when dependencies differ")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder of your own options, as of python -m harness")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the outcome as Markdown")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write it as JUnit XML")
    parser.add_argument("--benchmark-json", type=Path, metavar="FILE", help="write it for github-action-benchmark")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="the work, as of python -m harness -m (default: conf/check.yaml)")
    return parser


def _pairs(value: str) -> int:
    if not value.isdigit() or int(value) < LEAST_RUNS:
        raise argparse.ArgumentTypeError(f"got '{value}', expected a number of pairs, at least {LEAST_RUNS}")
    return int(value)


def _asked(options: argparse.Namespace) -> Asked:
    return Asked(
        base=options.base,
        records=options.records,
        candidate=options.candidate,
        overrides=tuple(options.overrides),
        pairs=options.pairs,
        gates=options.gates,
        strict=options.strict,
        allow=tuple(filter(None, (name.strip() for name in options.allow.split(",")))),
        environment=options.environment,
        config_dir=options.config_dir.resolve() if options.config_dir else None,
        markdown=options.markdown,
        junit=options.junit,
        benchmark_json=options.benchmark_json,
    )


if __name__ == "__main__":
    sys.exit(main())
