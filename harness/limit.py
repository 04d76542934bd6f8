"""``python -m harness.limit OVERRIDES``: measure the least time that this machine needs for a step, so that rows can be held against it."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.config import Request, Settings, requests
from harness.data.tokens import TokenFile
from harness.engine import Machine
from harness.errors import HarnessError
from harness.exits import leave_with
from harness.floor import Attention, Floor, Product, shapes
from harness.machine import detect
from harness.places import Prepared
from harness.preparing import prepared
from harness.spec import DType
from harness.store import save_floor
from harness.turns import turn

USAGE = """python -m harness.limit OVERRIDE ...

  python -m harness.limit model=smollm2_135m data=python_docs     the same overrides as python -m harness; the engine does not matter

Times the matrix products of the workload's linear layers and head (forward and backward) and causal attention at its lengths, alone.
Written beside the records (runs=...); every report then shows each row's fraction of it."""

_MOST_ROWS = {"cuda": 16384, "cpu": 512}  # more rows take proportionally longer: they are counted, not run
_MOST_HEAD_ELEMENTS = 2**29  # rows x vocabulary of one product with the head: 1 GiB in bfloat16

Timer = Callable[[Callable[[], object]], float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every distinct workload that the overrides describe, print and store it. Returns 0, 2 for a wrong command, 6 for nothing."""
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    if not overrides or {"-h", "--help"} & set(overrides):
        print(USAGE)
        return 0 if overrides else 2
    try:
        settings, found = requests(overrides, multirun=True)
        distinct = {request.cell.workload.key: request for request in found}
        floors = [_measure(settings, request) for request in distinct.values()]
    except (HarnessError, LookupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if any(floor.step_seconds for floor in floors) else 6


def _measure(settings: Settings, request: Request) -> Floor:
    root = Path(settings.runs).expanduser().resolve()
    machine = detect(request.machine.device, memory_cap_gib=request.machine.memory_cap_gib)
    with turn(root, lambda: print("waiting: a sweep is measuring here")) as held:
        place = prepared(request, settings.cache, root / "work" / "prepare", held=held, say=print)
        floor = measure(place, request, machine)
        save_floor(floor, root)
    print(_text(floor, request))
    return floor


def measure(prepared: Prepared, request: Request, machine: Machine) -> Floor:
    """Time what the workload needs at least. Raises UnsupportedError where its layers are not known."""
    import torch

    workload, dtype = request.cell.workload, request.machine.compute_dtype
    config = json.loads((Path(prepared.base) / "config.json").read_text(encoding="utf-8"))
    products, attention, tokens = shapes(config, workload, TokenFile.open(Path(prepared.tokens)))
    timer = _cuda_seconds if machine.device == "cuda" else _host_seconds
    forward, backward = _products(products, machine.device, dtype, timer)
    by, seconds = _attention(attention, machine.device, dtype, timer)
    return Floor(
        machine=machine.key,
        workload=workload.key,
        compute_dtype=dtype,
        tokens_per_step=tokens,
        forward_seconds=forward,
        backward_seconds=backward,
        attention_seconds=seconds,
        attention_by=by,
        measured_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        torch=torch.__version__,
    )


def _products(products: Sequence[Product], device: str, dtype: DType, timer: Timer) -> tuple[float | None, float | None]:
    """Seconds a step of all products forward and of their gradients; null when there is no room for one of them."""
    forward = backward = 0.0
    for product in products:
        times = _product(product, device, dtype, timer)
        if times is None:
            return None, None
        forward, backward = forward + times[0], backward + times[1]
    return forward, backward


def _product(product: Product, device: str, dtype: DType, timer: Timer) -> tuple[float, float] | None:
    import torch

    rows = max(1, min(round(product.rows), _MOST_ROWS[device], _MOST_HEAD_ELEMENTS // product.out))
    scale = product.count * product.rows / rows
    kind: Any = getattr(torch, dtype)
    try:
        x = torch.randn(rows, product.width, device=device, dtype=kind)
        weight = torch.randn(product.out, product.width, device=device, dtype=kind)
        y = torch.randn(rows, product.out, device=device, dtype=kind)
        forward = timer(lambda: torch.mm(x, weight.t()))
        backward = timer(lambda: torch.mm(y, weight))
        if product.trained:
            backward += timer(lambda: torch.mm(y.t(), x))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return None
        raise
    return scale * forward, scale * backward


def _attention(attention: Attention, device: str, dtype: DType, timer: Timer) -> tuple[str | None, float | None]:
    """The fastest implementation and its seconds a step, forward and backward; null when none takes these shapes."""
    from torch.nn.attention import SDPBackend

    kinds = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    tried = {kind.name: _attention_by(kind, attention, device, dtype, timer) for kind in (kinds if device == "cuda" else kinds[1:2])}
    known = {name: seconds for name, seconds in tried.items() if seconds is not None}
    best = min(known, key=lambda name: known[name], default=None)
    return (None, None) if best is None else (best.lower(), known[best])


def _attention_by(kind: Any, attention: Attention, device: str, dtype: DType, timer: Timer) -> float | None:
    import torch
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    documents = max(1, min(round(attention.documents), _MOST_ROWS[device] // attention.length or 1))
    scale = attention.count * attention.documents / documents

    def tensor(heads: int) -> torch.Tensor:
        shape = (documents, heads, attention.length, attention.size)
        return torch.randn(shape, device=device, dtype=getattr(torch, dtype), requires_grad=True)

    q, k, v = tensor(attention.heads), tensor(attention.key_heads), tensor(attention.key_heads)
    grad = torch.randn_like(q)

    def both() -> object:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=attention.heads != attention.key_heads)
        return torch.autograd.grad(out, (q, k, v), grad)

    with warnings.catch_warnings(), sdpa_kernel(kind):
        warnings.simplefilter("ignore")  # it warns of each reason why this implementation does not take the shapes
        try:
            return scale * timer(both)
        except RuntimeError as error:
            if "No available kernel" in str(error) or isinstance(error, torch.OutOfMemoryError):
                return None
            raise


def _host_seconds(run: Callable[[], object]) -> float:
    """The least of ten: what else the machine does only ever adds."""
    run()
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _cuda_seconds(run: Callable[[], object]) -> float:
    """The device's time of one run among ten queued ones, the least of three rounds: launching is not part of the floor."""
    import torch

    for _ in range(5):
        run()
    rounds = []
    for _ in range(3):
        marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # the device waits 10 ms, until the host has queued them all
        marks[0].record()
        for _ in range(10):
            run()
        marks[1].record()
        marks[1].synchronize()
        rounds.append(float(marks[0].elapsed_time(marks[1])) / 1000 / 10)
    return min(rounds)


def _text(floor: Floor, request: Request) -> str:
    def milliseconds(seconds: float | None) -> str:
        return "not measured" if seconds is None else f"{1000 * seconds:,.2f} ms"

    rate = floor.tokens_per_second
    return (
        f"{request.cell.workload.label} on {floor.machine}, {floor.compute_dtype}, {floor.tokens_per_step:,.0f} tokens a step\n"
        f"  products forward {milliseconds(floor.forward_seconds)}, backward {milliseconds(floor.backward_seconds)}, "
        f"attention {milliseconds(floor.attention_seconds)} ({floor.attention_by or 'no implementation takes these shapes'})\n"
        f"  floor {milliseconds(floor.step_seconds)} a step{f', {rate:,.0f} tokens/s' if rate else ''}"
    )


if __name__ == "__main__":
    leave_with(main)
