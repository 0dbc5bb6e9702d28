"""Agents of Pydantic AI in three APIs against a served graph; skipped without it."""

import asyncio
import os
from typing import Literal

import pytest

pydantic_ai = pytest.importorskip("pydantic_ai")
anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")
models = pytest.importorskip("pydantic_ai.models.openai")
claude = pytest.importorskip("pydantic_ai.models.anthropic")

KEY = "sk-of-the-tests"
MODEL = "sage-tiny"
ASKED = "What is the weather in Paris?"
SETTINGS = {"temperature": 0, "max_tokens": 256}


class Place(pydantic.BaseModel):
    """A place."""

    city: Literal["Paris", "Rome"]


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


@pytest.fixture(params=["chat", "responses", "anthropic"])
def make(request, url):
    """A function that returns an agent. Its client finds the server in the environment."""
    kinds = {
        "chat": models.OpenAIChatModel,
        "responses": models.OpenAIResponsesModel,
        "anthropic": claude.AnthropicModel,
    }
    places = {"OPENAI_BASE_URL": f"{url}/v1", "ANTHROPIC_BASE_URL": url}
    keys = {"OPENAI_API_KEY": KEY, "ANTHROPIC_API_KEY": KEY}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**places, **keys}.items():
            patch.setitem(os.environ, name, value)
        model = kinds[request.param](MODEL)
    return lambda **fields: pydantic_ai.Agent(model, model_settings=SETTINGS, **fields)


def parts_of(result):
    return [part.part_kind for message in result.all_messages() for part in message.parts]


def test_an_agent_answers(make):
    result = make(instructions="Be brief.").run_sync("What is 23 + 45?")
    assert result.output.strip() == "68"
    assert result.usage.output_tokens > 0


def test_a_conversation_goes_on(make):
    agent = make()
    first = agent.run_sync("What is 1 + 1?")
    second = agent.run_sync("What is 23 + 45?", message_history=first.all_messages())
    assert second.output
    assert second.usage.input_tokens > first.usage.input_tokens


def test_a_function_is_called_and_its_result_read(make):
    result = make(tools=[get_weather]).run_sync(ASKED)
    assert "rain" in result.output
    assert parts_of(result) == ["user-prompt", "tool-call", "tool-return", "text"]


def test_the_output_is_the_call_of_a_tool(make):
    result = make(output_type=Place).run_sync(ASKED)
    assert result.output == Place(city="Paris")
    assert parts_of(result) == ["user-prompt", "tool-call", "tool-return"]


def test_functions_stand_beside_the_tool_of_the_output(make):
    result = make(tools=[get_weather], output_type=Place).run_sync(ASKED)
    assert isinstance(result.output, Place)


def test_the_output_is_one_of_several_types(make):
    class Nothing(pydantic.BaseModel):
        """There is no place."""

        is_empty: bool

    result = make(output_type=[Place, Nothing]).run_sync(ASKED)
    assert isinstance(result.output, Place | Nothing)


def test_what_a_tool_rejects_goes_back_to_the_model(make):
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather of a city."""
        raise pydantic_ai.ModelRetry("there is none")

    with pytest.raises(pydantic_ai.UnexpectedModelBehavior, match="get_weather"):
        make(tools=[get_weather], retries=0).run_sync(ASKED)
    result = make(tools=[get_weather], retries=1).run_sync(ASKED)
    assert result.usage.requests == 2


def test_a_native_output_is_the_text_of_a_schema(make):
    agent = make(output_type=pydantic_ai.NativeOutput(Place))
    if isinstance(agent.model, claude.AnthropicModel):
        pytest.skip("Pydantic AI sends a schema to models that it knows by name")
    result = agent.run_sync(ASKED)
    assert isinstance(result.output, Place)
    assert parts_of(result) == ["user-prompt", "text"]


@pytest.mark.parametrize("output", [pydantic_ai.NativeOutput, pydantic_ai.PromptedOutput])
def test_functions_stand_beside_a_form_of_the_text(make, output):
    """One turn: sage-tiny may call on and on, because the form admits none of its sentences."""
    agent = make(tools=[get_weather], output_type=output(Place))
    if isinstance(agent.model, claude.AnthropicModel):
        pytest.skip("Pydantic AI sends a schema to models that it knows by name")

    async def turn():
        async with agent.iter(ASKED) as run:
            node = await run.next(run.next_node)
            return (await run.next(node)).model_response

    (part,) = asyncio.run(turn()).parts
    assert part.part_kind in ("tool-call", "text")
    if part.part_kind == "tool-call":
        assert part.args_as_dict() == {"city": "Paris"}


def streamed(agent, prompt):
    async def ask():
        async with agent.run_stream(prompt) as result:
            outputs = [output async for output in result.stream_output(debounce_by=None)]
        return outputs, result.usage.output_tokens

    return asyncio.run(ask())


def test_a_stream_of_text(make):
    outputs, num_tokens = streamed(make(), "What is 23 + 45?")
    assert outputs[-1].strip() == "68"
    assert num_tokens > 0


def test_a_stream_of_an_object(make):
    outputs, _ = streamed(make(output_type=Place), ASKED)
    assert outputs[-1] == Place(city="Paris")


def test_a_stream_of_calls_and_text(make):
    async def ask():
        async with make(tools=[get_weather]).run_stream_events(ASKED) as events:
            return [event async for event in events]

    kinds = [event.event_kind for event in asyncio.run(ask())]
    assert kinds.index("function_tool_call") < kinds.index("function_tool_result")
    assert kinds[-1] == "agent_run_result"


def test_an_error_of_the_server_is_one_of_the_agent(make):
    with pytest.raises(pydantic_ai.exceptions.ModelHTTPError) as error:
        make().run_sync("x" * 99_999)
    assert error.value.status_code == 400
