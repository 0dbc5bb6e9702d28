"""Models of the Hugging Face Hub: only the files that are needed, and never code."""

import errno
from pathlib import Path

import huggingface_hub  # which imports its HTTP client, and its errors, when it is asked for a file

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
REFUSED = ["*.py", "*.bin", "*.pt", "*.pth", "*/*"]


class HubError(OSError):
    """The Hub did not give the model; the text has the cause and a fix."""


def download(name: str) -> Path:
    """The local snapshot of a Hub model, downloaded where it is not cached. Raises HubError."""
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=PATTERNS, ignore_patterns=REFUSED
        )
    except (OSError, ValueError) as error:  # errors of the Hub and of its HTTP client are OSErrors
        raise HubError(_explained(error)) from error
    return Path(folder)


def _explained(error: OSError | ValueError) -> str:
    """Cause and fix. The Hub answers alike for a private model and for one that is not there."""
    errors = huggingface_hub.errors
    if isinstance(error, errors.GatedRepoError):
        return "it is gated; accept its licence on its page at the Hub, and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has no such model, or it is private; check the name, or set HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "it is not in the cache, and the Hub cannot be reached; "
            "check the network and HF_HUB_OFFLINE, or give a folder"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub answered {error.response.status_code}; try again later, or give a folder"
    if getattr(error, "errno", None) == errno.ENOSPC:
        return f"the disk is full at {_cache()}; free some space, or set HF_HOME to another disk"
    if getattr(error, "errno", None) in (errno.EACCES, errno.EROFS):
        return f"{_cache()} cannot be written to; set HF_HOME to a folder of yours"
    return f"the download failed ({type(error).__name__}); check the name, or give a folder"


def _cache() -> str:
    return str(huggingface_hub.constants.HF_HUB_CACHE)
