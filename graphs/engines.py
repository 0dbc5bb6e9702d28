"""What a graph says of an engine: its kind, and the options that it gives to that kind."""

from sagellm.graphs.ir import FrozenMap, Value

LOCAL = "local"  # the kind that computes, and the default
MODELLED = "modelled"  # the kind of the device "null" and of the model "null"
KIND = "kind"
_DEVICE, _MODEL, _NULL = "device", "model", "null"


def engine_kind(values: Value) -> str:
    """The kind of an engine: its entry `kind`. Without one, the kind is `modelled` where the device
    or the model is "null", which compute nothing, and `local` elsewhere.
    """
    given = _given(values)
    if KIND in given:
        return str(given[KIND])
    return MODELLED if _is_null(given) else LOCAL


def kind_options(values: Value) -> FrozenMap:
    """The options that the engine's kind is given: without `kind`, and without the device from
    which the kind `modelled` was derived.
    """
    given = _given(values)
    dropped = {KIND} if KIND in given or not _is_null(given) else {_DEVICE}
    return FrozenMap({name: value for name, value in given.items() if name not in dropped})


def _is_null(given: FrozenMap) -> bool:
    backend = str(given.get(_DEVICE)).partition(":")[0]
    return _NULL in (backend, given.get(_MODEL))


def _given(values: Value) -> FrozenMap:
    return values if isinstance(values, FrozenMap) else FrozenMap()
