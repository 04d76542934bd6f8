"""Two probes identify a line, what ran out of memory is a bound, and measured times teach each other."""

from __future__ import annotations

import numpy as np
import pytest

from harness.tune.cost_model import CostModel, Timed
from harness.tune.gaussian import corrected, independent
from harness.tune.memory_model import MemoryModel, Peak
from tests.tune.spaces import GIB, SCALE, machine, space


def test_observations_correct_what_they_depend_on_and_bounds_only_what_is_below() -> None:
    prior = independent({"a": (0.0, 1.0), "b": (0.0, 1.0)})
    matrix = np.array([[1.0, 0.0]])
    told = corrected(prior, lambda p: (matrix @ p, matrix), np.array([2.0]), np.array([0.01]), np.array([False]))
    assert told.mean == pytest.approx([2.0, 0.0], abs=1e-3)
    assert np.sqrt(np.diag(told.covariance)) == pytest.approx([0.01, 1.0], rel=1e-3)
    above, below = (
        corrected(told, lambda p: (matrix @ p, matrix), np.array([bound]), np.array([0.001]), np.array([True])) for bound in (3.0, 1.0)
    )
    assert above.mean[0] == pytest.approx(3.0, abs=0.02)
    assert below.mean[0] == told.mean[0]


@pytest.mark.parametrize("seed", range(4))
def test_two_probes_of_one_variant_predict_the_others_of_its_line(seed: int) -> None:
    whole = space(["unsloth"])
    truth = machine(whole, seed, gib=1000)
    line = [
        one
        for one in whole.candidates
        if one.values["recompute"] == "none" and one.values["layout"] == "padded" and not one.values["cuda_graphs"]
    ]
    by_size = {one.values["micro_batch"]: one for one in line}
    probes = [Peak(by_size[size], truth.peak_bytes(by_size[size])) for size in (1, 4)]
    predicted = MemoryModel(whole, SCALE).predict(probes)
    for size in (2, 8, 16):
        assert predicted[by_size[size]].middle == pytest.approx(truth.peak_bytes(by_size[size]), rel=0.05)


def test_out_of_memory_raises_the_prediction_to_what_there_was_at_least() -> None:
    whole = space(["hf"])
    model = MemoryModel(whole, SCALE)
    one = max(whole.candidates, key=lambda one: (-model.predict([])[one].middle, one.title))  # the thriftiest of all
    assert model.predict([])[one].middle < 10 * GIB
    assert model.predict([Peak(one, 20 * GIB, at_least=True)])[one].middle > 15 * GIB


def test_a_measured_cell_tells_of_its_neighbours() -> None:
    whole = space(["hf"])
    truth = machine(whole, seed=3, gib=1000)
    known = [one for one in whole.candidates if one.values["micro_batch"] in (2, 16) and one.values["recompute"] == "none"]
    model = CostModel(whole)
    before, after = model.step([]), model.step([Timed(one, truth.step_seconds(one), 20.0) for one in known])
    others = [one for one in whole.candidates if one.values["micro_batch"] in (4, 8) and one.values["recompute"] == "none"]
    off = [abs(after[one].middle / truth.step_seconds(one) - 1) for one in others]
    assert np.mean(off) < 0.05
    assert all(after[one].deviation < before[one].deviation / 10 for one in others)


def test_start_up_is_the_engines_and_what_compiling_adds() -> None:
    whole = space(["hf"])
    compiled, plain = (next(one for one in whole.candidates if one.values["compile"] is value) for value in (True, False))
    startups = CostModel(whole).startup([Timed(plain, 1.0, 40.0), Timed(compiled, 1.0, 70.0)])
    assert startups[plain][0] == pytest.approx(40, abs=1)
    assert startups[compiled][0] == pytest.approx(70, abs=1)
