"""What a server says when it answers, and that its command works in a shell."""

import shlex
from pathlib import Path

import msgspec
import pytest

from sagellm.gateway.settings import KEY_VARIABLE, Settings, banner, curl

URL = "http://127.0.0.1:8000"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def test_it_names_the_address_the_model_and_a_command() -> None:
    serves, base, browser, command = banner(
        URL, ["sage-tiny"], Settings(), has_chat=True
    ).splitlines()
    assert serves == f"sagellm serves sage-tiny at {URL}"
    assert base == f"  base URL: {URL}/v1   model: sage-tiny"
    assert browser == f"  in a browser: {URL}/   its API: {URL}/docs"
    assert command.strip() == curl(URL, "sage-tiny", Settings(), has_chat=True)
    assert "browser" not in banner(URL, ["m"], Settings(page=False), has_chat=True)


@pytest.mark.parametrize(
    ("has_chat", "path", "field"),
    [(True, "chat/completions", "messages"), (False, "completions", "prompt")],
)
def test_the_command_asks_for_what_the_model_can(has_chat: bool, path: str, field: str) -> None:
    _, url, *_, body = shlex.split(curl(URL, "it's \u6a21", Settings(), has_chat=has_chat))
    assert url == f"{URL}/v1/{path}"
    asked = msgspec.json.decode(body)
    assert asked["model"] == "it's \u6a21"
    assert field in asked


@pytest.mark.parametrize(
    ("listens", "calls"), [("http://0.0.0.0:80", "http://127.0.0.1:80"),
                           ("https://[::]:80", "https://[::1]:80"),
                           ("http://[::1]:80", "http://[::1]:80"),
                           ("http://box:80", "http://box:80")],
)  # fmt: skip
def test_the_address_is_one_that_can_be_called(listens: str, calls: str) -> None:
    assert f"base URL: {calls}/v1" in banner(listens, ["m"], Settings(), has_chat=True)


@pytest.mark.parametrize(
    ("given", "word", "has_key"), [(None, "$SAGELLM_API_KEY", False),
                                   ("hunter2", "$SAGELLM_API_KEY", True),
                                   ("a=hunter2", "${SAGELLM_API_KEY#*=}", True),
                                   ("other", "$SAGELLM_API_KEY", False),
                                   ("a=other", "$SAGELLM_API_KEY", False),
                                   ("other=hunter3", "$SAGELLM_API_KEY", False),
                                   ("", "$SAGELLM_API_KEY", False)],
)  # fmt: skip
def test_a_key_is_asked_for_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, given: str | None, word: str, has_key: bool
) -> None:
    if given is not None:
        monkeypatch.setenv(KEY_VARIABLE, given)
    said = banner(URL, ["m"], Settings(api_keys={"a": "hunter2"}), has_chat=True)
    assert f'-H "Authorization: Bearer {word}"' in said
    assert "hunter2" not in said
    assert ("with a key of yours" in said) == (not has_key)


def test_a_certificate_is_named() -> None:
    settings = Settings(tls_certificate=Path("/a b/c.pem"), tls_key=Path("k"))
    assert "--cacert '/a b/c.pem'" in curl("https://h:1", "m", settings, has_chat=True)
