"""Backends by name."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from sagellm.backends import UnknownBackend, get_backend, interface, list_available_backends
from sagellm.backends.cpu import BACKEND
from sagellm.backends.interface import register_backend
from sagellm.backends.null import NullBackend


def test_every_listed_backend_opens_under_its_name():
    assert set(list_available_backends()) >= {"cpu", "null"}
    for name in ("cpu", "null"):
        assert get_backend(name).name == name


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UnknownBackend, match="no backend 'cpuu'; did you mean 'cpu'"):
        get_backend("cpuu")


def test_a_name_like_none_gets_the_list():
    with pytest.raises(UnknownBackend, match="there are cpu, null"):
        get_backend("zzzzzz")


@dataclass(frozen=True)
class Renamed(NullBackend):
    name: str = "renamed"


def test_a_registered_backend_is_found_under_its_name(monkeypatch):
    monkeypatch.setattr(interface, "_registered", {})
    register_backend(Renamed())
    register_backend(Renamed())
    assert get_backend("renamed") == Renamed()
    assert "renamed" in list_available_backends()
    assert interface.is_registered_here("renamed")
    assert not interface.is_registered_here("null")


def test_what_is_no_backend_and_a_name_that_is_taken_are_refused(monkeypatch):
    monkeypatch.setattr(interface, "_registered", {})
    with pytest.raises(TypeError, match="backend int has no name"):
        register_backend(3)
    with pytest.raises(ValueError, match="'null' exists already"):
        register_backend(NullBackend())
    register_backend(Renamed())
    with pytest.raises(ValueError, match="'renamed' exists already"):
        register_backend(NullBackend("renamed"))


def test_a_backend_of_another_package_is_found_by_entry_point(monkeypatch):
    entry = EntryPoint("tpu", "sagellm.backends.cpu:BACKEND", interface.GROUP)
    monkeypatch.setattr(interface, "entry_points", lambda group: [entry])
    assert "tpu" in list_available_backends()
    assert get_backend("tpu") is BACKEND
