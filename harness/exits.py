"""How a command ends that a person has stopped, or whose reader has gone: with an exit code of its own, never with a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130  # as a shell says of SIGINT
READER_GONE = 141  # and of SIGPIPE


def leave_with(main: Callable[[], int]) -> NoReturn:
    """Exit with what ``main`` returns, 130 where Ctrl-C stopped it, 141 where nobody reads any longer what it prints (``… | head``)."""
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes what is left when it ends
        code = READER_GONE
    sys.exit(code)
