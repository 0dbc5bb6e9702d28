"""Traces: the selection of requests, the content of spans, and sending."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from trio.testing import MockClock

from sagellm import Graph, Sampling
from sagellm.gateway.graph_bridge import SessionBridge
from sagellm.gateway.settings import Streaming
from sagellm.runtime.messages import (
    Answer,
    FinishReason,
    Forked,
    Request,
    Stamps,
    TokenEvent,
    refusal,
)
from sagellm.session import Session
from sagellm.tracing import Tracer, TracingError, open_exporter, open_tracing
from sagellm.tracing.otel import OtelExporter
from sagellm.tracing.spans import Trace, read_parent

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "my secret plan"
STAMPS = Stamps(dispatched_s=1.0, started_s=2.0, prefilled_s=3.0, transferred_s=4.0, finished_s=6.0)


class Driven:
    """A tracer on a clock of the test; `traces` are its results."""

    def __init__(self, sample: float = 1.0, **options: Any) -> None:
        self.now = 0.0
        self.traces: list[Trace] = []
        self.tracer = Tracer(
            self.traces.append, lambda: self.now, model="m", sample=sample, **options
        )

    def serve(
        self, *, reason: FinishReason = "stop", ends_s: float = 7.0, num: int = 1, **fields: Any
    ) -> None:
        request_id = fields.pop("request_id", "r")
        stamps = fields.pop("stamps", STAMPS)
        requests = [
            Request(request_id=request_id, choice=choice, prompt=SECRET, **fields)
            for choice in range(num)
        ]
        self.tracer.submitted(requests)
        for choice in range(num):
            first = TokenEvent(
                request_id=request_id, choice=choice, token_ids=(1,), stamps=stamps,
                num_prompt_tokens=9,
            )  # fmt: skip
            self.now = 3.5
            self.tracer.delivered(first)
        for choice in range(num):
            self.now = ends_s
            last = TokenEvent(
                request_id=request_id, choice=choice, token_ids=(2,), finish_reason=reason,
                stamps=stamps, text=SECRET, num_prompt_tokens=9,
            )  # fmt: skip
            self.tracer.delivered(last)


def spans(trace: Trace) -> list[tuple[str, float, float]]:
    return [(span.name, span.begun_s, span.ended_s) for span in trace.children]


def test_a_span_for_every_operator_that_the_stamps_tell_of() -> None:
    driven = Driven()
    driven.serve()
    (trace,) = driven.traces
    assert spans(trace) == [
        ("policy", 0, 1), ("route", 1, 2), ("prefill", 2, 3), ("kv_transfer", 3, 4),
        ("decode", 4, 6), ("sink", 6, 7),
    ]  # fmt: skip
    assert (trace.root.name, trace.root.begun_s, trace.root.ended_s) == ("text_completion m", 0, 7)


def test_children_fill_the_root() -> None:
    driven = Driven()
    driven.serve(stamps=Stamps(started_s=2.0, prefilled_s=3.0, finished_s=6.0))  # no queue, no move
    (trace,) = driven.traces
    assert spans(trace) == [("route", 0, 2), ("prefill", 2, 3), ("decode", 3, 6), ("sink", 6, 7)]
    assert sum(end - begin for _, begin, end in spans(trace)) == 7


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, "policy"),
        ({"dispatched_s": 0.5}, "route"),
        ({"dispatched_s": 0.5, "started_s": 0.75}, "prefill"),
    ],
)
def test_a_request_that_ended_early_ended_in_a_phase(
    known: dict[str, float], expected: str
) -> None:
    driven = Driven()
    driven.tracer.submitted([Request(request_id="r")])
    driven.now = 1.0
    stamps = Stamps(**known, finished_s=1.0)
    driven.tracer.delivered(TokenEvent(request_id="r", finish_reason="cancelled", stamps=stamps))
    (trace,) = driven.traces
    assert [name for name, _, _ in spans(trace)][-2:] == [expected, "sink"]


def test_a_refusal_is_an_error_of_admission() -> None:
    driven = Driven(sample=0.0)
    request = Request(request_id="r", prompt=SECRET)
    driven.tracer.submitted([request])
    driven.tracer.delivered(refusal(request, "refused", now=0.5, code="queue_full"))
    (trace,) = driven.traces
    assert [name for name, _, _ in spans(trace)] == ["admission"]
    assert trace.root.error == "refused"


def test_attributes_are_those_of_the_conventions_and_of_vllm() -> None:
    driven = Driven()
    sampling = Sampling(max_tokens=5, temperature=0.5, top_p=0.9, top_k=3, seed=7)
    driven.serve(num=2, model="alias", sampling=sampling, tags={"operation": "chat"})
    root = driven.traces[0].root
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "sagellm",
        "gen_ai.request.model": "alias",
        "gen_ai.response.model": "m",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 3,
        "gen_ai.request.seed": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": "r",
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "gen_ai.response.time_to_first_chunk": 3.5,
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.latency.time_in_queue": 2.0,
        "gen_ai.latency.time_to_first_token": 3.5,
        "gen_ai.latency.e2e": 7.0,
        "gen_ai.latency.time_in_model_prefill": 1.0,
        "gen_ai.latency.time_in_model_decode": 2.0,
        "gen_ai.latency.time_in_model_inference": 4.0,
        "gen_ai.usage.prompt_tokens": 9,
        "gen_ai.usage.completion_tokens": 4,
        "gen_ai.request.n": 2,
    }
    assert root.name == "chat alias"
    assert expected.items() <= root.attributes.items()


def test_of_several_models_each_has_the_name_that_clients_use() -> None:
    driven = Driven(names={"tiny": "sage-tiny", "echo": "Echo"})
    for number, key in enumerate(("tiny", "echo")):
        driven.serve(request_id=f"r{number}", model=key)
    asked = [trace.root.attributes["gen_ai.request.model"] for trace in driven.traces]
    answered = [trace.root.attributes["gen_ai.response.model"] for trace in driven.traces]
    assert asked == answered == ["sage-tiny", "Echo"]


def test_no_prompt_and_no_answer_is_in_a_trace() -> None:
    driven = Driven()
    driven.serve(user_id=SECRET, tags={"note": SECRET}, sampling=Sampling(stop=(SECRET,)))
    assert SECRET not in repr(driven.traces)


# ---- which requests ------------------------------------------------------------------------------


@pytest.mark.parametrize(("drawn", "made"), [(0.009, 1), (0.011, 0)])
def test_one_in_a_hundred_by_default(drawn: float, made: int) -> None:
    driven = Driven(0.01, draw=lambda: drawn)
    driven.serve()
    assert len(driven.traces) == made


@pytest.mark.parametrize(
    "wrong",
    [{"reason": "failed"}, {"reason": "expired"}, {"ends_s": 31.0}, {"slo_ttft_s": 3.0}],
)
def test_always_where_something_went_wrong(wrong: dict[str, Any]) -> None:
    driven = Driven(sample=0.0)
    driven.serve(request_id="fine", slo_ttft_s=4.0)
    driven.serve(request_id="wrong", **wrong)
    assert [trace.root.attributes["gen_ai.response.id"] for trace in driven.traces] == ["wrong"]


def test_an_overload_of_errors_is_not_traced_whole() -> None:
    driven = Driven(sample=0.0)
    for number in range(1000):
        driven.serve(request_id=f"{number}", reason="failed")
    assert len(driven.traces) == 10
    driven.serve(request_id="later", reason="failed", ends_s=8.0)
    assert len(driven.traces) == 11


def test_a_caller_that_samples_gets_a_trace_below_its_own() -> None:
    driven = Driven(sample=0.0)
    driven.serve(tags={"traceparent": PARENT})
    driven.serve(tags={"traceparent": PARENT[:-1] + "0"})
    (trace,) = driven.traces
    assert trace.parent == (0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, True)


@pytest.mark.parametrize(
    "text",
    ["", "garbage", "ff" + PARENT[2:], PARENT.upper(), PARENT + "-00", PARENT[:-3],
     f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-{'1' * 32}-{'0' * 16}-01"],
)  # fmt: skip
def test_what_is_no_traceparent_is_no_parent(text: str) -> None:
    assert read_parent(text) is None


def test_all_choices_are_one_trace_forked_ones_too() -> None:
    driven = Driven()
    driven.tracer.submitted([Request(request_id="r")])
    driven.tracer.delivered(Forked(request_id="r", num_choices=3))
    for choice in range(3):
        assert not driven.traces
        driven.tracer.delivered(Answer(request_id="r", choice=choice, token_ids=(1,)))
    assert driven.traces[0].root.attributes["gen_ai.request.choice.count"] == 3


def test_what_was_never_submitted_makes_no_trace() -> None:
    driven = Driven()
    driven.tracer.delivered(TokenEvent(request_id="r", finish_reason="stop"))
    assert not driven.traces


# ---- where they go -------------------------------------------------------------------------------


@pytest.fixture
def sent() -> Iterator[tuple[OtelExporter, InMemorySpanExporter]]:
    memory = InMemorySpanExporter()
    exporter = OtelExporter(SimpleSpanProcessor(memory))
    yield exporter, memory
    exporter.close()


def test_spans_have_their_kind_parent_and_times(
    sent: tuple[OtelExporter, InMemorySpanExporter],
) -> None:
    exporter, memory = sent
    driven = Driven()
    driven.serve(tags={"traceparent": PARENT}, reason="failed")
    exporter.send(driven.traces[0])
    *children, root = memory.get_finished_spans()
    assert root.kind == SpanKind.SERVER
    assert root.status.status_code == StatusCode.ERROR
    assert root.parent is not None
    assert root.context is not None
    assert f"{root.context.trace_id:032x}-{root.parent.span_id:016x}" == PARENT[3:-3]
    assert {child.parent.span_id for child in children if child.parent} == {root.context.span_id}
    assert lasted(root) == pytest.approx(7.0)
    assert lasted(next(child for child in children if child.name == "decode")) == pytest.approx(2.0)
    decode = next(child for child in children if child.name == "decode")
    assert [event.name for event in decode.events] == ["first_token"]


def lasted(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


async def test_a_graphs_request_is_traced_whole(
    sent: tuple[OtelExporter, InMemorySpanExporter], autojump_clock: MockClock
) -> None:
    exporter, memory = sent
    null = {
        "p.device": "null",
        "d.device": "null",
        "d.kv_bytes_per_s": 1e8,
        "p.kv_bytes_per_s": 1e8,
    }
    async with Graph.load("pd").open(set=null) as session:
        tracer = Tracer(exporter.send, session.executor.now, model="m", sample=1.0)
        session.observers.append(tracer)
        await session.generate([1] * 100, sampling=Sampling(max_tokens=5), trace=PARENT)
    names = [span.name for span in memory.get_finished_spans()]
    assert names == [
        "policy", "route", "prefill", "kv_transfer", "decode", "sink", "text_completion m",
    ]  # fmt: skip
    spans_by_name = {span.name: span for span in memory.get_finished_spans()}
    assert lasted(spans_by_name["prefill"]) > 0
    assert lasted(spans_by_name["kv_transfer"]) > 0
    assert sum(lasted(spans_by_name[name]) for name in names[:-1]) == pytest.approx(
        lasted(spans_by_name[names[-1]]), rel=0.01
    )


async def test_the_gateway_says_what_is_a_chat(autojump_clock: MockClock) -> None:
    traces: list[Trace] = []
    async with Graph.load("joint").open(set={"g.device": "null"}) as session:
        session.observers.append(Tracer(traces.append, session.executor.now, model="m", sample=1.0))
        bridge = SessionBridge(session, Streaming())
        for operation in ("chat", "text_completion"):
            request = Request(
                request_id=operation, prompt="a", prompt_token_ids=(1,),
                sampling=Sampling(max_tokens=1),
                tags={"operation": operation, "traceparent": PARENT},
            )  # fmt: skip
            async with bridge.open_stream(request) as batches:
                async for _ in batches:
                    pass
    assert [trace.root.name for trace in traces] == ["chat m", "text_completion m"]
    assert all(trace.parent for trace in traces)


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "ftp://host", "http://"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(TracingError, match="otlp-endpoint"):
        open_exporter(endpoint)


def test_a_share_is_between_none_and_all() -> None:
    with pytest.raises(TracingError, match="trace-sample"):
        open_exporter("http://localhost:4318", 1.5)


def test_without_the_extra_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sagellm.tracing.otel", None)
    with pytest.raises(TracingError, match=r"pip install 'sagellm\[otel\]'"):
        open_exporter("http://localhost:4318")


async def test_traces_reach_a_collector_and_the_observer_leaves() -> None:
    received: list[bytes] = []
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, collector(received), 0)
        port = listeners[0].socket.getsockname()[1]
        async with Graph.load("joint").open(set={"g.device": "null"}) as session:
            await traced(session, f"http://127.0.0.1:{port}")
            assert session.observers == []
        nursery.cancel_scope.cancel()
    assert b"POST /v1/traces HTTP/1.1" in received[0]
    assert b"text_completion m" in b"".join(received)


async def traced(session: Session, endpoint: str) -> None:
    async with open_tracing(session, endpoint=endpoint, model="m", sample=1.0):
        await session.generate([1], sampling=Sampling(max_tokens=2))


def collector(received: list[bytes]) -> Any:
    async def take(stream: trio.SocketStream) -> None:
        async for data in stream:
            received.append(data)
            if b"text_completion" in data:
                await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    return take


def test_importing_tracing_imports_no_sdk() -> None:
    code = (
        "import sys, json, sagellm.tracing; "
        "print(json.dumps([m for m in sys.modules if 'opentelemetry' in m]))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout) == []
