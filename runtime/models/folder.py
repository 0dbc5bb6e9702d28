"""Finds a model's folder by name or on the Hub, and checks it before any weight is read.

Only the needed files of a Hub model are downloaded, and never code.
"""

import errno
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import huggingface_hub  # cheap: it imports its HTTP client and its errors at the first download

from sagellm.graphs.models import EmbeddingHead, ModelFacts, UnsupportedModel, check, facts
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.models import FolderWarning, ModelError
from sagellm.runtime.models.embedding_files import (
    HeadOptions,
    longest_text,
    read_head,
    with_prefix,
)
from sagellm.runtime.models.files import (
    CONFIG,
    SHARD_INDEX,
    WEIGHTS,
    StoredTensor,
    check_config,
    check_tokenizer,
    check_weights,
    file_state,
    read_header,
    read_json,
    refuse_file,
)
from sagellm.runtime.models.fit import TIE, StoredModel, check_fit, untie_if_different

__all__ = ["SHARD_INDEX", "ModelError", "ModelFolder", "open_folder", "resolve_model"]


_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
# Code, pickles, and all files of subfolders but config.json, which says how a model embeds.
_NEVER_DOWNLOADED = ["*.py", "*.bin", "*.pt", "*.pth", "*/[!c]*", "*/*.safetensors", "*/*_*.json"]


class HubError(OSError):
    """The Hub did not provide the model. `cause` is the reason, `fix` an instruction for the
    user.
    """

    def __init__(self, cause: str, fix: str) -> None:
        self.cause = cause
        self.fix = fix
        super().__init__(f"{cause}; {fix}")


def download(name: str, revision: str | None = None) -> Path:
    """The local snapshot of a Hub model, downloaded unless it is cached. Raises HubError.

    `revision`: a branch, a tag or a commit; None: the main branch.
    """
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=_DOWNLOADED,
            ignore_patterns=_NEVER_DOWNLOADED,
        )
    except (OSError, ValueError) as error:  # errors of the Hub and of its HTTP client are OSErrors
        raise _explained(error) from error
    return Path(folder)


def _explained(error: OSError | ValueError) -> HubError:
    """The error with a cause and a fix. The Hub has one answer for private and missing models."""
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


_SHIPPED = Path(__file__).parent
BUILT_IN: dict[str, Path] = {"sage-tiny": _SHIPPED / "sage_tiny"}
_NUM_SHOWN = 3  # tensors in a warning
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096  # samples of each hashed file: milliseconds for any size

NULL_FACTS = ModelFacts(
    family="null",
    vocab_size=32000,
    hidden_size=1024,
    num_layers=8,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    max_model_len=8192,
    dtype="bfloat16",
    tie_embeddings=True,
    sliding_window=None,
    eos_token_ids=(),
    num_parameters=0,
)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A checked folder. `path` is None for the null model, which has no files.

    `eos_token_ids`: the tokens that end an answer, from config.json and generation_config.json.
    `hash`: 16 hex digits; models with different hashes cannot continue each other's answers.
    `warnings`: about the folder, which is served nevertheless. `head`: None unless the model is to
    embed.
    """

    name: str
    path: Path | None
    facts: ModelFacts
    config: Mapping[str, object] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    hash: str = "null"
    warnings: tuple[FolderWarning, ...] = ()
    head: EmbeddingHead | None = None

    @property
    def tokenizer_hash(self) -> str:
        """The hash of tokenizer.json. Token ids mean the same to models with equal hashes."""
        file = self.path / "tokenizer.json" if self.path else None
        content = file.read_bytes() if file and file.is_file() else b""
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def file(self, name: str) -> Path:
        """The path of a file in the folder. Raises ModelError if the file is missing."""
        if self.path is None or not (self.path / name).is_file():
            raise ModelError(f"model {self.name}: {name} is missing in {self.path}")
        return self.path / name


# A start asks for each model several times, and a check takes 10 ms. A change of any file of the
# folder makes another key, unless it comes in the same tick of the file system's clock: a folder
# that was written just now is checked each time.
_SETTLED_S = 1.0
_MOST_KEPT = 8
_kept: dict[tuple[object, ...], ModelFolder] = {}


def resolve_model(name: str, embeds: HeadOptions | None = None) -> ModelFolder:
    """Find a built-in model, a folder or a Hub id, and check it without reading a weight.

    `embeds`: how a model is to embed; None: it is to generate. Raises ModelError, UnsupportedModel.
    """
    if name == "null" and embeds is None:
        return ModelFolder("null", None, NULL_FACTS)
    path = _locate(name)
    files = sorted((*path.iterdir(), *path.glob(f"*/{CONFIG}")))
    key = (name, embeds, path, *(file_state(file) for file in files))
    found = _kept.get(key)
    if found is None:
        found = open_folder(name, path, embeds)
        if all(_is_settled(file) for file in files):
            _keep(key, found)
    return found


def _is_settled(file: Path) -> bool:
    try:
        return time.time() - file.stat().st_ctime > _SETTLED_S
    except OSError:
        return False


def _keep(key: tuple[object, ...], folder: ModelFolder) -> None:
    for oldest in list(_kept)[: max(0, len(_kept) + 1 - _MOST_KEPT)]:
        _kept.pop(oldest, None)
    _kept[key] = folder


def open_folder(name: str, path: Path, embeds: HeadOptions | None = None) -> ModelFolder:
    """Read and check one folder; weights by their headers. Raises ModelError, UnsupportedModel."""
    check_config(name, path)
    declared = read_json(path / CONFIG, name)
    head = None if embeds is None else read_head(name, path, embeds)
    try:
        _refuse_remote_code(name, declared)
        check(declared, head)
    except UnsupportedModel as error:
        raise error.in_file(str(path / CONFIG)) from None
    check_tokenizer(name, path)
    tensors = _stored(name, path)
    if head is not None:
        head = with_prefix(head, tensors)
    config = declared if head is not None else untie_if_different(declared, path, tensors)
    unread = check_fit(StoredModel(name, config, tensors, head))
    model_facts = facts(config, head)
    if head is not None and (longest := longest_text(name, path)) is not None:
        longest = min(longest, model_facts.max_model_len)
        model_facts = replace(model_facts, max_model_len=longest)
    return ModelFolder(
        name,
        path,
        model_facts,
        config,
        _eos(name, path, model_facts),
        _hash(name, path, config if head is None else {**config, "head": asdict(head)}),
        tuple(_warnings(name, unread, is_untied=config is not declared)),
        head,
    )


def _warnings(name: str, unread: tuple[str, ...], *, is_untied: bool) -> Iterator[FolderWarning]:
    if is_untied:
        yield FolderWarning(
            "model_not_tied",
            name,
            f"lm_head.weight differs from the embeddings, and {CONFIG} ties them: both are used",
            f"set {TIE} to false in {CONFIG}",
        )
    if unread:
        shown = ", ".join(unread[:_NUM_SHOWN])
        more = f" and {len(unread) - _NUM_SHOWN} more" if len(unread) > _NUM_SHOWN else ""
        yield FolderWarning(
            "model_tensors_unread",
            name,
            f"this architecture does not read {shown}{more}",
            "compare answers with those of another engine, or remove these tensors",
        )


def shard_files(name: str, path: Path) -> dict[str, tuple[str, ...]]:
    """The safetensors files of a folder, each with the tensors that the index promises in it.
    Without an index: one file, with no promised tensors. Raises ModelError.
    """
    if not (path / SHARD_INDEX).is_file():
        return {WEIGHTS: ()}
    weight_map = read_json(path / SHARD_INDEX, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"model {name}: {SHARD_INDEX} has no weight_map", "download it again")
    shards: dict[str, tuple[str, ...]] = {}
    for tensor, file in weight_map.items():
        shards[str(file)] = (*shards.get(str(file), ()), str(tensor))
    return shards


def _locate(name: str) -> Path:
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise refuse_file(name, path)
    if _is_path(name):
        raise ModelError(f"model {name}: there is no such folder", "check the path")
    if name.count("/") == 1:
        return _download(name)
    close = nearest(name, BUILT_IN)
    fix = f"did you mean {close}?" if close else f"built in: {', '.join(BUILT_IN)}"
    raise ModelError(f"model {name!r} is not built in, a folder, or a Hub id (owner/name)", fix)


def _download(name: str) -> Path:
    try:
        return download(name)
    except HubError as error:
        of_folder = "there is no such folder, and " if Path(name).parent.is_dir() else ""
        raise ModelError(f"model {name}: {of_folder}{error.cause}", error.fix) from error


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _stored(name: str, path: Path) -> dict[str, StoredTensor]:
    """All tensors that the folder stores. Raises ModelError for missing or damaged files."""
    shards = shard_files(name, path)
    check_weights(name, path, tuple(shards))
    stored: dict[str, StoredTensor] = {}
    for file, promised in shards.items():
        held = read_header(name, path / file)
        missing = sorted(set(promised) - set(held))
        if missing:
            cause = f"model {name}: {file} lacks tensor {missing[0]}, which {SHARD_INDEX} names"
            raise ModelError(cause, "download both again: they are of two versions")
        stored |= held
    return stored


def _refuse_remote_code(name: str, config: Mapping[str, object]) -> None:
    if config.get("auto_map"):
        raise UnsupportedModel(
            f"model {name} wants to run code of its own",
            field="auto_map",
            fix="remote code never runs; use a model whose architecture is built in",
        )


def _hash(name: str, path: Path, config: Mapping[str, object]) -> str:
    """The hash of the config and of samples of all weight files. Fine-tunes of a model differ."""
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=8)
    for file in sorted(shard_files(name, path)):
        num_bytes = (path / file).stat().st_size
        digest.update(str(num_bytes).encode())
        with (path / file).open("rb") as stream:
            for part in range(_NUM_SAMPLES):
                stream.seek(num_bytes * part // _NUM_SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _eos(name: str, path: Path, model_facts: ModelFacts) -> tuple[int, ...]:
    found = dict.fromkeys(model_facts.eos_token_ids)
    if (path / "generation_config.json").is_file():
        value = read_json(path / "generation_config.json", name).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        whole = [token for token in ids if type(token) is int]  # `true` is an int in Python
        found |= dict.fromkeys(token for token in whole if 0 <= token < model_facts.vocab_size)
    return tuple(found)
