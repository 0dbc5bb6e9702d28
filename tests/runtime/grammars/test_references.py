"""Chains of definitions, and the stack that llguidance needs for them."""

import random
from collections.abc import Mapping

import pytest

from sagellm.runtime.grammars.references import Definition, longest_chain


def definitions(**names: Mapping[str, int]) -> dict[str, Definition]:
    return {name: Definition(max([1, *inner.values()]), inner) for name, inner in names.items()}


def longest_way(known: dict[str, Definition], name: str, seen: frozenset[str]) -> int:
    """The most levels on a way that enters each definition once."""
    inner = (
        depth + longest_way(known, other, seen | {other})
        for other, depth in known[name].names.items()
        if other in known and other not in seen
    )
    return max(known[name].num_levels, *inner, 0)


def test_the_deepest_way_counts() -> None:
    known = definitions(a={"b": 2, "c": 5}, b={"d": 7}, c={"d": 1}, d={})
    assert longest_chain(known, "a") == 2 + 7 + 1
    assert longest_chain(known, "c") == 2


def test_a_circle_counts_as_if_all_of_it_were_entered() -> None:
    known = definitions(a={"b": 1}, b={"c": 3, "d": 4}, c={"b": 2}, d={"x": 9})
    assert longest_chain(known, "a") == 1 + (3 + 2) + (4 + 9)


@pytest.mark.parametrize("seed", range(200))
def test_no_way_is_longer(seed: int) -> None:
    rng = random.Random(seed)
    names = "abcdef"
    known = definitions(
        **{
            name: {other: rng.randint(1, 5) for other in rng.sample(names, rng.randint(0, 3))}
            for name in names
        }
    )
    longest = longest_way(known, "a", frozenset("a"))
    assert longest_chain(known, "a") >= longest


@pytest.mark.parametrize("size", [1, 5000])
def test_long_chains_need_no_recursion(size: int) -> None:
    known = {str(one): Definition(1, {str(one + 1): 1}) for one in range(size)}
    assert longest_chain(known, "0") == size
