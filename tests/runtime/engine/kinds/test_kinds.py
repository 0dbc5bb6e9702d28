"""The registry of engine kinds: its table, the fields of a kind, and lazy imports."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from sagellm.runtime.engine.kinds import KINDS, EngineKind, ReplicaPlace, read_kind
from sagellm.runtime.engine.kinds.local import KIND as LOCAL
from sagellm.runtime.engine.kinds.modelled import KIND as MODELLED


@dataclass(frozen=True)
class Options:
    model: str = "far"
    replicas: int = 3


async def no_engine(options: Options, place: ReplicaPlace):
    raise AssertionError


def test_four_kinds_ship():
    found = {name: KINDS[name] for name in KINDS.ours}
    assert (found["local"], found["modelled"]) == (LOCAL, MODELLED)
    assert list(found) == ["local", "modelled", "embedding", "openai"]


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ValueError, match="unknown engine kind 'modeled': did you mean modelled"):
        KINDS.find("modeled")


def test_importing_the_registry_and_both_kinds_imports_no_torch():
    program = (
        "import sys; from sagellm.runtime.engine.kinds import KINDS; "
        "print([name for name in sys.modules if name.endswith(('.kinds.local', '.modelled'))]); "
        "KINDS['local'], KINDS['modelled']; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_without_a_description_the_options_describe_an_engine():
    kind = EngineKind(Options, frozenset({"text_in", "text_out"}), no_engine)
    described = kind.described(Options())
    assert (described.model, described.folder) == ("far", None)
    assert described.view.replicas == 3
    assert described.view.capabilities == {"text_in", "text_out"}


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((dict, frozenset(), no_engine), "options of an engine kind are a dataclass"),
        ((Options, frozenset({"sing"}), no_engine), "'sing' is no capability; there are tokens_in"),
        ((Options, frozenset(), None), "open must be a function"),
        ((Options, frozenset(), no_engine, 3), "describe must be a function"),
    ],
)
def test_parts_that_are_none(parts, reason):
    if parts[2] is None:
        parts = (*parts[:2], 7)
    with pytest.raises((TypeError, ValueError), match=reason):
        EngineKind(*parts)


def test_an_entry_point_is_a_kind_or_a_module_with_one():
    assert read_kind("local", LOCAL) is LOCAL
    with pytest.raises(TypeError, match="'x' must be an EngineKind"):
        read_kind("x", object())
