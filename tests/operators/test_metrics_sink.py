from typing import Any

import pytest

from sagellm.operators.metrics_sink import SPEC, build, statistics
from sagellm.runtime.messages import Answer, Request, Stamps, TokenEvent
from sagellm.runtime.operator import Arrival, Emit, Setup, Signal

STAMPS = Stamps(
    arrived_s=10.0, started_s=11.0, prefilled_s=13.0, transferred_s=13.5, finished_s=17.5
)


def tokens(name: str = "r", *, num: int = 1, last: str | None = None, **fields: Any) -> Any:
    return TokenEvent(request_id=name, token_ids=(1,) * num, finish_reason=last, **fields)


@pytest.fixture
def sink(running: Any) -> Any:
    return running(build(SPEC.options(), Setup("metrics")))


def seen(sink: Any) -> Any:
    return statistics(sink.state)


def test_everything_passes_unchanged(sink: Any) -> None:
    for item in (tokens(), Answer(request_id="a"), Request(request_id="q")):
        (output,) = sink(Arrival(item))
        assert isinstance(output, Emit)
        assert output.item is item


def test_nothing_was_measured_at_first(sink: Any) -> None:
    empty = seen(sink)
    assert (empty.num_requests, empty.num_tokens, empty.tokens_per_s) == (0, 0, 0.0)
    assert empty.ttft_p50_s is None
    assert empty.itl_p99_s is None


def test_one_request_is_counted_and_timed(sink: Any) -> None:
    sink(Arrival(tokens()), 14.0)
    sink(Arrival(tokens(num=2)), 15.0)
    sink(Arrival(tokens(last="length", num_prompt_tokens=7, stamps=STAMPS)), 18.0)
    done = seen(sink)
    assert done.ended == {"length": 1}
    assert (done.num_prompt_tokens, done.num_tokens) == (7, 4)
    assert done.elapsed_s == 8.0
    assert done.tokens_per_s == 0.5
    assert done.ttft_p50_s == pytest.approx(4.0, rel=0.011)
    assert done.itl_p50_s == pytest.approx(1.0, rel=0.011)
    assert done.itl_p99_s == pytest.approx(3.0, rel=0.011)
    assert done.phases == (1.0, 2.0, 0.5, 4.0)


def test_the_end_itself_is_no_token(sink: Any) -> None:
    sink(Arrival(tokens()), 14.0)
    sink(Arrival(tokens(num=0, last="stop", stamps=STAMPS)), 99.0)
    assert seen(sink).itl_p50_s is None


def test_a_request_that_gave_no_token_has_no_ttft(sink: Any) -> None:
    sink(Arrival(tokens(num=0, last="cancelled", stamps=STAMPS)), 14.0)
    assert seen(sink).ended == {"cancelled": 1}
    assert seen(sink).ttft_p50_s is None


def test_choices_are_timed_apart(sink: Any) -> None:
    for choice, now in ((0, 11.0), (1, 12.0), (0, 13.0), (1, 14.0)):
        sink(Arrival(tokens(choice=choice)), now)
    assert seen(sink).itl_p50_s == pytest.approx(2.0, rel=0.011)


def test_an_answer_tells_its_first_token_by_its_stamps(sink: Any) -> None:
    sink(Arrival(Answer(request_id="a", token_ids=(1, 2), stamps=STAMPS)), 18.0)
    done = seen(sink)
    assert (done.num_tokens, done.ended) == (2, {"stop": 1})
    assert done.ttft_p50_s == pytest.approx(3.0, rel=0.011)
    assert done.itl_p50_s is None


def test_nothing_is_kept_of_what_is_over(sink: Any) -> None:
    sink(Arrival(tokens("a")))
    sink(Arrival(tokens("b")))
    sink(Arrival(tokens("a", last="stop")))
    assert set(sink.state.under_way) == {"b"}
    sink(Signal("forget", "b"))
    assert not sink.state.under_way
