"""What can run here: the demo, every engine on the asked workload, every model of ``conf/model``, the Hub."""

from __future__ import annotations

import shlex
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import yaml

from harness.compose import CONF
from harness.config import Request, requests
from harness.doctor.finding import Finding
from harness.engine import load, requires
from harness.errors import HarnessError
from harness.interpreter import interpreter, lack
from harness.plan import plan
from harness.weights import resolve_source

DEMO = "+sweep=demo"
HUB_SECONDS = 3
OWN = "???"  # Hydra's mark for a value that the user must give


def demo_finding(overrides: Sequence[str]) -> Finding:
    """Whether every engine of the demo can run it here."""
    try:
        _, found = requests([DEMO, *overrides], multirun=True)
    except HarnessError as error:
        return Finding("engines", "demo", "problem", "cannot be planned", str(error), blocks=True)
    impossible = {cell.request.cell.engine.name: str(cell.reason) for cell in plan(found, [], "all") if cell.action == "unsupported"}
    engines = ", ".join(dict.fromkeys(one.cell.engine.name for one in found))
    if impossible:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in impossible.items())
        return Finding("engines", "demo", "problem", reasons, "choose what this machine has, as the reason says", blocks=True)
    own = [override for override in overrides if not override.startswith(("runs=", "cache=", "hydra."))]
    command = shlex.join(["python", "-m", "harness", DEMO, *own]) if own else "make demo"
    return Finding("engines", "demo", "ok", f"{len(found)} cells of {engines} can run: {command}")


def engine_findings(overrides: Sequence[str], folders: Sequence[Path] = (CONF,)) -> list[Finding]:
    """Every engine of ``folders`` on the workload of ``overrides``: its interpreter runs, and it does not refuse."""
    names = sorted({path.stem for folder in folders for path in (folder / "engine").glob("*.yaml")})
    rest = [override for override in overrides if not override.startswith("engine=")]
    return [_engine(name, [f"engine={name}", *rest]) for name in names]


def _engine(name: str, overrides: Sequence[str]) -> Finding:
    try:
        _, (request,) = requests(overrides, multirun=False)
    except HarnessError as error:
        return Finding("engines", name, "problem", "cannot be configured", str(error))
    try:
        missing = lack(request.python, requires(load(request.cell.engine)))
        python, versions = interpreter(request.python, request.packages)
    except HarnessError as error:
        return Finding("engines", name, "problem", str(error), _recipe(name, request))
    if missing:
        return Finding("engines", name, "note", f"not set up: {missing.problem}", missing.remedy)
    (cell,) = plan([request], [], "all")
    workload = request.cell.workload
    what = f"{workload.model.name}, {workload.method.name}, {workload.data.name}"
    if cell.action == "unsupported":
        return Finding(
            "engines", name, "note", f"cannot run {what} here: {cell.reason}", "ask for another workload: python -m harness.doctor model=…"
        )
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    return Finding("engines", name, "ok", f"can run {what}; Python {python}, {packages}")


def _recipe(name: str, request: Request) -> str:
    packages = " ".join(request.packages)
    return (
        f"build the environment that conf/engine/{name}.yaml names: python3 -m venv DIR && DIR/bin/pip install {packages}, "
        "then engine.python=DIR/bin/python"
    )


def model_findings(folder: Path = CONF / "model") -> list[Finding]:
    """Which models have weights and tokenizer at hand, and for the others, by what they lack, what to do."""
    able: list[str] = []
    lacking: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.yaml")):
        model = yaml.safe_load(path.read_text(encoding="utf-8"))
        problem = _lacking(model["weights"], model["tokenizer"])
        (lacking.setdefault(problem, []) if problem else able).append(path.stem)
    findings = [Finding("models", "not at hand", "problem", ", ".join(names), problem) for problem, names in lacking.items()]
    return [Finding("models", "at hand", "ok", ", ".join(able)), *findings] if able else findings


def _lacking(weights: str, tokenizer: str) -> str:
    """What to do so that both can be had, empty when they can; what the user has yet to name is not looked for."""
    problems = []
    for source in dict.fromkeys((weights, tokenizer)) if OWN not in (weights, tokenizer) else ():
        try:
            resolve_source(source)
        except HarnessError as error:
            problems.append(str(error))
    return "; ".join(problems)


def hub_finding() -> Finding:
    """Whether ``hub:`` sources can be fetched. Without it, what is in the local cache still works."""
    from huggingface_hub import constants  # takes a while to import, and --cache needs none of it

    if constants.HF_HUB_OFFLINE:
        return Finding(
            "models", "hub", "note", "switched off by HF_HUB_OFFLINE", "unset it to fetch hub: sources; dir: and package: need no network"
        )
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer, if not a friendly one
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding(
            "models", "hub", "note", f"{constants.ENDPOINT} does not answer ({reason})", "use dir: or package: sources, or connect"
        )
    return Finding("models", "hub", "ok", f"{constants.ENDPOINT} answers")
