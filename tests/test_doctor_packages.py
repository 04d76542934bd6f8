"""What a package that is not there is said to be for."""

from __future__ import annotations

import pytest

from harness.doctor import software


def test_an_absent_package_is_said_to_be_for_what_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "_version", lambda _: None)
    remedies = {finding.name: finding.remedy for finding in software.package_findings()}
    assert remedies["bitsandbytes"] == "only for method=qlora of hf in bfloat16, and its optimizer=adamw_8bit: pip install bitsandbytes"
