"""The files by which a folder says how its model embeds, in the layout of sentence-transformers.

modules.json lists the steps after the model: pooling, and scaling to length 1. Each step has a
subfolder with a config.json. sentence_bert_config.json limits the length of a text.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import msgspec

from sagellm.graphs.kernels.token_mixers import Pooling
from sagellm.graphs.models import EmbeddingHead
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.models import ModelError
from sagellm.runtime.models.files import CONFIG, read_json

MODULES, LIMITS = "modules.json", "sentence_bert_config.json"
POOLINGS: tuple[str, ...] = get_args(Pooling)
# How sentence-transformers names the ways to pool: in one field, or a flag for each.
_MODES: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last", "last": "last"}
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_TABLES = ("embeddings.word_embeddings.weight", "embed_tokens.weight")
_PREFIXES = ("", "bert.", "roberta.", "model.")


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """The options of a user for a model that embeds; None: as the folder says.

    `normalize`: scale vectors to length 1; so is done where the folder says nothing.
    """

    pooling: Pooling | None = None
    normalize: bool | None = None


class _Module(msgspec.Struct):
    """An entry of modules.json. `type`: the class of sentence-transformers."""

    type: str
    path: str = ""


def read_head(name: str, path: Path, given: HeadOptions) -> EmbeddingHead:
    """How the model of a folder makes a vector of its last rows. The prefix of weights is not known
    yet.

    Raises ModelError if the folder does not say it, or wants a step that is not built.
    """
    steps = _steps(name, path)
    pooling, is_unit = given.pooling, not steps or "Normalize" in steps
    if pooling is None:
        if "Pooling" not in steps:
            raise ModelError(
                f"model {name}: no {MODULES} in {path} says how its rows are pooled",
                f"set pooling of its engine to one of {', '.join(POOLINGS)}",
            )
        pooling = _pooling(name, path, steps["Pooling"])
    return EmbeddingHead(pooling, is_unit if given.normalize is None else given.normalize)


def with_prefix(head: EmbeddingHead, tensors: Iterable[str]) -> EmbeddingHead:
    """The head with the prefix of the stored weights; unchanged if no embedding is stored."""
    for stored in tensors:
        for table in _TABLES:
            if stored.endswith(table) and stored.removesuffix(table) in _PREFIXES:
                return replace(head, prefix=stored.removesuffix(table))
    return head


def longest_text(name: str, path: Path) -> int | None:
    """The most tokens of a text, special tokens included; None: the model's own limit."""
    if not (path / LIMITS).is_file():
        return None
    limit = read_json(path / LIMITS, name).get("max_seq_length")
    return limit if type(limit) is int and limit > 0 else None


def _steps(name: str, path: Path) -> dict[str, str]:
    """The subfolder of each step after the model, by the name of its class."""
    if not (path / MODULES).is_file():
        return {}
    try:
        modules = msgspec.json.decode((path / MODULES).read_bytes(), type=list[_Module])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        cause = f"model {name}: {path / MODULES} is no list of modules: {error}"
        raise ModelError(cause, "download it again") from None
    found = {module.type.rpartition(".")[2]: module.path for module in modules}
    known = ("Transformer", "Pooling", "Normalize")
    for step in found:
        if step not in known:
            cause = f"model {name}: {MODULES} has a step {step}, which is not built"
            raise ModelError(cause, f"use a model with {', '.join(known)} alone")
    if found.pop("Transformer", ""):
        cause = f"model {name}: {MODULES} keeps the model in a subfolder"
        raise ModelError(cause, "give a folder whose model is beside modules.json")
    return found


def _pooling(name: str, path: Path, subfolder: str) -> Pooling:
    if Path(subfolder).name != subfolder:
        raise ModelError(f"model {name}: {MODULES} names {subfolder!r}, which is no subfolder")
    file = path / subfolder / CONFIG
    config = read_json(file, name)
    modes = [mode for flag, mode in _FLAGS.items() if config.get(flag) is True]
    named = config.get("pooling_mode")
    if isinstance(named, str | list):
        modes = [named] if isinstance(named, str) else [str(one) for one in named]
    if len(modes) != 1 or modes[0] not in _MODES:
        shown = " and ".join(modes) or "nothing"
        cause = f"model {name}: {file} pools by {shown}, which is not built"
        close = nearest(shown, POOLINGS)
        raise ModelError(cause, f"use a model that pools by {close or ', '.join(POOLINGS)}")
    return _MODES[modes[0]]
