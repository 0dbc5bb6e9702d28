"""The operators for SAGE pipelines, without SAGE: classes with `execute` and a `ctx`."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from sagellm import Graph, RequestError, ops
from sagellm.sage import (
    GenerateAnswers,
    PipelineEvent,
    SubmitRequests,
    TokenEvents,
    close_graphs,
    finish,
    graph_named,
    register_graph,
)
from sagellm.sage.embedded_graphs import read_request


class StopSignal:
    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture(autouse=True)
def graph(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A graph `llm` of a modelled engine, and a module `sage.runtime` with its signal."""
    runtime = ModuleType("sage.runtime")
    runtime.StopSignal = StopSignal  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sage", ModuleType("sage"))
    monkeypatch.setitem(sys.modules, "sage.runtime", runtime)
    options: dict[str, Any] = {"decode_step_s": 0.001, "prefill_token_s": 0.0}
    chain = Graph("g").engine("e", kind="modelled", model="sage-tiny", **options)
    register_graph("llm", chain >> ops.policy_sort() >> ops.generate(engine="e"))
    yield
    close_graphs()


def drained(source: TokenEvents) -> list[PipelineEvent]:
    events: list[PipelineEvent] = []
    while not isinstance(found := source.execute(), StopSignal):
        if found is not None:
            events.append(found)
    return events


def test_all_requests_run_at_once_and_each_gets_its_events() -> None:
    sink = SubmitRequests("llm", max_tokens=5, ignore_eos=True)
    for number in range(20):
        sink.execute({"id": f"p{number}", "prompt": f"prompt {number}"})
    assert graph_named("llm").session.health().num_open > 1
    events = drained(TokenEvents("llm", num_requests=20))
    by_id: dict[str, list[PipelineEvent]] = {}
    for event in events:
        by_id.setdefault(event.id, []).append(event)
    assert set(by_id) == {f"p{number}" for number in range(20)}
    for each in by_id.values():
        assert sum(event.num_tokens for event in each) == 5
        assert [event.is_last for event in each] == [False] * (len(each) - 1) + [True]


def test_the_source_ends_after_finish_and_the_last_event() -> None:
    SubmitRequests("llm", max_tokens=3, ignore_eos=True).execute("hello")
    finish("llm")
    (last,) = [event for event in drained(TokenEvents("llm")) if event.is_last]
    assert (last.id, last.finish_reason) == ("0", "length")


def test_a_source_without_events_is_idle() -> None:
    assert TokenEvents("llm").execute() is None


def test_a_map_gives_whole_answers() -> None:
    answer = GenerateAnswers("llm", max_tokens=4, ignore_eos=True).execute("hello")
    assert (answer.num_tokens, answer.finish_reason) == (4, "length")


def test_a_packet_overrides_the_defaults() -> None:
    given = {"prompt": "hello", "max_tokens": 2}
    assert GenerateAnswers("llm", max_tokens=4, ignore_eos=True).execute(given).num_tokens == 2


def test_hints_of_sage_become_fields_of_the_request() -> None:
    hints = {"tenant_id": "t", "model_id": "m", "prefix_cache_key": "k", "target_ttft_ms": 250}
    identity, prompt, fields = read_request({"messages": [{"role": "user"}], "id": 7, **hints})
    assert (identity, prompt) == ("7", [{"role": "user"}])
    assert fields == {"user_id": "t", "model": "m", "salt": "k", "slo_ttft_s": 0.25}


@pytest.mark.parametrize(
    ("data", "error", "why"),
    [
        ({"prompt": ""}, ValueError, "neither `prompt` nor `messages`"),
        ({"prompt": "a", "priorty": 1}, RequestError, "priority"),
        ({"prompt": "a", "max_tokens": "x"}, TypeError, "max_tokens"),
        ({"prompt": "a", "tenant_id": 7}, RequestError, "user_id"),
    ],
)
def test_wrong_requests_are_refused_and_leave_nothing_open(
    data: Any, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        SubmitRequests("llm").execute(data)
    finish("llm")
    assert drained(TokenEvents("llm")) == []


def test_unknown_and_taken_names_are_refused() -> None:
    with pytest.raises(LookupError, match="did you mean 'llm'"):
        SubmitRequests("lm")
    with pytest.raises(ValueError, match="choose another name"):
        register_graph("llm", Graph("g"))


def test_a_closed_graph_opens_again() -> None:
    embedded = graph_named("llm")
    answers = GenerateAnswers("llm", max_tokens=1)
    answers.execute("hello")
    embedded.close()
    assert answers.execute("hello").num_tokens == 1
