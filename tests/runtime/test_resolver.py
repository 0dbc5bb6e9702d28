"""The resolver finds operators by name, and suggests the nearest name."""

import pytest

from sagellm.graphs.vocabulary import OpSpec
from sagellm.runtime.resolver import Resolver, UnknownOperator

SHIPPED = {
    "admission", "policy_sort", "pd_split", "route", "prefill", "kv_transfer", "decode",
    "generate", "metrics_sink", "map", "filter", "flat_map", "key_by", "collect", "route_model",
    "embed", "roles", "autoscale", "ab_split",
}  # fmt: skip


def test_every_file_of_the_floor_is_an_operator() -> None:
    assert set(Resolver().names) == SHIPPED


def test_a_spec_is_called_as_its_file() -> None:
    vocabulary = Resolver().vocabulary
    assert all(vocabulary[name].name == name for name in SHIPPED)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UnknownOperator, match="did you mean 'prefill'"):
        Resolver().operator("prefil")


def test_a_registered_operator_joins_the_vocabulary() -> None:
    resolver = Resolver()
    resolver.register(OpSpec("guard"), lambda options, setup: None)  # type: ignore[arg-type,return-value]
    assert "guard" in resolver.vocabulary


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="exists already"):
        Resolver().register(OpSpec("decode"), lambda options, setup: None)  # type: ignore[arg-type,return-value]
