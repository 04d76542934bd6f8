"""A model repository of the Hugging Face Hub on this disk: safetensors, configuration and tokenizer, never pickles or code."""

from __future__ import annotations

from pathlib import Path

from harness.errors import WeightsError
from harness.weights.sources import MODEL_FILES, TOKENIZER_FILES, split_hub


def snapshot(source: str, *, weights: bool) -> Path:
    """The folder of ``hub:OWNER/NAME[@REVISION]``, downloaded unless cached. Raises WeightsError that says why not and what to do."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, revision = split_hub(source)
    wanted = [*TOKENIZER_FILES, *MODEL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except HFValidationError as error:
        raise WeightsError(f"'{source}': {error}") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise WeightsError(f"'{source}': {_reason(status)} ({type(error).__name__}: {_first_line(error)})") from error


def _reason(status: int | None) -> str:
    if status in (401, 403):
        return "the Hub refuses it; accept the model's licence on its page and log in with `hf auth login`"
    if status == 404:
        return "the Hub knows no such repository or revision; check the name"
    return "the Hub cannot be reached and it is not in the local cache; connect, or copy the model here and use dir:PATH"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no details")
