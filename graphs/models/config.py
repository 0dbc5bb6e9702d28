"""Typed reading of a parsed config.json. Errors name the wrong field."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from sagellm.graphs.diagnostics import UnsupportedModel
from sagellm.graphs.kernels.token_mixers import Rope

_FIELD = "quantization_config"
_METHODS = ("gptq", "awq")
_FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_BITS = {"gptq": (4, 8), "awq": (4,)}
_BLOCK = 32  # input features that a kernel unpacks at once


@dataclass(frozen=True, slots=True)
class StoredQuantisation:
    """The format of quantised weights: `bits` bits, a scale and a zero per group of input features.

    `group_size`: input features of a group; None: the whole row is one group. `zero_offset`: add
    this number to a stored zero to get the zero. `reorders`: the features of a group need not be
    adjacent, and the model folder stores their order.
    """

    method: str
    bits: int
    group_size: int | None
    zero_offset: int = 0
    reorders: bool = False

    @property
    def weight_bits(self) -> float:
        """Bits per weight, including its share of the group's scale (float16) and zero."""
        return self.bits + (32 / self.group_size if self.group_size else 0.0)


def stored_quantisation(config: Mapping[str, object]) -> StoredQuantisation | None:
    """The format of a model's quantised weights; None if its weights are floats.

    Raises UnsupportedModel for a format that sagellm does not read.
    """
    table = config.get(_FIELD)
    if table is None:
        return None
    if not isinstance(table, Mapping):
        raise _unsupported(f"{table!r} is not a table", "give the weights in bfloat16 or float32")
    method = _method(table)
    form = _format(table, method)
    _refuse_variants(table)
    offset = 1 if form == "gptq" else 0  # gptq_v2 and AWQ store zeros as they are
    group = _group_size(table)
    return StoredQuantisation(method, _bits(table, method), group, offset, _reorders(table))


def _method(table: Mapping[Any, Any]) -> str:
    method = str(table.get("quant_method")).lower()
    if method not in _METHODS:
        fix = f"{' and '.join(_METHODS)} are built; or give the weights in bfloat16 or float32"
        raise _unsupported(f"quant_method {method!r} is not built", fix)
    return method


def _format(table: Mapping[Any, Any], method: str) -> str:
    """The packing of the weights: `checkpoint_format` or a flag for GPTQ, `version` for AWQ."""
    names = ("checkpoint_format", "format") if method == "gptq" else ("version", "format")
    given = next((table[name] for name in names if table.get(name) is not None), None)
    form = str(given or _FORMATS[method][0]).lower()
    if table.get("is_marlin_format"):
        form = "marlin"
    if form not in _FORMATS[method]:
        fix = f"convert the weights to {' or '.join(_FORMATS[method])}"
        raise _unsupported(f"{method} in the format {form!r} is not built", fix)
    return form


def _bits(table: Mapping[Any, Any], method: str) -> int:
    bits = table.get("bits", table.get("w_bit"))
    # `type`, because isinstance would accept true as the number 1.
    if type(bits) is not int or bits not in _BITS[method]:
        known = " and ".join(map(str, _BITS[method]))
        raise _unsupported(f"{method} of {bits!r} bits is not built", f"{known} bits are")
    return bits


def _group_size(table: Mapping[Any, Any]) -> int | None:
    size = table.get("group_size", table.get("q_group_size"))
    if size in (-1, None):  # -1 is the usual way to write one group per row
        return None
    if type(size) is not int or size <= 0 or size % _BLOCK:
        raise _unsupported(f"group_size {size!r} is not built", "give a multiple of 32, or -1")
    return size


def _reorders(table: Mapping[Any, Any]) -> bool:
    return bool(table.get("desc_act"))


def _refuse_variants(table: Mapping[Any, Any]) -> None:
    """Refuse variants that kernels would unpack wrongly without an error."""
    if table.get("dynamic"):
        raise _unsupported("settings by layer (dynamic) are not built", "quantise all alike")
    if str(table.get("pack_dtype") or "int32") != "int32":
        raise _unsupported(f"pack_dtype {table['pack_dtype']!r} is not built", "pack in int32")
    if table.get("zero_point") is False:
        raise _unsupported("awq without zero points is not built", "set zero_point: true")


def _unsupported(cause: str, fix: str) -> UnsupportedModel:
    return UnsupportedModel(cause, field=_FIELD, fix=fix)


Config: TypeAlias = Mapping[str, object]

_DTYPES = ("float32", "bfloat16", "float16")
_ROPE_TYPES = ("default", "linear", "llama3")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_MAX_LAYERS = 4096  # published models have a few hundred at most
_NO_REMOTE_CODE = "use a model whose architecture is built in"

# Fields with an effect that sagellm does not compute: field -> (values without an effect, fix).
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "hidden_act": (("silu", "swish", None), "only silu is built"),
    "auto_map": ((None,), f"remote code never runs; {_NO_REMOTE_CODE}"),
    "compression_config": ((None,), "give the weights in bfloat16 or float32"),
    "partial_rotary_factor": ((None, 1, 1.0), "only rotation of whole heads is built"),
    "is_decoder": ((None, True, False), "drop the field"),
    "add_cross_attention": ((None, False), "only decoders are built"),
    "attention_chunk_size": ((None,), "use a model with full or sliding attention"),
    "attn_logit_softcapping": ((None,), "use a model without soft-capped attention"),
    "final_logit_softcapping": ((None,), "use a model without soft-capped logits"),
    "no_rope_layers": ((None, (), []), "use a model that rotates in every layer"),
    "attn_temperature_tuning": ((None, False), "use a model without attention temperature"),
}


def refuse_unbuilt(config: Config) -> None:
    """Raise UnsupportedModel for a field whose effect sagellm does not compute."""
    for field, (accepted, fix) in _REFUSED.items():
        value = config.get(field)
        if value not in accepted:
            raise UnsupportedModel(f"{value!r} is not supported", field=field, fix=fix)
    stored_quantisation(config)


def whole(config: Config, field: str, default: int | None = None, *, least: int = 1) -> int:
    """The whole number in `field`, at least `least`. Raises UnsupportedModel for other values."""
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        fix = f"set it to a whole number of at least {least}"
        raise UnsupportedModel(f"{value!r} where a number is needed", field=field, fix=fix)
    return value


def num_layers(config: Config) -> int:
    """The number of layers. Raises UnsupportedModel for more than _MAX_LAYERS, so that a hostile
    config cannot exhaust memory.
    """
    count = whole(config, "num_hidden_layers")
    if count > _MAX_LAYERS:
        fix = f"set the model's own number, of at most {_MAX_LAYERS}"
        raise UnsupportedModel(
            f"{count} layers are more than any model has", field="num_hidden_layers", fix=fix
        )
    return count


def number(config: Config, field: str, default: float | None = None) -> float:
    """The finite number in `field`. Raises UnsupportedModel for any other value."""
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UnsupportedModel(f"{value!r} is not a number", field=field, fix="set it to a number")
    if not abs(value) <= sys.float_info.max:  # false for NaN as well
        raise UnsupportedModel("it is not finite", field=field, fix="set a finite number")
    return float(value)


def flag(config: Config, field: str, default: bool = False) -> bool:
    """The flag in `field`, true or false. Raises UnsupportedModel for any other value."""
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise UnsupportedModel(f"{value!r} is not a flag", field=field, fix="set true or false")
    return value


def dtype(config: Config) -> str:
    """The dtype of the stored weights: `dtype` (transformers 5) or `torch_dtype` (older)."""
    field = "dtype" if config.get("dtype") is not None else "torch_dtype"
    value = config.get(field) or "float32"
    if value not in _DTYPES:
        raise UnsupportedModel(
            f"{value!r} is not supported", field=field, fix=f"one of {', '.join(_DTYPES)}"
        )
    return str(value)


def head_dim(config: Config) -> int:
    """The size of a head: `head_dim`, or else hidden_size / num_attention_heads.

    Raises UnsupportedModel for an odd size, and for a division with a remainder.
    """
    if config.get("head_dim") is not None:
        size = whole(config, "head_dim")
    else:
        size, rest = divmod(whole(config, "hidden_size"), whole(config, "num_attention_heads"))
        if rest:
            raise UnsupportedModel(
                "heads do not divide hidden_size", field="num_attention_heads", fix="set head_dim"
            )
    if size % 2:
        cause = f"heads of {size} have no halves to rotate"
        raise UnsupportedModel(cause, field="head_dim", fix="set an even head_dim")
    return size


def rope(config: Config) -> Rope:
    """The rotary embedding: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.

    If both tables are given, `rope_scaling` counts, as in transformers.
    """
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    table = config.get(field) or {}
    # A table of tables gives each type of layer a rope of its own.
    if not isinstance(table, Mapping) or any(isinstance(v, Mapping) for v in table.values()):
        raise UnsupportedModel(
            f"{table!r} is not one table", field=field, fix="give one rope for all layers"
        )
    refuse_unbuilt({k: v for k, v in table.items() if k == "partial_rotary_factor"})
    theta = number(table, "rope_theta", number(config, "rope_theta", 10000.0))
    return _scaled(config, table, field, theta)


def _scaled(config: Config, table: Config, field: str, theta: float) -> Rope:
    kind = table.get("rope_type") or table.get("type") or "default"  # older configs: `type`
    if kind not in _ROPE_TYPES:
        known = f"one of {', '.join(_ROPE_TYPES)} is built"
        raise UnsupportedModel(f"rope type {kind!r} is not supported", field=field, fix=known)
    size = head_dim(config)
    if kind == "default":
        return Rope(size, theta)
    if kind == "linear":
        return Rope(size, theta, "linear", _factor(table))
    low, high = number(table, "low_freq_factor"), number(table, "high_freq_factor")
    if low == high:
        cause = "it equals low_freq_factor: nothing to blend between them"
        raise UnsupportedModel(cause, field="high_freq_factor", fix="set it above low_freq_factor")
    return Rope(
        size,
        theta,
        "llama3",
        factor=_factor(table),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_len=whole(
            table, "original_max_position_embeddings", whole(config, "max_position_embeddings")
        ),
    )


def _factor(table: Config) -> float:
    factor = number(table, "factor")
    if factor <= 0:
        cause = f"{factor} does not stretch a context"
        raise UnsupportedModel(cause, field="factor", fix="set a factor above 0")
    return factor


def layer_windows(config: Config, window: int | None) -> tuple[int | None, ...]:
    """The sliding window of each layer, by `layer_types`, or else by `max_window_layers`.

    The first `max_window_layers` layers (28 by default, as in transformers) have no window. Raises
    UnsupportedModel for a type of layer that sagellm does not compute.
    """
    count = num_layers(config)
    types = config.get("layer_types")
    if types is None:
        first = min(count, whole(config, "max_window_layers", 28, least=0))
        return (None,) * first + (window,) * (count - first)
    if not isinstance(types, list | tuple) or len(types) != count:
        cause = f"{types!r} does not name one type a layer"
        raise UnsupportedModel(cause, field="layer_types", fix=f"name {count} types")
    return tuple(_window(str(kind), window) for kind in types)


def same_windows(config: Config, window: int | None) -> tuple[int | None, ...]:
    """`window` for every layer. Raises UnsupportedModel if `layer_types` says otherwise."""
    windows = (window,) * num_layers(config)
    if config.get("layer_types") is not None and layer_windows(config, window) != windows:
        raise UnsupportedModel(
            "this family has one type of layer", field="layer_types", fix="drop the field"
        )
    return windows


def _window(kind: str, window: int | None) -> int | None:
    if kind not in _LAYER_TYPES:
        fix = f"use a model whose layers are {' or '.join(_LAYER_TYPES)}"
        raise UnsupportedModel(f"{kind!r} is not built", field="layer_types", fix=fix)
    if kind == "sliding_attention" and window is None:
        raise UnsupportedModel(
            "sliding layers without a window", field="sliding_window", fix="set the window"
        )
    return window if kind == "sliding_attention" else None
