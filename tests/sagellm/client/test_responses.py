import httpx2
import pytest

from sagellm.client.responses import (
    CUT_OFF,
    NOT_OFFERED,
    TIMED_OUT,
    UNREACHABLE,
    ClientError,
    raising_client_errors,
    response_error,
)

FULL = b'{"error": {"message": "full", "type": "rate_limit_error", "param": "n", "code": "queue"}}'


def test_a_refusal_says_all_that_the_server_says() -> None:
    headers = {"retry-after": "3", "x-should-retry": "false", "x-request-id": "r1"}
    error = response_error(429, headers, FULL)
    assert (error.message, error.status, error.code) == ("full", 429, "queue")
    assert (error.type, error.param) == ("rate_limit_error", "n")
    assert (error.retry_after_s, error.should_retry, error.request_id) == (3.0, False, "r1")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": "no"}', "no"),
        (b'{"detail": "no"}', "no"),
        (b'{"message": "no"}', "no"),
        (b'{"error": {}}', 'the server answered 502: {"error": {}}'),
        (b"<html>\n bad\n gateway", "the server answered 502: <html> bad gateway"),
        (b"[1]", "the server answered 502: [1]"),
        (b"", "the server answered 502"),
    ],
)
def test_a_refusal_in_any_shape_has_a_message(body: bytes, message: str) -> None:
    assert response_error(502, {}, body).message == message


@pytest.mark.parametrize("value", ["", "soon", "-1", "inf", "nan", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_retry_after_that_is_no_time_is_none(value: str) -> None:
    assert response_error(503, {"retry-after": value}, b"").retry_after_s is None


def test_a_long_page_is_quoted_in_part() -> None:
    assert len(response_error(500, {}, b"x" * 10_000).message) < 300


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (httpx2.ConnectError("refused"), UNREACHABLE),
        (httpx2.ConnectTimeout(""), UNREACHABLE),
        (httpx2.ReadTimeout(""), TIMED_OUT),
        (httpx2.RemoteProtocolError("peer closed"), CUT_OFF),
        (httpx2.ReadError(""), CUT_OFF),
        (httpx2.UnsupportedProtocol("ftp"), NOT_OFFERED),
        (httpx2.InvalidURL("no"), NOT_OFFERED),
    ],
)
def test_what_the_transport_raises_is_one_class(raised: Exception, code: str) -> None:
    with pytest.raises(ClientError, match="http://s") as caught, raising_client_errors("http://s"):
        raise raised
    assert (caught.value.code, caught.value.status) == (code, None)
