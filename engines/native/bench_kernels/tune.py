"""Times every candidate cut of the kernels that have a choice, at the sizes of some models, and makes this GPU's table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engines.native import tiles
from engines.native.bench_kernels.setting import Call, Setting
from engines.native.bench_kernels.variants import VARIANTS, launch_all
from engines.native.kernels import attention, cross_entropy, nf4, outer, swiglu_gradients
from engines.native.tiles import Entry, Table

Milliseconds = Callable[[Call], float]


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel that may be cut in several ways. ``kernel``: its name in a table; ``size``: elements that it walks over in a setting;
    ``attends``: of attention, the kernel whose name in a table depends on the size of a head.
    """

    kernel: str
    default: Any
    candidates: tuple[Any, ...]
    size: Callable[[Setting], int]
    attends: str | None = None


CHOICES: Mapping[str, Choice] = {
    "swiglu_gradients": Choice(
        "swiglu_gradients", swiglu_gradients.TILE, swiglu_gradients.TILES, lambda s: s.tokens * s.shape.intermediate_size
    ),
    "outer_dA": Choice("outer_normed", outer.TILE, outer.TILES, lambda s: s.tokens * s.shape.hidden_size),
    "outer_dB": Choice("outer", outer.TILE, outer.TILES, lambda s: s.tokens * s.layer.qkv.num_outputs),
    "cross_entropy": Choice("cross_entropy", cross_entropy.SWEEP, cross_entropy.SWEEPS, lambda s: min(s.tokens, 2048) * s.shape.vocab_size),
    "decode_nf4": Choice("decode_nf4", nf4.CUT, nf4.CUTS, lambda s: s.layer.down.num_outputs * s.layer.down.num_inputs),
    **{
        name: Choice(name, cut, attention.CANDIDATES[name], lambda s: s.tokens * s.shape.query_size, name.rpartition("_")[0])
        for name, cut in attention.CUTS.items()
    },
}


@dataclass(frozen=True, slots=True)
class Found:
    """What one kernel's candidates took at one size, milliseconds; ``problems`` of those that could not be launched."""

    kernel: str
    size: int
    default: Any
    milliseconds: Mapping[Any, float]
    problems: tuple[str, ...] = ()

    @property
    def best(self) -> Any:
        """The fastest that beats the default by more than noise, else the default."""
        return tiles.fastest(self.milliseconds, self.default)

    def entry(self, source: str) -> Entry:
        """For the table."""
        best = self.best
        return Entry(
            size=self.size,
            cut=asdict(best),
            milliseconds=round(self.milliseconds[best], 4),
            default_milliseconds=round(self.milliseconds[self.default], 4),
            source=source,
        )

    def line(self) -> str:
        """For people."""
        best = self.best
        what = "the default" if best == self.default else f"{best} instead of {self.default}"
        took = f"{self.milliseconds[best]:.4f} ms, default {self.milliseconds[self.default]:.4f}"
        return "\n".join([f"{self.kernel} {self.size:,}: {what} ({took}; {len(self.milliseconds)} candidates)", *self.problems])


def timed(name: str, setting: Setting, milliseconds: Milliseconds, failures: tuple[type[Exception], ...]) -> Found:
    """Time the candidates of one kernel. Raises RuntimeError where not even the default runs."""
    choice = CHOICES[name]
    variants = [variant for variant in VARIANTS[choice.attends or name](setting) if variant.cut in choice.candidates]
    launch_all(variants)
    took, problems = {}, []
    for variant in variants:
        try:
            took[variant.cut] = milliseconds(variant.call)
        except failures as error:
            problems.append(f"  {variant.label}: failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    if choice.default not in took:
        raise RuntimeError("\n".join([f"{name}: its default cut does not run here", *problems]))
    return Found(choice.kernel, choice.size(setting), choice.default, took, tuple(problems))


def every(
    settings: Sequence[Setting], names: Sequence[str], milliseconds: Milliseconds, failures: tuple[type[Exception], ...]
) -> Iterator[Found]:
    """Of every setting; a size that came before is not timed again."""
    seen: set[tuple[str, int]] = set()
    for setting in settings:
        for name in names:
            key = CHOICES[name].kernel, CHOICES[name].size(setting)
            attends = CHOICES[name].attends
            fits = attends is None or attention._name(attends, setting.shape.head_dim) == name
            if fits and key not in seen:
                seen.add(key)
                yield timed(name, setting, milliseconds, failures)


def table_of(found: Sequence[Found], device: str, provenance: str, source: str) -> Table:
    """The table of this GPU."""
    kernels: dict[str, tuple[Entry, ...]] = {}
    for one in found:
        kernels[one.kernel] = (*kernels.get(one.kernel, ()), one.entry(source))
    return Table(device=device, provenance=provenance, kernels=kernels)
