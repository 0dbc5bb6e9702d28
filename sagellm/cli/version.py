"""`sagellm version`: what is installed."""

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import msgspec

LISTED = ("torch", "trio", "msgspec", "safetensors", "tokenizers", "pyzmq", "starlette")


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
    """List sagellm, Python, the platform and the packages that matter, with their versions.

    Parameters
    ----------
    json
        Print one object, name to version; null for a package that is missing.
    """
    found = {
        "sagellm": sagellm_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **versions(),
    }
    if json:
        print(msgspec.json.encode(found).decode())
        return
    for name, number in found.items():
        print(f"{name:12} {number or 'missing'}")
