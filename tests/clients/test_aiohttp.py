"""aiohttp, which shows the reason phrase of the status line as the error."""

import asyncio

import pytest

aiohttp = pytest.importorskip("aiohttp")

KEY = "sk-of-the-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}


def post(url, path):
    async def ask():
        async with aiohttp.ClientSession(headers=HEADERS, raise_for_status=True) as session:
            body = {"messages": [{"role": "user", "content": "What is 23 + 45?"}], "temperature": 0}
            async with session.post(f"{url}{path}", json=body) as answer:
                return await answer.json()

    return asyncio.run(ask())


def test_an_error_has_a_phrase(url):
    with pytest.raises(aiohttp.ClientResponseError) as error:
        post(url, "/v1/nothing")
    assert (error.value.status, error.value.message) == (404, "Not Found")


def test_a_slash_at_the_end_is_followed_with_the_body(url):
    answer = post(url, "/v1/chat/completions/")
    assert answer["choices"][0]["message"]["content"].strip() == "68"
