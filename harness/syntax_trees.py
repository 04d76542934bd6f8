"""Threads that read source: an error of older Pythons that ends a run whose kernels are compiled by threads.

Before 3.11.8 the depth of the syntax tree under construction was counted for all threads together. A collection of garbage half-way
through one may run Python code, and with it another thread, which builds its own tree; then "SystemError: AST constructor recursion
depth mismatch" (https://github.com/python/cpython/issues/106905). Triton reads a kernel's source whenever it compiles it. From 3.12 on
nothing is collected there.
"""

import ast
import sys
import threading
from functools import wraps
from typing import Any

MENDED_IN = (3, 11, 8)


def one_tree_at_a_time() -> None:
    """From now on threads of this process wait for each other in ``ast.parse``, where this Python needs it. Twice does no harm."""
    if sys.version_info >= MENDED_IN or hasattr(ast.parse, "__wrapped__"):
        return
    parse = ast.parse
    turn = threading.RLock()  # what a collection runs may read source itself

    @wraps(parse)
    def alone(*given: Any, **named: Any) -> Any:
        with turn:
            return parse(*given, **named)

    ast.parse = alone
