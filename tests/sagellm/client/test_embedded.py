from typing import Any

import anyio
import pytest

from sagellm import AsyncUnifiedInferenceClient, ClientError, UnifiedInferenceClient
from sagellm.client.embedded import check_served
from sagellm.client.responses import NOT_OFFERED
from sagellm.runtime.messages import Answer, TokenEvent

ASK = [{"role": "user", "content": "What is 23 + 45?"}]


@pytest.fixture(scope="module")
def client() -> Any:
    """The shipped joint graph, opened in this process."""
    with UnifiedInferenceClient.create(embedded=True) as opened:
        yield opened


def test_a_chat_is_answered(client: Any) -> None:
    answer = client.chat(ASK, temperature=0)
    assert answer == "68"
    assert (answer.finish_reason, answer.model) == ("stop", "sage-tiny")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_adds_up_to_the_answer_and_its_usage(client: Any) -> None:
    whole = client.generate("def f(", max_tokens=12, temperature=0)
    with client.generate("def f(", max_tokens=12, temperature=0, stream=True) as stream:
        assert "".join(stream) == whole
    assert stream.finish_reason == whole.finish_reason
    assert stream.usage.completion_tokens == whole.usage.completion_tokens


def test_every_choice_is_answered(client: Any) -> None:
    answer = client.chat(ASK, temperature=0, n=2)
    assert answer.choices == ("68", "68")
    with client.chat(ASK, temperature=0, n=2, stream=True) as stream:
        pieces = list(stream)
    for choice in (0, 1):
        assert "".join(piece for piece in pieces if piece.choice == choice) == "68"


def test_leaving_a_stream_frees_the_graph(client: Any) -> None:
    with client.generate("a", max_tokens=1000, ignore_eos=True, stream=True) as stream:
        next(stream)
        assert client.get_status()["server_load"] == 1
    client._served._session.idle()
    assert client.get_status() == {
        "mode": "embedded",
        "url": None,
        "is_ready": True,
        "models": ["sage-tiny"],
        "server_load": 0,
        "version": "0.1.0",
    }


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"echo": True}, "echo"),
        ({"logprobs": 1}, "logprobs"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_what_is_wrong_or_not_served_is_a_400_that_names_it(
    client: Any, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(ClientError, match=param) as caught:
        client.generate("a", **options)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_an_unknown_option_and_a_long_answer_have_the_words_of_the_server(client: Any) -> None:
    with pytest.raises(ClientError, match="did you mean `max_tokens`") as caught:
        client.generate("a", max_token=3)
    assert (caught.value.code, caught.value.type) == ("unknown_parameter", "invalid_request_error")
    with pytest.raises(ClientError, match="has 1 tokens and max_tokens is 5000; this model"):
        client.generate("a", max_tokens=5000)


def test_a_prompt_that_is_too_long_is_refused_before_a_stream_begins(client: Any) -> None:
    for stream in (False, True):
        with pytest.raises(ClientError, match="maximum context length") as caught:
            client.generate([1] * 5000, stream=stream)
        assert caught.value.status == 400


def test_another_model_is_not_found(client: Any) -> None:
    with pytest.raises(ClientError, match="'other'") as caught:
        client.chat(ASK, model="other")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@pytest.fixture(scope="module")
def both() -> Any:
    """A client of one model that generates, and of one that embeds."""
    with UnifiedInferenceClient.create(
        embedded=True, default_embedding_model="sage-tiny"
    ) as opened:
        yield opened


def test_texts_are_embedded_beside_chats(both: Any) -> None:
    assert both.chat(ASK, temperature=0) == "68"
    first, second, third = both.embed(["a b", "c d e", "a b"])
    assert len(first) == 128
    assert first == pytest.approx(third, abs=1e-6)
    assert first != pytest.approx(second, abs=1e-3)
    assert both.embed("a b")[0] == pytest.approx(first, abs=1e-6)
    assert both.models() == ["sage-tiny", "sage-tiny"]
    for texts, options, says in (
        (["a"], {"model": "other"}, "not served here"),
        ([""], {}, "empty"),
    ):
        with pytest.raises(ClientError, match=says):
            both.embed(texts, **options)


def test_texts_are_embedded_in_a_loop() -> None:
    async def main() -> Any:
        async with AsyncUnifiedInferenceClient.create(
            embedded=True, default_embedding_model="sage-tiny"
        ) as client:
            return await client.embed(["a b", "c"])

    assert [len(vector) for vector in anyio.run(main)] == [128, 128]


def test_there_are_no_embeddings(client: Any) -> None:
    with pytest.raises(ClientError, match="default_embedding_model") as caught:
        client.embed("a")
    assert caught.value.code == NOT_OFFERED


def test_a_url_or_a_key_beside_a_graph_is_refused() -> None:
    for kind in (UnifiedInferenceClient, AsyncUnifiedInferenceClient):
        with pytest.raises(ClientError, match="no URL"):
            kind.create("http://a", embedded=True)
        with pytest.raises(ClientError, match="no API key"):
            kind.create(embedded=True, api_key="k")


@pytest.mark.parametrize("backend", ["trio", "asyncio"])
def test_the_same_for_async_code(backend: str) -> None:
    async def main() -> list[Any]:
        async with AsyncUnifiedInferenceClient.create(embedded=True) as client:
            opened = client._found
            assert await client.__aenter__() is client
            assert client._found is opened  # no second graph, which nobody would close
            async with await client.chat(ASK, temperature=0, stream=True) as stream:
                pieces = [piece async for piece in stream]
            whole = await client.chat(ASK, temperature=0)
            with pytest.raises(ClientError, match="maximum context length"):
                await client.generate([1] * 5000, stream=True)
            return ["".join(pieces), whole, (await client.get_status())["mode"]]

    assert anyio.run(main, backend=backend) == ["68", "68", "embedded"]


async def test_an_async_graph_must_be_entered() -> None:
    with pytest.raises(ClientError, match="async with"):
        await AsyncUnifiedInferenceClient.create(embedded=True).models()


@pytest.mark.parametrize(
    ("reason", "code", "status"),
    [
        ("refused", "bad_request", 400),
        ("refused", "queue_full", 503),
        ("refused", "slo_unreachable", 503),
        ("cancelled", "shutting_down", 503),
        ("expired", "", 504),
        ("failed", "", 500),
    ],
)
def test_an_end_that_is_no_answer_has_the_status_of_the_gateway(
    reason: Any, code: str, status: int
) -> None:
    for kind in (TokenEvent, Answer):
        end = kind(request_id="r", finish_reason=reason, code=code, retry_after_s=2.0)
        with pytest.raises(ClientError) as caught:
            check_served(end)
        assert (caught.value.status, caught.value.retry_after_s) == (status, 2.0)


class Ends:
    """An observer that records finish reasons."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def submitted(self, requests: Any) -> None:
        """Ignore the entry of requests: only ends matter here."""

    def delivered(self, item: Any) -> None:
        if item.is_last:
            self.reasons.append(item.finish_reason)


@pytest.mark.parametrize("backend", ["trio", "asyncio"])
def test_a_call_cancelled_before_its_first_token_cancels_its_request(backend: str) -> None:
    async def main() -> list[str]:
        ends = Ends()
        async with AsyncUnifiedInferenceClient.create(embedded=True) as client:
            session: Any = client._found._session  # type: ignore[union-attr]
            (session if backend == "trio" else session._thread.session).observers.append(ends)
            with anyio.CancelScope() as scope:
                scope.cancel()
                await client.generate("a", max_tokens=200, ignore_eos=True, stream=True)
            await session.idle()
        return ends.reasons

    assert set(anyio.run(main, backend=backend)) <= {"cancelled"}


def test_a_stream_that_begins_with_an_error_is_closed(client: Any, monkeypatch: Any) -> None:
    refused = TokenEvent(request_id="r", finish_reason="refused", code="queue_full")
    closed: list[bool] = []

    class Events:
        def __next__(self) -> TokenEvent:
            return refused

        def __exit__(self, *_: object) -> None:
            closed.append(True)

    monkeypatch.setattr(client._served._session, "stream", lambda *_, **__: Events())
    with pytest.raises(ClientError):
        client.generate("a", stream=True, n=2)
    assert closed == [True]
