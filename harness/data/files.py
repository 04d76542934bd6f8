"""Which files ``data.path`` names here: a file as it is, the *.jsonl of a folder, or what a glob matches, in the order of their names."""

from __future__ import annotations

import glob
from pathlib import Path

from harness.errors import DataError


def find_files(path: str) -> list[Path]:
    """The files that ``path`` names, absolute. Raises DataError when there is none.

    A file that exists is taken by its name, even when it holds the signs of a glob; ``**`` matches folders at any depth.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = sorted(entry for entry in place.glob("*.jsonl") if entry.is_file())
        if not found:
            raise DataError(f"data.path: the folder '{path}' holds no *.jsonl; name its files with a glob, for example '{path}/*.json'")
    elif place.is_file() or not glob.has_magic(path):
        found = [place] if place.is_file() else []
        if not found:
            raise DataError(f"data.path: there is no file '{path}'; give the path of a JSONL file, a folder of them, or a glob")
    else:
        try:
            found = sorted(entry for entry in Path(place.anchor).glob(str(place.relative_to(place.anchor))) if entry.is_file())
        except ValueError as error:
            raise DataError(f"data.path: '{path}' is no glob ({error})") from error
        if not found:
            raise DataError(f"data.path: nothing matches '{path}'; check the glob, and the folder you are in")
    return [entry.resolve() for entry in found]
