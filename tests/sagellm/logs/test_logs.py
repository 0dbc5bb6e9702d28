"""Log lines: one line each, as JSON, with nothing that a user wrote and no secret."""

import json
import logging
from collections.abc import Iterator
from contextlib import suppress

import pytest
import structlog

import sagellm
from sagellm.graphs.log import get_logger
from sagellm.logs import child_logs, current_logs, log, logs_environment, process_logs
from sagellm.logs.lines import Redactor

LOG = get_logger("sagellm.test")
FORGED = '\r\n{"level": "error", "event": "forged"}\x1b[31m\x1b]0;title\x07\u2028</script>\x7f\x85'


class Stderr:
    """The lines on stderr so far."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self._captured = captured
        self._text = ""

    def getvalue(self) -> str:
        self._text += self._captured.readouterr().err
        return self._text


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Stderr]:
    """Restore the set-up of structlog and logging after each test."""
    structlog.reset_defaults()
    yield Stderr(capsys)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()
    log("off")


def lines(stderr: Stderr) -> list[dict[str, object]]:
    return [json.loads(line) for line in stderr.getvalue().splitlines()]


def test_a_line_is_one_line_whatever_is_in_it(stderr: Stderr) -> None:
    log("warning")
    LOG.error("call_ended", path=FORGED)
    raw = stderr.getvalue()
    assert len(raw.splitlines()) == 1
    assert raw[:-1].isascii()
    assert raw[:-1].isprintable()
    assert lines(stderr)[0]["path"] == FORGED


def test_request_ids_come_from_the_context(stderr: Stderr) -> None:
    log("warning")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        LOG.error("one")
    LOG.error("two")
    assert [line.get("request_id") for line in lines(stderr)] == ["r1", None]


@pytest.mark.parametrize("name", ["prompt", "messages", "content", "input", "prompt_token_ids"])
def test_a_prompt_is_a_length_and_a_hash(stderr: Stderr, name: str) -> None:
    log("warning")
    LOG.error("arrived", **{name: "my secret plan"})
    (line,) = lines(stderr)
    assert "plan" not in stderr.getvalue()
    assert line[name]["len"] == 14  # type: ignore[index]


def test_hashes_need_the_key() -> None:
    first, same, other = Redactor(b"k"), Redactor(b"k"), Redactor(b"other")
    assert first.describe("p") == same.describe("p")
    assert first.describe("p")["hash"] != other.describe("p")["hash"]
    assert first.describe("p")["hash"] != Redactor().describe("p")["hash"]


@pytest.mark.parametrize(
    "name",
    ["api_key", "apikey", "Authorization", "x-api-key", "admin_key", "hf_token", "token",
     "set_cookie", "password", "salt_key"],
)  # fmt: skip
def test_secrets_are_found_by_name(stderr: Stderr, name: str) -> None:
    log("warning")
    LOG.error("x", **{name: "hunter2"}, nested={name: ["hunter2"]})
    assert "hunter2" not in stderr.getvalue()


@pytest.mark.parametrize(
    "text",
    ["Bearer abcdef123456", "basic YWxhZGRpbjpvcGVu", "sk-abcdefghijkl", "hf_abcdefghijkl",
     "api_key=abcdefghijkl", '"token": "abcdefghijkl"', "GET /?api-key=abcdefghijkl HTTP/1.1"],
)  # fmt: skip
def test_secrets_are_found_by_their_look(text: str) -> None:
    cleaned = Redactor().clean({"headers": [f"a {text} b"]})
    assert "abcdef" not in str(cleaned)
    assert "YWxh" not in str(cleaned)
    assert "redacted" in str(cleaned)


def test_known_secrets_are_taken_out_wherever_they_are(stderr: Stderr) -> None:
    with process_logs(logging.INFO, known=["tenant-key", "tenant-key-longer", ""]):
        try:
            raise ValueError("wrong key tenant-key-longer")
        except ValueError as error:
            deep = {"a": [("tenant-key",)]}
            LOG.error("at tenant-key", exc_info=error, deep=deep)
    assert "tenant-key" not in stderr.getvalue()
    assert "-longer" not in stderr.getvalue()
    assert "ValueError" in stderr.getvalue()


def test_numbers_of_tokens_are_no_secrets() -> None:
    line = {"num_tokens": 7, "max_tokens": 12, "event": "tokens", "seconds": 0.5}
    assert Redactor()(None, "info", dict(line)) == line


def test_deep_and_odd_values_do_no_harm() -> None:
    deep: list[object] = []
    deep.append(deep)
    assert "redacted" not in str(Redactor().clean(deep))
    assert Redactor().clean({1: object}) == {"1": "<class 'object'>"}


def test_an_application_that_has_configured_structlog_keeps_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    structlog.configure(processors=[structlog.processors.KeyValueRenderer()])
    before = structlog.get_config()
    log("info")
    structlog.get_logger().warning("mine")
    log("off")
    assert structlog.get_config() == before
    structlog.reset_defaults()
    assert capsys.readouterr() == ("event='mine'\n", "")


def test_an_application_has_its_logging_as_before(stderr: Stderr) -> None:
    def state() -> list[object]:
        root = logging.root
        return [root.handlers[:], root.level, logging.getLogger("theirs").handlers[:]]

    before = state()
    log("debug")
    assert state() == before
    logging.getLogger("theirs").warning("not shown by us")
    log("debug")  # again: no line comes twice
    LOG.debug("one")
    assert [line["event"] for line in lines(stderr)] == ["one"]


def test_nothing_is_said_unasked(stderr: Stderr, capsys: pytest.CaptureFixture[str]) -> None:
    LOG.error("unasked")
    log("info")
    log("off")
    LOG.error("off again")
    assert stderr.getvalue() == ""
    assert capsys.readouterr().out == ""


def test_an_applications_own_handler_gets_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        LOG.info("worker_up", worker="decode[0]", why="a\nb")
    assert caplog.messages == ["worker_up worker='decode[0]' why='a\\nb'"]


@pytest.mark.parametrize(
    ("level", "form", "told"),
    [("debgu", None, "did you mean 'debug'"), ("x" * 20, None, "use one of debug"),
     ("info", "jsn", "did you mean 'json'")],
)  # fmt: skip
def test_another_level_is_refused(level: str, form: str | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sagellm.log(level, format=form)


def test_a_child_shows_what_its_parent_shows(
    stderr: Stderr, monkeypatch: pytest.MonkeyPatch
) -> None:
    for level, form in (("off", None), ("debug", "text"), ("error", "json")):
        sagellm.log(level, format=form)
        for name, value in logs_environment().items():
            monkeypatch.setenv(name, value)
        log("off")
        with child_logs():
            shown = current_logs()
            LOG.error("seen")
        assert shown is not None
        assert (form is None) or shown == (level, form)
    text, json_line = stderr.getvalue().splitlines()
    assert "error   seen" in text
    assert json.loads(json_line)["event"] == "seen"


@pytest.mark.parametrize(("name", "shown"), [("debug", 2), ("error", 1)])
def test_the_level_decides(stderr: Stderr, name: str, shown: int) -> None:
    log(name)
    LOG.info("info")
    LOG.error("error")
    assert len(lines(stderr)) == shown


def test_what_libraries_log_goes_the_same_way(stderr: Stderr) -> None:
    theirs = logging.getLogger("uvicorn.access")
    own = logging.NullHandler()
    theirs.addHandler(own)
    theirs.propagate = False
    theirs.setLevel(logging.CRITICAL)
    handlers = theirs.handlers[:]
    logging.getLogger("hypercorn.error").disabled = True
    with process_logs(logging.INFO, known=["tenant-key"]):
        structlog.contextvars.bind_contextvars(request_id="r1")
        theirs.info('"%s" %d', f"GET /?key=tenant-key{FORGED}", 200)
        logging.getLogger("hypercorn.error").warning("Bearer abcdef", extra={"prompt": "plan"})
        logging.getLogger("hypercorn.error").debug("not shown")
    first, second = lines(stderr)
    assert first["logger"] == "uvicorn.access"
    assert first["request_id"] == "r1"
    assert "tenant-key" not in stderr.getvalue()
    assert "abcdef" not in stderr.getvalue()
    assert second["prompt"]["len"] == 4  # type: ignore[index]
    assert (theirs.handlers, theirs.propagate, theirs.level) == (handlers, False, logging.CRITICAL)
    assert logging.getLogger("hypercorn.error").disabled
    theirs.removeHandler(own)
    theirs.propagate = True
    theirs.setLevel(logging.NOTSET)
    logging.getLogger("hypercorn.error").disabled = False


def test_own_logs_replace_what_was_configured_and_give_it_back(stderr: Stderr) -> None:
    log("error")
    with process_logs(logging.INFO):
        LOG.info("inside")
    LOG.info("outside")
    assert [line["event"] for line in lines(stderr)] == ["inside"]


@pytest.mark.parametrize(("level", "has_text"), [(logging.INFO, False), (logging.DEBUG, True)])
def test_the_text_of_an_exception_is_for_debugging_only(
    stderr: Stderr, level: int, has_text: bool
) -> None:
    with process_logs(level):
        for log in (LOG, logging.getLogger("library")):
            try:
                raise ValueError("a prompt, and /a/path")
            except ValueError:
                log.error("failed", exc_info=True)
    found = lines(stderr)
    assert [("a prompt" in line) for line in map(str, found)] == [has_text, has_text]
    assert all("ValueError" in str(line["exception"]) for line in found)


@pytest.mark.usefixtures("stderr")
def test_a_full_disk_ends_nobody_who_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        log("warning")
        LOG.warning("lost")
        monkeypatch.undo()
        with suppress(OSError):  # closing flushes the same unwritable bytes
            full.close()
