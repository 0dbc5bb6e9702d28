"""openai-python, of whatever version is installed, against a served graph."""

import time

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
        assert one.token in {top.token for top in one.top_logprobs}  # greedy: the likeliest


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
    """Whether the server comes to rest within a second."""
    until = time.monotonic() + 1.0
    while num_open() and time.monotonic() < until:
        time.sleep(0.01)
    return num_open() == 0
