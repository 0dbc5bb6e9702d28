"""The kind of engine of examples/own_engine.py, registered for one test."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from sagellm.extensions import import_named
from sagellm.runtime.engine.kinds import KINDS

_EXAMPLES = Path(__file__).parent.parent / "examples"
PARROT: ModuleType = import_named("own_engine.py", _EXAMPLES)
_ENTRY = KINDS._registered.pop("parrot")


@contextmanager
def registered() -> Iterator[ModuleType]:
    """Register the kind for the duration of a test, as `import_named` does."""
    KINDS._registered["parrot"] = _ENTRY
    try:
        yield PARROT
    finally:
        del KINDS._registered["parrot"]
