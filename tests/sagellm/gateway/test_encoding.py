"""Prompts are encoded off the loop where it may take long, and not for longer than allowed."""

import threading
import time
from typing import Any

import anyio
import pytest
from gateway_calls import playing, post

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.encoding import PromptEncoder
from sagellm.gateway.http.endpoints import chat
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
    assert run(lambda: PromptEncoder(tokenizer).text("hey")) == tuple(b"hey")
    assert run(lambda: PromptEncoder(tokenizer).ids(tuple(b"hey"))) == "hey"
    assert tokenizer.threads == {"loop"}


def test_what_is_long_is_encoded_in_a_thread(run):
    tokenizer = Watched()
    assert len(run(lambda: PromptEncoder(tokenizer).text("x" * 5000))) == 5000
    assert len(run(lambda: PromptEncoder(tokenizer).ids((120,) * 5000))) == 5000
    assert tokenizer.threads == {"worker"}


def test_a_template_is_rendered_in_a_thread(run):
    tokenizer = Watched()
    prompt = run(lambda: PromptEncoder(tokenizer).render(MESSAGES))
    assert prompt == "user: hey\n"
    assert tokenizer.threads == {"worker"}


class Spinning(Watched):
    """Its templates use CPU time until `goes_on`."""

    def apply_chat_template(self, messages: Any, *how: Any) -> str:
        while not self.goes_on.is_set():
            pass
        return super().apply_chat_template(messages)


def test_a_template_that_takes_too_long_is_given_up(run):
    tokenizer = Spinning()
    tokenizer.goes_on.clear()

    async def ask() -> Any:
        try:
            return await post(chat, playing(), {"messages": MESSAGES}, tokenizer=tokenizer)
        finally:
            tokenizer.goes_on.set()

    answered = run(ask)
    assert answered.status == 400
    assert answered.json["error"]["param"] == "messages"
    assert "0.25 s of CPU time" in answered.json["error"]["message"]


def _asked_at_once(run: Any, tokenizer: Watched, num: int, release_s: float) -> list[str]:
    """What becomes of so many chats; their templates go on after `release_s`."""
    found: list[str] = []

    async def ask_one(encoder: PromptEncoder) -> None:
        try:
            found.append((await encoder.chat(MESSAGES)).text)
        except ApiError as error:
            found.append(f"{error.status} {error.code}")

    async def ask() -> None:
        encoder, opener = (
            PromptEncoder(tokenizer),
            threading.Timer(release_s, tokenizer.goes_on.set),
        )
        opener.start()
        try:
            with anyio.fail_after(30):
                async with anyio.create_task_group() as tasks:
                    for _ in range(num):
                        tasks.start_soon(ask_one, encoder)
        finally:
            opener.cancel()
            tokenizer.goes_on.set()

    run(ask)
    return sorted(found)


def test_a_machine_that_is_busy_is_no_fault_of_the_messages(run):
    """Time that a template waits, for a core or a thread, is not its own: all are served."""
    tokenizer = Watched()
    tokenizer.goes_on.clear()
    assert _asked_at_once(run, tokenizer, 40, release_s=0.6) == ["user: hey\n"] * 40


def test_who_waits_behind_templates_that_never_end_is_not_to_blame(run):
    tokenizer = Spinning()
    tokenizer.goes_on.clear()
    began_s = time.monotonic()
    found = _asked_at_once(run, tokenizer, 5, release_s=25)  # one more than there are threads
    assert found == ["400 None"] * 4 + ["503 tokenizer_busy"]
    assert time.monotonic() - began_s < 25


def test_the_server_says_when_to_try_again(run, monkeypatch):
    monkeypatch.setattr("sagellm.gateway.encoding.TOKENIZE_S", 0.05)
    tokenizer = Watched()
    tokenizer.goes_on.clear()

    async def ask() -> ApiError:
        try:
            with pytest.raises(ApiError) as caught:
                await PromptEncoder(tokenizer).chat(MESSAGES)
            return caught.value
        finally:
            tokenizer.goes_on.set()

    error = run(ask)
    assert (error.status, error.code, error.retry_after_s) == (503, "tokenizer_busy", 1.0)


def test_spellings_of_many_tokens_are_looked_up_in_a_thread(run):
    class Spelling(Watched):
        def token(self, token_id: int) -> str:
            self.threads.add(_kind())
            return super().token(token_id)

    tokenizer = Spelling()
    spelt = run(lambda: PromptEncoder(tokenizer).spelt((120,) * 5000))
    assert spelt == ["<0x78>"] * 5000
    assert tokenizer.threads == {"worker"}


async def test_what_a_template_says_of_its_messages_is_not_repeated():
    class Broken(ByteTokenizer):
        def apply_chat_template(self, messages: Any, *how: Any) -> str:
            raise ChatTemplateError("at 0x7f: hey")

    with pytest.raises(ApiError) as caught:
        await PromptEncoder(Broken()).chat(MESSAGES)
    assert caught.value.status == 400
    assert "0x7f" not in caught.value.message
