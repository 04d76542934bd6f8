"""How far rounding to bf16 alone moves a first loss: one function with its dimensions, and so its sums, in other orders (decision 0029).

python -m scripts.first_loss_rounding CACHE ORDERS RECORD…: records of the parity workload, whose base and tokens lie in CACHE.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from harness.data.tokens import Sample, TokenFile
from harness.record import Record

READ, WRITTEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"), ("o_proj", "down_proj")


def main(cache: Path, num_orders: int, records: list[Path]) -> None:
    """A line for each record: the first loss in fp32, and how far from it bf16 comes out in every order, the model's own first."""
    (base,) = (cache / "base").iterdir()
    exact, rounded = (AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16))
    for path in records:
        record = Record.model_validate_json(path.read_text())
        assert record.measurement is not None, f"{path} measured nothing"
        tokens = TokenFile.open(cache / "tokens" / f"{record.measurement.artifacts.tokens_sha256}.safetensors")
        samples = tokens.step(record.cell.workload.train, 0)
        truth = first_loss(exact, samples)
        same = first_loss(reordered(exact, torch.Generator().manual_seed(num_orders)), samples)
        generator = torch.Generator().manual_seed(0)
        orders = (rounded, *(reordered(rounded, generator) for _ in range(num_orders - 1)))
        off = [first_loss(model, samples) - truth for model in orders]
        labels = sum(sample.num_labels for sample in samples)
        print(f"{path.parent.parent.name}: {labels} labels, fp32 {truth:.6f}, in another order {same:.6f}; bf16 off by")
        print(f"  mean {statistics.mean(off):.4f}, standard deviation {statistics.stdev(off):.4f}:", *(f"{one:.4f}" for one in off))


def first_loss(model: PreTrainedModel, samples: tuple[Sample, ...]) -> float:
    """The mean over all supervised tokens, one document after the other."""
    total = 0.0
    for sample in samples:
        ids, targets = (torch.from_numpy(each.astype("int64")) for each in (sample.input_ids, sample.labels))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, targets[1:], reduction="sum"))
    return total / sum(sample.num_labels for sample in samples)


def reordered(model: PreTrainedModel, generator: torch.Generator) -> PreTrainedModel:
    """The same function of a Llama without biases: hidden and inner dimensions, in which no result can be told apart, in another order."""
    hidden = torch.randperm(model.config.hidden_size, generator=generator)
    inner = [torch.randperm(model.config.intermediate_size, generator=generator) for _ in range(model.config.num_hidden_layers)]

    def turned(name: str, weight: Tensor) -> Tensor:
        if any(part in name for part in READ):
            weight = weight[:, hidden]
        elif "norm" in name or any(part in name for part in WRITTEN):
            weight = weight[hidden]
        if "mlp" in name:
            order = inner[int(name.split(".")[2])]
            weight = weight[:, order] if "down_proj" in name else weight[order]
        return weight

    turned_model: PreTrainedModel = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    turned_model.load_state_dict({name: turned(name, weight) for name, weight in model.state_dict().items()})
    return turned_model.eval()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [Path(one) for one in sys.argv[3:]])
