"""LiteLLM, and its error for a path that the server does not have."""

import pytest

litellm = pytest.importorskip("litellm")

KEY = "sk-of-the-tests"


def test_a_chat_is_answered(url):
    answer = litellm.completion(
        "openai/sage-tiny",
        messages=[{"role": "user", "content": "What is 23 + 45?"}],
        temperature=0,
        api_base=f"{url}/v1",
        api_key=KEY,
    )
    assert answer.choices[0].message.content.strip() == "68"


def test_responses_name_what_is_built(url):
    with pytest.raises(litellm.NotFoundError) as error:
        litellm.responses(
            model="openai/sage-tiny", input="hello", api_base=f"{url}/v1", api_key=KEY
        )
    assert "this server has /v1/chat/completions" in str(error.value)
