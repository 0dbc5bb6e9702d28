"""What happens while a grammar is compiled: no other sequence waits, and any sequence may end."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from engine_driver import Driver, running
from models_on_the_fly import make_model, random_prompts

from sagellm.runtime.engine import grammar_queue
from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.grammars import choice_grammar, grammar_compiler
from sagellm.runtime.grammars.grammar_compiler import GrammarCompiler
from sagellm.runtime.models.tokenizer import ByteTokenizer
from sagellm.runtime.sampling import Grammar, Sampling

PROMPTS = random_prompts((5, 17))
BOUND = Sampling(max_tokens=60, grammar=Grammar(kind="regex", text="(ab|cd[0-9]{2}){3,20}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("qwen3", tmp_path_factory.mktemp("qwen3"))


def open_on(folder):
    options = EngineOptions(model=str(folder), deterministic=True, max_model_len=256)
    return open_engine(options, name="e")


@dataclass
class HeldCompiler:
    """Compiles when it may go on."""

    inside: object
    may_go_on: threading.Event
    started: threading.Event

    def open(self):
        return self.inside.open()

    def compile(self, grammar, salt, **options):
        self.started.set()
        assert self.may_go_on.wait(30)
        return self.inside.compile(grammar, salt, **options)


def held(engine):
    queue = engine._loop.grammars
    queue._compiler = HeldCompiler(queue._compiler, threading.Event(), threading.Event())
    return queue._compiler


def test_calls_that_come_together_make_one_compiler():
    inside, may_go_on = threading.Event(), threading.Event()
    made = []

    def make():
        made.append(GrammarCompiler(ByteTokenizer(), 256, frozenset()))
        inside.set()
        assert may_go_on.wait(30)
        return made[-1]

    compiler = grammar_queue.LateCompiler(make)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(compiler.open)
        assert inside.wait(30)
        inside.clear()
        second = threads.submit(compiler.open)
        assert not inside.wait(0.2)  # the second call waits for the first
        may_go_on.set()
        first.result(30)
        second.result(30)
    assert len(made) == 1


async def test_no_other_sequence_waits_for_a_grammar(folder):
    async with running(engine := open_on(folder)) as [driver]:
        compiler = held(engine)
        bound = await driver.submit("bound", PROMPTS[0], sampling=BOUND)
        free = await driver.submit("free", PROMPTS[1], max_tokens=8)
        await free.done.wait()
        assert not bound.events
        compiler.may_go_on.set()
        await bound.done.wait()
    assert bound.token_ids


@pytest.mark.parametrize("reason", ["cancelled", "expired"])
async def test_a_sequence_may_end_before_its_grammar_is_there(folder, reason):
    async with running(engine := open_on(folder)) as [driver]:
        compiler = held(engine)
        expires_s = trio.current_time() + 0.05 if reason == "expired" else None
        reply = await driver.submit("r", PROMPTS[0], sampling=BOUND, expires_s=expires_s)
        if reason == "cancelled":
            engine.cancel("r", 0, 0)
        await reply.done.wait()
        compiler.may_go_on.set()
    assert reply.last.finish_reason == reason
    assert reply.token_ids == []


async def test_choices_of_a_slow_grammar_leave_a_thread_to_others(folder):
    async with running(engine := open_on(folder)) as [driver]:
        queue, compile_ = engine._loop.grammars, engine._loop.grammars._compiler.compile
        compiled, may_go_on = [], threading.Event()

        class OneIsSlow:
            def compile(self, grammar, salt, **options):
                compiled.append(grammar)
                if grammar is BOUND.grammar:
                    assert may_go_on.wait(30)
                return compile_(grammar, salt, **options)

        queue._compiler = OneIsSlow()
        slow = [
            await driver.submit("slow", PROMPTS[0], choice=choice, sampling=BOUND)
            for choice in range(3)
        ]
        other = Sampling(max_tokens=60, grammar=choice_grammar(["yes", "no"]))
        fast = await driver.submit("fast", PROMPTS[1], sampling=other)
        with trio.move_on_after(5) as limit:
            await fast.done.wait()
        engine.cancel("slow", 2, 0)
        may_go_on.set()
        await driver.all_done()
    assert not limit.cancelled_caught
    assert slow[0].token_ids == slow[1].token_ids
    assert slow[2].last.finish_reason == "cancelled"
    assert len(compiled) == 3  # nothing for the cancelled choice


async def test_tenants_take_turns(folder):
    """Among the grammars that wait while both threads are busy."""
    async with running(engine := open_on(folder)) as [driver]:
        queue, compile_ = engine._loop.grammars, engine._loop.grammars._compiler.compile
        order, may_go_on = [], threading.Event()

        class Ordered:
            def compile(self, grammar, salt, *, user_id, ignores_eos):
                order.append((user_id, grammar.text))
                assert may_go_on.wait(30)
                return compile_(grammar, salt, user_id=user_id, ignores_eos=ignores_eos)

        queue._compiler = Ordered()
        replies = []
        for user_id, number in [*(("many", one) for one in range(6)), ("few", 8), ("one", 9)]:
            sampling = Sampling(max_tokens=4, grammar=choice_grammar([str(number)]))
            request_id = f"{user_id}-{number}"
            replies.append(
                await driver.submit(request_id, PROMPTS[0], sampling=sampling, user_id=user_id)
            )
        may_go_on.set()
        await driver.all_done()
    assert {user_id for user_id, _ in order[:2]} == {"many"}
    assert {"few", "one"} <= {user_id for user_id, _ in order[2:6]}
    assert all(reply.last.finish_reason == "stop" for reply in replies)


async def test_choices_of_a_refused_grammar_share_the_refusal(folder):
    bad = Sampling(max_tokens=8, grammar=Grammar(kind="regex", text="(?<=a)b"))
    async with running(engine := open_on(folder)) as [driver]:
        compiler = held(engine)
        replies = [
            await driver.submit("bad", PROMPTS[0], choice=choice, sampling=bad)
            for choice in range(3)
        ]
        compiler.may_go_on.set()
        await driver.all_done()
    assert {(one.last.finish_reason, one.last.code) for one in replies} == {
        ("refused", "invalid_grammar")
    }
    assert len({one.last.error for one in replies}) == 1


async def test_a_deadline_ends_a_sequence_that_an_idle_engine_compiles_for(folder):
    async with running(engine := open_on(folder)) as [driver]:
        await trio.testing.wait_all_tasks_blocked()  # the loop waits for a change
        compiler = held(engine)
        expires_s = trio.current_time() + 0.05
        reply = await driver.submit("r", PROMPTS[0], sampling=BOUND, expires_s=expires_s)
        with trio.move_on_after(5) as limit:
            await reply.done.wait()
        compiler.may_go_on.set()
    assert not limit.cancelled_caught
    assert reply.last.finish_reason == "expired"


async def test_an_engine_that_waits_for_a_grammar_does_not_hang(folder):
    async with running(engine := open_on(folder)) as [driver]:
        compiler = held(engine)
        reply = await driver.submit("r", PROMPTS[0], sampling=BOUND)
        await trio.to_thread.run_sync(compiler.started.wait)
        later_s = trio.current_time() + 60
        loop = engine._loop
        assert not loop.watchdog.health(later_s, has_work=loop.has_work).is_hung
        loop.watchdog.reset(trio.current_time() - 60)
        compiler.may_go_on.set()
        await trio.testing.wait_all_tasks_blocked()
        while not reply.events:
            assert not engine.health.is_hung
            await trio.lowlevel.checkpoint()
        await driver.all_done()


async def test_an_engine_may_stop_while_a_grammar_is_compiled(folder):
    engine = open_on(folder)
    compiler = held(engine)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        await Driver(engine).submit("r", PROMPTS[0], sampling=BOUND)
        await trio.to_thread.run_sync(compiler.started.wait)
        nursery.cancel_scope.cancel()
        compiler.may_go_on.set()
    assert engine.pool.num_leased == 0
    assert not [one for one in threading.enumerate() if one.name.startswith("sagellm-grammar")]


async def test_a_compiler_that_fails_ends_its_sequence_alone(folder):
    engine = open_on(folder)

    class Failing:
        def compile(self, *args, **options):
            raise RuntimeError("no memory")

    engine._loop.grammars._compiler = Failing()
    async with running(engine) as [driver]:
        reply = await driver.submit("bound", PROMPTS[0], sampling=BOUND)
        free = await driver.submit("free", PROMPTS[1], max_tokens=8)
        await driver.all_done()
    assert (reply.last.finish_reason, reply.last.code) == ("failed", "engine_failed")
    assert len(free.token_ids) == 8


async def test_a_bad_grammar_refuses_its_sequence_alone(folder):
    async with running(open_on(folder)) as [driver]:
        bad = Sampling(max_tokens=8, grammar=Grammar(kind="regex", text="(?<=a)b"))
        refused = await driver.submit("bad", PROMPTS[0], sampling=bad)
        good = await driver.submit("good", PROMPTS[1], max_tokens=8)
        await driver.all_done()
    assert (refused.last.finish_reason, refused.last.code) == ("refused", "invalid_grammar")
    assert refused.last.error
    assert len(good.token_ids) == 8


@dataclass
class CountedCompiler:
    """A compiler that records when its vocabulary is opened. `fault`: raised in place of that."""

    inside: object
    fault: Exception | None = None
    opened: threading.Event = field(default_factory=threading.Event)

    def open(self):
        self.opened.set()
        if self.fault:
            raise self.fault
        return self.inside.open()

    def compile(self, grammar, salt, **options):
        self.open()
        return self.inside.compile(grammar, salt, **options)


def counted(engine, fault=None):
    queue = engine._loop.grammars
    queue._compiler = CountedCompiler(queue._compiler, fault)
    return queue._compiler


async def test_an_idle_engine_opens_its_vocabulary(folder):
    engine = open_on(folder)
    compiler = counted(engine)
    async with running(engine):
        assert await trio.to_thread.run_sync(compiler.opened.wait, 30)


async def test_an_engine_with_sequences_leaves_its_vocabulary_closed(monkeypatch):
    monkeypatch.setattr(grammar_queue, "_IDLE_S", 0.001)
    sequences = {"fence": None}
    queue = grammar_queue.GrammarQueue(compiler := CountedCompiler(None), sequences, print)
    queue.open_when_idle()
    await trio.sleep(0.05)
    assert not compiler.opened.is_set()
    sequences.clear()
    assert await trio.to_thread.run_sync(compiler.opened.wait, 30)
    await queue.close()


async def test_the_end_does_not_wait_for_an_idle_moment():
    queue = grammar_queue.GrammarQueue(compiler := CountedCompiler(None), {"fence": None}, print)
    queue.open_when_idle()
    with trio.fail_after(30):
        await queue.close()
    assert not compiler.opened.is_set()


async def test_the_first_grammar_opens_the_vocabulary_of_a_busy_engine(folder, monkeypatch):
    monkeypatch.setattr(grammar_queue, "_IDLE_S", 600.0)
    async with running(engine := open_on(folder)) as [driver]:
        compiler = counted(engine)
        free = await driver.submit("free", PROMPTS[1], max_tokens=8)
        await free.done.wait()
        assert not compiler.opened.is_set()
        bound = await driver.submit("bound", PROMPTS[0], sampling=BOUND)
        await bound.done.wait()
    assert bound.token_ids


async def test_a_vocabulary_that_does_not_open_is_logged_and_ends_the_answers(folder, caplog):
    async with running(engine := open_on(folder)) as [driver]:
        compiler = counted(engine, fault=RuntimeError("a bug of the library"))
        assert await trio.to_thread.run_sync(compiler.opened.wait, 30)
        reply = await driver.submit("r", PROMPTS[0], sampling=BOUND)
        await reply.done.wait()
    assert reply.last.finish_reason == "failed"
    assert "could not compile" in reply.last.error
    assert "grammar_vocabulary_failed" in caplog.text


async def test_grammars_that_come_together_open_the_vocabulary_once(folder, monkeypatch):
    opened, open_once = [], grammar_compiler.open_vocabulary

    def slowly(*args):
        opened.append(args)
        return open_once(*args)

    monkeypatch.setattr(grammar_compiler, "open_vocabulary", slowly)
    async with running(open_on(folder)) as [driver]:
        for name in ("a", "b", "c"):
            grammar = Grammar(kind="regex", text=f"{name}{{3,9}}")
            await driver.submit(name, PROMPTS[0], sampling=Sampling(max_tokens=9, grammar=grammar))
        await driver.all_done()
    assert len(opened) == 1
