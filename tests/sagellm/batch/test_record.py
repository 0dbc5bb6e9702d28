import json
from typing import Any

import pytest

from sagellm.batch import answer_record, encode_record, error_record, phase_times, token_usage
from sagellm.runtime.messages import Answer, Stamps, TokenLogprob


def answer(choice: int = 0, **fields: Any) -> Answer:
    given = {"text": "ok", "token_ids": (1, 2), "num_prompt_tokens": 5, **fields}
    return Answer(request_id="r", choice=choice, **given)


def test_an_answer_is_one_line_with_usage_and_timing() -> None:
    line = answer_record("a", [answer(stamps=Stamps(arrived_s=0, finished_s=1))])
    assert {key: line[key] for key in ("id", "text", "token_ids", "finish_reason")} == {
        "id": "a",
        "text": "ok",
        "token_ids": (1, 2),
        "finish_reason": "stop",
    }
    assert line["usage"]["total_tokens"] == 7
    assert line["timing"]["decode_ms"] == 1000


def test_several_choices_are_listed_and_the_first_repeated() -> None:
    line = answer_record("a", [answer(), answer(1, text="other", token_ids=(3,))])
    assert [choice["index"] for choice in line["choices"]] == [0, 1]
    assert (line["text"], line["choices"][1]["text"]) == ("ok", "other")


def test_the_prompt_counts_once_for_all_choices() -> None:
    counts = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    assert token_usage([answer(), answer(1)]) == counts


def test_one_choice_that_was_not_served_makes_an_error() -> None:
    line = answer_record("a", [answer(), answer(1, finish_reason="refused", error="too long")])
    assert line == error_record("a", "too long", "refused")


def test_an_error_without_words_is_called_by_its_reason() -> None:
    line = answer_record("a", [answer(finish_reason="expired")])
    assert line["error"] == {"message": "expired", "type": "expired"}


def test_what_was_asked_for_and_only_that_is_added() -> None:
    logprobs = (TokenLogprob(1, -0.5, ((1, -0.5),)),)
    full = answer_record("a", [answer(logprobs=logprobs, stop_reason="end", value={"score": 1})])
    assert full["logprobs"] == [{"token_id": 1, "logprob": -0.5, "top": ((1, -0.5),)}]
    assert (full["stop_reason"], full["value"]) == ("end", {"score": 1})
    assert set(full) - set(answer_record("a", [answer()])) == {"logprobs", "stop_reason", "value"}


def test_phases_add_up_to_the_whole() -> None:
    stamps = Stamps(
        arrived_s=1.0,
        dispatched_s=1.5,
        started_s=2.0,
        prefilled_s=3.0,
        transferred_s=3.25,
        finished_s=4.0,
    )
    found = phase_times(stamps)
    assert found == {"queue_ms": 1000, "prefill_ms": 1000, "transfer_ms": 250, "decode_ms": 750}


def test_a_phase_that_was_not_passed_is_null() -> None:
    found = phase_times(Stamps(arrived_s=1, started_s=2, prefilled_s=3, finished_s=5))
    assert found == {"queue_ms": 1000, "prefill_ms": 1000, "transfer_ms": None, "decode_ms": 2000}


def test_without_a_start_the_queue_ends_at_dispatch() -> None:
    found = phase_times(Stamps(arrived_s=1, dispatched_s=2, prefilled_s=3))
    assert (found["queue_ms"], found["prefill_ms"], found["decode_ms"]) == (1000, 1000, None)


@pytest.mark.parametrize("text", ["line\nbreak", "\u2028", "\x00", "é"])
def test_a_line_is_one_line(text: str) -> None:
    raw = encode_record(answer_record("a", [answer(text=text)]))
    assert raw.count(b"\n") == 1
    assert json.loads(raw)["text"] == text


def test_a_users_value_that_is_not_json_is_written_as_text() -> None:
    raw = encode_record(answer_record("a", [answer(value=complex(1, 2))]))
    assert json.loads(raw)["value"] == "(1+2j)"
