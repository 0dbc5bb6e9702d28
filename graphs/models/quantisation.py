"""The quantisation of stored weights: `quantization_config` of config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sagellm.graphs.diagnostics import UnsupportedModel

_FIELD = "quantization_config"
_METHODS = ("gptq", "awq")
_FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_BITS = {"gptq": (4, 8), "awq": (4,)}
_BLOCK = 32  # input features that a kernel unpacks at a time


@dataclass(frozen=True, slots=True)
class StoredQuantisation:
    """Weights of `bits` bits with a scale and a zero a group of input features.

    `group_size` None: one group a row. `zero_offset`: zeros are stored less this number.
    `reorders`: the features of a group need not be adjacent; the folder stores their order.
    """

    method: str
    bits: int
    group_size: int | None
    zero_offset: int = 0
    reorders: bool = False

    @property
    def weight_bits(self) -> float:
        """Bits a weight, with its share of the scale (float16) and the zero."""
        return self.bits + (32 / self.group_size if self.group_size else 0.0)


def stored_quantisation(config: Mapping[str, object]) -> StoredQuantisation | None:
    """None for weights in floats. Raises UnsupportedModel for a format that is not built."""
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
    """The packing of the weights. Field `checkpoint_format` or a flag (GPTQ), `version` (AWQ)."""
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
    if type(bits) is not int or bits not in _BITS[method]:
        known = " and ".join(map(str, _BITS[method]))
        raise _unsupported(f"{method} of {bits!r} bits is not built", f"{known} bits are")
    return bits


def _group_size(table: Mapping[Any, Any]) -> int | None:
    size = table.get("group_size", table.get("q_group_size"))
    if size in (-1, None):
        return None
    if type(size) is not int or size <= 0 or size % _BLOCK:
        raise _unsupported(f"group_size {size!r} is not built", "give a multiple of 32, or -1")
    return size


def _reorders(table: Mapping[Any, Any]) -> bool:
    return bool(table.get("desc_act"))


def _refuse_variants(table: Mapping[Any, Any]) -> None:
    """Refuse variants that would be unpacked wrong without an error."""
    if table.get("dynamic"):
        raise _unsupported("settings by layer (dynamic) are not built", "quantise all alike")
    if str(table.get("pack_dtype") or "int32") != "int32":
        raise _unsupported(f"pack_dtype {table['pack_dtype']!r} is not built", "pack in int32")
    if table.get("zero_point") is False:
        raise _unsupported("awq without zero points is not built", "set zero_point: true")


def _unsupported(cause: str, fix: str) -> UnsupportedModel:
    return UnsupportedModel(cause, field=_FIELD, fix=fix)
