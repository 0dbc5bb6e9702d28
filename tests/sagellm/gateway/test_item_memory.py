"""The memory of output items: what is found, what goes first, and bounds that hold."""

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.gateway import item_memory
from sagellm.gateway.answers.responses_objects import (
    MessageText,
    OutputCall,
    OutputMessage,
    OutputReasoning,
    ReasoningText,
)
from sagellm.gateway.item_memory import ENTRY_BYTES, ItemMemory
from sagellm.gateway.protocol.responses_fields import (
    FunctionCallItem,
    InputMessage,
    ReasoningItem,
    ReasoningPart,
)

EMPTY_BYTES = ENTRY_BYTES + sys.getsizeof("")
NUM_BYTES = EMPTY_BYTES + 100  # of one message


def said(item_id: str, num_bytes: int = NUM_BYTES) -> OutputMessage:
    """A message of so many bytes."""
    text = MessageText(text="x" * (num_bytes - EMPTY_BYTES))
    return OutputMessage(id=item_id, status="completed", content=[text])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for four messages, two of them of one tenant."""
    monkeypatch.setattr(item_memory, "MAX_BYTES", 4 * NUM_BYTES)
    monkeypatch.setattr(item_memory, "TENANT_BYTES", 2 * NUM_BYTES)
    monkeypatch.setattr(item_memory, "ITEM_BYTES", NUM_BYTES)


def memory_of(**names: str) -> ItemMemory:
    """A memory of messages with ids of one letter: tenant -> the letters."""
    memory = ItemMemory()
    for tenant, letters in names.items():
        memory.keep(tenant, map(said, letters))
    return memory


def ids(memory: ItemMemory, tenant: str) -> str:
    return "".join(letter for letter in "abcdefgh" if memory.find(tenant, letter))


def test_each_item_is_found_as_a_client_sends_it() -> None:
    memory = ItemMemory()
    thought = OutputReasoning(id="r", status="completed", content=[ReasoningText(text="hm")])
    call = OutputCall(id="c", status="completed", call_id="k", name="f", arguments="{}")
    memory.keep("t", [thought, said("m"), call])
    found = [memory.find("t", letter) for letter in "rmc"]
    assert [kept and kept.item for kept in found] == [
        ReasoningItem(content=[ReasoningPart(text="hm")]),
        InputMessage(role="assistant", content="x" * 100),
        FunctionCallItem(call_id="k", name="f", arguments="{}"),
    ]


def test_a_text_counts_its_utf8_too() -> None:
    memory, text = ItemMemory(), "\u4e2d" * 1000
    memory.keep("t", [OutputMessage(id="a", status="completed", content=[MessageText(text=text)])])
    assert memory.num_bytes >= ENTRY_BYTES + 2000 + 3000


def test_another_tenants_item_is_not_found() -> None:
    memory = memory_of(t="a")
    assert [ids(memory, tenant) for tenant in ("t", "u", "")] == ["a", "", ""]


@pytest.mark.usefixtures("small")
def test_the_least_recently_used_item_of_a_tenant_goes_first() -> None:
    memory = memory_of(t="ab")
    memory.find("t", "a")
    memory.keep("t", [said("c")])
    assert ids(memory, "t") == "ac"


@pytest.mark.usefixtures("small")
def test_a_tenant_beyond_its_share_pushes_out_no_other() -> None:
    memory = memory_of(u="a", t="bcdefgh")
    assert (ids(memory, "u"), ids(memory, "t")) == ("a", "gh")


@pytest.mark.usefixtures("small")
def test_the_least_recently_used_item_of_all_tenants_goes_first() -> None:
    memory = memory_of(t="ab", u="cd")
    memory.find("t", "a")
    memory.keep("v", [said("e")])
    assert [ids(memory, tenant) for tenant in "tuv"] == ["a", "cd", "e"]


@pytest.mark.usefixtures("small")
def test_an_item_that_is_too_large_is_left_out() -> None:
    memory = memory_of(t="a")
    memory.keep("t", [said("b", NUM_BYTES + 1)])
    assert ids(memory, "t") == "a"


def test_the_bounds_hold(small: None) -> None:
    @given(st.lists(st.tuples(st.sampled_from("tuv"), st.integers(0, 110)), max_size=30))
    def holds(sizes: Any) -> None:
        memory, names = ItemMemory(), []
        for number, (tenant, size) in enumerate(sizes):
            names.append((tenant, str(number)))
            memory.keep(tenant, [said(str(number), EMPTY_BYTES + size)])
            totals = dict.fromkeys("tuv", 0)
            for owner, name in names:
                kept = memory.find(owner, name)
                totals[owner] += kept.num_bytes if kept else 0
            assert memory.num_bytes == sum(totals.values()) <= item_memory.MAX_BYTES
            assert max(totals.values()) <= item_memory.TENANT_BYTES

    holds()
