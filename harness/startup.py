"""How long this process has been importing: told from outside, by looking at the main thread, so that no engine has to say it."""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType

_LOOK_SECONDS = 0.02


class ImportClock:
    """A thread that looks fifty times a second whether the main thread stands inside an import, until :meth:`stop`.

    The time between two looks counts for what the later one finds: a library that is loaded without letting other threads run is seen
    when it has been loaded, inside the import that did it.
    """

    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._stopped = threading.Event()
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True, name="import-clock")
        self._thread.start()

    def stop(self) -> float:
        """Seconds spent importing so far; the thread ends. Calling it again says the same."""
        self._stopped.set()
        self._thread.join()
        return self._seconds

    def _watch(self) -> None:
        before = time.perf_counter()
        while not self._stopped.wait(_LOOK_SECONDS):
            now = time.perf_counter()
            if _importing(sys._current_frames().get(self._main)):
                self._seconds += now - before
            before = now


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
