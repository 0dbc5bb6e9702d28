"""The log line of each call, with both servers: where it came from, what it asked, what it cost."""

import pytest
import trio
from gateway_served import KEYS, SERVERS, STREAM, first_token, get, received, serving
from logged import Line, logged

from sagellm.gateway.http.call import MAX_PATH_LEN

pytestmark = pytest.mark.parametrize("server", SERVERS)


async def ended(lines: list[Line], num_calls: int = 1) -> Line:
    """The line of the last of so many calls. Lines may come after the answers."""
    with trio.fail_after(20):
        while True:
            calls = [line for line in lines if line["event"] == "call_ended"]
            if len(calls) >= num_calls:
                return calls[-1]
            await trio.lowlevel.checkpoint()


PROBES = ("/live", "/ready", "/health", "/ping", "/load", "/metrics")


async def test_probes_are_logged_at_debug_also_while_they_fail(server: str) -> None:
    async with serving(server, **KEYS) as served:
        key = "Authorization: Bearer user-key"
        with logged() as lines:
            for path in PROBES:
                assert (await served.ask(get(path, key))).status == 200
            served.gateway.readiness.change(False, "an engine makes no progress")
            assert (await served.ask(get("/ready"))).status == 503
            assert (await served.ask(get("/health"))).status == 401
            await ended(lines, len(PROBES) + 2)
    calls = [line for line in lines if line["event"] == "call_ended"]
    levels = {(call["path"], call["status"]): call["log_level"] for call in calls}
    assert levels == {
        **{(path, 200): "debug" for path in PROBES},
        ("/ready", 503): "debug",
        ("/health", 401): "info",
    }


async def test_a_call_that_leads_nowhere_is_logged_with_its_path(server: str) -> None:
    async with serving(server) as served:
        with logged() as lines:
            await served.ask(get("/v1/chats?api_key=secret", "x-request-id: r1"))
            line = await ended(lines)
        assert (line["method"], line["path"], line["status"]) == ("GET", "/v1/chats", 404)
        assert (line["request_id"], line["client"]) == ("r1", "127.0.0.1")
        assert line["error"] == "not_found_error"
        assert "secret" not in str(lines)


async def test_a_path_is_cut_and_forges_no_line(server: str) -> None:
    async with serving(server) as served:
        with logged() as lines:
            await served.ask(get("/%0d%0a" + "x" * 2000))
            line = await ended(lines)
        assert len(line["path"]) == MAX_PATH_LEN + len("...")
        assert line["path"].startswith("/%0d%0ax")


async def test_an_answer_is_logged_with_its_tokens_and_no_word_of_it(server: str) -> None:
    async with serving(server, **KEYS) as served, await served.connect() as stream:
        with logged() as lines:
            head, _, body = STREAM.partition(b"\r\n\r\n")
            keyed = head + b"\r\nAuthorization: Bearer user-key\r\n\r\n" + body
            await stream.send_all(keyed)
            await first_token(stream)
            await served.let_go()
            rest = b""
            while b"[DONE]" not in rest:
                rest += await received(stream)
            line = await ended(lines)
        assert (line["status"], line["tenant"]) == (200, "alice")
        assert (line["num_prompt_tokens"], line["num_output_tokens"]) == (3, 2)
        assert 0 <= line["ttft_s"] <= line["seconds"]
        assert line.get("tokens_per_s", 1) > 0
        assert "user-key" not in str(lines)


async def test_a_stream_that_fails_after_its_first_token_is_logged_with_its_error(
    server: str,
) -> None:
    async with serving(server) as served, await served.connect() as stream:
        with logged() as lines:
            await stream.send_all(STREAM)
            await first_token(stream)
            await served.let_go("cancelled")
            rest = b""
            while b"[DONE]" not in rest:
                rest += await received(stream)
            line = await ended(lines)
        assert b'"code":"shutting_down"' in rest
        assert (line["status"], line["error"]) == (200, "shutting_down")
