"""The option `kv_cache_dtype`: what is refused, what it changes in facts, and equal answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from detached import installed
from engine_driver import Driver, hand_over, running
from hybrid_models import LAYERS, make_hybrid, registered
from models_on_the_fly import make_model, random_prompts

from sagellm.backends import KVLayout, get_backend
from sagellm.runtime.engine.kinds.local import open_device, open_engine
from sagellm.runtime.engine.kinds.modelled import ModelledOptions, open_modelled
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.options import EngineOptionError, EngineOptions
from sagellm.runtime.engine.sizing import engine_facts, facts_view, size
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.port import EngineFacts

TINY = resolve_model("sage-tiny")
NUM_NEW = 24
MEMORY = {"kv_memory": "8MiB", "max_model_len": 64}


def facts_of(**options: object) -> EngineFacts:
    chosen = EngineOptions(**options)
    sizing = size(chosen, TINY.facts, open_device(chosen).memory_bytes)
    return engine_facts(chosen, TINY, sizing)


@pytest.mark.parametrize(
    ("name", "fix"),
    [("int-8", "did you mean int8?"), ("atuo", "did you mean auto?"), ("fp8", "use auto or int8")],
)
def test_an_unknown_dtype_is_refused(name: str, fix: str) -> None:
    for kind in (EngineOptions, ModelledOptions):
        with pytest.raises(EngineOptionError) as caught:
            kind(kv_cache_dtype=name)
        assert str(caught.value) == f"kv_cache_dtype: {name!r} is unknown; {fix}"


def test_a_device_without_the_dtype_refuses_it_before_weights_are_read() -> None:
    with installed(), pytest.raises(EngineOptionError, match="no int8; it has auto"):
        open_engine(EngineOptions(device="detached", kv_cache_dtype="int8"), name="e")


def test_the_null_backend_has_no_further_dtype() -> None:
    assert get_backend("null").kv_cache_dtypes == ()
    assert get_backend("cpu").kv_cache_dtypes == ("int8",)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_has_the_bytes_of_the_backend(dtype: str) -> None:
    model, found = TINY.facts, facts_of(dtype=dtype, kv_cache_dtype="int8")
    shape = model.num_layers, model.num_kv_heads, model.head_dim, 16
    assert found.kv_block_bytes == KVLayout(*shape, dtype="int8").block_bytes


def test_the_same_memory_holds_almost_twice_the_tokens() -> None:
    plain = facts_of(**MEMORY, dtype="bfloat16")
    small = facts_of(**MEMORY, dtype="bfloat16", kv_cache_dtype="int8")
    head_dim = TINY.facts.head_dim
    wanted = 2 * head_dim / (head_dim + 2)
    assert small.num_blocks / plain.num_blocks == pytest.approx(wanted, rel=0.01)


def test_pools_of_different_dtypes_exchange_no_blocks() -> None:
    plain, small = facts_of(), facts_of(kv_cache_dtype="int8")
    assert plain.layout_hash != small.layout_hash
    assert plain.model_hash == small.model_hash


def test_a_modelled_engine_has_the_same_pool() -> None:
    options = ModelledOptions(**MEMORY, kv_cache_dtype="int8")
    found = open_modelled(options, name="e").facts
    wanted = facts_of(**MEMORY, kv_cache_dtype="int8")
    assert (found.num_blocks, found.kv_block_bytes) == (wanted.num_blocks, wanted.kv_block_bytes)


def test_a_check_of_the_graph_knows_the_dtype() -> None:
    options = EngineOptions(kv_cache_dtype="int8")
    view = facts_view(options, TINY, size(options, TINY.facts, 2**30), pool_bytes=0)
    assert view.kv_cache_dtype == "int8"


class Exam:
    """A model, and its answers alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prompts = random_prompts((1, 16, 31, 50, 81, 120))
        self.right: list[list[int]] = []

    def opened(self, replica: int = 0, **options: object) -> LocalEngine:
        known = {"deterministic": True, "max_model_len": 256, "threads": 1}
        options = {"model": str(self.folder), "kv_cache_dtype": "int8", **known, **options}
        return open_engine(EngineOptions(**options), name="e", replica=replica)

    async def ask(self, driver: Driver, index: int) -> list[int]:
        reply = await driver.submit(str(index), self.prompts[index], max_tokens=NUM_NEW)
        await reply.done.wait()
        return reply.token_ids

    async def ask_all(self, driver: Driver) -> list[list[int]]:
        for index, prompt in enumerate(self.prompts):
            await driver.submit(str(index), prompt, max_tokens=NUM_NEW)
        await driver.all_done()
        return [reply.token_ids for reply in driver.replies.values()]

    async def answers(self) -> list[list[int]]:
        if not self.right:
            async with running(self.opened(prefix_caching=False)) as [driver]:
                for index in range(len(self.prompts)):
                    self.right.append(await self.ask(driver, index))
        return self.right


@pytest.fixture(scope="module", params=["full", "sliding", "hybrid"])
def exam(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Exam]:
    """`hybrid` has recurrent states, which are float32 in the blocks of any pool."""
    folder = tmp_path_factory.mktemp(request.param)
    with registered():
        if request.param == "hybrid":
            yield Exam(make_hybrid(folder, LAYERS))
        else:
            yield Exam(make_model("mistral" if request.param == "sliding" else "qwen3", folder))


async def test_others_and_preemption_change_no_token(exam: Exam) -> None:
    right = await exam.answers()
    needed = exam.opened().facts.shape.num_needed(160)
    engine = exam.opened(num_blocks=needed + 4, max_model_len=160)
    async with running(engine) as [driver]:
        assert await exam.ask_all(driver) == right
    assert engine.load.num_preemptions > 0


async def test_a_cached_prefix_changes_no_token(exam: Exam) -> None:
    right, engine = await exam.answers(), exam.opened()
    async with running(engine) as [driver]:
        for _ in range(2):
            assert [await exam.ask(driver, index) for index in (4, 5)] == right[4:]
    assert engine.load.num_prefix_hits > 0


async def test_blocks_that_move_to_another_pool_change_no_token(exam: Exam) -> None:
    right = await exam.answers()
    async with running(exam.opened(0), exam.opened(1)) as [prefill, decode]:
        for index in (0, 3, 5):
            prompt = exam.prompts[index]
            first, rest = await hand_over(prefill, decode, str(index), prompt, max_tokens=NUM_NEW)
            assert first.token_ids + rest.token_ids == right[index]


@pytest.mark.parametrize("exam", ["full", "sliding"], indirect=True)
async def test_a_draft_model_may_have_keys_in_8_bits_too(exam: Exam) -> None:
    options = {"speculation": "draft", "draft_model": str(exam.folder)}
    right, engine = await exam.answers(), exam.opened(**options)
    async with running(engine) as [driver]:
        assert [await exam.ask(driver, index) for index in range(3)] == right[:3]
