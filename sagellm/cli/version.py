"""`sagellm version`: what is installed."""

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import msgspec

LISTED = ("torch", "trio", "msgspec", "safetensors", "tokenizers")


def sagellm_version() -> str:
    """The version of this package, as installed."""
    return installed("sagellm")


def versions() -> dict[str, str | None]:
    """Package name -> version, None where it is missing; no package is imported."""
    return {name: _version(name) for name in LISTED}


def _version(name: str) -> str | None:
    try:
        return installed(name)
    except PackageNotFoundError:
        return None


def version(*, json: bool = False) -> None:
    """Say what is installed.

    Parameters
    ----------
    json
        Print an object: sagellm, python, and the packages that matter.
    """
    if not json:
        print(f"sagellm {sagellm_version()}")
        return
    found = {"sagellm": sagellm_version(), "python": platform.python_version(), **versions()}
    print(msgspec.json.encode(found).decode())
