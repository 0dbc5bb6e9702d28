"""The engine's loop on the null device, in virtual time: events, ends, cancellation, transfers."""

import dataclasses
import random

import msgspec
import pytest
import trio
from engine_driver import Driver, hand_over, running

from sagellm.runtime.engine.kinds.modelled import ModelledLaunch, ModelledOptions, open_modelled
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.port import EngineRefusal, LeaseOffer, StaleLease
from sagellm.runtime.sampling import Sampling

NUM_PROMPT = 40
PROMPT = tuple(range(1, NUM_PROMPT + 1))


def open_null(name="e", **options):
    return open_modelled(ModelledOptions(**{"model": "null", **options}), name=name)


def offer(engine, request_id="r", num_tokens=NUM_PROMPT, **fields):
    layout_hash = engine.facts.layout_hash
    fields = {"choice": 0, "epoch": 0, "layout_hash": layout_hash, **fields}
    return LeaseOffer(request_id=request_id, num_tokens=num_tokens, **fields)


async def test_an_answer_ends_by_length(autojump_clock):
    async with running(open_null()) as [driver]:
        reply = await driver.submit("r", PROMPT, max_tokens=5)
        await reply.done.wait()
    assert len(reply.token_ids) == 5
    assert reply.last.finish_reason == "length"
    assert reply.last.num_prompt_tokens == 40


async def test_sequences_that_are_sent_together_do_not_wait_a_turn_for_each_other(autojump_clock):
    """Sequences submitted together start together, even if turns of trio's loop are late."""
    turned = trio.Event()

    async def turn() -> None:
        turned.set()

    async with running(open_null()) as [driver], trio.open_nursery() as nursery:
        nursery.start_soon(turn)
        for number in range(8):
            await driver.submit(f"r{number}", PROMPT, max_tokens=2)
        assert not turned.is_set()
        await driver.all_done()


async def test_time_is_what_the_cost_model_says(autojump_clock):
    engine = open_null(prefill_token_s=0.5, decode_step_s=2.0)
    async with running(engine) as [driver]:
        start = trio.current_time()
        reply = await driver.submit("r", PROMPT, max_tokens=3)
        await reply.done.wait()
        stamps = reply.last.stamps
    assert stamps.started_s - start == pytest.approx(0)
    assert stamps.prefilled_s - start == pytest.approx(22)
    assert stamps.finished_s - start == pytest.approx(26)


async def test_tokens_depend_on_seed_choice_and_position_alone(autojump_clock):
    async with running(open_null()) as [driver]:
        alone = await driver.submit("a", PROMPT, max_tokens=8)
        await alone.done.wait()
        together = [await driver.submit(f"b{i}", (1, 2), max_tokens=8) for i in range(5)]
        other = await driver.submit("b0", PROMPT, choice=1, max_tokens=8)
        await driver.all_done()
    assert all(reply.token_ids == alone.token_ids for reply in together)
    assert other.token_ids != alone.token_ids


async def test_the_context_limit_ends_an_answer(autojump_clock):
    async with running(open_null(max_model_len=48)) as [driver]:
        reply = await driver.submit("r", PROMPT, max_tokens=100)
        await reply.done.wait()
    assert len(reply.token_ids) == 8
    assert reply.last.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "sampling", "reason"),
    [
        ((), {}, "prompt is empty"),
        ((1,) * 48, {}, "48 tokens and the context limit is 48; shorten it to 47"),
        ((1, 32000), {}, "token 32000; the model knows 0 ... 31999"),
        ((1,), {"top_p": 0.0}, "top_p is 0.0; it must be from 1e-09 to 1"),
        ((1,), {"max_tokens": 0}, "max_tokens is 0"),
        ((1,), {"temperature": float("nan")}, "temperature is nan"),
        ((1,), {"logit_bias": {-1: 1.0}}, "logit_bias has token -1"),
        ((1,), {"logit_bias": {1: float("inf")}}, "outside -100 to 100"),
        ((1,), {"stop": ("",)}, "stop holds an empty string"),
    ],
)
async def test_refusals_name_the_cause(prompt, sampling, reason):
    async with running(open_null(max_model_len=48)) as [driver]:
        with pytest.raises(EngineRefusal, match=reason):
            await driver.submit("r", prompt, sampling=Sampling(**sampling))


async def test_the_same_choice_cannot_run_twice(autojump_clock):
    async with running(open_null()) as [driver]:
        await driver.submit("r", PROMPT)
        with pytest.raises(EngineRefusal, match="runs here already"):
            await driver.submit("r", PROMPT)
        driver.engine.cancel("r", 0, 0)
        await driver.all_done()


async def test_cancel_ends_with_one_event(autojump_clock):
    async with running(open_null()) as [driver]:
        waiting = await driver.submit("w", PROMPT)
        driver.engine.cancel("w", 0, 0)
        decoding = await driver.submit("d", PROMPT, max_tokens=1000)
        await trio.sleep(1)
        driver.engine.cancel("d", 0, 0)
        driver.engine.cancel("d", 0, 0)
        driver.engine.cancel("unknown", 0, 0)
        await driver.all_done()
    assert waiting.last.finish_reason == decoding.last.finish_reason == "cancelled"
    assert 0 < len(decoding.token_ids) < 1000


async def test_cancel_obeys_the_epoch(autojump_clock):
    async with running(open_null()) as [driver]:
        reply = await driver.submit("r", PROMPT, epoch=2, max_tokens=5)
        driver.engine.cancel("r", 0, 1)
        await reply.done.wait()
    assert reply.last.finish_reason == "length"


async def test_a_deadline_ends_waiting_and_running(autojump_clock):
    async with running(open_null(max_num_seqs=1)) as [driver]:
        soon = trio.current_time() + 1
        runs = await driver.submit("a", PROMPT, max_tokens=1000, expires_s=soon)
        waits = await driver.submit("b", PROMPT, max_tokens=1000, expires_s=soon + 1)
        await driver.all_done()
        assert trio.current_time() == pytest.approx(soon + 1, abs=0.1)
    assert runs.last.finish_reason == waits.last.finish_reason == "expired"


async def test_a_slow_reader_stops_only_its_own_sequences(autojump_clock):
    engine = open_null()
    async with running(engine) as [driver]:
        state = await driver.submit("fast", PROMPT, max_tokens=50)
        slow = msgspec.structs.replace(_state("slow"), owner="slow")
        await engine.submit(slow)
        await state.done.wait()
        num_running = engine.load.num_running
        texts = [event async for batch in _first(engine.events("slow"), 16) for event in batch]
    assert num_running == 1
    assert len(texts) == 16
    assert texts[-1].is_last


def _state(request_id):
    return SequenceState(
        owner="o", request_id=request_id, prompt_token_ids=PROMPT, sampling=Sampling(max_tokens=16)
    )


async def _first(batches, count):
    async for batch in batches:
        yield batch
        count -= len(batch)
        if count == 0:
            return


async def test_held_prompt_is_copied_and_continued(autojump_clock):
    async with running(open_null("p"), open_null("d")) as [prefill, decode]:
        whole = await prefill.submit("w", PROMPT, max_tokens=10)
        await whole.done.wait()
        first, rest = await hand_over(prefill, decode, "r", PROMPT, max_tokens=10)
    assert first.token_ids + rest.token_ids == whole.token_ids
    assert rest.events[0].position == 1


async def test_a_first_token_that_is_the_last_leaves_no_lease(autojump_clock):
    async with running(open_null()) as [driver]:
        reply = await driver.submit("r", PROMPT, max_tokens=1, hold_kv=True)
        await reply.done.wait()
        assert reply.lease is None
    assert reply.last.finish_reason == "length"


async def test_a_held_lease_is_adopted_in_its_own_pool(autojump_clock):
    async with running(open_null()) as [driver]:
        first = await driver.submit("r", PROMPT, max_tokens=5, hold_kv=True)
        await first.done.wait()
        emitted = tuple(first.token_ids)
        rest = await driver.submit(
            "r", PROMPT, max_tokens=5, lease=first.lease, emitted_token_ids=emitted
        )
        await rest.done.wait()
    assert len(rest.token_ids) == 4


async def test_cancel_frees_a_held_lease_without_an_event(autojump_clock):
    async with running(open_null()) as [driver]:
        reply = await driver.submit("r", PROMPT, hold_kv=True)
        await reply.done.wait()
        driver.engine.cancel("r", 0, 0)
        assert driver.engine.pool.num_leased == 0
        with pytest.raises(StaleLease):
            driver.engine.export(reply.lease)
        assert len(reply.events) == 1


async def test_import_waits_for_blocks_in_order(autojump_clock):
    async with running(open_null(num_blocks=8, max_model_len=128)) as [driver]:
        engine, order = driver.engine, []
        held = await engine.import_(offer(engine, "first", 100))

        async def reserve(request_id):
            target = await engine.import_(offer(engine, request_id, 100))
            order.append(request_id)
            target.abort()

        async with trio.open_nursery() as nursery:
            for request_id in "abc":
                nursery.start_soon(reserve, request_id)
                await trio.testing.wait_all_tasks_blocked()
            assert order == []
            held.abort()
    assert order == ["a", "b", "c"]


async def test_a_cancelled_import_leaves_the_line(autojump_clock):
    async with running(open_null(num_blocks=8, max_model_len=128)) as [driver]:
        engine = driver.engine
        held = await engine.import_(offer(engine, "first", 100))
        with trio.move_on_after(1) as waiting:
            await engine.import_(offer(engine, "second", 100))
        held.abort()
        await trio.sleep(1)
        assert waiting.cancelled_caught
        assert engine.pool.num_leased == 0


async def test_import_is_asked_twice_for_one_target(autojump_clock):
    async with running(open_null()) as [driver]:
        target = await driver.engine.import_(offer(driver.engine))
        assert await driver.engine.import_(offer(driver.engine)) is target
        driver.engine.cancel("r", 0, 0)
        assert await driver.engine.import_(offer(driver.engine)) is not target
        driver.engine.cancel("r", 0, 0)


async def test_two_imports_of_one_request_wait_for_one_target(autojump_clock):
    async with running(open_null(num_blocks=8, max_model_len=128)) as [driver]:
        engine, targets = driver.engine, []
        held = await engine.import_(offer(engine, "first", 100))

        async def reserve():
            targets.append(await engine.import_(offer(engine, "r", 60)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reserve)
            nursery.start_soon(reserve)
            await trio.testing.wait_all_tasks_blocked()
            held.abort()
        assert targets[0] is targets[1]
        targets[0].abort()


async def test_a_lease_that_covers_all_is_refused_and_stays_with_its_owner(autojump_clock):
    async with running(open_null()) as [driver]:
        target = await driver.engine.import_(offer(driver.engine))
        with pytest.raises(EngineRefusal, match="covers every known token"):
            await driver.submit("r", PROMPT, lease=target.lease)
        target.abort()


async def test_a_request_may_return_while_its_older_epoch_ends(autojump_clock):
    async with running(open_null()) as [driver]:
        old = await driver.submit("r", PROMPT, max_tokens=1000)
        await trio.sleep(0.1)
        driver.engine.cancel("r", 0, 0)
        other = Driver(driver.engine, "other")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.read)
            new = await other.submit("r", PROMPT, epoch=1, max_tokens=5)
            await driver.all_done()
            await other.all_done()
            nursery.cancel_scope.cancel()
    assert old.last.finish_reason == "cancelled"
    assert new.last.finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"layout_hash": "x"}, "another layout"), ({"num_tokens": 10**6}, "exceed the pool")],
)
async def test_import_refuses_what_never_fits(fields, reason):
    async with running(open_null()) as [driver]:
        with pytest.raises(EngineRefusal, match=reason):
            await driver.engine.import_(offer(driver.engine, **fields))


async def test_a_reservation_without_its_blocks_cannot_decode(autojump_clock):
    async with running(open_null()) as [driver]:
        target = await driver.engine.import_(offer(driver.engine))
        with pytest.raises(StaleLease, match="reserved"):
            await driver.submit("r", PROMPT, emitted_token_ids=(1,), lease=target.lease)
        target.abort()


async def test_resuming_after_the_last_token_ends_at_once(autojump_clock):
    async with running(open_null()) as [driver]:
        reply = await driver.submit("r", PROMPT, max_tokens=3, emitted_token_ids=(1, 2, 3))
        await reply.done.wait()
    assert reply.last.finish_reason == "length"
    assert reply.token_ids == []


async def test_a_failed_step_fails_its_sequences_and_no_more(autojump_clock, monkeypatch):
    engine = open_null()
    result = ModelledLaunch.result

    async def fail(self):
        raise RuntimeError("secret detail")

    async with running(engine) as [driver]:
        monkeypatch.setattr(ModelledLaunch, "result", fail)
        broken = await driver.submit("a", PROMPT)
        await broken.done.wait()
        monkeypatch.setattr(ModelledLaunch, "result", result)
        fine = await driver.submit("b", PROMPT, max_tokens=3)
        await fine.done.wait()
    assert broken.last.finish_reason == "failed"
    assert "RuntimeError" in broken.last.error
    assert "secret" not in broken.last.error
    assert fine.last.finish_reason == "length"


@pytest.mark.parametrize("hold_kv", [False, True])
async def test_logits_that_are_no_numbers_fail_their_sequence_only(
    autojump_clock, monkeypatch, hold_kv
):
    engine = open_null()
    result = ModelledLaunch.result

    async def poisoned(self):
        sampled = await result(self)
        names = [sequence.state.request_id for sequence in self.batch.sampling]
        broken = frozenset({names.index("a")}) if "a" in names else frozenset()
        return dataclasses.replace(sampled, broken=broken)

    monkeypatch.setattr(ModelledLaunch, "result", poisoned)
    async with running(engine) as [driver]:
        broken = await driver.submit("a", PROMPT, hold_kv=hold_kv)
        fine = await driver.submit("b", PROMPT, max_tokens=3)
        await broken.done.wait()
        await fine.done.wait()
    assert broken.last.finish_reason == "failed"
    assert "not finite" in broken.last.error
    assert broken.token_ids == []
    assert fine.last.finish_reason == "length"


async def test_stopping_frees_everything_and_ends_readers(autojump_clock):
    engine = open_null()
    seen = []
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        @nursery.start_soon
        async def run():
            with scope:
                await engine.run()

        @nursery.start_soon
        async def read():
            async for batch in engine.events("o"):
                seen.extend(batch)

        await engine.import_(offer(engine, "reserved"))
        await engine.submit(_state("r"))
        await trio.sleep(0.05)
        scope.cancel()
    assert engine.pool.num_leased == 0
    assert seen
    with pytest.raises(EngineRefusal, match="has stopped"):
        await engine.submit(_state("late"))


@pytest.mark.parametrize("seed", range(4))
async def test_cancelling_at_random_points_frees_every_block(autojump_clock, seed):
    """Fifty requests go through both engines. Each may be cancelled at any moment."""
    draw = random.Random(seed)
    small = {
        "num_blocks": 40,
        "max_model_len": 256,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 32,
    }
    async with running(open_null("p", **small), open_null("d", **small)) as drivers:

        async def serve(request_id):
            await trio.sleep(draw.random())
            prompt = PROMPT[: draw.randint(1, 40)]
            with trio.move_on_after(draw.random() * 2):
                await hand_over(*drivers, request_id, prompt, max_tokens=draw.randint(1, 40))
            for driver in drivers:
                driver.engine.cancel(request_id, 0, 0)

        async with trio.open_nursery() as nursery:
            for index in range(50):
                nursery.start_soon(serve, str(index))
        await trio.sleep(1)
        assert [driver.engine.pool.num_leased for driver in drivers] == [0, 0]


async def test_load_counts(autojump_clock):
    async with running(open_null(max_num_seqs=1)) as [driver]:
        for index in range(3):
            await driver.submit(str(index), PROMPT, max_tokens=30)
        await trio.sleep(0.1)
        load = driver.engine.load
        await driver.all_done()
    assert (load.num_running, load.num_waiting, load.num_pending_prefill_tokens) == (1, 2, 80)
    assert load.num_leased_blocks + load.num_free_blocks + load.num_cached_blocks == load.num_blocks
    assert load.peak_leased_blocks >= 3
