"""The base model as every engine gets it: one content-addressed folder in the cache, made once, whatever the source."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.errors import StoreError, WeightsError
from harness.places import Sources
from harness.spec import Model
from harness.weights.building import building
from harness.weights.given_nf4 import from_given, is_given
from harness.weights.hub import snapshot
from harness.weights.random_init import random_values
from harness.weights.sources import TOKENIZER_FILES, fingerprint, resolve_source, tokenizer_fingerprint, write_atomically
from harness.weights.tensors import CODES, adapter_sha256, read_tensors, write_model
from harness.weights.tokenizer_files import write_tokenizer

FORMAT = 1  # raise when the same source would be written differently
_FP8_FORMAT = 1  # raise when harness.fp8 rounds differently
VOLATILE = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"})
PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


@dataclass(frozen=True, slots=True)
class Base:
    """A prepared base: its folder, its content hash (weights and architecture), and what the manifest says of it."""

    path: Path
    sha256: str
    description: str
    config: dict[str, Any]
    tokenizer_sha256: str

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.config["vocab_size"])

    @property
    def config_sha256(self) -> str:
        """Hash of the architecture: the configuration without what has no say in the function."""
        return _hash({key: value for key, value in self.config.items() if key not in VOLATILE})

    def content_sha256(self, weights_sha256: str) -> str:
        """Hash of these weights in this architecture."""
        return _hash({"weights": weights_sha256, "config": self.config_sha256})


def prepare_base(model: Model, sources: Sources, cache: Path) -> Base:
    """Make (or find) the base of ``model`` under ``cache``. Raises WeightsError, ConfigError or StoreError saying what to do."""
    weights, tokenizer, folder = _places(model, sources, cache)
    found = read_base(folder)
    if found is not None:
        return found
    with building(folder) as partial:
        _build(model, weights, tokenizer, partial)
    made = read_base(folder)
    if made is None:
        raise StoreError(f"{folder}: its manifest cannot be read; delete the folder and run again")
    return made


def find_base(model: Model, sources: Sources, cache: Path) -> Base | None:
    """The base that ``prepare_base`` would find, after the same checks; None where it must be made, or the Hub asked."""
    named = ((model.weights, sources.weights), (model.tokenizer, sources.tokenizer))
    if any(name.startswith("hub:") and path is None for name, path in named):
        return None
    return read_base(_places(model, sources, cache)[2])


@contextmanager
def tokenizing(model: Model, sources: Sources, cache: Path) -> Iterator[Base]:
    """What tokenising needs of the base of ``model``, its tokenizer and the rows of its embedding, without making or fetching weights;
    where the base is there, that one. A GGUF file tells its configuration with its weights only: it is made then. Raises what
    ``prepare_base`` raises.
    """
    found = find_base(model, sources, cache)
    weights = None if found else _locate(model.weights, sources.weights, weights=False)
    if found or (weights is not None and weights.suffix == ".gguf"):
        yield found or prepare_base(model, sources, cache)
        return
    tokenizer = _located_tokenizer(model, sources)
    with TemporaryDirectory(prefix="tokenizing-") as place:
        folder, config = Path(place), _config_alone(model, weights)
        (folder / "config.json").write_text(json.dumps(config))
        write_tokenizer(tokenizer, folder, vocab_size=config.get("vocab_size"))
        yield Base(folder, "", "not made yet", config, fingerprint_of_tokenizer(folder))


def _places(model: Model, sources: Sources, cache: Path) -> tuple[Path | None, Path, Path]:
    """Where the weights (None: random) and the tokenizer lie, unchanged since the plan, and the folder of the base that is made of them."""
    weights = _locate(model.weights, sources.weights)
    tokenizer = _located_tokenizer(model, sources)
    identity: dict[str, Any] = {"format": FORMAT, "dtype": model.dtype, "config": model.config}
    content = fingerprint(weights, cache) if weights else None
    if model.fingerprint not in (None, content):
        raise WeightsError(f"'{model.weights}': its files changed since the run was planned; run again")
    identity["weights"] = content or {"seed": model.seed}
    identity["tokenizer"] = tokenizer_fingerprint(tokenizer, cache)
    if model.tokenizer_fingerprint not in (None, identity["tokenizer"]):
        raise WeightsError(f"'{model.tokenizer}': its files changed since the run was planned; run again")
    return weights, tokenizer, cache / "base" / _hash(identity)[:20]


def _located_tokenizer(model: Model, sources: Sources) -> Path:
    tokenizer = _locate(model.tokenizer, sources.tokenizer, weights=False)
    if tokenizer is None:
        raise WeightsError(f"model.tokenizer: '{model.tokenizer}' names no tokenizer; expected dir:, hub: or package:")
    return tokenizer


def _locate(source: str, path: str | None, *, weights: bool = True) -> Path | None:
    if path is not None:
        if Path(path).exists():
            return Path(path)
        raise WeightsError(f"'{source}': {path} is gone since the run was planned; restore it or run again")
    if source.startswith("hub:"):
        return snapshot(source, weights=weights)
    return resolve_source(source)


def _build(model: Model, weights: Path | None, tokenizer: Path, folder: Path) -> None:
    size = "" if weights is None else f" from {weights.name}"
    print(f"preparing {model.name}: base weights{size} in {model.dtype} ...", flush=True)
    if weights is None:
        config, description = _from_config(model, tokenizer, folder)
    elif weights.suffix == ".gguf":
        config, description = _from_gguf(model, weights, folder)
    else:
        config, description = _from_folder(model, weights, folder)
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "_name_or_path")} | {"dtype": model.dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    write_tokenizer(tokenizer, folder, vocab_size=config.get("vocab_size"))
    base = Base(folder, "", description, config, fingerprint_of_tokenizer(folder))
    sha256 = base.content_sha256(adapter_sha256(folder))
    manifest = {
        "format": FORMAT,
        "base_sha256": sha256,
        "source": model.weights,
        "description": description,
        "dtype": model.dtype,
        "tokenizer_sha256": base.tokenizer_sha256,
    }
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))


def fingerprint_of_tokenizer(folder: Path) -> str:
    """Content hash of the tokenizer files in ``folder``, whatever else lies there."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return _hash({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})


def _config_alone(model: Model, weights: Path | None) -> dict[str, Any]:
    """The configuration that the base will have, of a folder or of the model's own values."""
    from harness.weights.structure import read_config

    if weights is None:
        return dict(read_config(model.config or {}, "model.config").to_dict())
    config = _config_file(weights)
    _check_config(model, config, weights.name)
    return config


def _from_config(model: Model, tokenizer: Path, folder: Path) -> tuple[dict[str, Any], str]:
    from harness.weights.structure import read_config, structure

    parsed = read_config(model.config or {}, "model.config")
    found = structure(parsed)
    (folder / "config.json").write_text(json.dumps(parsed.to_dict()))
    write_tokenizer(tokenizer, folder, vocab_size=parsed.to_dict().get("vocab_size"))  # one that does not fit: before gigabytes are drawn
    write_model(folder, found.shapes, model.dtype, random_values(found.kinds, model.seed, found.initializer_range))
    return {**parsed.to_dict(), "architectures": [found.architecture]}, f"random, seed {model.seed}"


def _from_gguf(model: Model, path: Path, folder: Path) -> tuple[dict[str, Any], str]:
    from harness.weights.gguf_file import gguf_weights

    config, shapes, values, description = gguf_weights(path)
    _check_config(model, config, path.name)
    write_model(folder, shapes, model.dtype, values)
    return config, description


def _from_folder(model: Model, source: Path, folder: Path) -> tuple[dict[str, Any], str]:
    config = _folder_config(source)
    _check_config(model, config, source.name)
    if is_given(config):
        return from_given(model, source, config, folder)
    stored = read_tensors(source)
    foreign = sorted({tensor.code for tensor in stored.values()} - set(CODES.values()))
    if foreign or "quantization_config" in config:
        kinds = ", ".join(foreign) or "quantization_config in its config.json"
        raise WeightsError(f"{source.name}: quantised weights ({kinds}); a base is stored in {', '.join(CODES)} or bitsandbytes' NF4")
    if {tensor.code for tensor in stored.values()} == {CODES[model.dtype]}:
        for file in (*source.glob("*.safetensors"), *source.glob("model.safetensors.index.json")):
            (folder / file.name).symlink_to(file.resolve())  # already what is wanted: no copy
        return config, f"{source.name}, as stored"
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    write_model(folder, shapes, model.dtype, lambda name, start, stop: stored[name].values(start, stop))
    origin = "/".join(sorted({name for name, code in CODES.items() for tensor in stored.values() if tensor.code == code}))
    return config, f"{source.name}, {origin} stored as {model.dtype}"


def _folder_config(source: Path) -> dict[str, Any]:
    if source.is_file():
        raise WeightsError(f"{source.name}: not a source of weights; expected a folder with config.json and *.safetensors, or a .gguf file")
    if not any(source.glob("*.safetensors")):
        pickled = sorted(file.name for file in source.iterdir() if file.suffix in PICKLED)
        why = f"found {pickled[0]}, but pickled weights can run code and are refused" if pickled else "found none"
        raise WeightsError(f"{source}: expected *.safetensors, {why}; convert the model with save_pretrained()")
    config, index = _config_file(source), source / "model.safetensors.index.json"
    try:
        wanted = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{source}: the index of its weights cannot be read ({error}); restore the folder") from error
    missing = sorted(name for name in wanted if not (source / name).is_file())
    if missing:
        raise WeightsError(f"{source}: {', '.join(missing)} of model.safetensors.index.json is missing; complete the download")
    return config


def _config_file(source: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((source / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{source}: config.json cannot be read ({error}); restore the folder") from error


def _check_config(model: Model, found: dict[str, Any], source: str) -> None:
    asked = model.config or {}
    keys = [key for key, value in asked.items() if found.get(key) != value]
    different = [f"model.config.{key}: {asked[key]!r} asked, {found.get(key)!r} in {source}" for key in keys]
    if different:
        raise WeightsError("\n".join([*different, "drop model.config (the weights bring their own), or make it agree"]))


def read_base(folder: Path) -> Base | None:
    """The prepared base in ``folder``; None where it has yet to be made, perhaps again."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        found = Base(folder, manifest["base_sha256"], manifest["description"], config, manifest["tokenizer_sha256"])
        complete = all(file.exists() for file in folder.glob("*.safetensors"))  # a link's target may have gone
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not complete:
        shutil.rmtree(folder)
        return None
    return found


def as_fp8(base: Base) -> Base:
    """``base`` with linear layers that compute in e4m3: the same folder, but another function, so another hash."""
    sha256 = _hash({"base": base.sha256, "fp8": _FP8_FORMAT})
    return replace(base, sha256=sha256, description=f"{base.description}; linear layers compute in e4m3")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
