"""How kernels cut their work: by size from the GPU's table; every candidate is right and compiles, the fastest wins by more than noise."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from engines.native import tiles
from engines.native.bench_kernels import tune
from engines.native.bench_kernels.__main__ import FAILURES, main
from engines.native.bench_kernels.setting import Call, Setting
from engines.native.kernels import cross_entropy, nf4, outer, swiglu_gradients
from engines.native.kernels.launching import Tile
from engines.native.nf4 import placed
from engines.native.tiles import Entry, Table, best_of, fastest
from harness.errors import ConfigError
from harness.nf4 import decode, quantise
from tests.engines.oracle import DEVICE, INTERPRETED, random
from tests.engines.test_ahead import python
from tests.engines.test_bench_kernels import SHAPE

DEFAULT = Tile(tokens=128, warps=4, stages=3)
SMALL, LARGE = Tile(tokens=64, warps=4, stages=2), Tile(tokens=256, warps=4, stages=2)


def entry(size: int, tile: Tile) -> Entry:
    return Entry(size=size, cut=asdict(tile), milliseconds=1.0, default_milliseconds=1.1, source="a test")


TABLE = Table(device="Some GPU", provenance="a test", kernels={"outer": (entry(1000, SMALL), entry(3000, LARGE))})


@pytest.mark.parametrize(
    ("size", "cut"), [(1000, SMALL), (500, SMALL), (499, DEFAULT), (1700, SMALL), (1800, LARGE), (6000, LARGE), (6001, DEFAULT)]
)
def test_the_nearest_size_speaks_up_to_a_factor_of_two(size: int, cut: Tile) -> None:
    assert best_of(TABLE, "outer", size, DEFAULT) == cut
    assert best_of(TABLE, "outer_normed", size, DEFAULT) == DEFAULT
    assert best_of(None, "outer", size, DEFAULT) == DEFAULT


def test_a_cut_must_beat_the_default_by_more_than_noise() -> None:
    assert fastest({DEFAULT: 1.0, SMALL: 0.985, LARGE: 1.2}, DEFAULT) == DEFAULT
    assert fastest({DEFAULT: 1.0, SMALL: 0.97, LARGE: 0.96}, DEFAULT) == LARGE


def test_a_table_is_found_by_the_name_of_the_gpu_and_grows(tmp_path: Path) -> None:
    assert tiles.table("Some GPU", tmp_path) is None
    assert tiles.said("Some GPU", tmp_path) == "defaults: no table for Some GPU"
    assert tiles.said(None) == "none: on a CPU nothing is cut"
    path = tiles.write(TABLE, tmp_path)
    assert path.name == "some-gpu.json"
    assert tiles.table("Some GPU", tmp_path) == TABLE
    more = Table(device="Some GPU", provenance="later", kernels={"outer": (entry(1000, LARGE),), "decode_nf4": ()})
    tiles.write(more, tmp_path)
    found = tiles.table("Some GPU", tmp_path)
    assert found is not None
    assert found.provenance == "later"
    assert found.kernels["outer"] == (entry(1000, LARGE), entry(3000, LARGE))
    assert tiles.said("Some GPU", tmp_path) == "some-gpu.json: decode_nf4, outer"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a table of tiles"),
        (json.dumps({"device": "Some GPU"}), "provenance"),
        (json.dumps({**TABLE.model_dump(mode="json"), "device": "Another"}), "is of 'Another', not of 'Some GPU'"),
    ],
)
def test_what_is_no_table_of_this_gpu_is_refused(tmp_path: Path, text: str, says: str) -> None:
    tiles.path_of("Some GPU", tmp_path).write_text(text)
    with pytest.raises(ConfigError, match=says):
        tiles.table("Some GPU", tmp_path)
    other = entry(8, SMALL).model_copy(update={"cut": {"tokens": 1, "depth": 2}})
    unknown = TABLE.model_copy(update={"kernels": {"outer": (other,)}})
    with pytest.raises(ConfigError, match="outer has no depth"):
        best_of(unknown, "outer", 8, DEFAULT)


def test_the_tables_that_are_shipped_are_of_candidates_and_name_their_sources() -> None:
    found = {path.name: tiles.table(json.loads(path.read_text())["device"]) for path in tiles.FOLDER.glob("*.json")}
    assert "nvidia-h100-80gb-hbm3.json" in found
    choices = {choice.kernel: choice for choice in tune.CHOICES.values()}
    for known in found.values():
        assert known is not None
        for kernel, entries in known.kernels.items():
            for each in entries:
                cut = best_of(known, kernel, each.size, choices[kernel].default)
                assert cut in choices[kernel].candidates
                assert each.source


def test_a_default_is_a_candidate() -> None:
    assert all(choice.default in choice.candidates for choice in tune.CHOICES.values())


@INTERPRETED
def test_this_gpus_table_is_made_of_what_was_the_fastest(tmp_path: Path) -> None:
    """On a made-up clock: candidates are launched, in order, and each of them is a tenth faster than the one before."""
    took: list[float] = []

    def clock(call: Call) -> float:
        call.run()
        took.append(1.0 if not took else took[-1] * 0.9)
        return took[-1]

    setting = Setting.of(SHAPE, 16, DEVICE, torch.float32)
    with torch.no_grad():
        found = list(tune.every([setting, setting], ["outer_dA", "decode_nf4"], clock, FAILURES))
    assert [(one.kernel, one.size) for one in found] == [("outer_normed", 16 * 32), ("decode_nf4", 32 * 64)], "a size is timed once"
    assert [len(one.milliseconds) for one in found] == [len(outer.TILES), len(nf4.CUTS)]
    assert found[0].best == max(found[0].milliseconds, key=lambda tile: -found[0].milliseconds[tile])
    made = tune.table_of(found, "Some GPU", "today", "this test")
    tiles.write(made, tmp_path)
    assert best_of(tiles.table("Some GPU", tmp_path), "outer_normed", 16 * 32, outer.TILE) == found[0].best != outer.TILE
    assert "instead of" in found[0].line()


@INTERPRETED
@pytest.mark.parametrize("tile", outer.TILES, ids=str)
def test_every_tile_of_outer_is_right(tile: Tile) -> None:
    x, thin, gradient = random(149, 70), random(149, 5), torch.zeros(70, 5, device=DEVICE)
    inverse, w = torch.rand(149, device=DEVICE) + 0.5, 1 + 0.1 * random(70)
    outer.add_outer_(gradient, x, thin, torch.zeros(2, dtype=torch.int32, device=DEVICE), (inverse, w), tile=tile)
    truth = (x.double() * inverse.double()[:, None] * w.double()).t() @ thin.double()
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-5)


@INTERPRETED
@pytest.mark.parametrize("tile", swiglu_gradients.TILES, ids=str)
def test_every_tile_of_swiglu_gradients_is_right(tile: Tile) -> None:
    gate_up, dh, thin, low = random(45, 2 * 70, room=8), random(45, 70), random(45, 3), random(45, 6)
    gate, up = (part.double().requires_grad_() for part in gate_up.split(70, 1))
    h = torch.nn.functional.silu(gate) * up
    of_gate, of_up = torch.autograd.grad(h, (gate, up), dh.double())
    d_input, d_outputs = torch.zeros(3, 70, device=DEVICE), torch.zeros(140, 3, device=DEVICE)
    arrived = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    made = swiglu_gradients.swiglu_gradients_(dh, gate_up, 8, thin, low, d_input, d_outputs, arrived, tile)
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(made[:, :140].double(), torch.cat([of_gate, of_up], 1), **near)
    torch.testing.assert_close(d_input.double(), thin.double().t() @ h.detach(), **near)
    right = torch.cat([of_gate.t() @ low[:, :3].double(), of_up.t() @ low[:, 3:].double()])
    torch.testing.assert_close(d_outputs.double(), right, **near)


@INTERPRETED
@pytest.mark.parametrize("sweep", cross_entropy.SWEEPS, ids=str)
def test_every_sweep_of_cross_entropy_is_right(sweep: cross_entropy.Sweep) -> None:
    logits, targets = 3 * random(2, 9001), torch.tensor([0, 9000], device=DEVICE)
    right, losses = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none"), torch.empty(2, device=DEVICE)
    cross_entropy.cross_entropy_(logits, targets, losses, torch.tensor(1.0, device=DEVICE), sweep)
    torch.testing.assert_close(losses.double(), right, rtol=1e-6, atol=1e-6)
    assert logits.sum(1).abs().max() < 1e-4, "a softmax less a one sums to nothing"


@INTERPRETED
@pytest.mark.parametrize("cut", nf4.CUTS, ids=str)
def test_every_cut_of_nf4_is_right(cut: nf4.Cut) -> None:
    weight = placed(quantise(0.02 * torch.randn(37, 192)), DEVICE)
    found = torch.empty(37, 192, device=DEVICE)
    nf4.decode_nf4(weight, found, cut)
    assert found.equal(decode(weight))


def test_every_candidate_compiles_for_an_h100_and_fits(tmp_path: Path) -> None:
    done = python(tmp_path, "-m", "engines.native.ahead", "--candidates", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len({line.split()[1] for line in lines}) == sum(len(choice.candidates) for choice in tune.CHOICES.values())
    assert all(line.endswith(" ok") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tune", "--only", "rms_norm"], "--only rms_norm: no such rows; known: swiglu_gradients, outer_dA"),
        (["--tune", "--variants"], "--tune goes without --variants"),
        (["--tune", "--write", "x.json"], "its --write takes no file"),
        (["--write"], "--write needs a file"),
    ],
)
def test_a_wrong_command_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in " ".join(capsys.readouterr().err.split())
