"""What is run, as frozen data: a Workload (what every engine must do identically), an engine's knobs, a Cell of both."""

from __future__ import annotations

import functools
import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from harness.frozen import DType as DType
from harness.frozen import Fraction as Fraction
from harness.frozen import Name as Name
from harness.frozen import Positive as Positive
from harness.frozen import Spec as Spec
from harness.frozen import content_key as content_key
from harness.frozen import parse as parse


class Model(Spec):
    """The model that is fine-tuned.

    ``weights`` and ``tokenizer`` are sources: ``random`` (weights only; seeded, from ``config``), ``dir:PATH``,
    ``hub:OWNER/NAME[@REVISION]`` or ``package:PACKAGE/FILE`` (a file inside an installed Python package).
    ``config`` is the transformers configuration of the architecture, needed for ``random`` weights only.
    ``dtype`` is the stored type of the base weights. ``fingerprint`` is the content hash of ``dir:`` and ``package:`` weights,
    ``tokenizer_fingerprint`` that of a ``dir:`` tokenizer which is not the weights' own; both are filled in when the cell is made.
    """

    name: Name
    weights: str
    tokenizer: str
    dtype: DType
    seed: int = 0
    config: dict[str, JsonValue] | None = None
    fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None

    @model_validator(mode="after")
    def _random_weights_need_a_config(self) -> Model:
        if self.weights == "random" and self.config is None:
            raise ValueError("weights=random needs model.config: the transformers configuration of the architecture")
        return self


class Fields(Spec):
    """The two JSONL keys that hold what the model reads and what it must answer."""

    prompt: str
    completion: str


class DataFile(Spec):
    """One entry of a list of files; a name alone is an entry of weight 1.

    ``weight``: how often a training row of the file comes in an epoch; a broken number repeats a share of the rows, chosen by hash.
    ``sha256``: hash of the file, filled in when the cell is made; given, it must be the file's.
    """

    path: str
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    sha256: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_name_alone(cls, raw: Any) -> Any:
        return {"path": raw} if isinstance(raw, str) else raw


DataPath = Annotated[
    Annotated[str, Tag("one")] | Annotated[tuple[DataFile, ...], Tag("several")],
    Discriminator(
        lambda value: "one" if isinstance(value, str) else "several" if isinstance(value, list | tuple) else None,
        custom_error_type="path_type",
        custom_error_message="expected a file, a folder, a glob, or a list of these with weights",
    ),
]
Layout = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]
Supervise = Literal["answers", "last_answer", "everything"]


class Data(Spec):
    """The samples. ``jsonl``: rows of files through the chat template (docs/data.md); ``dense``: seeded random tokens, all supervised.

    ``sequence_length`` is the most tokens a sample may have (``jsonl``: longer ones are truncated and counted; ``dense``: exactly
    that many). ``layout``: which keys of a row hold its turns, ``auto`` finds it out file by file; ``fields`` maps two other keys to
    prompt and completion. ``system_prompt`` is put before rows that bring none. ``held_out_fraction`` of the rows, chosen by a hash
    of their content, is never trained on; at most ``held_out_samples`` of them are scored. ``on_bad_row``: ``error`` names them,
    ``skip`` counts them. ``sha256`` is the hash of a single file, filled in when the cell is made.
    """

    name: Name
    source: Literal["jsonl", "dense"]
    sequence_length: Positive
    path: DataPath | None = None
    layout: Layout = "auto"
    fields: Fields | None = None
    supervise: Supervise = "answers"
    system_prompt: Annotated[str, Field(pattern=r"\S")] | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    num_samples: Positive | None = None
    held_out_fraction: Fraction = 0.0
    held_out_samples: Positive = 64
    sha256: str | None = None

    @property
    def files(self) -> tuple[DataFile, ...]:
        """``path`` as entries: none for dense data, one for a single file."""
        if isinstance(self.path, str):
            return (DataFile(path=self.path, sha256=self.sha256),)
        return self.path or ()

    @model_validator(mode="after")
    def _its_values_agree(self) -> Data:
        if self.source == "jsonl" and not self.path:
            raise ValueError("source=jsonl needs data.path: the JSONL file to train on")
        if self.source == "dense" and self.num_samples is None:
            raise ValueError("source=dense needs data.num_samples: how many distinct samples to draw")
        if self.fields is not None and self.layout != "auto":
            raise ValueError(f"data.fields maps keys of your own, data.layout={self.layout} names known ones; set one to null or auto")
        if self.layout == "text" and self.system_prompt is not None:
            raise ValueError("data.system_prompt has no place in plain text, which is no conversation; set it to null")
        return self


class Lora(Spec):
    """Low-rank adapters on a frozen base (Hu et al. 2021, arXiv 2106.09685): W + alpha/rank * B A.

    ``rank_stabilised``: W + alpha/sqrt(rank) * B A (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732). ``b_learning_rate_ratio``: the learning
    rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354); weight decay follows the rate. ``dropout`` of the adapters'
    inputs and ``dora`` (Liu et al. 2024, arXiv 2402.09353) are asked for here and refused by engines, with their reasons.
    """

    name: Literal["lora"]
    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    dtype: DType = "float32"
    rank_stabilised: bool = False
    b_learning_rate_ratio: Annotated[float, Field(gt=0)] = 1.0
    dropout: Fraction = 0.0
    dora: bool = False

    @property
    def scale(self) -> float:
        """The factor of the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class QLora(Lora):
    """Adapters on a base whose linear modules but the head are stored in NF4 (Dettmers et al. 2023, arXiv 2305.14314).

    Blocks of 64 values, their scales in 8 bits in blocks of 256. A decoded value is rounded to ``model.dtype``: decision 0011.
    """

    name: Literal["qlora"]  # type: ignore[assignment]  # the tag of a union is narrower in every member


class LoraFp8(Lora):
    """Adapters on a base whose linear layers but the head compute in 8-bit floating point: harness/fp8.py says which function that is."""

    name: Literal["lora_fp8"]  # type: ignore[assignment]


class Full(Spec):
    """Every weight is trained; ``dtype`` is the type of the trained (master) weights."""

    name: Literal["full"]
    dtype: DType = "float32"


Method = Annotated[Lora | QLora | LoraFp8 | Full, Field(discriminator="name")]


class Train(Spec):
    """The training schedule: AdamW (Loshchilov & Hutter 2019), a warm-up, clipping by global norm, a fixed sample order.

    ``stop_after``: the run ends after so many of the ``steps``, on the schedule of all of them; an engine makes ``num_steps``.
    """

    steps: Positive
    samples_per_step: Positive
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    beta1: Fraction
    beta2: Fraction
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    stop_after: Positive | None = None

    @property
    def num_steps(self) -> int:
        """How many optimizer steps the run makes."""
        return self.steps if self.stop_after is None else self.stop_after

    @model_validator(mode="after")
    def _warmup_and_run_end(self) -> Train:
        if self.warmup_steps >= self.steps:
            fewer = f"set train.warmup_steps to at most {self.steps - 1}, or train for longer"
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be less than steps ({self.steps}); {fewer}")
        if self.num_steps > self.steps:
            raise ValueError(f"stop_after ({self.stop_after}) must be at most steps ({self.steps})")
        return self

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimizer step ``step`` (0-based). Warm-up is linear and never zero; decay ends above zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return self.learning_rate * factor[self.schedule]


class Workload(Spec):
    """What every engine must do identically. Changing a field changes the result."""

    model: Model
    data: Data
    method: Method
    train: Train

    @functools.cached_property
    def key(self) -> str:
        """12 hex digits of the content hash."""
        return content_key(self)

    @property
    def label(self) -> str:
        """A readable, unique folder name: model, method, data and the start of the content hash."""
        return f"{self.model.name}-{self.method.name}-{self.data.name}-{self.key[:8]}"

    @property
    def key_without_seed(self) -> str:
        """What this workload shares with the same one under other seeds."""
        return content_key(self.model_copy(update={"train": self.train.model_copy(update={"seed": 0})}))

    @property
    def first_step(self) -> Workload:
        """This workload, ended after its first step: what it leaves is the first update."""
        return self.model_copy(update={"train": self.train.model_copy(update={"stop_after": 1})})

    @property
    def is_first_step(self) -> bool:
        """Whether this is the first step of a longer workload, run to look at its update and not to be timed."""
        return self.train.stop_after == 1 < self.train.steps


class EngineSpec(Spec):
    """One engine and how it does the work. Changing a knob may change speed and memory only.

    ``variant``: what the engine calls its knobs, a function of them; null for an engine without such names.
    """

    name: Name
    module: str
    processes: Positive
    environment: dict[str, str]
    knobs: dict[str, JsonValue]
    variant: str | None = None

    @functools.cached_property
    def key(self) -> str:
        """12 hex digits of the content hash."""
        return content_key(self)

    @property
    def title(self) -> str:
        """What people call it: ``hf``, ``unsloth/nockpt``."""
        return self.name if self.variant is None else f"{self.name}/{self.variant}"


class Cell(Spec):
    """One point of a sweep: a workload, an engine with its knobs, and the number of the repeat."""

    workload: Workload
    engine: EngineSpec
    repeat: Annotated[int, Field(ge=0)]

    @functools.cached_property
    def key(self) -> str:
        """12 hex digits of the content hash: what makes two cells the same cell."""
        return content_key(self)
