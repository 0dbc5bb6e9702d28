"""A model's weights: a lazy mapping over one or many safetensors files."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from sagellm.graphs.ir import Graph
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.models.folder import ModelError, ModelFolder, shard_files


class _Shard(Protocol):
    """An open safetensors file, whose library has no types."""

    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


class Weights(Mapping[str, torch.Tensor]):
    """Tensor by name, read from disk each time it is asked for; headers are read at once.

    Raises ModelError where a file is damaged, or lacks a tensor that the index says it holds.
    """

    def __init__(self, folder: ModelFolder) -> None:
        if folder.path is None:
            raise ModelError(f"model {folder.name} has no weights")
        self._folder = folder.name
        self._files: dict[str, _Shard] = {}
        for file, promised in shard_files(folder.name, folder.path).items():
            held = self._open(folder.path / file, file)
            missing = sorted(set(promised) - set(held.keys()))
            if missing:
                raise ModelError(f"model {folder.name}: {file} lacks tensor {missing[0]}")
            self._files.update(dict.fromkeys(held.keys(), held))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def require(self, names: Iterable[str]) -> None:
        """Raise ModelError for the first name that no file holds."""
        for name in names:
            if name not in self._files:
                close = nearest(name, list(self._files))
                hint = f"; the nearest there is {close}" if close else ""
                raise ModelError(f"model {self._folder}: tensor {name} is missing{hint}")

    def _open(self, path: object, file: str) -> _Shard:
        try:
            return cast(_Shard, safe_open(str(path), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model {self._folder}: {file} cannot be read: {error}") from error


def weight_names(graph: Graph) -> tuple[str, ...]:
    """The tensors that a kernel graph reads, in the order of its nodes."""
    named = (node.attrs.get(key) for node in graph.nodes for key in ("weight", "bias"))
    return tuple(dict.fromkeys(name for name in named if isinstance(name, str) and name))
