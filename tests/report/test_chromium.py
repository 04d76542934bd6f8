"""The page in a real browser: nothing sticks out on a phone or a desktop, charts are whole, records stay text, no script runs."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.report.page import html as page
from tests import records
from tests.records import engine, repeats, results
from tests.report.test_methods import work
from tests.report.test_report import HOSTILE, hostile
from tests.test_derived import gpu_record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (390, 1280)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (apt-get install chromium)")

# The report lies untouched in a frame of the wanted width; only this page around it has a script.
FRAME = """<!doctype html><meta charset="utf-8"><title>frame</title>
<iframe id="frame" style="width: WIDTHpx; height: 900px; border: 0" srcdoc="PAGE"></iframe><pre id="found"></pre>
<script>
// What is drawn lies inside its chart, and no two words of a chart lie on one another.
function faults(chart) {
  const all = chart.getBoundingClientRect(), found = all.width * all.height ? [] : ["nothing to see"];
  const box = one => Object.assign(one.getBoundingClientRect(), {said: one.textContent});
  for (const one of [...chart.querySelectorAll("path, text")].map(box))
    if (one.left < all.left - 1 || one.right > all.right + 1 || one.top < all.top - 1 || one.bottom > all.bottom + 1)
      found.push("outside: " + one.said);
  const words = [...chart.querySelectorAll("text")].map(box);
  words.forEach((a, i) => words.slice(i + 1).forEach(b => {
    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
      found.push(a.said + " on " + b.said);
  }));
  return found;
}
addEventListener("load", async () => {
  const view = document.getElementById("frame").contentWindow, doc = view.document, root = doc.documentElement;
  doc.querySelectorAll("details").forEach(one => one.open = true);
  const spills = one => one.matches("td, th") && one.scrollWidth > one.clientWidth + 1;
  const wide = [...doc.body.querySelectorAll("*")].filter(one => one.getBoundingClientRect().right > root.clientWidth + 1 || spills(one));
  document.getElementById("found").textContent = JSON.stringify({
    width: root.clientWidth, scroll: root.scrollWidth, wide: wide.map(one => one.tagName + " " + one.textContent.slice(0, 40)),
    charts: doc.querySelectorAll("svg").length, broken: [...doc.querySelectorAll("svg")].flatMap(faults),
    hacked: Boolean(view.hacked) || document.title !== "frame", text: doc.body.innerText, scripts: doc.scripts.length,
  });
});
</script>"""

LONG = "a_very_long_value_without_any_place_to_break_it_" * 4


def look(tmp_path: Path, text: str, width: int) -> dict[str, Any]:
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", html.escape(text)), encoding="utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            *QUIET,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,1000",
            "--virtual-time-budget=10000",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout.decode(), re.DOTALL)
    assert found is not None
    assert found[1], done.stderr.decode()
    answer: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert answer["width"] == width
    return answer


@pytest.fixture(scope="module")
def full() -> str:
    """A page with everything on it: a ranking, ties, a cheat, a GPU, failures, problems, hostile text and very long words."""
    evil = hostile()
    entries = [
        *evil.stored,
        *repeats(engine("fused", micro_batch=4), [200.0, 201.0, 199.0]),
        *repeats(engine("fused", micro_batch=8), [200.5, 199.0, 201.0]),
        *repeats(engine("cheat"), [900.0, 901.0, 902.0], losses=(0.0,) * 20),
        *repeats(engine("long", note=LONG), [50.0, 51.0, 49.0]),
        *repeats(engine("long", note="short"), [50.0]),
        records.stored(records.record(engine("long", note=LONG), repeat=9, status="crash", reason=LONG * 3)),
        *repeats(engine("fused", micro_batch=4, note=LONG), [150.0, 151.0, 149.0], work=work("qlora", seed=1)),
        *repeats(engine("hf", compute_dtype="bfloat16"), [8140.0], machine=records.GPU, memory_gib=58.4, scored=False),
        records.stored(gpu_record(), scored=False),
    ]
    return page(results(entries, [*evil.problems, LONG * 3]))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_shows_its_charts_and_runs_nothing(full: str, tmp_path: Path, width: int) -> None:
    found = look(tmp_path, full, width)
    assert found["scroll"] == width, found["wide"]
    assert found["wide"] == []
    assert found["charts"] == 12
    assert found["broken"] == []
    assert found["scripts"] == 0
    assert not found["hacked"]
    visible = " ".join(found["text"].split())
    assert "<script>window.hacked=1</script><img src=x onerror=alert(1)> | a`b*c*[d](javascript:e) $x$" in visible
    assert HOSTILE[-1] in visible
    assert "cheat was faster" in visible
    assert "Which method?" in visible


def test_the_look_sees_what_it_looks_for(tmp_path: Path) -> None:
    """A page that does all that is forbidden: were it to pass, the test above would prove nothing."""
    bad = "<!doctype html><body style='margin:0'><div style='width:2000px'>wide</div><script>window.hacked=1</script>"
    bad += "<svg width=200 height=60><text y=20>one</text><text y=20>two</text><text x=190 y=50>wide</text></svg><svg width=0></svg>"
    found = look(tmp_path, bad, 390)
    assert found["scroll"] == 2000
    assert found["wide"]
    assert found["broken"] == ["outside: wide", "one on two", "nothing to see"]
    assert found["hacked"]
    assert found["scripts"] == 1
