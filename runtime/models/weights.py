"""A model's weights: a lazy mapping over one or many safetensors files."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from sagellm.backends.progress import Loading, Progress, silent
from sagellm.graphs.ir import Graph
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.models.folder import ModelError, ModelFolder, shard_files
from sagellm.runtime.models.pages import give_back

_HELD_BYTES = 32 << 20  # of mapped pages in memory, before they are given back


class _Shard(Protocol):
    """An open safetensors file, whose library has no types."""

    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


class Weights(Mapping[str, torch.Tensor]):
    """Tensor by name, read from disk each time it is asked for; headers are read at once.

    Pages that were read are given back every now and then, so that a model which makes copies of
    its weights does not hold them twice. The tensors stay good, but nobody may write to them.

    `progress` hears how many bytes have been read.
    Raises ModelError where a file is damaged, or lacks a tensor that the index says it holds.
    """

    def __init__(self, folder: ModelFolder, progress: Progress = silent) -> None:
        if folder.path is None:
            raise ModelError(f"model {folder.name} has no weights")
        self._folder = folder.name
        self._files: dict[str, _Shard] = {}
        self._paths: list[Path] = []
        self._unreturned_bytes = 0
        self._progress = progress
        self._read_bytes = self._told_bytes = 0
        for file, promised in shard_files(folder.name, folder.path).items():
            held = self._open(folder.path / file, file)
            missing = sorted(set(promised) - set(held.keys()))
            if missing:
                raise ModelError(f"model {folder.name}: {file} lacks tensor {missing[0]}")
            self._files.update(dict.fromkeys(held.keys(), held))
            self._paths.append(folder.path / file)
        self._total_bytes = sum(path.stat().st_size for path in self._paths)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._files[name].get_tensor(name)
        if self._unreturned_bytes >= _HELD_BYTES:
            self.give_back()
        self._unreturned_bytes += tensor.nbytes
        self._tell(tensor.nbytes)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def give_back(self) -> None:
        """The pages of all tensors; those that are read again come again."""
        give_back(self._paths)
        self._unreturned_bytes = 0

    def loaded(self) -> None:
        """Nothing more is read: what was not needed, or is read as it is asked for, counts too."""
        self._progress(Loading(self._folder, self._total_bytes, self._total_bytes))

    def _tell(self, num_bytes: int) -> None:
        """Every now and then; what is read twice never makes it more than all."""
        self._read_bytes = min(self._read_bytes + num_bytes, self._total_bytes - 1)
        if self._read_bytes - self._told_bytes >= _HELD_BYTES:
            self._told_bytes = self._read_bytes
            self._progress(Loading(self._folder, self._read_bytes, self._total_bytes))

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
