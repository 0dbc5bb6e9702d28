"""Models of the Hugging Face Hub: only the files that are needed, and never code."""

from pathlib import Path

import huggingface_hub  # which imports its HTTP client, and its errors, when it is asked for a file

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
REFUSED = ["*.py", "*.bin", "*.pt", "*.pth", "*/*"]


class HubError(OSError):
    """The Hub did not give the model."""


def download(name: str) -> Path:
    """The local snapshot of a Hub model, downloaded where it is not cached. Raises HubError."""
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=PATTERNS, ignore_patterns=REFUSED
        )
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        raise HubError("the Hub cannot be reached and the model is not cached") from error
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise HubError(f"the Hub refused it ({type(error).__name__})") from error
    return Path(folder)
