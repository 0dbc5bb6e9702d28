"""The kind of an engine of a graph, and the options for that kind."""

import pytest

from sagellm.graphs.ir import FrozenMap
from sagellm.graphs.sections import engine_kind, kind_options


@pytest.mark.parametrize(
    ("given", "kind", "options"),
    [
        ({}, "local", {}),
        ({"device": "cpu", "threads": 2}, "local", {"device": "cpu", "threads": 2}),
        ({"device": "null", "replicas": 2}, "modelled", {"replicas": 2}),
        ({"device": "null:0"}, "modelled", {}),
        ({"model": "null"}, "modelled", {"model": "null"}),
        ({"model": "null", "device": "cpu"}, "modelled", {"model": "null"}),
        ({"kind": "modelled", "model": "m"}, "modelled", {"model": "m"}),
        ({"kind": "local", "device": "null"}, "local", {"device": "null"}),
        ({"kind": "modelled", "device": "cpu"}, "modelled", {"device": "cpu"}),
    ],
)
def test_a_kind_is_given_or_follows_from_the_device(given, kind, options):
    assert engine_kind(FrozenMap(given)) == kind
    assert kind_options(FrozenMap(given)) == FrozenMap(options)
