"""LangChain's ChatOpenAI against a served graph; skipped without langchain-openai."""

from typing import Literal

import pytest

langchain_openai = pytest.importorskip("langchain_openai", exc_type=ImportError)
pydantic = pytest.importorskip("pydantic")
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
