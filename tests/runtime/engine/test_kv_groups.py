"""Layers with windows and recurrent states: the same answers in every way of serving."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import virtual_workers
from detached import installed
from endings import generate
from engine_driver import Driver, Reply, hand_over, running
from hybrid_models import LAYERS, greedy, make_hybrid, one_thread, registered
from models_on_the_fly import make_model, random_prompts, reference_tokens
from virtual_workers import Lives, chaotic

from sagellm import Graph, Sampling
from sagellm.backends import Sampled
from sagellm.backends.interface import Progress
from sagellm.graphs.ir import Graph as FrozenGraph
from sagellm.opening.graph_engines import engine_options
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.options import EngineOptionError, EngineOptions
from sagellm.runtime.engine.runner import DeviceLaunch
from sagellm.runtime.kv.lease import FREED
from sagellm.runtime.kv.memory import DeviceStorage
from sagellm.runtime.kv.transport import KVChunk, Sharing
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import EngineRefusal, LeaseOffer, StaleLease

LENGTHS = (1, 16, 31, 50, 81, 120)
NUM_NEW = 24
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 20,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXAMS = [
    *(("hybrid", device) for device in ("cpu", "detached")),
    *(("linear", "cpu"), ("sliding", "cpu"), ("sliding", "detached")),
]

STATEFUL = [(name, device) for name, device in EXAMS if name != "sliding"]
stateful = pytest.mark.parametrize("exam", STATEFUL, ids="-".join, indirect=True)


@dataclass(frozen=True)
class Exam:
    name: str
    folder: Path
    device: str
    prompts: list[tuple[int, ...]]
    right: list[list[int]]

    @property
    def has_state(self) -> bool:
        return self.name != "sliding"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    made = {"sliding": make_model("qwen3", tmp_path_factory.mktemp("sliding"), **SLIDING)}
    with registered():
        for name, mixers in {"hybrid": LAYERS, "linear": ("linear", "linear")}.items():
            made[name] = make_hybrid(tmp_path_factory.mktemp(name), mixers)
        yield made


@pytest.fixture(scope="module")
def answers() -> dict[str, list[list[int]]]:
    """The right answers of each model, computed for its first exam."""
    return {}


@pytest.fixture(scope="module", params=EXAMS, ids="-".join)
def exam(
    request: pytest.FixtureRequest, folders: dict[str, Path], answers: dict[str, list[list[int]]]
) -> Iterator[Exam]:
    name, device = request.param
    exam = Exam(name, folders[name], device, random_prompts(LENGTHS), answers.setdefault(name, []))
    with installed():
        if not exam.right:
            exam.right.extend(trio.run(answered_alone, exam))
        yield exam


def opened(
    exam: Exam, replica: int = 0, sharing: Sharing | None = None, **options: Any
) -> LocalEngine:
    known = {
        "deterministic": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 64,
        "threads": 1,
    }
    options = {"model": str(exam.folder), "device": exam.device, **known, **options}
    return open_engine(EngineOptions(**options), name="e", replica=replica, sharing=sharing)


async def ask_all(driver: Driver, exam: Exam, epoch: int = 0) -> list[list[int]]:
    replies = [
        await driver.submit(str(index), prompt, max_tokens=NUM_NEW, epoch=epoch)
        for index, prompt in enumerate(exam.prompts)
    ]
    for reply in replies:
        await reply.done.wait()
    return [reply.token_ids for reply in replies]


async def answered_alone(exam: Exam) -> list[list[int]]:
    found = []
    async with running(opened(exam, prefix_caching=False, max_num_batched_tokens=512)) as [driver]:
        for index, prompt in enumerate(exam.prompts):
            reply = await driver.submit(str(index), prompt, max_tokens=NUM_NEW)
            await reply.done.wait()
            found.append(reply.token_ids)
    return found


def test_alone_it_answers_as_the_reference(exam: Exam) -> None:
    if exam.device != "cpu":
        pytest.skip("another exam of the model has answered")
    with one_thread():
        assert exam.right == right_answers(exam)


def right_answers(exam: Exam) -> list[list[int]]:
    if exam.has_state:
        return [
            greedy(exam.folder, prompt, answer)
            for prompt, answer in zip(exam.prompts, exam.right, strict=True)
        ]
    return reference_tokens(exam.folder, exam.prompts, NUM_NEW)


def test_the_answers_are_worth_comparing(exam: Exam) -> None:
    assert min(len(set(tokens)) for tokens in exam.right[2:]) > 8
    assert len({tuple(tokens) for tokens in exam.right}) == len(exam.right)


async def test_all_together(exam: Exam) -> None:
    async with running(opened(exam, prefix_caching=False)) as [driver]:
        assert await ask_all(driver, exam) == exam.right


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk": 7},
        {"max_num_batched_tokens": 9, "block_size": 4},
        {"deterministic": False},
    ],
)
async def test_in_chunks_and_small_blocks(exam: Exam, options: dict[str, Any]) -> None:
    async with running(opened(exam, **options)) as [driver]:
        assert await ask_all(driver, exam) == exam.right


async def test_preempted(exam: Exam) -> None:
    options = {"block_size": 4, "max_model_len": 150, "max_num_batched_tokens": 8}
    engine = opened(exam, **options, num_blocks=fewest(exam, **options))
    async with running(engine) as [driver]:
        assert await ask_all(driver, exam) == exam.right
    assert engine.load.num_preemptions > 0 or exam.name == "linear"  # its leases do not grow


@pytest.mark.parametrize("fails_at", [12, 25, 40])
async def test_tokens_computed_in_the_step_after_one_that_failed_are_computed_again(
    exam: Exam, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Tokens are computed again from the start of the step: states have advanced meanwhile."""
    short = replace(exam, prompts=random_prompts(range(4, 14)))
    async with running(opened(exam)) as [driver]:
        right = await ask_all(driver, short)
    engine = opened(exam, block_size=4, max_num_batched_tokens=4)
    late = fail_late(engine, monkeypatch, fails_at)
    async with running(engine) as [driver]:
        answers = await ask_all(driver, short)
    ends = [reply.events[-1].finish_reason for reply in driver.replies.values()]
    whole = [index for index, end in enumerate(ends) if end == "length"]
    assert late
    assert set(ends) == {"failed", "length"}
    assert [answers[index] for index in whole] == [right[index] for index in whole]
    assert (engine.load.num_preemptions > 0) == exam.has_state


def fail_late(engine: LocalEngine, patch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let a step fail after the next step is over. Return the requests computed in that alone."""
    late: list[str] = []
    result = DeviceLaunch.result

    async def fail(launch: DeviceLaunch) -> Sampled:
        sampled = await result(launch)
        after = engine._loop._next
        if engine._loop.num_steps < number or late or not isinstance(after, DeviceLaunch):
            return sampled
        others = [one for one in after.batch.sequences if one not in launch.batch.sequences]
        if any(one.num_computed for one in others):
            await result(after)
            late.extend(one.fence.request_id for one in others)
            raise RuntimeError("broken")
        return sampled

    patch.setattr(DeviceLaunch, "result", fail)
    return late


def fewest(exam: Exam, **options: Any) -> int:
    """The number of blocks of the smallest pool."""
    facts = opened(exam, **options).facts
    return facts.shape.num_needed(facts.max_model_len)


async def test_handed_over_between_two_engines(exam: Exam) -> None:
    async with running(opened(exam), opened(exam, 1)) as [prefill, decode]:
        for index, prompt in enumerate(exam.prompts):
            both = await hand_over(prefill, decode, str(index), prompt, max_tokens=NUM_NEW)
            assert answer_of(both) == exam.right[index]


async def test_in_bfloat16(exam: Exam) -> None:
    """States stay in float32, in blocks of keys and values that do not."""
    options = {"dtype": "bfloat16", "block_size": 4}
    async with running(opened(exam, **options), opened(exam, 1, **options)) as [one, other]:
        alone = await one.submit("alone", exam.prompts[-1], max_tokens=NUM_NEW, salt="alone")
        await alone.done.wait()
        answers = await ask_all(one, exam)
        both = await hand_over(one, other, "r", exam.prompts[-1], max_tokens=NUM_NEW)
    assert alone.token_ids == answers[-1] == answer_of(both)


def answer_of(replies: tuple[Reply, Reply]) -> list[int]:
    first, rest = replies
    return first.token_ids if rest is first else first.token_ids + rest.token_ids


async def test_a_reused_prefix(exam: Exam) -> None:
    """The same prompts again, and prompts that begin alike, are computed in part."""
    async with running(opened(exam, block_size=4)) as [driver]:
        assert await ask_all(driver, exam) == exam.right
        before = driver.engine.load.num_prefix_hits
        assert await ask_all(driver, exam, epoch=1) == exam.right
        assert driver.engine.load.num_prefix_hits - before > sum(LENGTHS) // 2
        other = (*exam.prompts[-1][:100], 5, 6, 7)
        fresh = await driver.submit("other", other, max_tokens=NUM_NEW, salt="alone")
        forked = await driver.submit("forked", other, max_tokens=NUM_NEW)
        await driver.all_done()
        assert forked.token_ids == fresh.token_ids
        assert fresh.events[-1].num_cached_tokens == 0
        assert forked.events[-1].num_cached_tokens >= 40


def watched(engine: LocalEngine) -> list[list[int]]:
    """The blocks held in each table of each lease, after each step."""
    collect, seen = engine._loop._collect, []

    def watching(batch: Batch, sampled: Sampled | Exception) -> None:
        collect(batch, sampled)
        engine.pool.check()
        for lease in engine.pool.leases:
            seen.append([sum(block != FREED for block in table) for table in lease.tables])

    engine._loop._collect = watching  # type: ignore[method-assign]
    return seen


async def test_windows_free_the_blocks_that_they_have_passed(exam: Exam) -> None:
    engine = opened(exam, block_size=4, prefill_chunk=16)
    windows = [one.window for one in engine.facts.shape.groups for _ in range(one.num_tables)]
    seen = watched(engine)
    async with running(engine) as [driver]:
        await driver.submit("r", exam.prompts[-1], max_tokens=100)
        await driver.all_done()
    for table, window in enumerate(windows):
        counts = [held[table] for held in seen]
        if window is None:
            assert counts[-1] == (len(exam.prompts[-1]) + 99 + 3) // 4
        else:
            assert max(counts) <= -(-(window + 2 * 16) // 4) + 1  # two chunks may be under way
            assert max(counts[-60:]) <= -(-(window + 2) // 4) + 1


def test_a_pool_is_sized_for_all_groups(exam: Exam) -> None:
    facts = opened(exam, num_blocks=None, max_model_len=None).facts
    needed = facts.shape.num_needed(facts.max_model_len)
    assert facts.num_blocks >= needed
    with pytest.raises(EngineOptionError, match=f"num_blocks: {needed} or more"):
        opened(exam, num_blocks=needed - 1, max_model_len=facts.max_model_len)


@stateful
async def test_snapshots_are_kept_at_the_ends_of_chunks_and_evicted_for_others(
    exam: Exam,
) -> None:
    options = {"block_size": 4, "prefill_chunk": 32, "max_model_len": 80}
    engine = opened(exam, **options, num_blocks=fewest(exam, **options))
    async with running(engine) as [driver]:
        for number in range(3):
            prompt = [(number + 7 * at) % 250 for at in range(70)]
            await (await driver.submit(str(number), prompt, max_tokens=2)).done.wait()
            await driver.at_rest()
            snapshots = [one for one in engine.pool._tree.idle if one.group == states_of(engine)]
            assert 1 <= len(snapshots) <= (number + 1) * 3  # at 32, 64 and 68
    assert engine.load.num_evicted_blocks > 0


def states_of(engine: LocalEngine) -> int:
    return len(engine.facts.shape.groups)


@stateful
@pytest.mark.parametrize("is_dropped", [False, True], ids=["with its state", "without it"])
async def test_a_state_is_handed_over_and_nothing_else_would_do(
    exam: Exam, monkeypatch: pytest.MonkeyPatch, is_dropped: bool
) -> None:
    source, target = opened(exam), opened(exam, 1)
    copy = DeviceStorage.receive

    async def without_state(self: DeviceStorage, sender: Any, pairs: Any, check: Any) -> None:
        if others := pairs[: -source.facts.shape.num_state_blocks]:
            await copy(self, sender, others, check)

    async with running(source, target) as [prefill, decode]:
        # The blocks are full of another sequence: nothing is right by being zero.
        await (await decode.submit("other", exam.prompts[-2], max_tokens=2)).done.wait()
        if is_dropped:
            monkeypatch.setattr(DeviceStorage, "receive", without_state)
        both = await hand_over(prefill, decode, "r", exam.prompts[-1], max_tokens=NUM_NEW)
    assert (answer_of(both) != exam.right[-1]) == is_dropped


@stateful
async def test_blocks_without_a_state_are_refused(exam: Exam) -> None:
    source, target = opened(exam), opened(exam, 1)
    async with running(source, target) as [prefill, _]:
        prompt = exam.prompts[-1]
        held = await prefill.submit("r", prompt, hold_kv=True)
        await held.done.wait()
        assert held.lease is not None
        sender = source.export(held.lease)
        offer = offer_of(source, prompt)
        reservation = await target.import_(offer)
        sender.held.state_blocks, state_blocks = [], sender.held.state_blocks
        with pytest.raises(StaleLease, match="blocks were sent where"):
            await reservation.receive(sender)
        sender.held.state_blocks = state_blocks
        sender.release()
        with pytest.raises(EngineRefusal, match="another layout"):
            await target.import_(msgspec.structs.replace(offer, layout_hash="of other groups"))


def test_drafts_are_refused_where_a_state_cannot_go_back(
    exam: Exam, folders: dict[str, Path]
) -> None:
    if not exam.has_state:
        opened(exam, speculation="ngram")
        return
    with pytest.raises(EngineOptionError, match=r"speculation: .* recurrent state"):
        opened(exam, speculation="ngram")
    model = folders["sliding"]
    with pytest.raises(EngineOptionError, match=r"draft_model: .* recurrent state"):
        opened(exam, model=str(model), speculation="draft", draft_model=str(exam.folder))


@pytest.mark.in_process
@pytest.mark.parametrize("kind", ["tcp", "memory"])
async def test_moved_between_workers_that_die(
    exam: Exam, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill and decode in workers, with blocks that go over a transport; two workers die."""
    if exam.device == "detached" and kind == "memory":
        pytest.skip("its memory is no memory of the host")

    async def begun(
        lives: Lives, graph: FrozenGraph, name: str, replica: int, _: int | None, say: Progress
    ) -> LocalEngine:
        await trio.lowlevel.checkpoint()
        options = engine_options(graph, name)
        engine = open_engine(options, name=name, replica=replica, sharing=Sharing(kind))
        lives.engines.append(engine)
        return engine

    monkeypatch.setattr(Lives, "_open", begun)
    options = {"device": exam.device, "model": str(exam.folder), "deterministic": True}
    options |= {"max_model_len": 256, "max_num_batched_tokens": 32, "threads": 1}
    monkeypatch.setattr(virtual_workers, "OPTIONS", options)
    sampling = Sampling(max_tokens=NUM_NEW, ignore_eos=True, seed=1)
    found: dict[int, list[int]] = {}
    async with chaotic(Graph.load("pd_many"), 1) as chaos:

        async def ask(index: int) -> None:
            answer = await generate(chaos.session, list(exam.prompts[index]), sampling=sampling)
            found[index] = list(answer.token_ids)

        async with trio.open_nursery() as nursery:
            for index in range(len(exam.prompts)):
                nursery.start_soon(ask, index)
            await trio.sleep(0.05)
            for worker in {one.engine_name: one for one in chaos.supervisor.workers}.values():
                life = chaos._life(worker.pid)
                assert life is not None
                life.kill()
    assert [found[index] for index in range(len(exam.prompts))] == exam.right


async def test_blocks_of_full_attention_go_early_and_the_rest_at_the_end(exam: Exam) -> None:
    options, prompt = {"block_size": 4, "prefill_chunk": 16}, exam.prompts[-1]
    source, target = (opened(exam, number, sharing=Sharing("tcp"), **options) for number in (0, 1))
    advances: list[tuple[LeaseRef, int]] = []
    source.report_kv_progress(lambda lease, num_blocks: advances.append((lease, num_blocks)))
    async with running(source, target) as [prefill, decode], trio.open_nursery() as nursery:
        nursery.start_soon(source.serve_blocks)
        nursery.start_soon(target.serve_blocks)
        reservation = await target.import_(offer_of(source, prompt))
        first = await prefill.submit("r", prompt, hold_kv=True)
        await first.done.wait()
        num_early = 0
        for lease, num_blocks in advances[:3]:
            chunk = KVChunk(first=num_early, end=num_blocks)
            located = await source.export_chunk(lease, chunk)
            await target.receive_chunk(reservation.lease, located, chunk)
            num_early = num_blocks
        assert first.lease is not None
        sender = source.export(first.lease)
        located = await sender.share(num_early)
        assert located.num_blocks == len(source.pool.sent(sender.held, num_early))
        await target.receive(reservation.lease, located, num_early)
        sender.release()
        emitted = tuple(first.token_ids)
        rest = await decode.submit(
            "r", prompt, lease=reservation.lease, emitted_token_ids=emitted, max_tokens=NUM_NEW
        )
        await rest.done.wait()
        nursery.cancel_scope.cancel()
    assert first.token_ids + rest.token_ids == exam.right[-1]
    assert (num_early > 0) == source.facts.shape.has_full


def offer_of(source: LocalEngine, prompt: Sequence[int]) -> LeaseOffer:
    return LeaseOffer(
        request_id="r",
        choice=0,
        epoch=0,
        num_tokens=len(prompt),
        layout_hash=source.facts.layout_hash,
    )
