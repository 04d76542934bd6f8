"""data.path: files, folders, globs and lists of them become names, weights and content hashes; the places travel beside the cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import Request, requests
from harness.data.files import find_files
from harness.errors import ConfigError, DataError
from harness.spec import DataFile
from harness.weights import fingerprint


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.jsonl", "a.jsonl", "notes.txt", "deep/c.jsonl", "a[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(cache: Path, *overrides: str) -> Request:
    _, (request,) = requests(["data=jsonl", "model=tiny_llama", f"cache={cache}", *overrides], multirun=False)
    return request


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("b.jsonl", ["b.jsonl"]),
        (".", ["a.jsonl", "a[1].jsonl", "b.jsonl"]),
        ("*.txt", ["notes.txt"]),
        ("[ab].jsonl", ["a.jsonl", "b.jsonl"]),
        ("a[1].jsonl", ["a[1].jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "a[1].jsonl", "b.jsonl", "c.jsonl"]),
    ],
)
def test_a_path_names_files_in_order(here: Path, path: str, names: list[str]) -> None:
    for given in (path, str(here / path)):
        found = find_files(given)
        assert [file.name for file in found] == names
        assert all(file.is_absolute() for file in found)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("absent.jsonl", "there is no file 'absent.jsonl'; give the path of a JSONL file, a folder of them, or a glob"),
        ("none", "the folder 'none' holds no *.jsonl"),
        ("x*.jsonl", "nothing matches 'x*.jsonl'"),
        ("a**.jsonl", "a**.jsonl"),
    ],
)
def test_a_path_that_names_nothing_is_an_error(here: Path, path: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        find_files(path)
    assert says in str(caught.value)


def test_a_list_becomes_names_weights_and_hashes_and_no_path(here: Path, cache: Path) -> None:
    asked = ask(cache, "data.path=[deep/c.jsonl, {path: '[ab].jsonl', weight: 2}]")
    data = asked.cell.workload.data
    expected = [("c.jsonl", 1.0, "deep/c.jsonl"), ("a.jsonl", 2.0, "a.jsonl"), ("b.jsonl", 2.0, "b.jsonl")]
    assert data.path == tuple(DataFile(path=n, weight=w, sha256=fingerprint(here / p, cache)) for n, w, p in expected)
    assert data.sha256 is None
    assert asked.sources.data == tuple(str(here / p) for _, _, p in expected)
    assert str(here) not in asked.cell.model_dump_json()


def test_what_decides_is_content_weight_and_order_however_it_was_named(here: Path, cache: Path) -> None:
    def key(path: str) -> str:
        return ask(cache, f"data.path={path}").cell.key

    assert key("a.jsonl") == key(f"{here}/a.jsonl") == key("[a.jsonl]") == key("'[a].jsonl'") == key("[{path: a.jsonl, weight: 1.0}]")
    ways = ["a.jsonl", "[a.jsonl, b.jsonl]", "[b.jsonl, a.jsonl]", "[{path: a.jsonl, weight: 2}]", "[a.jsonl, {path: b.jsonl, weight: 2}]"]
    before = [key(way) for way in ways]
    assert len(set(before)) == len(ways)
    (here / "b.jsonl").write_text('{"text": "changed"}\n')
    assert [key(way) == old for way, old in zip(ways, before, strict=True)] == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("[a.jsonl, '*.jsonl']", "data.path: 'a.jsonl' is named twice; say once how often it counts, with a weight"),
        ("[]", "source=jsonl needs data.path"),
        ("[absent.jsonl]", "there is no file 'absent.jsonl'"),
        ("[{path: a.jsonl, weight: 0}]", "data.path.0.weight: got 0; input should be greater than 0"),
        ("[{path: a.jsonl, wait: 1}]", "data.path.0.wait: unknown key"),
        ("3", "data.path: got 3; expected a file, a folder, a glob, or a list of these with weights"),
        ("[{path: a.jsonl, sha256: abc}]", "data.path: 'a.jsonl' is not the file that was asked for: its sha-256 is"),
    ],
)
def test_mistakes_are_named(here: Path, cache: Path, path: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(cache, f"data.path={path}")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
