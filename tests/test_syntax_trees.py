"""Two threads in ``ast.parse`` at once: what older Pythons raise, and that a worker's process does not."""

import subprocess
import sys

import pytest

from harness.syntax_trees import MENDED_IN

# A collection half-way through the first tree lets another thread build one from another depth.
TWO_TREES = """
import ast, gc, sys, threading
from harness.syntax_trees import one_tree_at_a_time

def deep(levels):
    return deep(levels - 1) if levels else ast.parse("x = 1")

def let_another(phase, info):
    global collections
    collections += 1
    if collections == 40:
        other.start()
        other.join(0.5)

source = "\\n".join(f"y{i} = ((x + {i}) * 2 + 3) * (4 + (5 + (6 + x)))" for i in range(300))
if sys.argv[1] == "guarded":
    one_tree_at_a_time()
    one_tree_at_a_time()
trees, collections = [], 0
other = threading.Thread(target=lambda: trees.append(deep(20)))
gc.set_threshold(5)
gc.callbacks.append(let_another)
trees.append(ast.parse(source))
gc.callbacks.clear()
other.join(10)
assert len(trees) == 2 and sum(len(tree.body) for tree in trees) == 301, trees
"""
pytestmark = pytest.mark.skipif(sys.version_info >= MENDED_IN, reason="this Python counts each thread's depth by itself")


def built(how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", TWO_TREES, how], capture_output=True, text=True, check=False, timeout=60)


def test_threads_of_a_guarded_process_build_trees_one_after_the_other() -> None:
    done = built("guarded")
    assert done.returncode == 0, done.stderr


def test_the_guard_is_needed_here() -> None:
    assert "SystemError: AST constructor recursion depth mismatch" in built("bare").stderr
