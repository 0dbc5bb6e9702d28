"""Parts of a prompt that follow each other, whatever came when, are all of it."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.kv.extent import NOTHING, Extent, Part, whole

NUM_LAYERS = 4


def cells(part: Part) -> set[tuple[int, int]]:
    """Blocks and layers."""
    blocks = range(part.first, part.end)
    return {(block, layer) for block in blocks for layer in part.layers(NUM_LAYERS)}


def covered(extent: Extent) -> set[tuple[int, int]]:
    behind = Part(first=extent.num_blocks, end=extent.end, end_layer=extent.num_layers)
    return cells(Part(first=0, end=extent.num_blocks)) | cells(behind)


@st.composite
def growth(draw: st.DrawFn) -> list[Extent]:
    """What a worker tells of one prompt, step by step, layer by layer; some it leaves out."""
    told, num_blocks = [], 0
    for num_new in draw(st.lists(st.integers(0, 3), min_size=1, max_size=5)):
        for num_layers in draw(st.lists(st.integers(1, NUM_LAYERS), unique=True).map(sorted)):
            told.append(
                Extent(num_blocks=num_blocks, end=num_blocks + num_new, num_layers=num_layers)
            )
        num_blocks += num_new
        if draw(st.booleans()):
            told.append(whole(num_blocks))
    return [*told, whole(num_blocks)]


@given(growth())
def test_what_is_missing_comes_once_and_in_order(told: list[Extent]) -> None:
    there, came = NOTHING, set()
    for extent in told:
        while (part := extent.missing(there)) is not None:
            assert there.fits(part)
            assert cells(part) <= covered(extent)
            assert cells(part) - came or not cells(part)
            came |= cells(part)
            there = there.plus(part)
            assert came >= covered(there)
    assert covered(there) == covered(told[-1])


@given(growth(), growth())
def test_old_news_is_no_news(told: list[Extent], others: list[Extent]) -> None:
    there = told[-1]
    for extent in others:
        part = extent.missing(there)
        assert part is None or extent.num_blocks >= there.num_blocks


@pytest.mark.parametrize(
    "part",
    [
        Part(first=3, end=4),  # a block between
        Part(first=2, end=4, first_layer=3),  # a layer between
        Part(first=2, end=5, first_layer=1),  # layers of other blocks
    ],
)
def test_a_part_behind_a_gap_does_not_fit(part: Part) -> None:
    assert not Extent(num_blocks=2, end=4, num_layers=2).fits(part)


def test_a_part_that_came_before_does_fit_and_adds_nothing() -> None:
    there = Extent(num_blocks=2, end=4, num_layers=2)
    assert there.fits(Part(first=0, end=2))
    assert there.plus(Part(first=0, end=2)).num_blocks == 2


def test_extents_travel() -> None:
    extent = Extent(num_blocks=2, end=4, num_layers=1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(extent), type=Extent) == extent
