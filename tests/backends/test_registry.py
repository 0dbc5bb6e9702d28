"""Backends by name."""

from importlib.metadata import EntryPoint

import pytest

from sagellm.backends import UnknownBackend, get_backend, list_available_backends, registry
from sagellm.backends.cpu import BACKEND


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


def test_a_backend_of_another_package_is_found_by_entry_point(monkeypatch):
    entry = EntryPoint("tpu", "sagellm.backends.cpu:BACKEND", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    assert "tpu" in list_available_backends()
    assert get_backend("tpu") is BACKEND
