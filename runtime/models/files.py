"""One file of a model folder: recognised by its first bytes, and read without torch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sagellm.runtime.models.fault import ModelError

_HEAD_BYTES = 512
_LENGTH_BYTES = 8  # of a safetensors header's length, little-endian
_MOST_HEADER_BYTES = 100_000_000  # what the safetensors library reads at most
_LFS_SIZE = re.compile(rb"^size (\d+)", re.MULTILINE)

GGUF_FIX = (
    "GGUF is llama.cpp's format and is not built; give the Hugging Face folder (config.json, "
    "tokenizer.json, *.safetensors) that it was made from"
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file: dtype as the format spells it (BF16), shape, and where its
    bytes are in the file of that name.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    num_bytes: int


class _Entry(msgspec.Struct):
    """One tensor's entry in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _lfs_pointer(head: bytes, path: Path) -> tuple[str, str]:
    size = _LFS_SIZE.search(head)
    left = f" to {human_bytes(int(size[1]))}" if size else ""
    return f"a Git LFS pointer{left}, not the file", f"run `git lfs pull` in {path.parent}"


def _gguf(head: bytes, path: Path) -> tuple[str, str]:
    return "a GGUF file", GGUF_FIX


def _web_page(head: bytes, path: Path) -> tuple[str, str]:
    return "a web page, not the file", "download it again: the link may need a login"


def _pickle(head: bytes, path: Path) -> tuple[str, str]:
    return "a pickled PyTorch file, which can run any code when read", convert_fix(path.parent)


# What files turn out to be instead: how they begin -> (what that is, what helps).
_FOREIGN: dict[bytes, Callable[[bytes, Path], tuple[str, str]]] = {
    b"version https://git-lfs": _lfs_pointer,
    b"GGUF": _gguf,
    b"<!doctype html": _web_page,
    b"<!DOCTYPE html": _web_page,
    b"<html": _web_page,
    b"PK\x03\x04": _pickle,
    b"\x80\x02": _pickle,
}


def refuse_foreign(name: str, path: Path) -> None:
    """Raise ModelError for a file that is something else under a right name."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for begins, told in _FOREIGN.items():
        if head.lstrip().startswith(begins):
            what, fix = told(head, path)
            raise ModelError(f"model {name}: {path.name} is {what}", fix)


def read_json(path: Path, name: str) -> dict[str, object]:
    """A JSON object. Raises ModelError where the file is missing, or is something else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(name, path, error) from None
    try:
        return msgspec.json.decode(content, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        refuse_foreign(name, path)
        cause = f"model {name}: {path} is not valid JSON: {error}"
        raise ModelError(cause, "download it again") from error


def _unreadable(name: str, path: Path, error: OSError) -> ModelError:
    if isinstance(error, FileNotFoundError):
        return ModelError(f"model {name}: {path.name} is missing in {path.parent}")
    reason = error.strerror or str(error)
    return ModelError(f"model {name}: {path} cannot be read: {reason}", "check its permissions")


def read_header(name: str, path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by its header.

    Raises ModelError where the file is something else, is damaged, or ends too early.
    """
    try:
        length, entries = _entries(name, path)
    except OSError as error:
        raise _unreadable(name, path, error) from None
    data = _LENGTH_BYTES + length
    _check_length(name, path, data, entries)
    found = {}
    for key, entry in entries.items():
        begin, end = entry.data_offsets
        found[key] = StoredTensor(entry.dtype, entry.shape, path.name, data + begin, end - begin)
    return found


def _entries(name: str, path: Path) -> tuple[int, dict[str, _Entry]]:
    """The length of the header, and its entries."""
    with path.open("rb") as file:
        begins = file.read(_LENGTH_BYTES + 1)
        length = int.from_bytes(begins[:_LENGTH_BYTES], "little")
        if begins[_LENGTH_BYTES:] != b"{" or length > _MOST_HEADER_BYTES:
            raise _no_header(name, path)
        header = b"{" + file.read(length - 1)
    if len(header) < length:
        raise _cut_off(name, path, _LENGTH_BYTES + length, "header")
    try:
        found = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        found.pop("__metadata__", None)
        return length, {key: msgspec.json.decode(raw, type=_Entry) for key, raw in found.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _no_header(name, path) from None


def _no_header(name: str, path: Path) -> ModelError:
    """A file that is no safetensors file. Raises ModelError where it is known what it is."""
    refuse_foreign(name, path)
    cause = f"model {name}: {path.name} cannot be read: it has no safetensors header"
    return ModelError(cause, "download it again")


def _check_length(name: str, path: Path, data: int, entries: dict[str, _Entry]) -> None:
    """`data`: where the tensors begin in the file."""
    promised = data + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    found = path.stat().st_size
    if found < promised:
        raise _cut_off(name, path, promised, "tensors")
    if found > promised:
        cause = f"model {name}: {path.name} has {found - promised} bytes more than its header names"
        raise ModelError(cause, "download it again")


def _cut_off(name: str, path: Path, promised: int, what: str) -> ModelError:
    found = path.stat().st_size
    return ModelError(
        f"model {name}: {path.name} is cut off: it has {found} bytes, and its {what} need "
        f"{promised}",
        "the download did not end: download it again",
    )


def convert_fix(folder: Path) -> str:
    """How to make safetensors of pickled weights."""
    quoted = repr(str(folder))
    code = (
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({quoted}).save_pretrained({quoted})"
    )
    return f'convert them to safetensors, if you trust their source: python -c "{code}"'


def human_bytes(num_bytes: int) -> str:
    """A size in at most four letters and a unit."""
    size, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"
