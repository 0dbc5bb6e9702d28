"""Prefix reuse in an engine: computed tokens are counted, and no block stays leased."""

import random

import pytest
import trio
from engine_driver import Driver, hand_over, running

from sagellm.runtime.engine.kinds.modelled import ModelledLaunch, ModelledOptions, open_modelled
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.port import LeaseOffer
from sagellm.runtime.sampling import Sampling

SYSTEM = tuple(range(1, 201))  # 12 blocks of 16, and a half


def open_null(name="e", **options):
    return open_modelled(ModelledOptions(**{"model": "null", **options}), name=name)


def num_computed(engine: LocalEngine) -> int:
    """Tokens of all steps so far."""
    return int(engine.step_tokens.total)


async def ask(driver: Driver, request_id, prompt, **fields):
    """The reply to a sequence, and the number of tokens computed meanwhile."""
    before = num_computed(driver.engine)
    fields = fields if "sampling" in fields else {"max_tokens": 1, **fields}
    reply = await driver.submit(request_id, prompt, **fields)
    await reply.done.wait()
    return reply, num_computed(driver.engine) - before


def cached(reply):
    return {event.num_cached_tokens for event in reply.events}


async def test_the_second_computes_only_what_is_new(autojump_clock):
    async with running(open_null()) as [driver]:
        first, cost = await ask(driver, "a", (*SYSTEM, 7))
        assert (cost, cached(first)) == (201, {0})
        second, cost = await ask(driver, "b", (*SYSTEM, 8, 9))
        assert (cost, cached(second)) == (202 - 192, {192})
        load = driver.engine.load
    assert (load.num_prefix_queries, load.num_prefix_hits) == (403, 192)
    assert load.num_cached_blocks == 12


@pytest.mark.parametrize(("num_prompt", "cost"), [(192, 16), (193, 1), (200, 8), (16, 16), (17, 1)])
async def test_a_full_hit_costs_a_block_or_less(num_prompt, cost, autojump_clock):
    async with running(open_null()) as [driver]:
        await ask(driver, "a", SYSTEM[:num_prompt])
        _, spent = await ask(driver, "b", SYSTEM[:num_prompt])
    assert spent == cost


async def test_a_hit_shortens_the_time_to_the_first_token(autojump_clock):
    async with running(open_null(prefill_token_s=1.0, decode_step_s=1.0)) as [driver]:
        first, _ = await ask(driver, "a", SYSTEM)
        second, _ = await ask(driver, "b", SYSTEM)
    stamps = [reply.last.stamps for reply in (first, second)]
    assert [one.prefilled_s - one.started_s for one in stamps] == [201, 9]


async def test_blocks_of_a_running_sequence_are_shared(autojump_clock):
    async with running(open_null()) as [driver]:
        long = await driver.submit("a", SYSTEM, max_tokens=100)
        await trio.sleep(0.1)
        assert not long.done.is_set()
        before = driver.engine.load.num_leased_blocks
        second = await driver.submit("b", SYSTEM, max_tokens=50)
        await trio.sleep(0.1)
        assert driver.engine.load.num_leased_blocks <= before + 2
        await driver.all_done()
    assert cached(second) == {192}


@pytest.mark.parametrize("max_num_batched_tokens", [64, 512])
async def test_eight_at_once_compute_their_beginning_once(max_num_batched_tokens, autojump_clock):
    async with running(open_null(max_num_batched_tokens=max_num_batched_tokens)) as [driver]:
        for number in range(8):
            await driver.submit(str(number), (*SYSTEM, 300 + number), max_tokens=1)
        await driver.all_done()
        computed = num_computed(driver.engine)
    assert computed == 201 + 7 * 9


async def test_the_urgent_does_not_wait_for_the_less_urgent(autojump_clock):
    async with running(open_null(max_num_batched_tokens=32)) as [driver]:
        await driver.submit("a", SYSTEM, max_tokens=1, priority=4)
        await trio.sleep(0.005)
        urgent = await driver.submit("b", SYSTEM, max_tokens=1, priority=0)
        await trio.sleep(0.02)
        assert driver.engine.load.num_running == 2
        await driver.all_done()
        assert driver.engine.load.num_leased_blocks == 0
    assert cached(urgent) != {192}


async def test_no_sequence_waits_for_a_reader_that_does_not_read(autojump_clock):
    engine = open_null(max_num_batched_tokens=32)
    async with running(engine) as [driver]:
        stuck = SequenceState(owner="stuck", request_id="s", prompt_token_ids=SYSTEM)
        await engine.submit(stuck)
        mailbox = engine.events("stuck")
        await trio.sleep(0.02)
        for _ in range(1000):  # its reader has what it can take
            mailbox.post(object())
            mailbox.flush()
        reply, _ = await ask(driver, "b", SYSTEM)
        assert mailbox.is_full
        engine.cancel("s", 0, 0)
    assert reply.last.finish_reason == "length"


async def test_answers_are_kept_for_the_next_turn(autojump_clock):
    async with running(open_null()) as [driver]:
        first, _ = await ask(driver, "a", SYSTEM[:40], max_tokens=60)
        turn = (*SYSTEM[:40], *first.token_ids, 7, 8, 9)
        second, cost = await ask(driver, "b", turn)
    assert cached(second) == {96}  # 99 of the first 100 tokens have keys and values
    assert cost == 103 - 96


async def test_a_prompt_that_is_scored_takes_nothing_and_leaves_all(autojump_clock):
    scored = Sampling(max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    async with running(open_null()) as [driver]:
        await ask(driver, "a", SYSTEM)
        reply, cost = await ask(driver, "b", SYSTEM, sampling=scored)
        assert (cost, cached(reply)) == (200, {0})
        assert driver.engine.load.num_prefix_queries == 200
        assert driver.engine.load.num_cached_blocks == 12


async def test_salts_share_nothing(autojump_clock):
    async with running(open_null()) as [driver]:
        await ask(driver, "a", SYSTEM, salt="tenant a")
        other, cost = await ask(driver, "b", SYSTEM, salt="tenant b")
        assert (cost, cached(other)) == (200, {0})
        plain, cost = await ask(driver, "c", SYSTEM)
        assert (cost, cached(plain)) == (200, {0})
        same, cost = await ask(driver, "d", SYSTEM, salt="tenant a")
        assert (cost, cached(same)) == (8, {192})


async def test_switched_off_only_choices_share(autojump_clock):
    async with running(open_null(prefix_caching=False)) as [driver]:
        await ask(driver, "a", SYSTEM)
        _, cost = await ask(driver, "b", SYSTEM)
        assert cost == 200
        before = num_computed(driver.engine)
        for choice in range(3):
            await driver.submit("c", SYSTEM, choice=choice, max_tokens=5)
        await driver.all_done()
        load = driver.engine.load
    assert num_computed(driver.engine) - before == 200 + 2 * 8 + 3 * 4
    assert (load.num_cached_blocks, load.num_prefix_queries, load.num_prefix_hits) == (0, 0, 0)


async def test_a_preempted_sequence_finds_its_own_blocks(autojump_clock):
    spent = {}
    for is_on in (True, False):
        options = {"num_blocks": 8, "max_model_len": 128, "prefix_caching": is_on}
        async with running(open_null(**options)) as [driver]:
            await driver.submit("a", SYSTEM[:40], max_tokens=30)
            await driver.submit("b", SYSTEM[100:140], max_tokens=60)
            await driver.all_done()
            assert driver.engine.load.num_preemptions > 0
            assert [len(reply.token_ids) for reply in driver.replies.values()] == [30, 60]
            assert all(cached(reply) == {0} for reply in driver.replies.values())
            spent[is_on] = num_computed(driver.engine)
    assert spent[True] < spent[False]


async def test_pending_work_is_counted_without_what_is_found(autojump_clock):
    async with running(open_null(max_num_seqs=1)) as [driver]:
        await ask(driver, "a", SYSTEM)
        await driver.submit("b", (7,) * 8, max_tokens=50)
        await trio.sleep(0.05)
        await driver.submit("c", SYSTEM, max_tokens=1)
        assert driver.engine.load.num_pending_prefill_tokens == 8
        await driver.all_done()


async def test_a_prefill_engine_reuses_and_a_decode_engine_keeps(autojump_clock):
    async with running(open_null("p"), open_null("d")) as [prefill, decode]:
        one, rest = await hand_over(prefill, decode, "a", SYSTEM, max_tokens=10)
        before = num_computed(prefill.engine)
        two, _ = await hand_over(prefill, decode, "b", SYSTEM, max_tokens=10)
        assert num_computed(prefill.engine) - before == 8
        assert (cached(one), cached(two)) == ({0}, {192})
        joint, cost = await ask(decode, "c", (*SYSTEM, *one.token_ids, *rest.token_ids, 5))
        assert (cached(joint), cost) == ({208 - 16 * (209 < 208)}, 211 - 208)


async def test_an_exported_lease_is_left_alone_by_those_who_share_it(autojump_clock):
    async with running(open_null("p"), open_null("d")) as [prefill, decode]:
        engine = prefill.engine
        offer = LeaseOffer(
            request_id="a", choice=0, epoch=0, num_tokens=200,
            layout_hash=engine.facts.layout_hash,
        )  # fmt: skip
        target = await decode.engine.import_(offer)
        held = await prefill.submit("a", SYSTEM, hold_kv=True)
        await held.done.wait()
        source = engine.export(held.lease)
        blocks = list(source.held.blocks)
        sharer, cost = await ask(prefill, "b", SYSTEM, max_tokens=5)
        assert (cost, cached(sharer)) == (8 + 4, {192})
        assert source.held.blocks == blocks
        assert engine.pool.num_leased == 13
        await target.receive(source)
        source.release()
        assert engine.load.num_cached_blocks == 12
        target.abort()


async def test_a_failed_step_leaves_nothing_to_find(autojump_clock, monkeypatch):
    engine = open_null()
    async with running(engine) as [driver]:
        reply = await driver.submit("a", SYSTEM, max_tokens=100)
        await trio.sleep(0.1)

        async def fail(self):
            raise RuntimeError("broken")

        with monkeypatch.context() as patched:
            patched.setattr(ModelledLaunch, "result", fail)
            await reply.done.wait()
        assert reply.last.finish_reason == "failed"
        assert engine.load.num_cached_blocks == 0
        _, cost = await ask(driver, "b", SYSTEM)
        assert cost == 200


async def test_a_stopped_engine_has_every_block_free(autojump_clock):
    engine = open_null()
    async with running(engine) as [driver]:
        await ask(driver, "a", SYSTEM)
        await driver.submit("b", SYSTEM, max_tokens=5)
        await driver.all_done()
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("is_on", [True, False])
async def test_any_traffic_keeps_the_books(seed, is_on, autojump_clock):
    """Shared beginnings, a pool that is too small, cancels, deadlines, salts, choices, transfers.

    The ledger is checked after every step; every answer that ends well is the one that the null
    device gives to that seed alone.
    """
    draw = random.Random(seed)
    options = {
        "num_blocks": draw.choice((10, 14, 40)), "max_model_len": 96, "block_size": 8,
        "max_num_seqs": draw.choice((2, 8)), "max_num_batched_tokens": draw.choice((8, 64)),
        "prefix_caching": is_on,
    }  # fmt: skip
    options["num_blocks"] = max(options["num_blocks"], 12)
    beginnings = [tuple(draw.randrange(100) for _ in range(40)) for _ in range(3)]
    engines = [open_null(name, **options) for name in "pd"]
    expected = {}

    async def one(drivers, number):
        await trio.sleep(draw.random() * 3)
        prompt = draw.choice(beginnings)[: draw.randrange(1, 41)]
        prompt += tuple(draw.randrange(100) for _ in range(draw.randrange(12)))
        request_id, fields = str(number), {"max_tokens": draw.randrange(1, 30)}
        fields |= {"salt": draw.choice(("", "a")), "priority": draw.randrange(5)}
        if draw.random() < 0.3:
            first, rest = await hand_over(*drivers, request_id, prompt, **fields)
            tokens = first.token_ids + (rest.token_ids if rest is not first else [])
            expected[request_id] = (tokens, fields["max_tokens"])
            return
        driver = draw.choice(drivers)
        if draw.random() < 0.2:
            fields["expires_s"] = trio.current_time() + draw.random()
        for choice in range(draw.choice((1, 1, 3))):
            await driver.submit(request_id, prompt, choice=choice, **fields)
        if draw.random() < 0.3:
            await trio.sleep(draw.random())
            driver.engine.cancel(request_id, 0, 0)

    async with running(*engines) as drivers:
        with_checks = [_check_each_step(engine) for engine in engines]
        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(one, drivers, number)
        for driver in drivers:
            await driver.all_done()
        assert all(count > 10 for count in (check() for check in with_checks))
        reused = sum(driver.engine.load.num_prefix_hits for driver in drivers)
        for driver in drivers:
            load = driver.engine.load
            assert load.num_free_blocks + load.num_cached_blocks == load.num_blocks
    assert (reused > 0) == is_on
    assert all(len(tokens) == wanted for tokens, wanted in expected.values())


def _check_each_step(engine):
    """Check the pool after each step. Return a function that gives the number of steps."""
    count, collect = 0, engine._loop._collect

    def checked(batch, sampled):
        nonlocal count
        collect(batch, sampled)
        engine.pool.check()
        count += 1

    engine._loop._collect = checked
    return lambda: count
