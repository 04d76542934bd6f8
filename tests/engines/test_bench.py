"""The batches that the bench of whole steps is given."""

from __future__ import annotations

import numpy as np
import pytest

from engines.native.bench import lengths_of, main, model_shape, random_row
from harness.data.tokens import IGNORE


def test_documents_are_alike_or_drawn_between_two_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    assert lengths_of("4x2048") == (2048,) * 4
    drawn = lengths_of("64x80-354")
    assert (len(drawn), min(drawn) >= 80, max(drawn) <= 354, len(set(drawn)) > 32) == (64, True, True, True)
    assert drawn == lengths_of("64x80-354")
    with pytest.raises(SystemExit):
        main(["--batch", "4by2048"])
    assert "--batch 4by2048: expected documents x tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="4by2048: expected documents x tokens"):
        lengths_of("4by2048")


@pytest.mark.parametrize(("supervised", "masked"), [(1.0, 1), (0.6, 4), (0.001, 10)])
def test_the_end_of_each_document_is_supervised_but_never_its_first_token(supervised: float, masked: int) -> None:
    row = random_row(model_shape("llama3_1b", 1), (10, 10), supervised)
    expected = np.tile(np.arange(10) < masked, 2)
    assert ((row.labels[0] == IGNORE) == expected).all()
    assert (row.labels[0, ~expected] == row.input_ids[0, ~expected]).all()
