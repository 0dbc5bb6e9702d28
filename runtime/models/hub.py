"""Models of the Hugging Face Hub: only the files that are needed, and never code."""

import errno
from pathlib import Path

import huggingface_hub  # which imports its HTTP client, and its errors, when it is asked for a file

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
REFUSED = ["*.py", "*.bin", "*.pt", "*.pth", "*/*"]


class HubError(OSError):
    """The Hub did not give the model: `cause` says why, `fix` what to do."""

    def __init__(self, cause: str, fix: str) -> None:
        self.cause = cause
        self.fix = fix
        super().__init__(f"{cause}; {fix}")


def download(name: str) -> Path:
    """The local snapshot of a Hub model, downloaded where it is not cached. Raises HubError."""
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=PATTERNS, ignore_patterns=REFUSED
        )
    except (OSError, ValueError) as error:  # errors of the Hub and of its HTTP client are OSErrors
        raise _explained(error) from error
    return Path(folder)


def _explained(error: OSError | ValueError) -> HubError:
    """The Hub answers alike for a private model and for one that is not there."""
    errors = huggingface_hub.errors
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            "it is gated", "accept its licence on its page at the Hub, and set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        cause = "the Hub has no such model, or it is private"
        return HubError(cause, "check the name, or set HF_TOKEN")
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = "it is not in the cache, and the Hub cannot be reached"
        return HubError(cause, "check the network and HF_HUB_OFFLINE, or give a folder")
    if isinstance(error, errors.HfHubHTTPError):
        cause = f"the Hub answered {error.response.status_code}"
        return HubError(cause, "try again later, or give a folder")
    number = getattr(error, "errno", None)
    cache = huggingface_hub.constants.HF_HUB_CACHE
    if number == errno.ENOSPC:
        return HubError(f"the disk is full at {cache}", "free some space, or set HF_HOME")
    if number in (errno.EACCES, errno.EROFS):
        return HubError(f"{cache} cannot be written to", "set HF_HOME to a folder of yours")
    cause = f"the download failed ({type(error).__name__})"
    return HubError(cause, "check the name, or give a folder")
