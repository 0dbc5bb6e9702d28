"""LangChain's chat models of both APIs against a served graph; skipped without LangChain."""

from typing import Literal

import pytest

langchain_openai = pytest.importorskip("langchain_openai", exc_type=ImportError)
pydantic = pytest.importorskip("pydantic")
langchain_anthropic = pytest.importorskip("langchain_anthropic", exc_type=ImportError)
tools = pytest.importorskip("langchain_core.tools")
HumanMessage = pytest.importorskip("langchain_core.messages").HumanMessage
ToolMessage = pytest.importorskip("langchain_core.messages").ToolMessage

KEY = "sk-of-the-tests"


@pytest.fixture
def chat(url):
    return langchain_openai.ChatOpenAI(
        base_url=f"{url}/v1", api_key=KEY, model="sage-tiny", temperature=0, max_tokens=16
    )


def test_invoke(chat):
    answer = chat.invoke("What is 23 + 45?")
    assert answer.content.strip() == "68"
    assert answer.usage_metadata["output_tokens"] > 0


def test_stream(chat):
    pieces = [piece.content for piece in chat.stream("What is 23 + 45?")]
    assert "".join(pieces).strip() == "68"


def test_batch(chat):
    answers = chat.batch(["What is 23 + 45?", "What is 1 + 1?"])
    assert [answer.content.strip() for answer in answers] == ["68", "2"]


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    model_config = pydantic.ConfigDict(extra="forbid")  # a small model would go on for long
    city: Literal["Paris", "Rome"]


@pytest.fixture
def responses(url):
    return langchain_openai.ChatOpenAI(
        base_url=f"{url}/v1",
        api_key=KEY,
        model="sage-tiny",
        temperature=0,
        max_tokens=256,
        use_responses_api=True,
        output_version="responses/v1",
    )


def test_a_response_is_invoked_and_streamed(responses):
    answer = responses.invoke([("system", "Be brief."), ("user", "What is 23 + 45?")])
    assert answer.text.strip() == "68"
    assert answer.response_metadata["object"] == "response"
    assert answer.usage_metadata["output_tokens"] > 0
    pieces = list(responses.stream("What is 23 + 45?"))
    assert "".join(piece.text for piece in pieces).strip() == "68"


def test_a_response_calls_a_tool_and_takes_its_output(responses):
    bound = responses.bind_tools([Weather], tool_choice="Weather", parallel_tool_calls=False)
    question = HumanMessage("What is the weather in Paris?")
    answer = bound.invoke([question])
    (call,) = answer.tool_calls
    assert call["name"] == "Weather"
    assert call["args"]["city"] in ("Paris", "Rome")
    output = ToolMessage("sunny", tool_call_id=call["id"])
    assert responses.invoke([question, answer, output]).usage_metadata["input_tokens"] > 0


def test_a_streamed_response_calls_a_tool(responses):
    bound = responses.bind_tools([Weather], tool_choice="Weather", parallel_tool_calls=False)
    whole, *pieces = bound.stream("What is the weather in Paris?")
    for piece in pieces:
        whole += piece
    assert whole.tool_calls[0]["args"]["city"] in ("Paris", "Rome")


def test_a_response_has_the_form_of_a_schema(responses):
    answer = responses.with_structured_output(Weather, method="json_schema")
    assert isinstance(answer.invoke("What is the weather in Paris?"), Weather)


@tools.tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


ASKED = "What is the weather in Paris?"


@pytest.fixture(params=["openai", "responses", "anthropic"])
def model(request, url):
    """A model of each API, with what LangChain sets by itself."""
    fields = {"model": "sage-tiny", "api_key": KEY, "max_tokens": 256, "temperature": 0}
    if request.param == "anthropic":
        return langchain_anthropic.ChatAnthropic(base_url=url, **fields)
    is_response = request.param == "responses"
    return langchain_openai.ChatOpenAI(
        base_url=f"{url}/v1", use_responses_api=is_response, **fields
    )


def added(pieces):
    whole, *others = pieces
    for piece in others:
        whole += piece
    return whole


def test_the_model_calls_a_tool_and_reads_its_result(model):
    bound, turns = model.bind_tools([get_weather]), [HumanMessage(ASKED)]
    turns.append(bound.invoke(turns))
    (call,) = turns[-1].tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    turns.append(get_weather.invoke(call))
    assert "rain" in bound.invoke(turns).text


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_a_tool_that_must_be_called(model, choice):
    for options in ({}, {"strict": True}):
        answer = model.bind_tools([get_weather], tool_choice=choice, **options).invoke(ASKED)
        assert answer.tool_calls[0]["args"].keys() == {"city"}
        assert not answer.invalid_tool_calls


def test_pieces_of_a_streamed_call_add_up(model):
    bound = model.bind_tools([get_weather], tool_choice="any")
    whole, streamed = bound.invoke(ASKED), added(bound.stream(ASKED))
    assert [call["args"] for call in streamed.tool_calls] == [
        call["args"] for call in whole.tool_calls
    ]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_structured_output(model, method):
    bound = model.with_structured_output(Weather, method=method)
    assert isinstance(bound.invoke(ASKED), Weather)
    assert isinstance(list(bound.stream(ASKED))[-1], Weather)


def test_tools_beside_a_form(model):
    """What an agent with a response format sends. ChatOpenAI wants strict tools beside it."""
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {**Weather.model_json_schema(), "additionalProperties": False},
            "strict": True,
        },
    }
    form = {"method": "json_schema", "include_raw": True, "tools": [tool]}
    if isinstance(model, langchain_anthropic.ChatAnthropic):
        form["tools"] = [get_weather]
    answer = model.with_structured_output(Weather, **form).invoke(ASKED)
    assert answer["raw"].tool_calls or isinstance(answer["parsed"], Weather)


def test_tokens_are_counted_by_the_server(url):
    model = langchain_anthropic.ChatAnthropic(base_url=url, model="sage-tiny", api_key=KEY)
    assert model.get_num_tokens_from_messages([HumanMessage(ASKED)]) > 0
