"""The files of a model folder, which are recognised by name and first bytes, and read without
torch.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sagellm.runtime.models import ModelError

_HEAD_BYTES = 512
_LENGTH_BYTES = 8  # of a safetensors header's length, little-endian
_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_LFS_SIZE = re.compile(rb"^size (\d+)", re.MULTILINE)

GGUF_FIX = (
    "GGUF is llama.cpp's format and is not built; give the Hugging Face folder (config.json, "
    "tokenizer.json, *.safetensors) that it was made from"
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file.

    `dtype`: as the format spells it (BF16). `begin`: the offset in `file`, in bytes.
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


def file_state(file: Path) -> tuple[object, ...]:
    """A value that changes whenever the file changes."""
    try:
        held = file.resolve().stat()
    except OSError:
        return (file,)
    return file, held.st_dev, held.st_ino, held.st_size, held.st_mtime_ns, held.st_ctime_ns


def _lfs_pointer(head: bytes, path: Path) -> tuple[str, str]:
    size = _LFS_SIZE.search(head)
    left = f" to {human_bytes(int(size[1]))}" if size else ""
    return f"a Git LFS pointer{left}, not the file", f"run `git lfs pull` in {path.parent}"


def _gguf(head: bytes, path: Path) -> tuple[str, str]:
    return "a GGUF file", GGUF_FIX


def _web_page(head: bytes, path: Path) -> tuple[str, str]:
    return "a web page, not the file", "download it again: the link may need a login"


def _pickle(head: bytes, path: Path) -> tuple[str, str]:
    return "a pickled PyTorch file, which can run any code when read", conversion_fix(path.parent)


# Formats that a file with a right name may have instead: first bytes -> (its format, the fix).
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
    """Raise ModelError if the file has another format than its name promises. `name`: the model."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for begins, described in _FOREIGN.items():
        if head.lstrip().startswith(begins):  # a web page may begin with blank lines
            what, fix = described(head, path)
            raise ModelError(f"model {name}: {path.name} is {what}", fix)


def read_json(path: Path, name: str) -> dict[str, object]:
    """Read a JSON object. Raises ModelError if the file is missing, or of another format."""
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
    """Read the header of a safetensors file: its tensors by name. No tensor is read.

    Raises ModelError if the file is of another format, damaged, or cut off.
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
    """The length of the header in bytes, and its entries."""
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
    """The error for a file without a safetensors header. Raises a more precise error if the file
    has another known format.
    """
    refuse_foreign(name, path)
    cause = f"model {name}: {path.name} cannot be read: it has no safetensors header"
    return ModelError(cause, "download it again")


def _check_length(name: str, path: Path, data: int, entries: dict[str, _Entry]) -> None:
    """Raise ModelError unless the file is as long as its header says. `data`: the offset of the
    first tensor, in bytes.
    """
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


def conversion_fix(folder: Path) -> str:
    """The command that converts pickled weights to safetensors."""
    quoted = repr(str(folder))
    code = (
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({quoted}).save_pretrained({quoted})"
    )
    return f'convert them to safetensors, if you trust their source: python -c "{code}"'


def human_bytes(num_bytes: int) -> str:
    """A size with three significant digits and a unit."""
    size, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"


CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, SHARD_INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth")
_WEIGHT_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
_DOWNLOAD = "give the folder that holds config.json, tokenizer.json and *.safetensors"


def is_model_file(path: Path) -> bool:
    """Whether a file holds weights or a model's configuration, by its name."""
    return path.name == CONFIG or path.suffix.lower() in _WEIGHT_SUFFIXES


def refuse_file(name: str, path: Path) -> ModelError:
    """The error for a file that is given as a model."""
    if path.suffix.lower() == ".gguf":
        return ModelError(f"model {name}: it is a GGUF file", GGUF_FIX)
    fix = f"give the folder that it is in: {path.parent}"
    return ModelError(f"model {name}: it is a file, and a model is a folder", fix)


def check_config(name: str, path: Path) -> None:
    """Raise ModelError if a folder has no config.json. The message names what the folder seems to
    be.
    """
    if (path / CONFIG).is_file():
        return
    if not any(path.iterdir()):
        raise ModelError(f"model {name}: the folder {path} is empty", _DOWNLOAD)
    if found := _first_match(path, ("*.gguf",)):
        raise ModelError(f"model {name}: the folder holds a GGUF file ({found})", GGUF_FIX)
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"model {name}: it is a LoRA adapter, not a model", _merge_fix(path))
    if inner := _first_match(path, (f"*/{CONFIG}",)):
        fix = f"give {path / inner}"
        raise ModelError(f"model {name}: {CONFIG} is missing in {path}, not below it", fix)
    if (path / "params.json").is_file():
        cause = f"model {name}: {CONFIG} is missing; params.json is of the layout of its maker"
        raise ModelError(cause, "download the same model in Hugging Face layout")
    raise ModelError(f"model {name}: {CONFIG} is missing in {path}", _DOWNLOAD)


def check_weights(name: str, path: Path, shards: tuple[str, ...]) -> None:
    """Raise ModelError if weights are pickled or missing, or if the index names a file outside the
    folder.
    """
    for file in shards:
        if Path(file).name != file:
            raise ModelError(f"model {name}: {SHARD_INDEX} names {file!r}, outside its folder")
    absent = [file for file in shards if not (path / file).is_file()]
    if not absent:
        return
    if (path / SHARD_INDEX).is_file():
        of = f", {len(absent)} of {len(shards)}" if len(shards) > 1 else ""
        cause = f"{SHARD_INDEX} names {absent[0]}, which is missing in {path}{of}"
        raise ModelError(f"model {name}: {cause}", "download the missing files")
    if found := _first_match(path, _PICKLED):
        raise ModelError(
            f"model {name}: only pickled weights ({found}), which can run any code when read",
            conversion_fix(path),
        )
    if found := _first_match(path, ("*.gguf",)):
        raise ModelError(f"model {name}: its weights are a GGUF file ({found})", GGUF_FIX)
    if found := _first_match(path, ("*.safetensors",)):
        fix = f"rename it to {WEIGHTS}, or add {SHARD_INDEX} if it is one of several"
        raise ModelError(f"model {name}: {WEIGHTS} is missing in {path}; {found} is there", fix)
    raise ModelError(f"model {name}: {WEIGHTS} is missing in {path}", "download it")


def check_tokenizer(name: str, path: Path) -> None:
    """Raise ModelError if tokenizer.json is missing or has another format. The file is not
    parsed.
    """
    if (path / TOKENIZER).is_file():
        refuse_foreign(name, path / TOKENIZER)
        return
    others = ("tokenizer.model", "vocab.json", "*.tiktoken", "tekken.json")
    found = _first_match(path, others)
    if found is None:
        cause = f"model {name}: {TOKENIZER} is missing in {path}"
        raise ModelError(cause, "download it, or copy it from the model that this one was made of")
    quoted = repr(str(path))
    code = f"from transformers import AutoTokenizer as T; T.from_pretrained({quoted})"
    raise ModelError(
        f"model {name}: {TOKENIZER} is missing in {path}; {found} is there, which is not read",
        f'pip install transformers sentencepiece, and convert it once: python -c "{code}.'
        f'save_pretrained({quoted})"',
    )


def _first_match(path: Path, patterns: tuple[str, ...]) -> str | None:
    """The first path, in alphabetical order, that a pattern matches; if it is inside a folder, the
    name of the folder.
    """
    for pattern in patterns:
        for found in sorted(path.glob(pattern)):
            return found.relative_to(path).parts[0]
    return None


def _merge_fix(path: Path) -> str:
    try:
        base = read_json(path / "adapter_config.json", str(path)).get("base_model_name_or_path")
    except ModelError:
        base = None
    of = f" ({json.dumps(base)})" if isinstance(base, str) else ""
    return f"merge it into its base model{of} with peft's merge_and_unload, and give that folder"
