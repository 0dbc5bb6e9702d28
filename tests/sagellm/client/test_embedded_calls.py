import shutil
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
import pytest

from sagellm import AsyncUnifiedInferenceClient, ClientError, UnifiedInferenceClient
from sagellm.client.embedded import reply_of
from sagellm.client.embedded_calls import read_call
from sagellm.client.http_calls import CHAT, COMPLETIONS
from sagellm.client.responses import CUT_OFF
from sagellm.gateway.api_errors import ApiError
from sagellm.runtime.messages import Answer
from sagellm.runtime.models.folder import BUILT_IN

ASK = [{"role": "user", "content": "What is 23 + 45?"}]
# A template in the way of Hermes: its calls stand between tags.
TEMPLATE = """{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}
{%- for message in messages %}{{ '<|' + message['role'] + '|>' }}
{%- for call in message['tool_calls'] or [] %}{{ '<tool_call>' + (call | tojson) + '</tool_call>' }}
{%- endfor %}{{ (message['content'] or '') + '<|end|>' }}{% endfor %}{{ '<|assistant|>' }}"""


class Sum(msgspec.Struct):
    total: Annotated[int, msgspec.Meta(ge=0, le=999)]
    kind: Literal["even", "odd"]


def get_weather(city: Literal["Paris", "Rome"]) -> dict[str, str]:
    """The weather of a city."""
    return {"city": city, "weather": "sunny"}


@pytest.fixture(scope="module")
def client() -> Iterator[UnifiedInferenceClient]:
    """The shipped model, opened in this process."""
    with UnifiedInferenceClient.create(embedded=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def toolful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UnifiedInferenceClient]:
    """The shipped model under a template that shows tools."""
    folder = tmp_path_factory.mktemp("models") / "toolful"
    shutil.copytree(BUILT_IN["sage-tiny"], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with UnifiedInferenceClient.create(embedded=True, default_llm_model=str(folder)) as opened:
        yield opened


class StubSession:
    """A session, and the tokenizer of a model with this chat template. Its engine does nothing."""

    max_model_len = 100
    chat_variables: frozenset[str] = frozenset()
    special_token_ids: frozenset[int] = frozenset()

    def __init__(self, template: str) -> None:
        self.chat_template = template
        self.tokenizer: Any = self

    is_bound = True

    def is_able(self, capability: str) -> bool:
        return self.is_bound

    def apply_chat_template(self, messages: Any, how: Any) -> str:
        return "a prompt"

    def encode(self, prompt: Any, add_special_tokens: bool = False) -> Any:
        return (1, 2)


THINKING = "{{ '<think>' }} {{ '</think>' }}"
HARMONY = "{{ '<|start|>assistant<|channel|>final<|message|>' }}"


@pytest.mark.parametrize(("template", "skips"), [(HARMONY, False), ("", True)])
def test_a_format_of_special_tokens_gets_them(template: str, skips: bool) -> None:
    read = read_call(CHAT, {"messages": ASK}, {}, StubSession(template))
    assert read.sampling.skip_special_tokens is skips


@pytest.mark.parametrize("shown", [True, False])
def test_reasoning_is_split_off_and_may_be_left_out(shown: bool) -> None:
    session = StubSession(THINKING)
    read = read_call(CHAT, {"messages": ASK}, {"include_reasoning": shown}, session)
    text = "<think>23 and 45</think>68"
    reply = reply_of([Answer(request_id="r", text=text)], "m", read)
    assert (reply.text, reply.reasoning) == ("68", "23 and 45" if shown else None)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_engine_without_grammars_is_a_400_as_over_http(path: str) -> None:
    session = StubSession("")
    session.is_bound = False
    call: dict[str, Any] = {"messages": ASK} if path == CHAT else {"prompt": "a"}
    with pytest.raises(ApiError) as caught:
        read_call(path, call, {"response_format": {"type": "json_object"}}, session)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "response_format")


def test_an_answer_is_one_of_the_choices(client: UnifiedInferenceClient) -> None:
    assert client.chat(ASK, choices=["no", "yes"], temperature=0) in ("no", "yes")
    assert client.generate("a", grammar='start: "xyz"', temperature=0) == "xyz"


def test_an_answer_is_a_value_of_its_type(client: UnifiedInferenceClient) -> None:
    whole = client.chat(ASK, response_format=Sum, temperature=0, n=2)
    assert [type(choice.parsed) for choice in whole.choices] == [Sum, Sum]
    with client.chat(ASK, response_format=Sum, temperature=0, stream=True) as stream:
        assert "".join(stream) == whole
    assert stream.parsed == whole.parsed


def test_an_answer_that_is_cut_off_says_so(client: UnifiedInferenceClient) -> None:
    reply = client.chat(ASK, response_format=Sum, max_tokens=3)
    with pytest.raises(ClientError, match="and 3 tokens with finish_reason 'length'") as caught:
        _ = reply.parsed
    assert caught.value.code == CUT_OFF


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"regex": "("}, "structured_outputs.regex"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            "response_format.json_schema.schema",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_a_wrong_form_is_a_400_that_names_it(
    client: UnifiedInferenceClient, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(ClientError) as caught:
        client.chat(ASK, **options)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_call_that_must_come_is_split_from_the_text(toolful: UnifiedInferenceClient) -> None:
    options: dict[str, Any] = {"tools": [get_weather], "tool_choice": "required", "temperature": 0}
    reply = toolful.chat(ASK, parallel_tool_calls=False, **options)
    (call,) = reply.tool_calls
    assert (reply.text, reply.finish_reason, call.name) == ("", "tool_calls", "get_weather")
    assert msgspec.json.decode(call.arguments)["city"] in ("Paris", "Rome")
    with toolful.chat(ASK, parallel_tool_calls=False, stream=True, **options) as stream:
        assert "".join(stream) == ""
    assert stream.reply.tool_calls[0].arguments == call.arguments
    assert stream.finish_reason == "tool_calls"


def test_a_loop_calls_the_function(toolful: UnifiedInferenceClient) -> None:
    run = toolful.run_tools(
        ASK,
        tools=[get_weather],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=120,
    )
    _, asked, result, answer = run.messages
    assert result["tool_call_id"] == asked["tool_calls"][0]["id"]
    assert msgspec.json.decode(result["content"])["weather"] == "sunny"
    assert answer == run.reply.message


async def test_async_code_has_the_same() -> None:
    async with AsyncUnifiedInferenceClient.create(embedded=True) as opened:
        reply = await opened.chat(ASK, response_format=Sum, temperature=0)
        async with await opened.chat(ASK, choices=["xyz"], stream=True) as stream:
            assert "".join([piece async for piece in stream]) == "xyz"
    assert isinstance(reply.parsed, Sum)
