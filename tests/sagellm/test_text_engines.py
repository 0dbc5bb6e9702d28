"""A graph whose engine has text only: nothing needs token ids or KV blocks."""

import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
import virtual_workers
from endings import generate
from gateway_served import get, post, read_reply
from gateway_session import served_session
from text_kind import registered
from trio.testing import MockClock
from virtual_workers import chaotic
from waiting import until

from sagellm import Graph, RequestError, Sampling, ops
from sagellm.gateway.lifecycle import watch_readiness
from sagellm.gateway.processes.supervision import GatewaysFailed
from sagellm.gateway.readiness import Readiness
from sagellm.gateway.settings import Streaming
from sagellm.graphs.diagnostics import GraphError
from sagellm.opening.open_graph import OpenGraph
from sagellm.runtime.engine.kinds import KINDS
from sagellm.session import Session

PROMPT = "one two three four five six seven eight"
SAID = PROMPT + " "


@pytest.fixture(autouse=True)
def parrot() -> Iterator[ModuleType]:
    with registered() as module:
        yield module


def graph(**options: Any) -> Graph:
    chain = Graph("g").engine("e", kind="parrot", **options)
    return chain >> ops.policy_sort() >> ops.route() >> ops.generate(engine="e")


def opened(**options: Any) -> OpenGraph:
    return (graph(**options) >> ops.metrics_sink()).open()


async def test_an_answer_has_text_and_a_number_of_tokens(autojump_clock: MockClock) -> None:
    async with opened() as session:
        answer = await session.generate(PROMPT)
        statistics = session.statistics()
    assert (answer.text, answer.token_ids, answer.num_tokens) == (SAID, (), 8)
    assert (answer.finish_reason, answer.num_prompt_tokens) == ("stop", 8)
    assert statistics.num_tokens == 8
    assert statistics.itl_p50_s == pytest.approx(0.01, rel=0.1)
    session.executor.core.ledger.check()


async def test_a_stream_is_the_whole(autojump_clock: MockClock) -> None:
    async with opened() as session:
        events = [event async for event in session.stream(PROMPT)]
    assert "".join(event.text for event in events) == SAID
    assert [event.position for event in events] == list(range(8))
    assert [event.num_tokens for event in events] == [1] * 8


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [(("three",), "one two ", 3), (("two three",), "one ", 3), (("thread",), SAID, 8)],
)
async def test_stop_strings(
    autojump_clock: MockClock, stop: tuple[str, ...], text: str, num_tokens: int
) -> None:
    async with opened() as session:
        answer = await session.generate(PROMPT, sampling=Sampling(stop=stop))
    assert (answer.text, answer.num_tokens) == (text, num_tokens)
    assert answer.stop_reason == (stop[0] if text != SAID else None)


async def test_several_choices_and_a_limit(autojump_clock: MockClock) -> None:
    async with opened() as session:
        answers = await session.generate_all(PROMPT, sampling=Sampling(n=3, max_tokens=2))
    assert [answer.text for answer in answers] == ["one two ", "two three ", "three four "]
    assert {answer.finish_reason for answer in answers} == {"length"}


async def test_messages_reach_the_engine(autojump_clock: MockClock) -> None:
    async with opened() as session:
        answer = await session.generate([{"role": "user", "content": "to be"}])
    assert answer.text == "to be "


@pytest.mark.parametrize("prompt", [[1, 2, 3], "", [], 7])
async def test_what_is_no_text_is_refused(autojump_clock: MockClock, prompt: Any) -> None:
    async with opened() as session:
        with pytest.raises(RequestError, match=r"text|empty"):
            await session.generate(prompt)


@pytest.mark.parametrize(
    ("sampling", "why"),
    [
        ({"logprobs": 1}, "no log probabilities"),
        ({"stop_token_ids": (3,)}, "knows no token ids"),
        ({"logit_bias": {3: 1.0}}, "knows no token ids"),
    ],
)
async def test_what_the_engine_cannot_do_is_refused(
    autojump_clock: MockClock, sampling: Any, why: str
) -> None:
    async with opened() as session:
        answer = await generate(session, PROMPT, sampling=Sampling(**sampling))
    assert (answer.finish_reason, answer.code) == ("refused", "bad_request")
    assert why in (answer.error or "")


async def test_a_cancel_frees_everything_and_asks_for_no_block(autojump_clock: MockClock) -> None:
    """The engine has no `export` and no `import_`: asking for one would raise."""
    async with opened() as session:
        (engine,) = session.executor.all_engines
        assert not hasattr(engine, "export")
        async with session.stream(PROMPT) as stream:
            await stream.take()
        with trio.fail_after(1):
            await session.idle()
        assert engine.load.num_running == 0
        gates = session.executor.core.gates
        assert not gates.holds(stream.request_id)
    session.executor.core.ledger.check()


async def killed_while_answering(session: Session, chaos: Any) -> list[Any]:
    """The events of an answer whose worker dies after three words."""
    events: list[Any] = []
    async with session.stream(PROMPT, sampling=Sampling(stop=("nine",))) as stream:
        while batch := await stream.take():
            events += batch
            if len(events) == 3:
                chaos.lives.lives[0].kill()
    return events


async def test_an_answer_goes_on_from_its_text_where_its_engine_is_lost(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtual_workers, "OPTIONS", {"word_s": 0.05})
    async with chaotic(graph(), seed=1) as chaos:
        events = await killed_while_answering(chaos.session, chaos)
        assert chaos.session.executor.core.recovery.num_migrated == 1
    assert "".join(event.text for event in events) == SAID
    assert sum(event.num_tokens for event in events) == 8
    assert events[-1].finish_reason == "stop"


async def test_a_kind_that_cannot_resume_ends_what_was_lost(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, parrot: ModuleType
) -> None:
    able = parrot.CAPABILITIES - {"resume"}
    monkeypatch.setattr(parrot, "CAPABILITIES", able)
    kind = replace(KINDS["parrot"], capabilities=able)
    monkeypatch.setitem(KINDS._registered, "parrot", (kind, "here"))
    monkeypatch.setattr(virtual_workers, "OPTIONS", {"word_s": 0.05})
    async with chaotic(graph(), seed=1) as chaos:
        events = await killed_while_answering(chaos.session, chaos)
    assert (events[-1].finish_reason, events[-1].code) == ("refused", "engine_failed")
    assert "none of its kind can go on" in events[-1].error


PD = """\
sagellm: 1
name: pd
engines:
  p: {kind: parrot}
  d: {kind: modelled}
operators:
  prefill: {op: prefill, engine: p}
  transfer: {op: kv_transfer}
  decode: {op: decode, engine: d}
edges:
  - source -> prefill -> transfer -> decode -> sink
"""


def mistakes(folder: Path, text: str) -> list[str]:
    (folder / "g.yaml").write_text(text)
    try:
        with Graph.load(folder / "g.yaml").open():
            return []
    except GraphError as error:
        return [str(one) for one in error.diagnostics]


def test_an_operator_that_needs_more_names_the_kinds_that_have_it(tmp_path: Path) -> None:
    tokenizers, found = mistakes(tmp_path, PD)
    assert "engines p and d have different tokenizers" in tokenizers
    assert "g.yaml:7:" in found
    assert "`prefill` needs kv_transfer, tokens_in, tokens_out" in found
    assert "engine `p` of kind `parrot` lacks" in found
    assert "use engine `d`; an engine of kind `local` or `modelled` can do it" in found


def test_worker_processes_do_not_know_a_kind_of_this_one(tmp_path: Path) -> None:
    text = PD.replace("prefill: {op: prefill, engine: p}", "generate: {op: generate, engine: p}")
    text = text.replace("source -> prefill -> transfer -> decode", "source -> generate")
    lines = [line for line in text.splitlines() if not line.startswith(("  d:", "  tr", "  dec"))]
    whole = "\n".join([*lines, "executor: {kind: processes}", ""])
    (found,) = mistakes(tmp_path, whole)
    assert "g.yaml:4:" in found
    assert "worker processes do not know it" in found


PACKAGE = """\
[sagellm.engines]
macaw = fake_macaw:KIND
"""


async def test_worker_processes_open_a_kind_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parrot: ModuleType
) -> None:
    info = tmp_path / "macaw-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: macaw\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(PACKAGE)
    program = inspect.getsource(parrot).replace('"parrot", EngineKind', '"m", EngineKind')
    kind = "KIND = EngineKind(Options, CAPABILITIES, open_parrot)\n"
    (tmp_path / "fake_macaw.py").write_text(program + kind)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(KINDS, "_registered", dict(KINDS._registered))
    graph = Graph("g").engine("e", kind="macaw") >> ops.policy_sort() >> ops.generate(engine="e")
    async with graph.open(set={"executor.kind": "processes"}) as session:
        answer = await session.generate(PROMPT)
    assert (answer.text, answer.num_tokens) == (SAID, 8)


async def test_over_http_it_streams_and_counts() -> None:
    options = {"g.kind": "parrot", "g.word_s": 0.0}
    async with served_session("hypercorn", "joint", options) as served:
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 20}
        async with await served.connect() as stream:
            await stream.send_all(post("/v1/completions", body, "Connection: close"))
            whole = json.loads((await read_reply(stream)).body)
        async with await served.connect() as stream:
            asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
            await stream.send_all(post("/v1/completions", asked, "Connection: close"))
            reply = await read_reply(stream)
        async with await served.connect() as stream:
            messages = [{"role": "user", "content": "or not"}]
            asked = {"model": "m", "messages": messages}
            await stream.send_all(post("/v1/chat/completions", asked, "Connection: close"))
            chat = json.loads((await read_reply(stream)).body)
        assert chat["choices"][0]["message"]["content"] == "or not "
        async with await served.connect() as stream:
            asked = {"model": "m", "prompt": "to be"}
            await stream.send_all(post("/tokenize", asked, "Connection: close"))
            refused = await read_reply(stream)
        async with await served.connect() as stream:
            await stream.send_all(get("/metrics", "Connection: close"))
            metrics = (await read_reply(stream)).body.decode()
    assert 'sagellm_generation_tokens_total{model_name="m"} 18.0' in metrics
    assert 'sagellm_prompt_tokens_total{model_name="m"} 18.0' in metrics
    assert refused.status == 400
    assert "its tokens are not known here" in refused.body.decode()
    lines = [line for line in reply.body.decode().splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert whole["choices"][0]["text"] == SAID
    assert whole["usage"]["completion_tokens"] == chunks[-1]["usage"]["completion_tokens"] == 8
    assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == SAID


async def test_its_gateway_becomes_ready(autojump_clock: MockClock) -> None:
    """A probe carries token ids, which an engine that takes text never sees."""
    readiness = Readiness()
    async with graph().open() as session, trio.open_nursery() as nursery:
        nursery.start_soon(watch_readiness, readiness, session, Streaming())
        await until(lambda: readiness.is_ready)
        nursery.cancel_scope.cancel()


async def test_gateway_processes_do_not_know_a_kind_of_this_one() -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(GatewaysFailed, match="do not know the engine kind 'parrot'"),
        flatten_subgroups=True,
    ):
        async with served_session("hypercorn", "joint", {"g.kind": "parrot"}, num_gateways=1):
            raise AssertionError("it serves")
