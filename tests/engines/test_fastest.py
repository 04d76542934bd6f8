"""The fastest way: which one is taken, that a step made of products so made is the same, and where it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import engines.fused
import engines.native.fastest
from engines.native.checkpoint import load_weights, read_config
from engines.native.decoder import Decoder
from engines.native.fastest import Fastest, Run, quickest
from engines.native.footprint import WORKSPACE_BYTES, WORKSPACES, workspaces
from engines.native.loader import Placement
from engines.native.lora import read_adapter
from engines.native.packed import Angles
from engines.native.plan import KEEP_INPUT
from engines.native.products import Asked, Product
from engines.native.reference import REFERENCE
from engines.native.shape import read_shape
from harness.data.tokens import pack
from harness.engine import Machine
from harness.spec import parse
from tests.engines.lt import Library, matrix, on_the_host
from tests.engines.test_fused import KNOBS
from tests.engines.tiny import CPU, FAMILIES, FULL, LONGEST, LORA, RecordingProbe, make_job, make_workload

HOST = torch.device("cpu")
WIDE = Product(6, 8, 4, (10, 1), (1, 16), 12, 0.5)
GPU = Machine(device="cuda", name="H100", count=1, memory_gib=80)


class Clock:
    """Instead of a GPU's time: each run's milliseconds by its place, ``seen`` what was timed."""

    def __init__(self, *milliseconds: float) -> None:
        self.milliseconds, self.seen = milliseconds, 0
        self.known: list[Run] = []

    def __call__(self, runs: Sequence[Run], calls: int) -> list[float]:
        self.seen += 1
        if not all(run in self.known for run in runs):
            self.known = list(runs)  # those of another product
        for run in runs:
            run()
        return [self.milliseconds[self.known.index(run)] for run in runs]


def never() -> bool:
    return False


def fastest_on_the_host(monkeypatch: pytest.MonkeyPatch, library: Library, clock: Clock, **options: Any) -> Fastest:
    settings: dict[str, Any] = {"capturing": never, "least_flops": 1.0, **options}
    return Fastest(on_the_host(monkeypatch, library), in_turns=clock, **settings)


# Which way is taken.


@pytest.mark.parametrize(
    ("milliseconds", "place"),
    [((1.0,), 0), ((1.0, 1.1, 0.9), 2), ((1.0, 0.8, 0.8), 1), ((1.0, 0.996), 0), ((1.0, 0.994), 1), ((1.0, 2.0, 3.0, 4.0, 5.0), 0)],
    ids=["no_other", "faster", "the_first_of_two", "within_half_a_percent", "just_beyond_it", "slower"],
)
def test_torch_wins_ties(milliseconds: tuple[float, ...], place: int) -> None:
    runs: list[Run] = [partial(print, end="") for _ in milliseconds]
    assert quickest(runs, Clock(*milliseconds)) == place


def test_one_hasty_round_chooses_nothing() -> None:
    """The way that is fastest in one round only is the slower one by the median; only the best of the first heat are timed again."""
    heats: list[list[float]] = [[1.0] * 6, [1.0] * 6, [1.0, 9.0, 0.9, 0.7, 0.8, 9.0], *[[1.0, 0.9, 0.8, 0.95]] * 6, [1.0, 0.1, 0.8, 0.95]]
    sizes: list[tuple[int, int]] = []

    def in_turns(runs: Sequence[Run], calls: int) -> list[float]:
        sizes.append((len(runs), calls))
        return heats[len(sizes) - 1]

    runs: list[Callable[[], None]] = [lambda: None] * 6
    assert quickest(runs, in_turns) == 4, "finalists are 3, 4 and 2 by the heat"
    assert sizes == [(6, 1), (6, 1), (6, 2), *[(4, 2)] * 7]


def run(
    fastest: Fastest, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None, alpha: float = 1.0
) -> torch.Tensor | None:
    return fastest.make(Asked(left, right, out, alpha))


def test_a_way_is_chosen_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    library, clock = Library(num_ways=2), Clock(1.0, 0.9, 0.5)
    fastest = fastest_on_the_host(monkeypatch, library, clock)
    left, right, out = WIDE.operands(HOST)
    expected = 0.5 * left.float() @ right.float()
    assert run(fastest, left, right, out, 0.5) is out
    timed, library.ran = clock.seen, []
    for _ in range(2):
        out.fill_(math.nan)
        assert run(fastest, left, right, out, 0.5) is out
        torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-3)
    assert (clock.seen, library.ran) == (timed, [1, 1])
    found = run(fastest, left, right, None, 0.5)
    assert found is not None
    assert clock.seen > timed, "a result with other strides is another product"
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-3)
    assert fastest.said() == "2 of 2 products in another way than torch's"


def test_torch_keeps_what_it_makes_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    library, clock = Library(num_ways=2), Clock(1.0, 0.999, 1.2)
    fastest = fastest_on_the_host(monkeypatch, library, clock)
    operands = WIDE.operands(HOST)
    assert run(fastest, *operands, 0.5) is None
    timed, library.ran = clock.seen, []
    assert run(fastest, *operands, 0.5) is None
    assert (clock.seen, library.ran) == (timed, [])
    assert fastest.said() == "0 of 1 products in another way than torch's"


def test_what_a_capture_is_the_first_to_ask_for_stays_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also afterwards: one process never makes one product in two ways. What was chosen before is captured."""
    library, clock, capturing = Library(), Clock(1.0, 0.5), [True]
    fastest = fastest_on_the_host(monkeypatch, library, clock, capturing=lambda: capturing[0])
    late, early = WIDE.operands(HOST), Product(6, 8, 4, (4, 1), (8, 1), 8).operands(HOST)
    assert run(fastest, *late, 0.5) is None
    assert clock.seen == 0, "nothing may be timed while launches are captured"
    capturing[0] = False
    assert run(fastest, *late, 0.5) is None
    assert run(fastest, *early) is early[2]
    capturing[0] = True
    assert run(fastest, *early) is early[2]
    assert fastest.said() == "1 of 2 products in another way than torch's, 1 first asked for by a capture"


def test_choosing_ends_where_it_has_taken_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uneven documents bring sizes without end; what was chosen stays."""
    monkeypatch.setattr(engines.native.fastest, "MOST_SECONDS", 0.0)
    library, clock = Library(), Clock(1.0, 0.5)
    fastest = fastest_on_the_host(monkeypatch, library, clock)
    early, late = WIDE.operands(HOST), Product(6, 8, 4, (4, 1), (8, 1), 8).operands(HOST)
    assert run(fastest, *early, 0.5) is early[2]
    timed = clock.seen
    assert run(fastest, *late) is None
    assert clock.seen == timed
    assert run(fastest, *early, 0.5) is early[2]
    assert fastest.said() == "1 of 2 products in another way than torch's, 1 first asked for after 0 s of choosing"


@pytest.mark.parametrize("which", ["left", "right", "out"])
def test_what_begins_between_sixteens_of_bytes_is_torchs(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    fastest = fastest_on_the_host(monkeypatch, Library(), Clock(1.0, 0.5))
    operands = {"left": matrix(8, 9), "right": matrix(8, 9), "out": matrix(8, 9)}
    parts = {name: values[:, 1:] if name == which else values[:, :8] for name, values in operands.items()}
    assert run(fastest, parts["left"], parts["right"], parts["out"]) is None
    assert fastest.said().startswith("0 of 0 ")


def test_products_that_wait_for_memory_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = fastest_on_the_host(monkeypatch, Library(), Clock(1.0, 0.5), least_flops=WIDE.flops + 1)
    assert run(fastest, *WIDE.operands(HOST), 0.5) is None
    assert fastest.said().startswith("0 of 0 ")


def test_a_way_that_makes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one writes nothing, so what torch left there must not pass for its result."""
    fastest = fastest_on_the_host(monkeypatch, Library(num_ways=2, faulty=1), Clock(1.0, 0.9, 0.5))
    with pytest.raises(ArithmeticError, match=r"6 × 8 of 4, right turned: cuBLASLt makes another result.*set products=torch"):
        run(fastest, *WIDE.operands(HOST), 0.5)


def test_zeros_can_be_compared_and_what_is_not_finite_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """B begins as zeros; a run that has diverged goes on as it would with torch."""
    fastest = fastest_on_the_host(monkeypatch, Library(), Clock(1.0, 0.5))
    zeros = matrix(4, 8), matrix(8, 8), matrix(4, 8)
    assert run(fastest, *zeros) is zeros[2]
    diverged = torch.full_like(matrix(5, 8), math.inf), matrix(8, 8), matrix(5, 8)
    assert run(fastest, *diverged) is None
    assert fastest.said() == "1 of 2 products in another way than torch's, 1 of values that are not finite, so not compared"


# A step made of them.


def small_decoder(folder: Path, method: dict[str, Any]) -> tuple[Decoder, Any]:
    job = make_job(folder, "llama_biases", method)
    shape = read_shape(read_config(job.base), LONGEST)
    adapter = None if job.adapter_init is None else read_adapter(job.adapter_init)
    weights = load_weights(job.base, shape, Placement(HOST, torch.bfloat16, torch.float32), adapter)
    native = Decoder(shape=shape, weights=weights, ops=REFERENCE, plans=(KEEP_INPUT,) * shape.num_layers, loss_chunk=5)
    return native, Angles.of(shape, LONGEST, HOST).pack(pack(job.tokens.step(job.workload.train, 0)))


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_losses_and_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: dict[str, Any]) -> None:
    monkeypatch.setattr(engines.native.fastest, "_alignment", lambda _: 256)  # as on a GPU; the host's allocator promises less
    found = []
    for name in ("torch", "fastest"):
        (tmp_path / name).mkdir()
        native, packed = small_decoder(tmp_path / name, method)
        library, clock = Library(), Clock(1.0, 0.5)
        fastest = fastest_on_the_host(monkeypatch, library, clock)
        native = native if name == "torch" else replace(native, ops=fastest.through(native.ops))
        losses = [native.accumulate(packed, torch.tensor(0.01))]
        if name == "fastest":
            timed, library.ran = clock.seen, []
            losses.append(native.accumulate(packed, torch.tensor(0.01)))
            assert torch.equal(losses[0], losses[1])
            assert clock.seen == timed, "a pass of known sizes times nothing"
            assert len(library.ran) > 10
            assert not fastest.said().startswith("0 of"), fastest.said()
        else:
            losses.append(native.accumulate(packed, torch.tensor(0.01)))
        found.append((losses[0], native.weights.arena.gradients.clone()))
    (right, expected), (losses_L, gradients) = found
    torch.testing.assert_close(losses_L, right, rtol=2e-2, atol=2e-2)
    assert torch.linalg.vector_norm(gradients - expected) < 3e-2 * torch.linalg.vector_norm(expected)


def test_the_record_says_what_was_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_the_host(monkeypatch, Library())
    probe = RecordingProbe()
    engines.fused.train(make_job(tmp_path), parse(engines.fused.Knobs, {**KNOBS, "products": "fastest"}), probe)
    assert probe.chosen["products"] == "0 of 0 products in another way than torch's", "all of a tiny model's are too small"
    assert "plan" in probe.chosen


# Where it is asked for.


def reasons(machine: Machine, **knobs: Any) -> str | None:
    usual = {"operations": "fused", "compute_dtype": "bfloat16", "replay": True, "products": "fastest"}
    workload = make_workload(FAMILIES["llama"], LORA)
    return engines.fused.unsupported(workload, parse(engines.fused.Knobs, {**KNOBS, **usual, **knobs}), machine)


def test_it_is_refused_with_reasons() -> None:
    assert reasons(GPU) is None
    for knobs, says in (({"operations": "reference"}, "operations=reference"), ({"replay": False}, "replay=true makes steps share sizes")):
        said = reasons(GPU, **knobs)
        assert said is not None
        assert f"products=fastest {'asks' if 'operations' in knobs else 'times'}" in said
        assert says in said
        assert reasons(GPU, **knobs, products="torch") is None
    assert "operations=fused needs an NVIDIA GPU" in str(reasons(CPU))


def test_the_planner_knows_its_workspace() -> None:
    assert workspaces("torch") == WORKSPACES
    assert workspaces("fastest") == WORKSPACES + WORKSPACE_BYTES
