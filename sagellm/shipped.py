"""The graphs that ship with the package, and which file the name of a graph means.

- A shipped name (`pd`) means the shipped graph, whatever the current folder holds.
- Any other name is a path, and means that file and no other.
- `graphs/pd.yaml`, the path of a shipped graph in the repository, means the shipped graph where
  there is no folder `graphs`: examples work from a clone and from an installed package.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from sagellm import graphs
from sagellm.graphs.vocabulary import nearest

_FOLDER = Path(graphs.__file__).parent
_IN_REPOSITORY = re.compile(r"graphs/(\w+)\.yaml")
SUFFIXES = (".yaml", ".yml")


def shipped_names() -> tuple[str, ...]:
    """The names of the shipped graphs."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def shipped_file(name: str) -> Path:
    """The file of a shipped graph, by its name."""
    return _FOLDER / f"{name}.yaml"


def graph_file(name: str | Path) -> Path:
    """The file that a name means, which need not exist. A `Path` is always a path."""
    if isinstance(name, str) and name in shipped_names():
        return shipped_file(name)
    path, in_repository = Path(name), _IN_REPOSITORY.fullmatch(str(name))
    if in_repository and in_repository[1] in shipped_names() and not path.parent.exists():
        return shipped_file(in_repository[1])
    return path


def shadowed_by(name: str, folder: Path) -> str | None:
    """What in `folder` has the name of a shipped graph, as it can be written: `./pd.yaml`."""
    if name not in shipped_names():
        return None
    found = _first(folder, (f"{name}{suffix}" for suffix in (*SUFFIXES, "")))
    is_shipped = found is not None and (folder / found).samefile(shipped_file(name))
    return None if is_shipped else found


def hint(name: str) -> str:
    """What to write instead of a graph that is not there."""
    close = nearest(Path(name).stem, shipped_names())
    return (
        f"did you mean {close}?"
        if close
        else f"give a file, or one of {', '.join(shipped_names())}"
    )


def _first(folder: Path, names: Iterable[str]) -> str | None:
    return next((f"./{name}" for name in names if (folder / name).exists()), None)
