from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sagellm.operators.collect import SPEC, build
from sagellm.runtime.messages import Stamps, TokenEvent, TokenLogprob
from sagellm.runtime.operator import Arrival, Emit, Setup, Signal


def open_collect(running: Any) -> Any:
    return running(build(SPEC.options(), Setup("collect")))


def test_an_answer_holds_all_that_its_events_held(running: Any) -> None:
    collect = open_collect(running)
    logprob = TokenLogprob(2, -0.5)
    first = TokenEvent(request_id="r", token_ids=(1,), text="a", num_prompt_tokens=9)
    second = TokenEvent(
        request_id="r",
        position=1,
        token_ids=(2, 3),
        text="b",
        logprobs=(logprob,),
        finish_reason="length",
        stop_reason=3,
        stamps=Stamps(finished_s=4.0),
    )
    assert collect(Arrival(first)) == ()
    (emit,) = collect(Arrival(second))
    answer = emit.item
    assert (answer.text, answer.token_ids, answer.logprobs) == ("ab", (1, 2, 3), (logprob,))
    assert (answer.finish_reason, answer.stop_reason) == ("length", 3)
    assert (answer.num_prompt_tokens, answer.stamps.finished_s) == (9, 4.0)


def test_a_failure_keeps_its_cause(running: Any) -> None:
    last = TokenEvent(request_id="r", finish_reason="failed", error="why")
    (emit,) = open_collect(running)(Arrival(last))
    assert (emit.item.finish_reason, emit.item.error) == ("failed", "why")


def test_a_forgotten_request_leaves_nothing(running: Any) -> None:
    collect = open_collect(running)
    for choice in range(2):
        collect(Arrival(TokenEvent(request_id="r", choice=choice, text="a")))
    collect(Signal("forget", "r"))
    assert not collect.state


@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 1), st.text(max_size=3))),
)
def test_answers_are_concatenations_however_events_interleave(running: Any, parts: Any) -> None:
    collect = open_collect(running)
    expected = {}
    for name, choice, text in parts:
        expected[name, choice] = expected.get((name, choice), "") + text
        event = TokenEvent(request_id=name, choice=choice, token_ids=(len(text),), text=text)
        assert collect(Arrival(event)) == ()
    for (name, choice), text in expected.items():
        last = TokenEvent(request_id=name, choice=choice, finish_reason="stop")
        (output,) = collect(Arrival(last))
        assert isinstance(output, Emit)
        assert output.item.text == text
        assert sum(output.item.token_ids) == len(text)
    assert not collect.state
