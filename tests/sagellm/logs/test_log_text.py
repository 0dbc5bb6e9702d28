"""Log lines for people: aligned, coloured on a terminal alone, and never more than one line."""

import logging
import os
import pty
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sagellm.graphs.log import get_logger
from sagellm.logs import log, process_logs
from sagellm.logs.lines import TextRenderer, escaped

CALL = {
    "event": "call_ended",
    "level": "info",
    "timestamp": "2026-11-23T11:30:00.123456",
    "status": 200,
    "method": "POST",
    "path": "/v1/chat/completions",
    "route": "/v1/chat/completions",
    "num_prompt_tokens": 12,
    "num_output_tokens": 64,
    "ttft_s": 0.0351,
    "tokens_per_s": 180.234,
    "seconds": 1.391,
    "client": "127.0.0.1",
    "tenant": "team-a",
    "request_id": "r1",
}


def text(**changes: object) -> str:
    return TextRenderer(has_colours=False)(None, "", {**CALL, **changes})


def test_a_call_is_one_aligned_line() -> None:
    assert text() == (
        "11:30:00.123 info    call_ended         200 POST /v1/chat/completions 12+64 tokens    "
        "TTFT 35.1 ms  180.2 tokens/s 1.391 s  127.0.0.1       team-a    r1"
    )


def test_a_call_without_tokens_keeps_its_columns() -> None:
    line: dict[str, object] = {
        name: value
        for name, value in CALL.items()
        if name not in ("num_prompt_tokens", "num_output_tokens", "ttft_s", "tokens_per_s")
    }
    found = TextRenderer(has_colours=False)(None, "", {**line, "status": 404, "path": "/v1/chats"})
    assert "404 POST /v1/chats " in found
    assert found.index("127.0.0.1") == text().index("127.0.0.1")


@pytest.mark.parametrize("name", ["path", "request_id", "client", "tenant", "event", "why"])
def test_no_value_forges_a_line_or_moves_the_cursor(name: str) -> None:
    forged = text(**{name: "a\r\n11:30:00 error forged\x1b[31m\u2028\u202e\x85\x07"})
    assert len(forged.splitlines()) == 1
    assert forged.isprintable()


def test_values_with_blanks_are_quoted() -> None:
    line = {"event": "draining", "level": "info", "timestamp": "", "hint": 'a "b" c', "num": 3}
    assert TextRenderer(has_colours=False)(None, "", line).endswith('hint="a \\"b\\" c" num=3')


def test_an_exception_is_indented_so_that_it_looks_like_no_line() -> None:
    line = {"event": "failed", "level": "error", "timestamp": "", "exception": "A\nB: \x1b[1m"}
    _, first, second = TextRenderer(has_colours=False)(None, "", line).splitlines()
    assert (first, second) == ("    A", "    B: \\x1b[1m")


def test_letters_of_any_language_stay() -> None:
    assert escaped("größe 模型") == "größe 模型"


@contextmanager
def terminal() -> Iterator[int]:
    """stderr is a terminal; its output can be read from the descriptor."""
    reader, writer = pty.openpty()
    before = sys.stderr
    with os.fdopen(writer, "w") as sys.stderr:
        try:
            yield reader
        finally:
            sys.stderr = before
    os.close(reader)


@pytest.mark.parametrize(
    ("variable", "value", "has_colours"),
    [("NO_COLOR", "", True), ("NO_COLOR", "1", False), ("TERM", "dumb", False)],
)
def test_a_terminal_gets_text_and_colours_unless_it_refuses_them(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, has_colours: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, value)
    with terminal() as shown:
        with process_logs(20):
            get_logger("sagellm.test").info("worker_up", worker="decode[0]")
        line = os.read(shown, 1000).decode()
    assert ("\x1b[" in line) == has_colours
    assert re.sub(r"\x1b\[\d+m", "", line)[12:] == (
        " info    worker_up          worker=decode[0]\r\n"
    )


def test_an_http_client_logs_no_line_for_each_call() -> None:
    with terminal() as shown:
        with process_logs(20):
            logging.getLogger("httpx2").info("HTTP Request: POST")
            logging.getLogger("httpx2").warning("a certificate expires")
        text = os.read(shown, 1000).decode()
    assert "HTTP Request" not in text
    assert "a certificate expires" in text


def test_json_on_a_terminal_where_it_is_asked_for() -> None:
    with terminal() as shown:
        log("info", format="json")
        get_logger("sagellm.test").info("worker_up")
        log("off")
        assert os.read(shown, 1000).startswith(b'{"event": "worker_up"')
