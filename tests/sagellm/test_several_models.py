"""Several models in one graph: each with its tokenizer, names, limits, queue and blocks."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from mirrored_models import make_mirrored, mirrored
from trio.testing import MockClock

from sagellm import Graph, RequestRefused, Sampling, ops
from sagellm.cli.graph_argument import graph_of_models, model_keys
from sagellm.graphs.diagnostics import GraphError
from sagellm.opening.tokenizers import load_models
from sagellm.runtime.messages import Request
from sagellm.session import RequestError, Session

TWO = Path("examples/two_models.yaml")
SUM = [{"role": "user", "content": "What is 23 + 45?"}]
GREEDY = Sampling(max_tokens=16, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mirrored(tmp_path_factory.mktemp("models") / "mirror")


@asynccontextmanager
async def opened(graph: Graph, **options: Any) -> AsyncIterator[Session]:
    """The session; at the end the ledger balances and no block is leased."""
    async with graph.open(set=options) as session:
        yield session
        await session.idle()
        session.executor.core.ledger.check()
        loads = [load for pool in session.statistics().engines.values() for load in pool]
        assert sum(load.num_leased_blocks for load in loads) == 0


def null_pair(**admission: Any) -> Graph:
    """Two models that compute nothing, behind `route_model`."""
    graph, choose = Graph("two"), ops.route_model(["a", "b"])
    graph >> choose
    for key in ("a", "b"):
        graph.engine(key, model="null", device="null", decode_step_s=0.01, max_num_seqs=1)
        door = ops.admission(**admission).named(f"door_{key}")
        queue = ops.policy_sort("fifo").named(f"sort_{key}")
        choose.outlet(key) >> door >> queue >> ops.generate(engine=key).named(f"generate_{key}")
    return graph


class Notes:
    """An observer that records the submitted requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def submitted(self, requests: Any) -> None:
        self.requests += requests

    def delivered(self, item: Any) -> None:
        """Ignore items."""


async def test_each_model_reads_and_writes_with_its_own_tokenizer(folder: Path) -> None:
    """The mirrored model answers alike only if its tokens are never mixed up."""
    graph = graph_of_models(["sage-tiny", str(folder)])
    async with opened(graph) as session:
        one = await session.generate(SUM, sampling=GREEDY, model="sage-tiny")
        other = await session.generate(SUM, sampling=GREEDY, model="mirror")
    assert "68" in one.text
    assert other.text == one.text
    assert other.token_ids == mirrored(one.token_ids) != one.token_ids


async def test_a_request_chooses_by_name_alias_or_key_and_else_gets_the_first(
    autojump_clock: MockClock,
) -> None:
    graph, notes = null_pair().model("a", name="Org/A", aliases=["small"]).model("b"), Notes()
    async with opened(graph) as session:
        session.observers.append(notes)
        for name in ("Org/A", "small", "a", "b", ""):
            await session.generate("hi", sampling=Sampling(max_tokens=1), model=name)
        steps = {name: loads[0].num_steps for name, loads in session.statistics().engines.items()}
    assert [request.model for request in notes.requests] == ["a", "a", "a", "b", "a"]
    assert steps["a"] == 4 * steps["b"]


@pytest.mark.parametrize(("name", "hint"), [("smal", "did you mean 'small'"), ("x", "there are")])
async def test_an_unknown_model_is_refused_before_it_enters(
    name: str, hint: str, autojump_clock: MockClock
) -> None:
    graph = null_pair().model("a", aliases=["small"]).model("b")
    async with opened(graph) as session:
        with pytest.raises(RequestError, match=hint):
            session.stream("hi", model=name)


async def test_a_full_queue_of_one_model_refuses_nothing_of_the_other(
    autojump_clock: MockClock,
) -> None:
    async with opened(null_pair(max_queued=1)) as session, trio.open_nursery() as nursery:
        codes = []

        async def ask() -> None:
            try:
                await session.generate("hi", sampling=Sampling(max_tokens=50), model="a")
            except RequestRefused as refused:
                codes.append(refused.end.code)

        for _ in range(6):
            nursery.start_soon(ask)
        await trio.sleep(0.05)
        answer = await session.generate("hi", sampling=Sampling(max_tokens=2), model="b")
        assert answer.finish_reason == "length"
        assert set(codes) == {"queue_full"}


async def test_a_limit_of_the_table_holds_for_its_model_alone(autojump_clock: MockClock) -> None:
    graph = null_pair().model("a", max_model_len=8).model("b")
    async with opened(graph) as session:
        assert (session.max_model_len_of("a"), session.max_model_len) == (8, 8)
        assert session.max_model_len_of("b") > 8
        short = await session.generate("12345", sampling=Sampling(max_tokens=50), model="a")
        whole = await session.generate("12345", sampling=Sampling(max_tokens=50), model="b")
        with pytest.raises(RequestError, match="context limit of the model is 8"):
            session.stream("12345678", model="a")
    assert (len(short.token_ids), len(whole.token_ids)) == (3, 50)


async def test_salts_of_models_that_differ_never_meet(folder: Path) -> None:
    """Two names of one model share blocks."""
    graph, notes = graph_of_models(["sage-tiny", str(folder)]), Notes()
    async with opened(graph) as session:
        session.observers.append(notes)
        for model in ("sage-tiny", "mirror"):
            await session.generate("hi", sampling=Sampling(max_tokens=1), model=model, salt="s")
    one, other = (request.salt for request in notes.requests)
    assert one != other
    assert one.endswith("/s")
    assert str(folder) not in other


def test_models_of_one_config_have_scopes_of_their_own(folder: Path, tmp_path: Path) -> None:
    """Two folders of one config may have different weights."""
    twin = shutil.copytree(folder, tmp_path / "twin")
    one, other = load_models(graph_of_models([str(folder), str(twin)]).ir).all
    assert one.scope != other.scope


async def test_a_function_before_the_models_is_encoded_anew_for_the_model_it_chooses(
    folder: Path,
) -> None:
    def to_mirror(request: Request) -> Request:
        return type(request)(**{**as_dict(request), "model": "mirror"})

    graph, choose, notes = Graph("m"), ops.route_model(["tiny", "mirror"]), []
    graph >> ops.map(to_mirror) >> choose

    def keep(request: Request) -> Request:
        notes.append(request.prompt_token_ids)
        return request

    graph.engine("tiny", device="null").engine("mirror", model=str(folder), device="null")
    choose.outlet("tiny") >> ops.generate(engine="tiny").named("g_tiny")
    choose.outlet("mirror") >> ops.map(keep) >> ops.generate(engine="mirror").named("g_mirror")
    async with opened(graph) as session:
        await session.generate("hi", sampling=Sampling(max_tokens=1), model="tiny")
    assert notes == [mirrored(tuple(b"hi"))]


def as_dict(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__struct_fields__}


def test_engines_of_one_model_need_one_tokenizer(folder: Path) -> None:
    """The options that may differ between two models."""
    with pytest.raises(GraphError, match="different tokenizers"):
        Graph.load("pd").open(set={"d.model": str(folder)}).__enter__()


def test_the_model_of_all_engines_cannot_be_changed_at_once() -> None:
    with pytest.raises(GraphError, match="serves several models"):
        Graph.load(TWO).open(model="sage-tiny").__enter__()


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["sage-tiny", "Qwen/Qwen2.5-0.5B"], ["sage-tiny", "Qwen2_5-0_5B"]),
        (["a/x", "b/x", "metrics"], ["x", "x_2", "metrics_2"]),
        (["7b", "-", "source"], ["m_7b", "model", "source_2"]),
    ],
)
def test_keys_are_names_that_an_edge_can_say(names: list[str], keys: list[str]) -> None:
    assert model_keys(names) == keys


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="called sage-tiny"):
        graph_of_models(["sage-tiny", "sage-tiny"])
