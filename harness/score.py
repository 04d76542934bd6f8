"""Held-out loss of trained weights, by one neutral evaluator in fp32, whoever trained them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.data.tokens import IGNORE, Sample, Split, StepTokens, TokenFile, pad
from harness.errors import ConfigError, DataError, HarnessError, WeightsError
from harness.places import PairItem, Prepared, ScoreItem, ScoreRequest
from harness.record import Score, dumps
from harness.rounding import Rounding
from harness.spec import LoraFp8, parse
from harness.updates import UpdatePair
from harness.weights.sources import write_atomically
from harness.weights.tensors import CHUNK, Stored, read_tensors

LOGITS_BYTES = 2**28  # the most that one batch's fp32 logits may take
BATCH_TOKENS = 8192  # the most positions in a batch

Doubles = npt.NDArray[np.float64]


def main(arguments: Sequence[str]) -> int:
    """``python -m harness.score REQUEST.json``. Exit code 0, or 2 with the reason on stderr."""
    if len(arguments) != 1:
        print("usage: python -m harness.score REQUEST.json", file=sys.stderr)
        return 2
    try:
        score(read_request(Path(arguments[0])))
    except HarnessError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def read_request(path: Path) -> ScoreRequest:
    """The request in ``path``. Raises ConfigError when there is none, or it is not one."""
    try:
        return parse(ScoreRequest, json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable request: {error}") from error


def score(request: ScoreRequest) -> None:
    """Write a Score for every item, then an UpdatePair for every pair, then the Rounding, where one is asked for.

    Raises DataError without held-out rows (only scores need them), WeightsError for weights that are not loadable or do not belong.
    """
    if request.items or not (request.pairs or request.rounding):
        _score_items(request)
    for pair in request.pairs:
        write_atomically(Path(pair.out), compare_updates(request.prepared, pair).model_dump_json())
    if request.rounding:
        write_atomically(Path(request.rounding.out), round_first_loss(request).model_dump_json())


def _score_items(request: ScoreRequest) -> None:
    tokens = TokenFile.open(Path(request.prepared.tokens))
    if len(tokens.held_out) == 0:
        raise DataError("nothing to score: the data has no held-out rows; set data.held_out_fraction above 0 (dense data cannot be scored)")
    base: Any = None
    for item in request.items:
        if item.adapter is not None and request.workload.method.name == "full":
            model, after = load_model(Path(item.adapter), request.device), None
        else:
            base = base or _base(request)
            model = base if item.adapter is None else with_adapter(base, Path(item.adapter))
            after = model if item.adapter is not None else None
        loss, count = held_out_loss(model, tokens.held_out, request.device)
        if after is not None:
            base = after.unload()  # takes the adapter's layers out again, the base unchanged
        result = _score(request, item, loss, count, tokens.sha256)
        write_atomically(Path(item.out), dumps(result))


def held_out_loss(model: Any, split: Split, device: str) -> tuple[float, int]:
    """Mean negative log likelihood of the supervised tokens of ``split``, and their number. Padding and batching do not matter."""
    import torch
    from torch.nn import functional

    total, count = 0.0, 0
    with torch.inference_mode():
        for samples in batches(split, int(model.config.vocab_size)):
            batch = pad(samples)
            targets = batch.labels[:, 1:]
            columns = np.flatnonzero((targets != IGNORE).any(axis=0))  # only these positions go through the head
            logits = model(
                input_ids=torch.from_numpy(batch.input_ids).to(device),
                attention_mask=torch.from_numpy(batch.attention_mask).to(device),
                logits_to_keep=torch.from_numpy(columns).to(device),
                use_cache=False,
            ).logits
            wanted = torch.from_numpy(targets[:, columns]).to(device)
            losses = functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORE, reduction="none")
            total += float(losses.double().sum())
            count += int((targets != IGNORE).sum())
    return total / count, count


def update_norm(trained: Path, initial: Path) -> float:
    """L2 norm of trained minus initial weights (of the adapter: all A and B), in fp64. Raises WeightsError when names or shapes differ."""
    before, after = read_tensors(initial), read_tensors(trained)
    return math.sqrt(sum(float(update @ update) for (update,) in _updates(before, after)))


def compare_updates(prepared: Prepared, pair: PairItem) -> UpdatePair:
    """Norms and cosine of two updates, exactly, in fp64. Raises WeightsError when names or shapes differ."""
    before = read_tensors(Path(prepared.adapter_init or prepared.base))
    one, other = sorted(zip(pair.trained_sha256, pair.trained, strict=True))
    products = np.zeros(3)
    for a, b in _updates(before, read_tensors(Path(one[1])), read_tensors(Path(other[1]))):
        products += (a @ a, b @ b, a @ b)
    norms = math.sqrt(products[0]), math.sqrt(products[1])
    return UpdatePair(
        start_sha256=prepared.adapter_init_sha256 or prepared.base_sha256,
        trained_sha256=(one[0], other[0]),
        norms=norms,
        cosine=float(products[2]) / (norms[0] * norms[1]) if all(norms) else None,
    )


def _updates(before: Mapping[str, Stored], *trained: Mapping[str, Stored]) -> Iterator[list[Doubles]]:
    """Trained minus initial values of each of ``trained``, a piece of a tensor at a time: full weights may not fit into memory."""
    for after in trained:
        differing = sorted(
            name for name in {*after, *before} if name not in after or name not in before or after[name].shape != before[name].shape
        )
        if differing:
            some = f"{', '.join(differing[:3])} (of {len(differing)})"
            raise WeightsError(f"the trained tensors are not those of the start; differing in name or shape: {some}")
    for name in sorted(before):
        for start in range(0, math.prod(before[name].shape), CHUNK):
            initial = before[name].values(start, start + CHUNK).astype(np.float64)
            yield [after[name].values(start, start + CHUNK).astype(np.float64) - initial for after in trained]


def round_first_loss(request: ScoreRequest) -> Rounding:
    """The first loss of the workload in fp32, and in bf16 with its sums in several orders; its base must be what its method trains on."""
    from harness.orders import first_losses

    samples = TokenFile.open(Path(request.prepared.tokens)).step(request.workload.train, 0)
    exact, rounded = first_losses(load_model(Path(request.prepared.base), request.device), samples)
    return Rounding(
        base_sha256=request.prepared.base_sha256,
        stream_sha256=StepTokens.expected(samples).sha256,
        exact=exact,
        rounded=rounded,
        evaluator=_evaluator(request.device),
    )


def batches(split: Split, vocab_size: int) -> Iterator[list[Sample]]:
    """The samples of ``split``, shortest first, in batches whose positions and logits stay within bounds."""
    most = min(BATCH_TOKENS, max(1, LOGITS_BYTES // (4 * vocab_size)))
    batch: list[Sample] = []
    for sample in sorted(split, key=len):
        if batch and (len(batch) + 1) * len(sample) > most:
            yield batch
            batch = []
        batch.append(sample)
    yield batch


def _base(request: ScoreRequest) -> Any:
    """The base that adapters are trained on, computing as their method says."""
    base = load_model(Path(request.prepared.base), request.device)
    if isinstance(request.workload.method, LoraFp8):
        from harness.fp8 import emulate

        emulate(base)
    return base


def load_model(folder: Path, device: str) -> Any:
    """The model in ``folder``, in float32 without TF32; one in NF4 decoded. Raises WeightsError for what transformers cannot load."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from harness.nf4 import is_nf4, load_decoded

    disable_progress_bar()
    torch.set_float32_matmul_precision("highest")  # no TF32: this is the judge
    try:
        if is_nf4(folder):
            model = load_decoded(folder, torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"{folder}: not weights that transformers can load: {error}") from error
    return model.to(device).eval()


def with_adapter(base: Any, folder: Path) -> Any:
    """``base`` with the adapter in ``folder`` beside it. Raises WeightsError for one that does not belong to it."""
    from peft import PeftModel

    wanted = set(read_tensors(folder))
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        what, *others = str(error).splitlines() or [""]
        more = f" {others[0].strip()} ({len(others)} such lines)" if others else ""
        raise WeightsError(
            f"{folder}: not an adapter that PEFT can load on this base; give the model=… of its training. {what}{more}"
        ) from error
    own = {name.replace(".default.", ".") for name, _ in model.named_parameters() if ".lora_" in name}
    if own != wanted:
        raise WeightsError(f"{folder}: its tensors are not those its adapter_config.json describes: {', '.join(sorted(own ^ wanted)[:3])}")
    return model.eval()


def _score(request: ScoreRequest, item: ScoreItem, loss: float, count: int, tokens_sha256: str) -> Score:
    prepared: Prepared = request.prepared
    norm = update_norm(Path(item.adapter), Path(prepared.adapter_init or prepared.base)) if item.adapter else None
    return Score(
        adapter_sha256=item.adapter_sha256,
        tokens_sha256=tokens_sha256,
        base_sha256=prepared.base_sha256,
        held_out_loss=loss,
        held_out_tokens=count,
        update_norm=norm,
        evaluator=_evaluator(request.device),
    )


def _evaluator(device: str) -> str:
    import torch

    return f"engine-room 1, torch {torch.__version__.partition('+')[0]}, {device}, float32"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
