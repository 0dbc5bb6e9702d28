"""A modelled engine reports the prefix blocks that it stores and drops, as engines do."""

from dataclasses import dataclass, field

import pytest

from sagellm.runtime.engine.block_model import BlockModel
from sagellm.runtime.messages import EngineReplica, Request
from sagellm.runtime.prefixes import hashes_in
from sagellm.runtime.simulation.cache_reports import CacheReports
from sagellm.runtime.simulation.prompts import PromptHasher, TraceHasher, TracePrompt


@dataclass(eq=False)
class Holder:
    keys: tuple[bytes, ...]
    num_blocks: int = 0
    spans: list = field(default_factory=list)


def computed(pool, hasher, prompt):
    holder = Holder(hasher.keys(prompt, pool.block_size))
    assert pool.admit(holder, len(prompt), 0)
    pool.publish(holder, len(prompt))
    pool.free(holder)


@pytest.mark.parametrize("make", [PromptHasher, TraceHasher])
def test_stored_and_dropped_blocks_have_the_hashes_that_routers_look_up(make):
    hasher, pool, told = make(), BlockModel(20, 128, span=512), []
    reports = CacheReports(EngineReplica("g", 1), 128, hasher)
    reports.begin(pool, told.append)
    first = TracePrompt(0, 1300, (7, 8))
    computed(pool, hasher, first)
    reports.flush(pool)
    hashes = hasher.hashes(Request(request_id="r", prompt_token_ids=first), 128)
    assert list(hashes_in(told[-1].stored)) == [hashes[index] for index in range(8)]
    computed(pool, hasher, TracePrompt(1, 2500, (1, 2, 3, 4)))  # needs the blocks of the first
    reports.flush(pool)
    assert set(hashes_in(told[-1].dropped)) == {hashes[index] for index in range(8)}
    assert [(one.sequence, one.is_first) for one in told] == [(0, True), (1, False), (2, False)]


def test_a_reader_that_begins_later_gets_all_blocks_first():
    hasher, pool, told = TraceHasher(), BlockModel(20, 128, span=512), []
    reports = CacheReports(EngineReplica("g", 0), 128, hasher)
    computed(pool, hasher, TracePrompt(0, 1300, (7, 8)))
    reports.flush(pool)
    reports.begin(pool, told.append)
    assert told[0].is_first
    assert len(list(hashes_in(told[0].stored))) == 8
