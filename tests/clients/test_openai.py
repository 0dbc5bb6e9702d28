"""openai-python, in the installed version, against a served graph."""

import json
import re
import time

import pydantic
import pytest

openai = pytest.importorskip("openai")

QUESTION = [{"role": "user", "content": "What is 23 + 45?"}]
KEY = "sk-of-the-tests"


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def model(client):
    return client.models.list().data[0].id


def chat(client, model, **options):
    return client.chat.completions.create(
        **{"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 16, **options}
    )


def complete(client, model, **options):
    return client.completions.create(
        **{"model": model, "prompt": "def add(a, b):", "temperature": 0, "max_tokens": 8, **options}
    )


def test_models_are_listed_and_found(client, model):
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("no-such-model")
    assert error.value.code == "model_not_found"


def test_a_chat_is_answered(client, model):
    answer = chat(client, model)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content.strip() == "68"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_deltas_add_up_to_the_whole_answer(client, model):
    whole = chat(client, model).choices[0].message.content
    with chat(client, model, stream=True) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(client, model):
    with chat(client, model, stream=True, stream_options={"include_usage": True}) as stream:
        *before, last = list(stream)
    assert last.choices == []
    assert last.usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in before)


def test_several_choices_and_a_seed(client, model):
    options = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 12}
    first, second = chat(client, model, **options), chat(client, model, **options)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in second.choices]


def test_stop_strings_end_an_answer_and_are_left_out(client, model):
    answer = chat(client, model, stop=["8"])
    assert answer.choices[0].message.content.strip() == "6"
    assert answer.choices[0].finish_reason == "stop"


def test_chat_logprobs(client, model):
    answer = chat(client, model, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for one in content:
        assert one.logprob <= 0
        assert len(one.top_logprobs) == 3
        assert one.token in {top.token for top in one.top_logprobs}  # greedy


def test_completions_of_text_and_of_token_ids_agree(client, model):
    text = complete(client, model).choices[0].text
    ids = list(b"def add(a, b):")  # sage-tiny's tokens are bytes
    assert complete(client, model, prompt=ids).choices[0].text == text
    both = complete(client, model, prompt=[ids, ids])
    assert [choice.text for choice in both.choices] == [text, text]


def test_echoed_logprobs_cover_the_prompt(client, model):
    answer = complete(client, model, echo=True, logprobs=2, max_tokens=1)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("def add(a, b):")
    assert len(logprobs.tokens) == answer.usage.prompt_tokens + 1
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens) == answer.choices[0].text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n": 17}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"extra_body": {"tools": [{"type": "function"}]}}, "tools"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_is_wrong_is_refused_by_name(client, model, options, named):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, model, **options)
    assert named in str(error.value)


def test_a_wrong_key_is_refused(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_client_that_runs_out_of_time_leaves_nothing_behind(client, model, num_open):
    impatient = client.with_options(timeout=0.05)
    with pytest.raises(openai.APITimeoutError):
        chat(impatient, model, max_tokens=1500, extra_body={"ignore_eos": True})
    assert settles(num_open)
    assert chat(client, model).choices[0].message.content.strip() == "68"


def test_a_stream_that_is_closed_is_cancelled(client, model, num_open):
    stream = chat(client, model, stream=True, max_tokens=1500, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert num_open() == 1
    stream.close()
    assert settles(num_open)


def settles(num_open):
    """Whether all requests end within a second."""
    until = time.monotonic() + 1.0
    while num_open() and time.monotonic() < until:
        time.sleep(0.01)
    return num_open() == 0


def scored(client, model, **options):
    """Scores of a prompt, requested as lm-eval requests the score of a continuation."""
    extra = {"return_tokens_as_token_ids": True, **options.pop("extra_body", {})}
    fields = {"max_tokens": 0, "echo": True, "logprobs": 1, "extra_body": extra}
    return complete(client, model, prompt="23 + 45 = 68", **fields, **options)


def test_a_prompt_is_scored_alone(client, model):
    answer = scored(client, model)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("23 + 45 = 68", "length")
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert all(token.startswith("token_id:") for token in choice.logprobs.tokens)
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == 0


def test_a_streamed_score_is_the_whole_one(client, model):
    (whole,) = scored(client, model).choices
    with scored(client, model, stream=True) as stream:
        (streamed,) = [choice for chunk in stream for choice in chunk.choices]
    assert streamed.logprobs == whole.logprobs
    assert streamed.text == whole.text


def test_prompt_logprobs_of_both_endpoints(client, model):
    extra = {"prompt_logprobs": 2}
    completed = complete(client, model, extra_body=extra)
    chatted = chat(client, model, extra_body=extra)
    for found, answer in (
        (completed.choices[0].prompt_logprobs, completed),
        (chatted.prompt_logprobs, chatted),
    ):
        assert len(found) == answer.usage.prompt_tokens
        assert found[0] is None
        assert all(2 <= len(one) <= 3 for one in found[1:])
        assert set(next(iter(found[1].values()))) == {"logprob", "rank", "decoded_token"}
    with chat(client, model, stream=True, extra_body=extra) as stream:
        told = [one.prompt_logprobs for one in stream if hasattr(one, "prompt_logprobs")]
    assert told == [chatted.prompt_logprobs]


def test_logprobs_to_twenty(client, model):
    top = complete(client, model, logprobs=20).choices[0].logprobs.top_logprobs
    assert all(20 <= len(one) <= 21 for one in top)


def test_a_final_message_goes_on(client, model):
    messages = [*QUESTION, {"role": "assistant", "content": "6"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    answer = chat(client, model, messages=messages, extra_body=extra)
    assert answer.choices[0].message.content == "8"


def test_words_that_are_banned_and_tokens_that_are_allowed(client, model):
    banned = chat(client, model, extra_body={"bad_words": ["6", "68"]})
    assert "6" not in banned.choices[0].message.content
    ids = complete(client, model, prompt="7 8", extra_body={"return_token_ids": True})
    allowed = ids.choices[0].prompt_token_ids
    extra = {"allowed_token_ids": allowed, "return_token_ids": True, "ignore_eos": True}
    answer = chat(client, model, extra_body=extra)
    assert set(answer.choices[0].token_ids) <= set(allowed)


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 23}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
HISTORY = [
    {"role": "user", "content": "Add 1 and 2."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "c1"},
    *QUESTION,
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"messages": HISTORY, "tools": [TOOL], "tool_choice": "none"},
        {"store": True, "metadata": {"a": "b"}, "service_tier": "flex", "verbosity": "low"},
        {"prediction": {"type": "content", "content": "68"}},
        {
            "extra_body": {
                **{"reasoning": {}, "timeout": 30, "best_of": 1, "echo": False, "new": None},
                "chat_template_kwargs": {"enable_thinking": False},
                "prompt_cache_retention": "24h",
            }
        },
    ],
    ids=["no tools", "history", "stored", "predicted", "others"],
)
def test_what_changes_no_answer_is_taken(client, model, fields, stream):
    answer = chat(client, model, **fields, stream=stream)
    if stream:
        with answer as chunks:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = answer.choices[0].message.content
    assert "messages" in fields or text.strip() == "68"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"chat_template_kwargs": {"messages": "x"}}}, "chat_template_kwargs"),
        ({"extra_body": {"chat_template_kwargs": {"nobody": 1}}}, "chat_template_kwargs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex"),
    ],
)
def test_what_would_change_it_is_refused_by_name(client, model, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, model, **fields)
    assert error.value.param == param


def test_a_tool_that_may_not_be_called_is_not(client, model):
    (made,) = chat(client, model, tools=[TOOL], tool_choice="none").choices
    assert not made.message.tool_calls
    assert made.finish_reason in ("stop", "length")


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_that_must_be_made_has_valid_arguments(client, model, choice):
    options = {"tools": [ADD], "tool_choice": choice, "parallel_tool_calls": False}
    (made,) = chat(client, model, **options, max_tokens=100).choices
    assert made.finish_reason == "tool_calls"
    assert made.message.content is None
    (call,) = made.message.tool_calls
    assert call.function.name == "add"
    arguments = json.loads(call.function.arguments)
    assert {name: type(value) for name, value in arguments.items()} == {"a": int, "b": int}
    result = {"role": "tool", "tool_call_id": call.id, "content": "68"}
    history = [*QUESTION, made.message, result]
    assert chat(client, model, messages=history, tools=[ADD]).choices[0].finish_reason


def test_the_helper_of_the_client_puts_a_streamed_call_together(client, model):
    options = {"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False}
    fields = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 100}
    whole = chat(client, model, **options, max_tokens=100).choices[0].message
    with client.chat.completions.stream(**fields, **options) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    (call,) = streamed.message.tool_calls
    assert call.function.arguments == whole.tool_calls[0].function.arguments
    assert set(call.function.parsed_arguments) == {"a", "b"}


class Sum(pydantic.BaseModel):
    a: int
    b: int


def test_the_client_parses_a_structured_answer(client, model):
    fields = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 100}
    parsed = client.chat.completions.parse(**fields, response_format=Sum).choices[0].message.parsed
    assert isinstance(parsed, Sum)


def test_a_completion_is_bound_by_a_field_of_vllm(client, model):
    extra = {"structured_outputs": {"regex": "[a-c]{3}"}}
    text = complete(client, model, extra_body=extra).choices[0].text
    assert re.fullmatch("[a-c]{3}", text)
