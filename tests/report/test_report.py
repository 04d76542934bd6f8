"""What the report says: sentences, table, rows, Markdown and HTML, with records that hold hostile text."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from harness import report
from harness.errors import StoreError
from harness.record import Record
from harness.report.judged import judged
from harness.report.page import html as page
from harness.report.sentence import sentences
from harness.store import Results
from tests import records
from tests.records import engine, repeats, results

HOSTILE = "<script>window.hacked=1</script><img src=x onerror=alert(1)> | a`b*c*[d](javascript:e) $x$ \x1b[31mred\nnew line ${y} 字"
FASTER = [200.0, 201.0, 199.0]
SLOWER = [100.0, 101.0, 99.0]
NOISE = [110.0, 95.0, 102.0]
SAME = "same: fp32 (6 of 9 tests)"  # synthetic runs have no first step, and nobody compared their updates


def said(of: Results) -> str:
    (group,) = judged(of)
    return sentences(group).text


def hostile() -> Results:
    spec = engine("evil", note=HOSTILE)
    good = repeats(engine("hf"), SLOWER)
    failed = records.stored(records.record(spec, status="crash", reason=HOSTILE))
    ran = records.record(engine("evil", note=f"{HOSTILE}, and it ran"), rate=90.0)
    provenance = ran.provenance.model_copy(update={"packages": {HOSTILE: HOSTILE}, "commit": HOSTILE, "host": HOSTILE})
    ran = ran.model_copy(update={"provenance": provenance, "notes": (HOSTILE,)})
    stored = dataclasses.replace(records.stored(ran), path=HOSTILE)
    return results([*good, failed, stored], [f"runs/{HOSTILE}.json: {HOSTILE}"])


def test_a_clear_winner_is_named_with_its_lead_the_interval_and_parity() -> None:
    text = said(results([*repeats(engine("hf"), SLOWER), *repeats(engine("fused"), FASTER)]))
    assert text.startswith("fused is the fastest: 200.0 tokens/s, 2.00 times the rate of hf. 98\u00a0% confidence interval: ")
    assert "from 3 paired repeats. Parity of fused: same: fp32 (6 of 9 tests) (" in text


def test_where_settings_of_one_engine_tie_the_engine_is_the_answer() -> None:
    ours = [*repeats(engine("fused", micro_batch=1), FASTER), *repeats(engine("fused", micro_batch=2), FASTER)]
    text = said(results([*repeats(engine("hf"), SLOWER), *ours]))
    assert text.startswith("fused is the fastest engine: fused micro_batch=1 measured 200.0 tokens/s, 2.00 times the rate of hf. 98")
    assert "from 3 paired repeats. Which of its settings is the best is open. fused micro_batch=1 measured 1.000 times" in text
    assert said(results([*repeats(engine("hf"), NOISE), *ours[:3], *repeats(engine("other"), FASTER)])).startswith("No clear winner: ")


def test_a_tie_is_a_tie() -> None:
    text = said(results([*repeats(engine("hf"), SLOWER), *repeats(engine("fused"), NOISE)]))
    assert text.startswith(
        "No clear winner: fused and hf share the first place. fused measured 1.022 times the rate of hf, too close to call."
    )
    same = said(results([*repeats(engine("hf"), SLOWER), *repeats(engine("fused"), [100.01, 101.0, 99.01])]))
    assert "the same within ±2\u00a0%" in same


def test_one_repeat_is_not_enough() -> None:
    once = said(results([*repeats(engine("hf"), [100]), *repeats(engine("fused"), [300])]))
    assert once.startswith("No verdict yet: fused measured 300.0 tokens/s, 3.00 times the rate of hf, once. One paired repeat says nothing")
    assert "so fused and hf share the first place: run at least 3" in once


def test_other_hosts_are_not_paired() -> None:
    text = said(results([*repeats(engine("hf"), SLOWER), *repeats(engine("fused"), FASTER, host="other")]))
    assert "no repeat measured on the same host" in text


def test_a_lone_variant_and_no_variant() -> None:
    assert said(results(repeats(engine("hf"), SLOWER))).startswith(
        "hf is the only variant that ran: 100.0 tokens/s. There is nothing to compare"
    )
    failed = records.stored(records.record(status="oom", reason="too big"))
    assert said(results([failed])) == "Nothing was measured: the only variant did not run to the end."
    whole = records.record()
    assert whole.measurement is not None
    resumed = whole.model_copy(update={"measurement": whole.measurement.model_copy(update={"resumed_at": (5,)})})
    assert said(results([records.stored(resumed)])) == "No rate was measured: what ran to its end had gone on from a checkpoint."


def test_a_fast_cheat_does_not_win_and_the_report_says_why() -> None:
    cheat = repeats(engine("cheat"), [900, 901, 902], losses=(*records.losses()[:9], *(0.0,) * 11))
    text = said(results([*repeats(engine("hf"), SLOWER), *cheat]))
    assert text.startswith("hf is the only variant that ran and can win: 100.0 tokens/s.")
    assert "cheat was faster (901.0 tokens/s) but cannot win: different: largest loss deviation (step 10)" in text
    alone = said(results([*repeats(engine("hf"), SLOWER, status="oom"), *repeats(engine("cheat"), [900], losses=(math.nan,) * 20)]))
    assert alone.startswith(
        "No winner: no variant that ran trained the same as the reference. cheat (900.0 tokens/s): different: loss is nan"
    )


def test_unproven_parity_is_said_with_the_light_check() -> None:
    text = said(results([*repeats(engine("hf"), SLOWER, scored=False), *repeats(engine("fused"), FASTER, scored=False)]))
    assert "That fused trains the same is not proven: no held-out score of this run" in text
    assert "The light check passed: same stream; loss of step" in text


def test_the_anchor_is_never_a_superseded_record() -> None:
    wrong = tuple(x + 1 for x in records.losses())
    broken = records.stored(records.record(engine("hf"), started="2026-01-01T00:00:00+00:00", losses=wrong))
    gone = records.stored(records.record(engine("hf"), repeat=0, status="crash", started="2026-12-01T00:00:00+00:00"))
    hf, fused = repeats(engine("hf"), SLOWER), repeats(engine("fused"), FASTER)
    found = report.rows(results([broken, *hf, *fused]))
    assert [(row["label"], row["parity"], row["superseded"]) for row in found] == [("fused", SAME, 0), ("hf", "reference: fp32", 1)]
    found = report.rows(results([broken, *hf[1:], gone, *fused]))
    assert [(row["label"], row["parity"], row["superseded"]) for row in found] == [("fused", SAME, 0), ("hf", "reference: fp32", 1)]


def test_rows_have_every_column_and_are_strict_json() -> None:
    found = report.rows(results([*repeats(engine("hf"), SLOWER), *repeats(engine("fused"), FASTER, memory_gib=2)]))
    json.dumps(found, allow_nan=False)
    fused, hf = found
    expected = {
        "machine": "test-cpu-x2-8gib", "model": "smollm2_135m", "method": "lora", "data": "python_docs", "sequence_length": 512,
        "samples_per_step": 16, "engine": "fused", "knobs": {"compute_dtype": "float32", "micro_batch": 4}, "processes": 1, "status": "ok",
        "reason": None, "peak_allocated_gib": None, "peak_rss_gib": 2.0, "parity": SAME, "rank": 1, "label": "fused",
        "held_out_loss": records.TRAINED_LOSS, "can_win": True,
    }  # fmt: skip
    assert {key: fused[key] for key in expected} == expected
    assert fused["repeats"] == pytest.approx(FASTER)
    assert fused["tokens_per_second"] == pytest.approx(200.0)
    assert len(fused["records"]) == 3
    assert not any(Path(path).is_absolute() for path in fused["records"])
    assert hf["rank"] == 2


def test_rows_hold_null_where_json_has_no_number() -> None:
    entries = [*repeats(engine("hf"), SLOWER)]
    weights = dataclasses.replace(entries[0], score=records.score(entries[0].record, held_out_loss=math.nan))
    (row,) = report.rows(results([weights]))
    assert row["held_out_loss"] is None
    json.dumps(row, allow_nan=False)


def test_rows_of_failures_and_of_a_gpu() -> None:
    oom = records.stored(records.record(engine("fused"), machine=records.GPU, status="oom", reason="out of memory"))
    ok, failed = report.rows(results([*repeats(engine("hf"), SLOWER, machine=records.GPU, memory_gib=40), oom]))
    assert (ok["peak_allocated_gib"], ok["peak_rss_gib"]) == (40.0, 1.0)
    assert (failed["status"], failed["rank"], failed["tokens_per_second"], failed["repeats"]) == ("oom", None, None, [])
    assert failed["reason"] == "repeat 0: oom: out of memory"


def test_the_table_shows_ties_failures_and_problems() -> None:
    failed = records.stored(records.record(engine("big"), status="oom", reason="too\nbig"))
    text = report.table(results([*repeats(engine("hf"), SLOWER), *repeats(engine("fused"), NOISE), failed], ["runs/x.json: broken"]))
    assert re.search(r"^  1=  +fused +102\.0 +3 +1\.50 +same: fp32 \(6 of 9 tests\)$", text, re.MULTILINE)
    assert re.search(r"^  1=  +hf +100\.0 +3 +1\.50 +reference: fp32$", text, re.MULTILINE)
    assert "  big: repeat 0: oom: too big" in text
    assert text.endswith("Files that could not be read:\n  runs/x.json: broken")


def test_no_escape_sequence_and_no_line_break_of_a_record_reaches_the_terminal() -> None:
    text = report.table(hostile())
    assert "\x1b" not in text
    assert "\nnew line" not in text
    assert "<script>window.hacked=1</script>" in text


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    return tags


def test_hostile_text_stays_text_in_html() -> None:
    tags = parsed(page(hostile()))
    names = {tag for tag, _ in tags.tags}
    assert not names & {"script", "iframe", "object", "link", "base", "form", "img", "foreignobject"}
    assert not any(key.startswith("on") for _, attributes in tags.tags for key in attributes)
    assert "<script>window.hacked=1</script>" in "".join(tags.text)


def test_the_page_fetches_nothing() -> None:
    text = page(hostile())
    linked = [
        value for _, attributes in parsed(text).tags for key, value in attributes.items() if key in ("src", "href", "srcset", "action")
    ]
    assert all(value.startswith("#") for value in linked)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_markdown_shows_hostile_text_as_text() -> None:
    text = report.markdown(hostile())
    outside = re.sub(r"^(`{3,})sh$.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside
    assert "<img" not in outside
    assert not re.search(r"(?<!\\)`", outside)
    assert not re.search(r"(?<!\\)\]\(", outside)
    tables = re.findall(r"(?:^\|.*\n)+", outside, flags=re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        bars = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(bars) >= 4
        assert len(set(bars)) == 1


def test_a_fence_is_longer_than_any_in_the_command() -> None:
    spec = engine("evil", note="a\n```\nb````c")
    text = report.markdown(results(repeats(spec, [100.0])))
    assert "`````sh\n" in text


def test_the_markdown_says_what_the_page_says() -> None:
    text = report.markdown(results([*repeats(engine("hf"), SLOWER), *repeats(engine("fused"), FASTER)], ["runs/x.json: broken"]))
    assert "**fused is the fastest: 200.0 tokens/s, 2.00 times the rate of hf.**" in text
    assert "| 1 | fused | 200.0 | 200.0, 201.0, 199.0 | 1 |" in text
    assert "python -m harness -m engine=" in text
    assert "- runs/x.json: broken" in text


def test_write_leaves_two_files_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "runs"
    path = report.write(hostile(), out)
    assert path == out / "report.html"
    assert sorted(file.name for file in out.iterdir()) == ["report.html", "report.md"]
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_folder_that_cannot_be_written_is_an_error_for_people(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot write the report .*--out"):
        report.write(hostile(), tmp_path / "file" / "runs")


def test_provenance_is_shown_for_every_variant() -> None:
    dirty: Record = records.record(engine("hf"))
    provenance = dirty.provenance.model_copy(update={"dirty": True, "driver": "580.1"})
    tags = parsed(page(results([records.stored(dirty.model_copy(update={"provenance": provenance}))])))
    text = " ".join("".join(tags.text).split())
    for fact in ("0123456789abcdef with local changes", "torch 2.13.0, transformers 5.17.0", "580.1", "3.11.9", "host-1"):
        assert fact in text
