import json
import signal
from typing import Any

import pytest
from scripted_server import MODEL, Call, Script, delta, error, scripted, telling, text

from sagellm.cli import main


def run(script: Script, *argv: str) -> tuple[int, list[Any]]:
    """The exit code of a command against a scripted server, and the requests of that server."""
    with scripted(script) as server:
        return main([*argv, "--url", server.url]), server.asked


def test_the_answer_is_all_that_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    code, asked = run(telling("Good", " day"), "complete", "Say", "--max-tokens", "5")
    shown = capsys.readouterr()
    assert (code, shown.out, shown.err) == (0, "Good day\n", "")
    usage = {"include_usage": True}
    wanted = {"model": MODEL, "prompt": "Say", "max_tokens": 5, "stream_options": usage}
    assert asked == [{**wanted, "stream": True}]


def test_options_go_to_the_server() -> None:
    options = ("--temperature", "0.5", "--top-p", "0.9", "--seed", "7", "--model", "mine")
    _, (asked,) = run(telling("a"), "complete", "Say", *options)
    assert (asked["temperature"], asked["top_p"], asked["seed"]) == (0.5, 0.9, 7)
    assert asked["model"] == "mine"


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (("--regex", "[0-9]"), "structured_outputs", {"regex": "[0-9]"}),
        (("--choice", "a", "--choice", "b"), "structured_outputs", {"choice": ["a", "b"]}),
        (
            ("--json-schema", '{"type": "object"}'),
            "response_format",
            {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"type": "object"}},
            },
        ),
    ],
)
def test_a_form_goes_to_the_server(options: tuple[str, ...], field: str, value: Any) -> None:
    _, (asked,) = run(telling("a"), "complete", "Say", *options)
    assert asked[field] == value


async def thinking(call: Call) -> None:
    chunks = (delta(None, reasoning="hm, "), delta(None, reasoning="two"), delta("2", "stop"))
    await call.events(delta("", role="assistant"), *chunks)
    await call.done()


def test_reasoning_goes_to_stderr_and_into_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(thinking, "chat", "-q", "1 + 1?")[0] == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("2\n", "hm, two\n")
    assert run(thinking, "chat", "-q", "1 + 1?", "--json")[0] == 0
    shown = capsys.readouterr()
    assert (json.loads(shown.out)["reasoning"], shown.err) == ("hm, two", "")


async def conceal(call: Call) -> None:
    await call.events(delta("", role="assistant"), delta(None, reasoning="\x1b[8mhm"))
    await call.event(delta("a\x1b[2J\tb\x9b\u200d\r\n", "stop"))
    await call.done()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_answer_cannot_hide_lines_of_a_terminal(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    assert run(conceal, "chat", "-q", "1 + 1?")[0] == 0
    shown = capsys.readouterr()
    assert ("\\u001b[8mhm" in shown.err) is is_terminal
    spelt, plain = "a\\u001b[2J\tb\\u009b\u200d\r\n\n", "a\x1b[2J\tb\x9b\u200d\r\n\n"
    assert shown.out == (spelt if is_terminal else plain)


def test_stats_are_of_the_servers_usage(capsys: pytest.CaptureFixture[str]) -> None:
    _, (asked,) = run(telling("Good", " day"), "complete", "Say", "--stats")
    said = capsys.readouterr().err
    assert said.startswith("prompt 3 tokens, 2 tokens, TTFT ")
    assert "tokens/s" in said
    assert asked["stream_options"] == {"include_usage": True}


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    run(telling("Good", " day"), "complete", "Say", "--json")
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["text"], said["finish_reason"]) == (MODEL, "Good day", "stop")
    assert said["usage"]["completion_tokens"] == 2
    assert said["timing"]["ttft_s"] > 0


async def full(call: Call) -> None:
    await call.whole(error("too many wait", 429), 429, Retry_After="2")


async def locked(call: Call) -> None:
    await call.whole(error("wrong key", 401), 401)


async def wrong(call: Call) -> None:
    await call.whole(error("is too long", 400, param="prompt"), 400)


async def dying(call: Call) -> None:
    await call.events(text("a"), error("died", 500))
    await call.done()


async def cutting(call: Call) -> None:
    await call.events(text("a"))
    await call.cut()


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        (full, 3, "try again in 2 s"),
        (locked, 2, "SAGELLM_API_KEY"),
        (wrong, 2, "where: prompt"),
        (dying, 1, "died"),
        (cutting, 1, "broke"),
    ],
)
def test_a_failure_is_said_with_its_code(
    script: Script, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, "complete", "Say")[0] == code
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("param", "option"),
    [
        ("response_format.json_schema.schema", "--json-schema"),
        ("structured_outputs.regex", "--regex"),
        ("structured_outputs.choice", "--choice"),
        ("structured_outputs.grammar", "--grammar"),
    ],
)
def test_a_form_that_the_server_refuses_names_its_option(
    param: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refusing(call: Call) -> None:
        await call.whole(error(f"{param}: is no form", 400, param=param), 400)

    assert run(refusing, "complete", "Say")[0] == 2
    shown = capsys.readouterr().err
    assert f"error: is no form\n  where: {option}\n" in shown
    assert "fix: correct it" in shown


def test_nobody_there_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "Say", "--url", "http://127.0.0.1:9"]) == 1
    assert "sagellm serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["complete", ""], "the text is empty"),
        (["complete", "\udcff"], "not UTF-8"),
        (["complete", "a", "--url", "ftp://x"], "not the URL"),
        (["complete", "a", "--temperature", "-1"], "Must be >= 0"),
    ],
)
def test_a_users_mistake_is_two(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_ctrl_c_stops_and_hangs_up(capsys: pytest.CaptureFixture[str]) -> None:
    left = []

    async def endless(call: Call) -> None:
        await call.events(text("a"))
        signal.raise_signal(signal.SIGINT)  # equals Ctrl-C
        await call.gone()
        left.append(call)

    assert run(endless, "complete", "Say", "--stats")[0] == 130
    assert "stopped" in capsys.readouterr().err
    assert len(left) == 1
