"""Prompts are encoded off the loop where it may take long, and not for longer than allowed."""

import threading
from typing import Any

import anyio
import pytest
from gateway_calls import Client, gateway_before, playing, post

from sagellm.gateway.encoding import Encoder
from sagellm.gateway.endpoints.chat import chat
from sagellm.gateway.failure import ApiError
from sagellm.runtime.models.chat import ChatTemplateError
from sagellm.runtime.models.tokenizer import ByteTokenizer

MESSAGES = [{"role": "user", "content": "hey"}]


class Watched(ByteTokenizer):
    """Says which threads it worked in; a template may wait for `goes_on`."""

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self.goes_on = threading.Event()
        self.goes_on.set()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        self.threads.add(_kind())
        return super().encode(text)

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = True) -> str:
        self.threads.add(_kind())
        return super().decode(token_ids)

    def apply_chat_template(self, messages: Any, *how: Any) -> str:
        self.threads.add(_kind())
        self.goes_on.wait()
        return super().apply_chat_template(messages)


def _kind() -> str:
    return "loop" if threading.current_thread() is threading.main_thread() else "worker"


def test_what_is_short_is_encoded_in_place(run):
    tokenizer = Watched()
    assert run(lambda: Encoder(tokenizer).text("hey")) == tuple(b"hey")
    assert run(lambda: Encoder(tokenizer).ids(tuple(b"hey"))) == "hey"
    assert tokenizer.threads == {"loop"}


def test_what_is_long_is_encoded_in_a_thread(run):
    tokenizer = Watched()
    assert len(run(lambda: Encoder(tokenizer).text("x" * 5000))) == 5000
    assert len(run(lambda: Encoder(tokenizer).ids((120,) * 5000))) == 5000
    assert tokenizer.threads == {"worker"}


def test_a_template_is_rendered_in_a_thread(run):
    tokenizer = Watched()
    prompt = run(lambda: Encoder(tokenizer)._render(MESSAGES))
    assert prompt == "user: hey\n"
    assert tokenizer.threads == {"worker"}


def test_a_template_that_takes_too_long_is_given_up(run):
    tokenizer = Watched()
    tokenizer.goes_on.clear()

    async def ask() -> Any:
        try:
            return await post(chat, playing(), {"messages": MESSAGES}, tokenizer=tokenizer)
        finally:
            tokenizer.goes_on.set()

    answered = run(ask)
    assert answered.status == 400
    assert answered.json["error"]["param"] == "messages"
    assert "0.25 s" in answered.json["error"]["message"]


def test_who_waits_for_others_templates_is_not_to_blame(run):
    tokenizer = Watched()
    tokenizer.goes_on.clear()
    body = {"messages": MESSAGES}

    async def ask() -> list[int]:
        gateway = gateway_before(playing(), tokenizer=tokenizer)
        clients = [Client(body) for _ in range(5)]  # one more than there are threads
        try:
            async with anyio.create_task_group() as tasks:
                for client in clients:
                    tasks.start_soon(client.call, chat, gateway)
        finally:
            tokenizer.goes_on.set()
        return [client.answered.status for client in clients]

    assert sorted(run(ask)) == [400, 400, 400, 400, 503]


def test_spellings_of_many_tokens_are_looked_up_in_a_thread(run):
    class Spelling(Watched):
        def token(self, token_id: int) -> str:
            self.threads.add(_kind())
            return super().token(token_id)

    tokenizer = Spelling()
    spelt = run(lambda: Encoder(tokenizer).spelt((120,) * 5000))
    assert spelt == ["<0x78>"] * 5000
    assert tokenizer.threads == {"worker"}


async def test_what_a_template_says_of_its_messages_is_not_repeated():
    class Broken(ByteTokenizer):
        def apply_chat_template(self, messages: Any, *how: Any) -> str:
            raise ChatTemplateError("at 0x7f: hey")

    with pytest.raises(ApiError) as caught:
        await Encoder(Broken()).chat(MESSAGES)
    assert caught.value.status == 400
    assert "0x7f" not in caught.value.message
