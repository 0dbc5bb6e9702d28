"""Bodies of calls, and events of answers, without a server."""

from typing import Any

import msgspec
import pytest

from sagellm import Sampling
from sagellm.client.replies import ResponseBody
from sagellm.foreign.calls import AnswerReader, call_of
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.port import EngineRefusal
from sagellm.runtime.sampling import Grammar


def state(sampling: Any = None, **fields: Any) -> SequenceState:
    known = Sampling(seed=5, max_tokens=20) if sampling is None else Sampling(**sampling)
    return SequenceState(owner="g", request_id="r", sampling=known, **fields)


def body(sampling: Any = None, **fields: Any) -> dict[str, Any]:
    return call_of(state(sampling, prompt="p", **fields), "m", 4096)[1]


def test_a_plain_request_has_the_fields_of_the_api_alone() -> None:
    path, found = call_of(state(prompt="p"), "m", 4096)
    assert path == "/v1/completions"
    assert found == {
        "model": "m",
        "prompt": "p",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 5,
        "max_tokens": 20,
    }


def test_what_a_request_sets_beside_the_api_goes_along() -> None:
    found = body(
        {"top_k": 4, "min_p": 0.1, "ignore_eos": True, "stop": ("x",), "bad_words": ("y",)}
    )
    assert (found["top_k"], found["min_p"], found["ignore_eos"]) == (4, 0.1, True)
    assert (found["stop"], found["bad_words"]) == (("x",), ("y",))


def test_the_limit_of_a_request_counts_what_it_has_emitted() -> None:
    found = body(emitted_text="said", num_emitted_without_ids=8)
    assert (found["prompt"], found["max_tokens"]) == ("psaid", 12)


def test_a_limit_of_the_whole_context_is_left_to_the_server() -> None:
    assert "max_tokens" not in body({"max_tokens": 4096})
    assert body({"max_tokens": 4095})["max_tokens"] == 4095


def test_seeds_differ_between_choices_and_fit_32_bits() -> None:
    seeds = {body({"seed": (1 << 62) + 9}, choice=choice)["seed"] for choice in range(3)}
    assert seeds == {9, 10, 11}


def test_token_ids_go_with_those_that_were_emitted() -> None:
    sequence = state(prompt_token_ids=(1, 2), emitted_token_ids=(3,))
    path, found = call_of(sequence, "m", 4096)
    assert (path, found["prompt"]) == ("/v1/completions", [1, 2, 3])
    assert found["return_token_ids"] is True


@pytest.mark.parametrize(
    ("kind", "name"), [("json_schema", "json"), ("regex", "regex"), ("lark", "grammar")]
)
def test_a_grammar_has_the_name_that_servers_know(kind: Any, name: str) -> None:
    found = body({"grammar": Grammar(kind=kind, text="{}")})
    assert found["structured_outputs"] == {name: "{}"}


@pytest.mark.parametrize("sampling", [{"bad_words_token_ids": ((1,),)}, {"prompt_logprobs": 0}])
def test_what_no_server_takes_is_refused(sampling: Any) -> None:
    with pytest.raises(EngineRefusal):
        body(sampling)


def chunk(**fields: Any) -> ResponseBody:
    return msgspec.convert(fields, ResponseBody)


def choice(text: str, reason: str | None = None, **more: Any) -> ResponseBody:
    return chunk(choices=[{"text": text, "finish_reason": reason, **more}])


def test_the_last_event_has_the_tokens_that_no_chunk_counted() -> None:
    reader = AnswerReader(state(prompt="p", num_emitted_without_ids=4))
    first = reader.take(choice("two words"), 1.0)
    assert first is not None
    assert (first.position, first.num_tokens) == (4, 1)
    assert reader.take(choice(" end", "length"), 2.0) is None
    assert reader.take(chunk(usage={"prompt_tokens": 9, "completion_tokens": 6}), 2.0) is None
    last = reader.last(3.0)
    assert (last.position, last.num_tokens, last.text) == (5, 5, " end")
    assert (last.finish_reason, last.num_prompt_tokens) == ("length", 5)
    assert (last.stamps.prefilled_s, last.stamps.finished_s) == (1.0, 3.0)


def test_without_a_usage_each_chunk_counts_once() -> None:
    reader = AnswerReader(state(prompt="p"))
    reader.take(choice("a"), 1.0)
    reader.take(choice("b", "stop"), 1.0)
    assert reader.last(1.0).num_tokens == 1


def test_thoughts_count_as_tokens_without_text() -> None:
    reader = AnswerReader(state(messages=({"role": "user", "content": "q"},)))
    delta = {"reasoning_content": "hm", "role": "assistant"}
    event = reader.take(chunk(choices=[{"delta": delta}]), 1.0)
    assert event is not None
    assert (event.text, event.num_tokens) == ("", 1)


@pytest.mark.parametrize(
    ("reason", "end"),
    [("stop", "stop"), ("content_filter", "filtered"), ("tool_calls", "stop"), ("abort", "failed")],
)
def test_reasons_of_the_api(reason: str, end: str) -> None:
    reader = AnswerReader(state(prompt="p"))
    reader.take(choice("", reason), 1.0)
    last = reader.last(1.0)
    assert (last.finish_reason, last.code) == (end, "engine_failed" if end == "failed" else "")


def test_token_ids_are_those_of_the_server() -> None:
    reader = AnswerReader(state(prompt_token_ids=(1, 2)))
    event = reader.take(choice("ab", token_ids=[7, 8]), 1.0)
    assert event is not None
    assert (event.token_ids, event.num_tokens_without_ids) == ((7, 8), 0)
    reader.take(choice("", "stop", token_ids=[9]), 1.0)
    assert (reader.last(1.0).token_ids, reader.last(1.0).num_prompt_tokens) == ((9,), 2)


def logprobs(tokens: list[str], values: list[float], tops: Any) -> dict[str, Any]:
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}


def test_log_probabilities_are_asked_for_by_ids() -> None:
    found = body({"logprobs": 2})
    assert (found["logprobs"], found["return_tokens_as_token_ids"]) == (2, True)


def test_log_probabilities_come_with_their_tokens() -> None:
    reader = AnswerReader(state({"logprobs": 1}, prompt_token_ids=(1,)))
    given = logprobs(["token_id:7"], [-0.5], [{"token_id:7": -0.5, "token_id:9": -0.25}])
    event = reader.take(choice("a", token_ids=[7], logprobs=given), 1.0)
    assert event is not None
    ((token, logprob, top),) = [(one.token_id, one.logprob, one.top) for one in event.logprobs]
    assert (token, logprob, top) == (7, -0.5, ((9, -0.25),))
    given = logprobs(["token_id:3"], [-1.5], None)
    reader.take(choice("b", "stop", token_ids=[3], logprobs=given), 1.0)
    assert [(one.token_id, one.top) for one in reader.last(1.0).logprobs] == [(3, ())]


@pytest.mark.parametrize(
    "given",
    [logprobs([" the"], [-0.5], None), logprobs(["token_id:7"], [], None), {"content": []}, None],
)
def test_log_probabilities_of_another_form_are_left_out(given: Any) -> None:
    reader = AnswerReader(state({"logprobs": 1}, prompt_token_ids=(1,)))
    event = reader.take(choice("a", token_ids=[7], logprobs=given), 1.0)
    assert event is not None
    assert event.logprobs == ()
