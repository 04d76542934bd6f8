"""The house rules that a linter does not know."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.config import EngineConfig
from harness.engine import load
from harness.spec import EngineSpec

TREE = Path(__file__).resolve().parent.parent
CODE = sorted(path for folder in ("harness", "engines", "tests", "scripts") for path in (TREE / folder).rglob("*.py"))
SHELF = TREE / "engines" / "native"
ENGINES = sorted(  # modules, and packages where one file would be too long
    path
    for path in (TREE / "engines").iterdir()
    if path.name not in ("__init__.py", SHELF.name) and (path.suffix == ".py" or (path / "__init__.py").is_file())
)
CONFS = sorted((TREE / "conf" / "engine").glob("*.yaml"))
FAKES = sorted((TREE / "tests" / "fakes" / "conf" / "engine").glob("*.yaml"))


def name(path: Path) -> str:
    return path.relative_to(TREE).as_posix()


@pytest.mark.parametrize("path", CODE, ids=name)
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    most = 400 if "kernels" in path.parts else 300
    assert len(text.splitlines()) <= most, f"{name(path)} is longer than {most} lines: find its natural seam"
    assert not text.strip() or ast.get_docstring(ast.parse(text)) or "fakes" in path.parts or path.name == "__init__.py"


ENGINE_CODE = sorted((TREE / "engines").rglob("*.py"))


@pytest.mark.parametrize("path", ENGINE_CODE, ids=name)
def test_engines_see_the_contract_only(path: Path) -> None:
    allowed = ("harness.engine", "harness.spec", "harness.data", "harness.nf4", "harness.fp8", "harness.errors")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        for module in modules:
            assert module.partition(".")[0] != "harness" or module.startswith(allowed), f"{name(path)} imports {module}"


def test_broad_excepts_stay_at_the_worker_door() -> None:
    broad = [
        f"{name(path)}:{node.lineno}"
        for path in CODE
        if "tests" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    ]
    assert [place.partition(":")[0] for place in broad] == ["harness/worker.py"]


@pytest.mark.parametrize("path", ENGINES, ids=name)
def test_every_engine_is_registered_by_one_yaml_and_is_light_to_load(path: Path) -> None:
    registered = [conf for conf in CONFS if yaml.safe_load(conf.read_text())["module"] == f"engines.{path.stem}"]
    assert len(registered) == 1
    banned = "import sys\nfor name in ('torch', 'transformers', 'triton', 'peft', 'unsloth', 'axolotl'): sys.modules[name] = None\n"
    code = f"{banned}import engines.{path.stem}, harness.engine, harness.worker"
    done = subprocess.run([sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [*CONFS, *FAKES], ids=name)
def test_an_engine_yaml_has_all_keys_and_exactly_the_knobs_of_its_engine(path: Path) -> None:
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    required = {key for key, field in EngineConfig.model_fields.items() if field.is_required()}
    assert required <= set(raw) <= set(EngineConfig.model_fields)
    assert raw["name"] == path.stem
    engine = load(EngineSpec(name=raw["name"], module=raw["module"], processes=1, environment={}, knobs={}))
    assert list(raw["knobs"]) == list(engine.Knobs.model_fields)
    assert set(raw["search"]) <= {*raw["knobs"], "processes"}
    assert set(raw.get("planned_knobs", ())) <= raw["knobs"].keys() - raw["search"].keys()


def test_the_planner_imports_no_torch() -> None:
    code = "import sys, harness.sweep, harness.config\nassert not {'torch', 'transformers', 'peft', 'triton'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_document_names_an_absolute_home() -> None:
    texts = [*TREE.glob("*.md"), *(TREE / "docs").rglob("*.md"), *(TREE / "conf").rglob("*.yaml"), *CODE]
    guilty = [name(path) for path in texts if "/root" + "/" in path.read_text(encoding="utf-8")]
    assert guilty == []
