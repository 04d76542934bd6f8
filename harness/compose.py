"""From the command line to composed configurations: Hydra's groups, overrides and sweeps, every mistake reported at once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from harness.errors import ConfigError, closest, nearest
from harness.machine import has_cuda

CONF = Path(__file__).resolve().parent.parent / "conf"
ROOT = "config"


def compose_one(overrides: Sequence[str]) -> DictConfig:
    """The configuration of ``python -m harness OVERRIDES`` without sweeps, unresolved, Hydra's own node removed.

    Here and below, ``hydra.searchpath=[file:///FOLDER]`` adds a folder of one's own groups and options.
    """
    with _hydra():
        given = _with_machine(overrides)
        if several := [_line(override) for override in _parse(given) if override.is_sweep_override()]:
            raise ConfigError(f"{', '.join(several)}: several values, and one is asked for")
        return _without_hydra(_compose(given))


def searchpath(folder: Path) -> str:
    """The override that adds a folder of one's own groups and options. Raises ConfigError where it is not there."""
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {folder}: there is no such folder")
    return f"hydra.searchpath=[file://{folder.resolve()}]"


def compose_all(overrides: Sequence[str], *, multirun: bool | None) -> list[tuple[tuple[str, ...], DictConfig]]:
    """Every point of the sweep that ``overrides`` describe: its own overrides, and its configuration.

    ``multirun`` is the ``-m`` of the command line, None of one that takes a single cell and has no ``-m``; a config with
    ``hydra.mode: MULTIRUN`` sets it too.
    Raises ConfigError naming every override that cannot be used.
    """
    with _hydra():
        parsed = _parse(_with_machine(overrides))
        fixed = [_line(override) for override in parsed if not override.is_sweep_override()]
        sweeps = [override for override in parsed if override.is_sweep_override()]
        if empty := [_line(override) for override in sweeps if not _values(override)]:
            raise ConfigError("\n".join(f"{line}: these are no values" for line in empty))
        # With the first value of every sweep: a fixed override may be valid only under a choice that is swept.
        root = _compose([*fixed, *(_values(override)[0] for override in sweeps)])
        is_sweep = bool(multirun) or str(root.hydra.mode) == "RunMode.MULTIRUN"
        if is_sweep:
            sweeps += _from_file(root, {override.key_or_group for override in parsed})
        several = ", ".join(_line(override) for override in sweeps if override.is_sweep_override())
        if several and (multirun is None or not is_sweep):
            why = "several values, and one is asked for" if multirun is None else "several values make a sweep; add -m"
            raise ConfigError(f"{several}: {why}")
        return _points(fixed, sweeps) if sweeps else [((), _without_hydra(root))]


def _from_file(root: DictConfig, given: set[str]) -> list[Override]:
    """The sweep of ``hydra.sweeper.params``; what the command line says of a key goes first."""
    params = root.hydra.sweeper.params or {}
    lines = [f"{key!s}={value}" for key, value in params.items()]
    return [override for override in _parse(lines) if override.key_or_group not in given]


def _points(fixed: list[str], sweeps: list[Override]) -> list[tuple[tuple[str, ...], DictConfig]]:
    """The product. Composing takes 0.2 s, so it is done once for each choice of groups; single values are set on a copy."""
    lists = [_values(override) for override in sweeps]
    is_value = [_is_plain_value(override) for override in sweeps]
    composed: dict[tuple[str, ...], DictConfig] = {}
    points = []
    for point in itertools.product(*lists):
        values = tuple(itertools.compress(point, is_value))
        groups = tuple(itertools.compress(point, (not one for one in is_value)))
        if groups not in composed:
            composed[groups] = _without_hydra(_compose([*fixed, *groups]))
        points.append((point, _with_values(composed[groups], values)))
    return points


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    return [_line(override)]


def _is_plain_value(override: Override) -> bool:
    return not override.is_add() and not override.is_delete() and not _options(override.key_or_group)


def _with_values(config: DictConfig, lines: tuple[str, ...]) -> DictConfig:
    config = copy.deepcopy(config)
    problems = []
    for override in _parse(lines):
        if _is_unknown(override, config):
            problems.append(_unknown(override, config))
        else:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=False)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _with_machine(overrides: Sequence[str]) -> list[str]:
    """``machine=`` follows the hardware unless the user chose."""
    chosen = any(line.startswith("machine=") for line in overrides)
    return list(overrides) if chosen or not has_cuda() else ["machine=cuda", *overrides]


def _parse(lines: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed, problems = [], []
    for line in lines:
        try:
            parsed += parser.parse_overrides([line])
        except HydraException:
            problems.append(f"{line}: not an override; write key=value, group=option, +key=value or ~key")
    if problems:
        raise ConfigError("\n".join(problems))
    return parsed


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        return compose(ROOT, overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("\n".join(_diagnose(overrides)) or str(error)) from error


def _diagnose(overrides: Sequence[str]) -> list[str]:
    """Hydra stops at the first override it cannot use: find all of them, each with the nearest thing that exists."""
    problems, good = [], []
    for override in _parse(overrides):
        options = _options(override.key_or_group)
        if options and not override.is_delete():
            wanted = override.value()
            if isinstance(wanted, str) and wanted not in options:
                problems.append(f"{override.key_or_group}={wanted}: there is no such option; {nearest(wanted, options)}")
                continue
            good.append(override)
    config = compose(ROOT, overrides=[_line(override) for override in good])
    for override in _parse(overrides):
        if not _options(override.key_or_group) and not override.is_add() and _is_unknown(override, config):
            problems.append(_unknown(override, config))
    return problems


def _is_unknown(override: Override, config: DictConfig) -> bool:
    try:
        return OmegaConf.select(config, override.key_or_group, default=config, throw_on_missing=True) is config
    except (MissingMandatoryValue, InterpolationToMissingValueError):  # it waits for a value, as data.path of data=jsonl, or for another's
        return False


def _line(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def _unknown(override: Override, config: DictConfig) -> str:
    return f"{override.key_or_group}: unknown key; {_nearest_key(override.key_or_group, config)}"


def _nearest_key(key: str, config: DictConfig) -> str:
    """The nearest key below the deepest part of ``key`` that exists, or all that stand there. The part that is right makes nothing near."""
    above, node = "", config
    *parts, last = key.split(".")
    for part in parts:
        below = OmegaConf.select(node, part)
        if not isinstance(below, DictConfig):
            return f"{above}{part} has no keys here"
        above, node = f"{above}{part}.", below
    names = ({str(name) for name in node} | (set(_groups()) if not above else set())) - {"hydra"}
    near = closest(last, names)
    return f"did you mean '{above}{near}'?" if near else nearest(last, names)


def _options(group: str) -> list[str]:
    """Of ``group``, those in folders below it too: ``engine=unsloth/nockpt`` is a variant of ``engine=unsloth``."""
    loader = GlobalHydra.instance().config_loader()
    options = list(loader.get_group_options(group))
    below = loader.list_groups(group) if options else []
    return [*options, *(f"{folder}/{name}" for folder in below for name in loader.get_group_options(f"{group}/{folder}"))]


def _groups() -> list[str]:
    return list(GlobalHydra.instance().config_loader().list_groups(""))


def _without_hydra(config: DictConfig) -> DictConfig:
    with open_dict(config):
        config.pop("hydra")
    return config


def plain(config: DictConfig) -> dict[str, Any]:
    """``config`` as plain data, interpolations resolved. Raises ConfigError naming every value that is still to be given."""
    try:
        container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        missing = sorted(_missing(OmegaConf.to_container(config, resolve=False)))
        raise ConfigError("\n".join(f"{key}: required, but not given; add {key}=…" for key in missing) or str(error)) from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _missing(node: Any, key: str = "") -> Iterator[str]:
    """Keys that wait for a value. (Those of others that refer to it are not named: omegaconf's own search stops at such a one.)"""
    if isinstance(node, dict):
        for name, below in node.items():
            yield from _missing(below, f"{key}.{name}" if key else str(name))
    elif node == "???":
        yield key


@contextmanager
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
