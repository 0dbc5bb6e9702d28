"""LangChain's ChatOpenAI against a served graph; skipped without langchain-openai."""

import pytest

langchain_openai = pytest.importorskip("langchain_openai", exc_type=ImportError)

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
