"""Checks that the stored tensors fit config.json, by file headers, before any weight is read."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sagellm.graphs.kernels.memory_layout import Shape, linear_weights, weight_shapes
from sagellm.graphs.models import EmbeddingHead, build
from sagellm.graphs.models.config import StoredQuantisation, num_layers, stored_quantisation
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.models import ModelError
from sagellm.runtime.models.files import StoredTensor

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_NUM_SHOWN = 4  # mistakes in a message
_WORD_BITS = 32
_QUANTISED = ".qweight"
_PARTS = (_QUANTISED, ".qzeros", ".scales")
_SETTINGS = "quantization_config"
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"

# Tensors that many folders store, and that change no logit: buffers, scales of a quantised KV
# cache, copies of the embeddings, and modules that text does not pass through.
_HARMLESS = re.compile(
    r"""
    (^|\.) rotary_emb \. | (^|\.) position_ids $ | \. (self_)? attn \. (masked_)? bias $
    | \. [kv]_scale $ | (^|\.) embed_tokens \. weight $
    | ^ (model\.)? (vision | visual | image_ | audio_ | multi_modal_ | mm_ | mtp | medusa) [\w]* \.
    | ^ (model\.)? (score | classifier | qa_outputs | (v | value | reward) _head) \.
    """,
    re.VERBOSE,
)
# Heads of other tasks, which change no vector of a model that embeds.
_OTHER_HEADS = re.compile(r"^((bert|roberta)\.)?pooler\.dense\.|^cls\.|^lm_head\.")
# Tensors that change the result if they belong to a module of the decoder.
_PARAMETER = re.compile(r"(\.(weight|bias)|scale|zero|absmax|quant|lora)[\w.]*$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")

_FIX = "give the folder the config.json that these weights were saved with, or download it again"


@dataclass(frozen=True, slots=True)
class StoredModel:
    """The config.json of a folder, and the tensors that the folder holds.

    `head`: that of a model that embeds; None: the model generates.
    """

    name: str
    config: Mapping[str, object]
    tensors: Mapping[str, StoredTensor]
    head: EmbeddingHead | None = None


def check_fit(stored: StoredModel) -> tuple[str, ...]:
    """Check the stored tensors. Returns the names of tensors that the model's graph does not read
    and that are not known to be harmless.

    Raises ModelError if tensors are missing or have a wrong shape, or if answers depend on tensors
    that are not read.
    """
    quantisation = stored_quantisation(stored.config)
    _check_quantisation(stored, quantisation)
    _check_layers(stored)
    graph = build(stored.config, stored.head)
    shapes, linears = weight_shapes(graph), linear_weights(graph)
    wanted = _as_stored(shapes, linears, stored.tensors, quantisation)
    unread = tuple(_unread(wanted, stored))
    mistakes = [
        *_missing(wanted, stored.tensors),
        *_misshapen(wanted, stored.tensors),
        *_needed(unread, wanted, stored),
    ]
    if mistakes:
        raise ModelError(f"model {stored.name}: {_listed(mistakes)}", _FIX)
    return unread


def _check_layers(stored: StoredModel) -> None:
    """Raise ModelError if config.json has more layers than the folder has tensors.

    A hostile number of layers must be refused before a graph with these layers is built.
    """
    layers, tensors = num_layers(stored.config), len(stored.tensors)
    if layers > tensors:
        cause = f"config.json has {layers} layers (num_hidden_layers), and the folder"
        raise ModelError(f"model {stored.name}: {cause} only {tensors} tensors", _FIX)


def _check_quantisation(stored: StoredModel, declared: StoredQuantisation | None) -> None:
    """Raise ModelError if config.json and the tensors disagree on quantisation."""
    packed = next((name for name in stored.tensors if name.endswith(_QUANTISED)), None)
    if declared is not None and packed is None:
        raise ModelError(
            f"model {stored.name}: config.json says that the weights are stored as "
            f"{declared.method} of {declared.bits} bits ({_SETTINGS}), and no tensor is"
            f"{_example(stored)}",
            f"remove {_SETTINGS} from config.json, or download the quantised weights",
        )
    if declared is None and packed is not None:
        raise ModelError(
            f"model {stored.name}: {packed} is quantised, and config.json has no {_SETTINGS}",
            f"add {_SETTINGS} to config.json (older folders keep it in quantize_config.json)",
        )


def _example(stored: StoredModel) -> str:
    first = next((name for name in stored.tensors if name.startswith("model.layers.")), None)
    return f": {first} is {stored.tensors[first].dtype}" if first else ""


def _as_stored(
    shapes: Mapping[str, Shape],
    linears: frozenset[str],
    tensors: Mapping[str, StoredTensor],
    declared: StoredQuantisation | None,
) -> dict[str, Shape | None]:
    """The tensors that the folder must store: their stored names and shapes. Shape None: the shape
    is checked later, when the tensor is unpacked.
    """
    wanted: dict[str, Shape | None] = {}
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        if declared is None or name in tensors or name not in linears:
            wanted[name] = shape
        else:
            wanted |= {f"{stem}{part}": None for part in _PARTS}
            wanted[f"{stem}{_QUANTISED}"] = _packed(shape, declared)
    return wanted


def _packed(shape: Shape, declared: StoredQuantisation) -> Shape:
    """The packed shape of a weight [N, K], in words of 32 bits.

    GPTQ packs along K, AWQ along N; both store [K, N].
    """
    size, width = shape
    if declared.method == "awq":
        return width, size * declared.bits // _WORD_BITS
    return -(-width * declared.bits // _WORD_BITS), size


def _missing(
    wanted: Mapping[str, Shape | None], tensors: Mapping[str, StoredTensor]
) -> Iterator[str]:
    absent = [name for name in wanted if name not in tensors]
    spare = [name for name in tensors if name not in wanted]
    for number, name in enumerate(absent):
        close = nearest(name, spare) if number < _NUM_SHOWN else None  # slow, and shown for few
        yield f"tensor {name} is missing" + (f"; the nearest there is {close}" if close else "")


def _misshapen(
    wanted: Mapping[str, Shape | None], tensors: Mapping[str, StoredTensor]
) -> Iterator[str]:
    for name, shape in wanted.items():
        found = tensors.get(name)
        if found is None or shape is None:
            continue
        if found.shape != shape:
            yield f"tensor {name} is {list(found.shape)}; config.json makes it {list(shape)}"
        elif not name.endswith(_QUANTISED) and found.dtype not in _FLOATS:
            known = ", ".join(sorted(_FLOATS))
            yield f"tensor {name} is stored as {found.dtype}, which is not one of {known}"


def _unread(wanted: Mapping[str, Shape | None], stored: StoredModel) -> Iterator[str]:
    tied = bool(stored.config.get("tie_word_embeddings"))
    for name in stored.tensors:
        is_known = _HARMLESS.search(name) or _belongs_to_packed(name, stored.tensors)
        if stored.head is not None and _OTHER_HEADS.search(name):
            continue
        if name not in wanted and not is_known and not (name == HEAD and tied):
            yield name


def _needed(
    unread: Iterable[str], wanted: Mapping[str, Shape | None], stored: StoredModel
) -> Iterator[str]:
    """A mistake for each unread tensor of the decoder, and one for unread layers: without these
    tensors, answers would be wrong.
    """
    modules = {name.rpartition(".")[0] for name in (*wanted, HEAD)}
    num_layers = len({found[0] for name in wanted if (found := _LAYER.match(name))})
    further: dict[int, str] = {}
    for name in unread:
        layer = _LAYER.match(name)
        if layer and int(layer[1]) >= num_layers:
            further.setdefault(int(layer[1]), name)
        elif _PARAMETER.search(name) and (layer or _is_inside(name, modules)):
            shape = list(stored.tensors[name].shape)
            yield f"tensor {name} {shape} has no place in this architecture"
    if further:
        first = further[min(further)]
        yield f"tensor {first} is of a further layer; config.json has {num_layers} layers"


def _is_inside(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _belongs_to_packed(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor belongs to a quantised weight, such as `g_idx` or the zero bias of GPTQ."""
    return f"{name.rpartition('.')[0]}{_QUANTISED}" in tensors


def _listed(mistakes: list[str]) -> str:
    shown = mistakes[:_NUM_SHOWN]
    if len(mistakes) == 1:
        return shown[0]
    left = len(mistakes) - len(shown)
    more = [f"and {left} more"] if left else []
    lines = "".join(f"\n  {line}" for line in (*shown, *more))
    return f"{len(mistakes)} tensors do not fit config.json:{lines}"


TIE = "tie_word_embeddings"
_CHUNK_BYTES = 1 << 20


def untie_if_different(
    config: Mapping[str, object], path: Path, tensors: Mapping[str, StoredTensor]
) -> Mapping[str, object]:
    """The configuration, with the head untied if the stored head differs from the embeddings.

    transformers ties the two only if the file holds one of them, or both with equal values
    (`PreTrainedModel.tie_weights`). A fine-tune may have changed one of them and kept the setting.
    """
    head, embeddings = tensors.get(HEAD), tensors.get(EMBEDDINGS)
    if not config.get(TIE) or head is None or embeddings is None:
        return config
    return config if _is_same(path, head, embeddings) else {**config, TIE: False}


def _is_same(path: Path, one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are equal, byte for byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with (path / one.file).open("rb") as first, (path / other.file).open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        for offset in range(0, one.num_bytes, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, one.num_bytes - offset)
            if first.read(length) != second.read(length):
                return False
    return True
