"""``python -m harness.merge ADAPTER OUT``: an adapter and its base as one Hugging Face model, its logits checked before and after."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.compose import CONF
from harness.config import requests
from harness.errors import ConfigError, HarnessError, StoreError, WeightsError, nearest
from harness.exits import leave_with
from harness.nf4 import is_nf4
from harness.record import Record
from harness.score import load_model, with_adapter
from harness.spec import LoraFp8, QLora
from harness.store import load
from harness.weights.base_model import Base, as_fp8, prepare_base
from harness.weights.building import building
from harness.weights.nf4_base import prepare_nf4
from harness.weights.sources import TOKENIZER_FILES
from harness.weights.tensors import CODES, adapter_sha256, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

DONE, USAGE, DIFFERENT = 0, 2, 7
USAGE_TEXT = """python -m harness.merge ADAPTER OUT [--base FOLDER] [--dtype DTYPE] [--device DEVICE] [OVERRIDE …]

  python -m harness.merge runs/adapters/0123456789abcdef merged                   the base by the name that the adapter gives, and the
                                                                                  method of its record, where that is beside it in runs
  python -m harness.merge ADAPTER merged model=local model.weights=dir:my-model   the base by overrides (method=qlora: in NF4)
  python -m harness.merge ADAPTER merged --base my-model                          the base as a folder, plain or in NF4; where the record
                                                                                  of the adapter is known, it must be that of its run

Exit code 0: written and checked, 7: the logits differ too much and nothing is left, 2: the command is wrong."""
SHARD = "4GB"
# The largest difference of a logit, as a share of the largest logit: four to eight times what SmolLM2-135M with a random adapter showed
# (float32 4e-6, float16 1e-3, bfloat16 4e-3 to 7e-3). It grows with depth about as the roundings of weights add up.
ALLOWED = {"float32": 2.0**-15, "float16": 2.0**-8, "bfloat16": 2.0**-5}
_SEQUENCES, _TOKENS = 2, 48  # of the check: random tokens, always the same
_GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Check:
    """Logits before and after: how far apart, how large they are, and what the adapter alone changes in them."""

    step: str
    dtype: str
    difference: float
    largest: float
    effect: float

    @property
    def allowed(self) -> float:
        """The largest difference that ``dtype`` explains."""
        return ALLOWED[self.dtype] * self.largest

    @property
    def passed(self) -> bool:
        """Whether the difference is no larger; one that is no number is."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{self.step} ({self.dtype}): largest difference {self.difference:.3g}, allowed {self.allowed:.3g} "
            f"of logits up to {self.largest:.3g}; the adapter changes them by up to {self.effect:.3g}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge, check, and only then leave the folder. Returns 0, 2 or 7."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        _expect_device(options.device)
        adapter, out = _adapter(options.adapter), _empty(options.out)
        record = _record(options.adapter)
        base, said = _base(options.base, options.overrides, str(adapter.get("base_model_name_or_path") or ""), record)
        print(f"base: {said}", flush=True)
        dtype = options.dtype or _stored_dtype(base)
        with building(out) as folder:
            checks = merge(options.adapter, base, folder, dtype, options.device)
            for check in checks:
                print(check, flush=True)
            if not all(check.passed for check in checks):
                raise _TooFarError
    except _TooFarError:
        print(f"error: the logits differ by more than {dtype} explains; {out} is not written", file=sys.stderr)
        return DIFFERENT
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    print(f"done: {out}, {dtype}")
    return DONE


def merge(adapter: Path, base: Path, folder: Path, dtype: str, device: str) -> list[Check]:
    """Write ``base`` with ``adapter`` merged into its weights into ``folder``, stored as ``dtype``.

    W + s B A is summed in float32. Two checks of logits computed in float32: of the sums, and of what was read back from the files.
    """
    import torch

    plain = load_model(base, device)
    start = logits(plain)
    model = with_adapter(plain, adapter)
    before = logits(model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise WeightsError(f"{adapter}: PEFT cannot merge it ({error}); train the adapter again, or use it beside its base") from error
    sums = logits(merged)
    merged.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=SHARD)
    del plain, model, merged
    for name in (*TOKENIZER_FILES, _GENERATION):
        if (base / name).is_file() and not (folder / name).exists():
            shutil.copyfile(base / name, folder / name)
    after = logits(load_model(folder, device))
    return [_check("summed", "float32", start, before, sums), _check("read back", dtype, start, before, after)]


def logits(model: Any) -> Tensor:
    """Those of the same random tokens whenever they are asked for, [sequences, tokens, vocabulary], on the host."""
    import torch

    ids = torch.randint(int(model.config.vocab_size), (_SEQUENCES, _TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return found.float().cpu()


def _check(step: str, dtype: str, start: Tensor, before: Tensor, after: Tensor) -> Check:
    largest = [float(values.abs().max()) for values in (after - before, before, before - start)]
    return Check(step, dtype, *largest)


class _TooFarError(Exception):
    """Logits after are not those before; what was written goes away with it."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.merge", usage=USAGE_TEXT)
    parser.add_argument("adapter", type=Path, help="a folder with adapter_config.json, as every engine here leaves one")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("overrides", nargs="*", help="as of python -m harness; model=… names the base, cache=… where it is kept")
    parser.add_argument("--base", type=Path, help="a folder with config.json and *.safetensors, instead of overrides")
    parser.add_argument("--dtype", choices=list(CODES), help="stored type of the result (default: the base's)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where sums and logits are computed, in float32")
    return parser


def _expect_device(device: str) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch can use no GPU here; leave it out, and the CPU computes")


def _adapter(folder: Path) -> dict[str, Any]:
    """What its adapter_config.json says. Raises WeightsError for what is no LoRA adapter."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{file}: missing; ADAPTER is a folder in PEFT's format, as keep=adapters leaves in runs/adapters/") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file}: not readable ({error}); restore the adapter") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise WeightsError(f"{file}: peft_type is {found!r}; only LORA can be merged")
    read_tensors(folder)  # a torn file is named before the base is opened
    return config


def _empty(out: Path) -> Path:
    if out.exists():
        raise StoreError(f"{out}: exists already; name a folder that does not, nothing is overwritten")
    return out.resolve()


def _record(adapter: Path) -> Record | None:
    """That of the run which left ``adapter``, where both are still where the run put them."""
    folder = adapter.resolve()
    if folder.parent.name != "adapters":
        return None
    for stored in load(folder.parent.parent).stored:
        made = stored.record.measurement
        if made is not None and (made.artifacts.adapter_sha256 or "").startswith(folder.name):
            return stored.record
    return None


def _base(folder: Path | None, overrides: Sequence[str], name: str, record: Record | None) -> tuple[Path, str]:
    """The base's folder, given, or prepared as overrides, the adapter's record and its own word say; and what it is."""
    if folder is not None:
        if overrides:
            raise ConfigError(f"{' '.join(overrides)}: overrides find a base, --base gives one; leave one of them out")
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise WeightsError(f"{folder}: no config.json with *.safetensors; --base is a Hugging Face model folder")
        said = f"{folder}{', in NF4, decoded' if is_nf4(folder) else ''}"
        if record is None:
            return folder, f"{said}; no record lies beside the adapter, so nothing is known of the base that it was trained on"
        name = record.cell.workload.model.name
        otherwise = f"leave --base out, or, if it is stored differently only, give it as model={name} model.weights=dir:{folder}"
        _expect_trained_on(_as_it_lies(folder, said), record, otherwise)
        return folder, said
    given = {word.partition("=")[0] for word in overrides}
    named = [] if "model" in given else [f"model={_known(name)}"]
    if record is not None and "method" not in given:
        named.append(f"method={record.cell.workload.method.name}")
    settings, (request,) = requests([*named, *overrides], multirun=None)
    cache, workload = Path(settings.cache).expanduser(), request.cell.workload
    base = prepare_base(workload.model, request.sources, cache)
    base = prepare_nf4(base, workload.model.dtype, cache) if isinstance(workload.method, QLora) else base
    if record is not None:
        _expect_trained_on(base, record, "give the model=… and model.… of its run, or --base FOLDER")
    return base.path, f"{workload.model.name}: {base.description}"


def _as_it_lies(folder: Path, said: str) -> Base:
    """``folder`` with the content hash that a base of these files, as they are stored, was given when it was prepared."""
    try:
        found = Base(folder, "", said, json.loads((folder / "config.json").read_text(encoding="utf-8")), "")
        return replace(found, sha256=found.content_sha256(adapter_sha256(folder)))
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{folder}: config.json cannot be read ({error}); restore the folder") from error


def _expect_trained_on(base: Base, record: Record, otherwise: str) -> None:
    """Raise WeightsError where the adapter's record names another base, and say what to do ``otherwise``."""
    workload, made = record.cell.workload, record.measurement
    found = as_fp8(base) if isinstance(workload.method, LoraFp8) else base
    if made is not None and made.artifacts.base_sha256 != found.sha256:
        raise WeightsError(
            f"the record of this adapter says that it was trained on another base (model.name={workload.model.name}, "
            f"model.weights={workload.model.weights}, model.dtype={workload.model.dtype}, method={workload.method.name}) "
            f"than what was found here ({base.description}); {otherwise}"
        )


def _known(name: str) -> str:
    models = [path.stem for path in (CONF / "model").glob("*.yaml")]
    if name not in models:
        said = f"the adapter says that its base is {name!r}, which is no model of conf/model" if name else "the adapter names no base"
        raise ConfigError(f"{said}; give --base FOLDER or model=… ({nearest(name, models)})")
    return name


def _stored_dtype(base: Path) -> str:
    """The type of the base's weights; of one in NF4, that of what was not quantised."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    by_code = {code: name for name, code in CODES.items()}
    large = max((tensor for tensor in read_tensors(base).values() if tensor.code in by_code), key=lambda tensor: tensor.stop - tensor.start)
    said = config.get("dtype") or config.get("torch_dtype")
    return str(said) if is_nf4(base) and said in CODES else by_code[large.code]


if __name__ == "__main__":
    leave_with(main)
