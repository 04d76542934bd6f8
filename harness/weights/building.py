"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from harness.errors import StoreError


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A new folder that becomes ``folder`` at once when the body succeeds; whoever comes second keeps the first one's."""
    partial = folder.with_name(f".{folder.name}.{platform.node()}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        partial.mkdir()
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot write {folder}: {error}; free space there or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """What a killed process of this host left while it made the same folder."""
    for left in folder.parent.glob(f".{folder.name}.{platform.node()}.*.partial"):
        process = int(left.name.split(".")[-2])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except PermissionError:
            continue
