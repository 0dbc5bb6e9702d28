import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripted_server import MODEL, Call, Server, calling, delta, error, scripted, telling

from sagellm.cli import main
from sagellm.cli.chat import COMMANDS, PROMPT
from sagellm.cli.chat_tools import load_tools
from sagellm.cli.complete import ServerOptions
from sagellm.client.unified_async import AsyncUnifiedInferenceClient


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Type these lines, and then Ctrl-D."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def talk(server: Server, *options: str) -> int:
    return main(["chat", "--url", server.url, *options])


def test_a_question_is_answered_once(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(telling("Good", " day")) as server:
        assert talk(server, "-q", "Hello?", "--system", "Be kind.") == 0
    assert capsys.readouterr().out == "Good day\n"
    assert server.asked[0]["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello?"},
    ]


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(telling("Good", " day")) as server:
        assert talk(server, "-q", "Hello?", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["text"], said["usage"]["prompt_tokens"]) == (MODEL, "Good day", 3)


def test_a_conversation_keeps_its_history(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "one", "", "two")
    with scripted(telling("yes")) as server:
        assert talk(server) == 0
    assert capsys.readouterr().out == "yes\nyes\n"
    first, second = server.asked
    assert [message["content"] for message in first["messages"]] == ["one"]
    assert [message["content"] for message in second["messages"]] == ["one", "yes", "two"]
    assert second["messages"][1]["role"] == "assistant"


def test_a_question_that_fails_is_forgotten_and_the_talk_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def moody(call: Call) -> None:
        if call.json["messages"][-1]["content"] == "bad":
            return await call.whole(error("will not", 500), 500)
        await telling("yes")(call)

    say(monkeypatch, "bad", "good")
    with scripted(moody) as server:
        assert talk(server, "--stats") == 0
    shown = capsys.readouterr()
    assert shown.out == "yes\n"
    assert "will not" in shown.err
    assert "TTFT" in shown.err
    assert [message["content"] for message in server.asked[-1]["messages"]] == ["good"]


def test_ctrl_c_stops_the_answer_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hung_up = []

    async def slow_once(call: Call) -> None:
        if hung_up:
            return await telling("yes")(call)
        await call.events(delta("half"))
        os.kill(os.getpid(), signal.SIGINT)
        await call.gone()
        hung_up.append(call)

    say(monkeypatch, "one", "two")
    with scripted(slow_once) as server:
        assert talk(server) == 0
    shown = capsys.readouterr()
    assert "stopped" in shown.err
    assert shown.out.endswith("yes\n")
    assert len(hung_up) == 1


@pytest.mark.parametrize(
    "interrupt", [KeyboardInterrupt(), BaseExceptionGroup("", [KeyboardInterrupt()])]
)
def test_ctrl_c_before_the_answer_keeps_the_conversation(
    interrupt: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "one", "two", "three")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    usual, num_clients = ServerOptions.client, iter(range(9))

    def client(server: ServerOptions) -> AsyncUnifiedInferenceClient:
        if next(num_clients) == 2:  # the first finds the model
            raise interrupt
        return usual(server)

    monkeypatch.setattr(ServerOptions, "client", client)
    with scripted(telling("yes")) as server:
        assert talk(server) == 0
    assert "\nstopped\n" in capsys.readouterr().err
    assert asked_of(server) == [["one"], ["one", "yes", "three"]]


def test_no_server_ends_it_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert "sagellm serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--json"], "--json needs a question"), (["-q", ""], "the text is empty")],
)
def test_a_users_mistake_is_two(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", *options]) == 2
    assert said in capsys.readouterr().err


def asked_of(server: Server) -> list[list[str]]:
    """The texts of each call's messages."""
    return [[message["content"] for message in asked["messages"]] for asked in server.asked]


def test_help_lists_every_command_and_goes_to_no_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "/help")
    with scripted(telling("yes")) as server:
        assert talk(server) == 0
    shown = capsys.readouterr()
    assert (server.asked, shown.out) == ([], "")
    assert all(word in shown.err for word in (*COMMANDS, "/save FILE", "//TEXT"))


def test_clear_forgets_all_but_the_system_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "one", "/clear", "two")
    with scripted(telling("yes")) as server:
        assert talk(server, "--system", "Be kind.") == 0
    assert asked_of(server) == [["Be kind.", "one"], ["Be kind.", "two"]]


def test_exit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "one", "/exit", "two")
    with scripted(telling("yes")) as server:
        assert talk(server) == 0
    assert asked_of(server) == [["one"]]


def test_save_writes_what_a_request_holds_and_overwrites_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "my talk.json"
    say(monkeypatch, "one", f"/save {path}", "two", f"/save {path}", f"/save {tmp_path / 'a/b'}")
    with scripted(telling("yes")) as server:
        assert talk(server) == 0
    saved = json.loads(path.read_text())
    assert saved["model"] == MODEL
    assert [message["content"] for message in saved["messages"]] == ["one", "yes"]
    shown = capsys.readouterr().err
    assert f"saved to {path}" in shown
    assert "the file exists" in shown
    assert "no such file" in shown
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/hepl", "did you mean /help? To send a text that begins with /, begin it with //"),
        ("/xyzzy", "the commands are /help, /clear, /tools, /save, /exit."),
        ("/save", "/save needs a FILE"),
        ("/exit now", "/exit stands alone"),
    ],
)
def test_a_command_that_is_none_is_said_and_not_sent(
    line: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, line, "one")
    with scripted(telling("yes")) as server:
        assert talk(server) == 0
    assert asked_of(server) == [["one"]]
    assert said in capsys.readouterr().err


def test_two_slashes_send_a_text_that_begins_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "//help", " /indented", "a / b")
    with scripted(telling()) as server:
        assert talk(server) == 0
    assert asked_of(server) == [["/help"], [" /indented"], ["a / b"]]


def test_a_question_of_the_command_line_is_no_command() -> None:
    with scripted(telling("yes")) as server:
        assert talk(server, "-q", "/help") == 0
    assert asked_of(server) == [["/help"]]


WEATHER = """
from pathlib import Path
from posixpath import join

def get_weather(city: str) -> dict:
    \"\"\"The weather of a city.\"\"\"
    Path(__file__).with_name("called").write_text(city)
    return {"city": city, "weather": "sunny"}

def _helper() -> None: ...
"""
PARIS = ("get_weather", '{"city":"Paris"}')
RESULT = '{"city": "Paris", "weather": "sunny"}'


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A file of one tool, which leaves a file `called` beside itself."""
    path = tmp_path / "weather.py"
    path.write_text(WEATHER)
    return path


def test_a_tool_is_called_and_the_answer_follows(
    tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(calling(PARIS, reasoning="I need the weather.")) as server:
        assert talk(server, "-q", "Weather?", "--tools", str(tools), "--yes") == 0
    shown = capsys.readouterr()
    assert shown.out == f"{RESULT}\n"
    assert "I need the weather.\n" in shown.err
    assert 'get_weather {"city":"Paris"}\n= {"city"' in shown.err
    first, second = server.asked
    # Neither what is imported nor what begins with _ is offered.
    assert [tool["function"]["name"] for tool in first["tools"]] == ["get_weather"]
    assert second["messages"][-1]["content"] == RESULT


@pytest.mark.parametrize(("consent", "is_called"), [("y", True), ("", False), ("no", False)])
def test_the_user_is_asked_before_a_call(
    consent: str,
    is_called: bool,
    tools: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    say(monkeypatch, "Weather?", consent)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    with scripted(calling(PARIS)) as server:
        assert talk(server, "--tools", str(tools)) == 0
    assert tools.with_name("called").exists() is is_called
    shown = capsys.readouterr()
    assert "run it? [y/N] " in shown.err
    assert "run it?" not in shown.out
    result = server.asked[1]["messages"][-1]["content"]
    assert result == RESULT if is_called else "did not allow" in result


def test_what_a_tool_prints_is_no_answer(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools.write_text(WEATHER.replace("    return", '    print("called")\n    return'))
    with scripted(calling(PARIS)) as server:
        assert talk(server, "-q", "Weather?", "--tools", str(tools), "--yes", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["text"] == RESULT
    assert "called\n" in shown.err


def test_ctrl_c_in_a_tool_stops_the_question_alone(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools.write_text(WEATHER.replace("    return", "    raise KeyboardInterrupt\n    return"))
    say(monkeypatch, "Weather?", "Hello?")
    with scripted(calling(PARIS)) as server:
        assert talk(server, "--tools", str(tools), "--yes") == 0
    assert capsys.readouterr().err.count("stopped\n") == 2
    assert [len(asked["messages"]) for asked in server.asked] == [1, 1]


def test_a_call_cannot_hide_on_the_terminal(
    tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(calling(("get_weather\r\x1b[2K", "{}"))) as server:
        assert talk(server, "-q", "Weather?", "--tools", str(tools), "--yes") == 0
    shown = capsys.readouterr().err
    assert "get_weather\\u000d\\u001b[2K {}" in shown
    assert "\x1b" not in shown


def test_a_model_that_only_calls_tools_is_stopped(
    tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def insisting(call: Call) -> None:
        call.body = call.body.replace(b'"role":"tool"', b'"role":"user"')
        await calling(PARIS)(call)

    with scripted(insisting) as server:
        assert talk(server, "-q", "Weather?", "--tools", str(tools), "--yes") == 1
    assert "still calls tools in round 8" in capsys.readouterr().err
    assert len(server.asked) == 8


def test_tools_are_listed(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "/tools")
    with scripted(telling("yes")) as server:
        assert talk(server, "--tools", str(tools), "--yes") == 0
    assert "get_weather          The weather of a city." in capsys.readouterr().err


WRAPPED = """
from functools import cache, partial, wraps
from itertools import chain
from operator import itemgetter
from typing import NewType
from unittest.mock import call

def hide(function):
    def hidden(*args): ...
    hidden.__module__ = "decorators"
    return hidden

Celsius = NewType("Celsius", int)
Names = dict[str, str]

@cache
def cached(x: int) -> int: ...

def _traced(function):
    @wraps(function)
    def wrapper(*args, **kwargs): ...
    return wrapper

@_traced
def traced(x: int) -> int: ...

given = partial(cached, x=1)

class _Lookup:
    def __call__(self, key: str) -> str: ...

lookup = _Lookup()

@hide
def hidden(x: int) -> int: ...

first = itemgetter(0)
second = call
del hide
"""


def test_wrapped_functions_are_tools_and_others_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrapped.py"
    path.write_text(WRAPPED)
    offered = load_tools(path, yes=True)
    assert list(offered.descriptions) == ["cached", "traced", "given", "lookup"]
    said = capsys.readouterr().err
    assert "hidden is no tool: its code is in another file" in said
    assert "first is no tool" in said
    assert "call is no tool" in said
    assert "second is no tool" in said
    assert said.count("warning") == 4


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (WEATHER, [], "nobody can be asked"),
        ("f = lambda x: x", ["--yes"], "f is no tool: parameter x has no type"),
        ("x = 1", ["--yes"], "defines no public function"),
        ("def f(x): ...", ["--yes"], "parameter x has no type"),
        ("raise ValueError('boom')", ["--yes"], "boom"),
        (None, ["--yes"], "there is no file"),
    ],
)
def test_tools_that_cannot_be_offered_are_said_at_once(
    text: str | None,
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    say(monkeypatch)
    path = tmp_path / "tools.py"
    if text is not None:
        path.write_text(text)
    assert main(["chat", "--url", "http://127.0.0.1:9", "--tools", str(path), *options]) == 2
    assert said in capsys.readouterr().err


def test_yes_without_tools_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9", "--yes"]) == 2
    assert "add --tools FILE" in capsys.readouterr().err


def test_a_draft_of_a_bound_answer_is_not_shown(
    tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(call: Call) -> None:
        await (telling("{}") if "response_format" in call.json else calling(PARIS))(call)

    form = ("--json-schema", '{"type":"object"}')
    with scripted(script) as server:
        assert talk(server, "-q", "Weather?", "--tools", str(tools), "--yes", *form) == 0
    assert capsys.readouterr().out == "{}\n"


def test_an_answer_may_be_bound_to_a_schema() -> None:
    with scripted(telling("{}")) as server:
        assert talk(server, "-q", "Ada?", "--json-schema", '{"type":"object"}') == 0
    form = server.asked[0]["response_format"]
    assert form["json_schema"]["schema"] == {"type": "object"}


# A shell ignores SIGINT in background jobs and in all their children: tests may run in one.
HEARS_CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from sagellm.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_on_a_terminal_ctrl_c_at_the_prompt_only_hints_and_ctrl_d_leaves() -> None:
    with scripted(telling("yes")) as server:
        command = [sys.executable, "-c", HEARS_CTRL_C, "chat", "--url", server.url]
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        ) as process:
            os.close(theirs)
            try:
                read_until(ours, PROMPT)
                interrupt_until(ours, process.pid, "Ctrl-D leaves")
                os.write(ours, b"hello\n")
                assert "yes" in read_until(ours, PROMPT)
                os.write(ours, b"\x04")
                assert process.wait(20) == 0
            finally:
                process.kill()
        os.close(ours)
    assert [message["content"] for message in server.asked[0]["messages"]] == ["hello"]


def interrupt_until(terminal: int, pid: int, said: str) -> None:
    """Send Ctrl-C until the terminal shows `said` and then the prompt again.

    Python loses a signal that arrives just before it waits for a key, so that one may have no
    effect. A second signal during the answer to the first would end the process.
    """
    shown = ""
    deadline = time.monotonic() + 60
    while PROMPT not in shown.partition(said)[2]:
        assert time.monotonic() < deadline, shown
        os.kill(pid, signal.SIGINT)
        while PROMPT not in shown.partition(said)[2] and select.select([terminal], [], [], 5)[0]:
            shown += os.read(terminal, 4096).decode()


def read_until(terminal: int, end: str) -> str:
    """The output of the terminal until it ends with `end`."""
    shown = ""
    while not shown.endswith(end):
        shown += os.read(terminal, 4096).decode()
    return shown
