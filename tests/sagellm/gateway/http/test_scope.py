"""What is decided by the head of a request alone: headers, host, origin, ids, routes."""

import socket
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.http.call import (
    NOT_FOUND,
    EndpointRoute,
    RouteTable,
    read_request_id,
    read_traceparent,
)
from sagellm.gateway.http.checks import Hosts, OpenBodies, check_body, check_headers
from sagellm.gateway.http.routes import ROUTES
from sagellm.gateway.settings import RequestLimits, Settings

HOST = (b"host", b"localhost:8000")


def scope(*headers: tuple[bytes, bytes], path: bytes = b"/", **fields: Any) -> dict[str, Any]:
    known = {"headers": list(headers), "raw_path": path, "query_string": b"", "method": "GET"}
    return {**known, "http_version": "1.1", **fields}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([HOST], 200),
        ([], 400),
        ([HOST, HOST], 400),
        ([(b"host", b"")], 400),
        ([HOST, (b"content-length", b"1"), (b"transfer-encoding", b"chunked")], 400),
        ([HOST, (b"content-length", b"1"), (b"content-length", b"1")], 400),
        ([HOST, (b"content-length", b"-1")], 400),
        ([HOST, (b"transfer-encoding", b"gzip, chunked")], 400),
        ([HOST, (b"transfer-encoding", b"Chunked")], 200),
        ([HOST, *[(b"x", b"1")] * 100], 431),
        ([HOST, (b"x", b"a" * 16384)], 431),
    ],
)
def test_headers(headers: list[tuple[bytes, bytes]], status: int) -> None:
    assert _status(check_headers, scope(*headers), RequestLimits()) == status


def test_a_long_path_counts_as_headers() -> None:
    assert _status(check_headers, scope(HOST, path=b"/" * 20000), RequestLimits()) == 431


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("10.1.2.3", 200),
        ("gateway.internal:443", 200),
        ("evil.com", 421),
        ("localhost.evil.com", 421),
        ("127.0.0.1.evil.com", 421),
        ("localhost:0", 421),
        ("localhost:port", 421),
        ("localhost/x", 421),
        ("a@localhost", 421),
        ("[::1", 421),
    ],
)
def test_hosts(host: str, status: int) -> None:
    hosts = Hosts(Settings(allowed_hosts=("gateway.internal",)))
    assert _status(hosts.check, scope((b"host", host.encode()))) == status


def test_any_host_may_be_allowed() -> None:
    assert _status(Hosts(Settings(allowed_hosts=("*",))).check, scope((b"host", b"x.org"))) == 200


PRIVATE = (
    "sagellm:8000",
    "sagellm.default.svc",
    "sagellm.default.svc.cluster.local:8000",
    "box.local",
    "models.internal",
    "nas.lan",
    "x.home.arpa",
)
FOREIGN = ("evil.com", "svc.evil.com", "internal.evil.com", "homexarpa.com")


@pytest.mark.parametrize("host", PRIVATE)
def test_names_of_services_are_let_in_where_more_than_loopback_is_served(host: str) -> None:
    """No browser asked. On loopback nobody needs such a name."""
    named = scope((b"host", host.encode()))
    assert _status(Hosts(Settings(host="0.0.0.0", api_keys={"a": "k"})).check, named) == 200
    assert _status(Hosts(Settings(host="::")).check, named) == 200
    assert _status(Hosts(Settings()).check, named) == 421


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
def test_a_name_that_can_be_bought_is_never_let_in(host: str, bound: str) -> None:
    assert _status(Hosts(Settings(host=bound)).check, scope((b"host", host.encode()))) == 421


@pytest.mark.parametrize("host", ["host.docker.internal:8000", "host.containers.internal"])
def test_containers_reach_the_machine_that_they_run_on(host: str) -> None:
    assert _status(Hosts(Settings()).check, scope((b"host", host.encode()))) == 200


@pytest.mark.parametrize("host", ["sagellm:8000", "localhost:8000"])
def test_a_foreign_page_is_refused_under_any_name(host: str) -> None:
    hosts = Hosts(Settings(host="0.0.0.0", allowed_hosts=("sagellm",)))
    foreign = scope((b"host", host.encode()), (b"origin", b"http://evil.com"))
    own = scope((b"host", host.encode()), (b"origin", f"http://{host}".encode()))
    assert _status(hosts.check, foreign) == 403
    assert _status(hosts.check, own) == 200


BROWSER = (
    ((b"origin", b"http://evil.local:8000"),),
    ((b"sec-fetch-site", b"same-origin"), (b"sec-fetch-mode", b"cors")),
    ((b"sec-fetch-site", b"none"), (b"sec-fetch-mode", b"navigate")),
    ((b"sec-fetch-dest", b"document"),),
)


@pytest.mark.parametrize("headers", BROWSER)
@pytest.mark.parametrize("host", [*PRIVATE, "host.docker.internal", socket.gethostname()])
def test_a_browser_is_refused_under_a_name_that_a_neighbour_could_answer_for(
    host: str, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    """mDNS, LLMNR and DHCP let anybody on the network say where a private name leads."""
    asked = scope((b"host", host.encode()), *headers)
    with pytest.raises(ApiError, match="--allowed-host") as refused:
        Hosts(Settings(host="0.0.0.0")).check(asked)
    assert (refused.value.status, refused.value.code) == (421, "unknown_host")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "localhost", "a.localhost", "10.1.2.3", "box"]
)
def test_a_browser_is_let_in_under_a_name_that_nobody_else_can_answer_for(host: str) -> None:
    hosts = Hosts(Settings(host="0.0.0.0", allowed_hosts=("box",)))
    own = (b"origin", f"http://{host}:8000".encode())
    asked = scope((b"host", f"{host}:8000".encode()), own, (b"sec-fetch-site", b"same-origin"))
    assert _status(hosts.check, asked) == 200


def test_a_browser_needs_no_more_where_the_operator_allows_any_host() -> None:
    asked = scope((b"host", b"sagellm"), (b"sec-fetch-site", b"none"))
    assert _status(Hosts(Settings(host="0.0.0.0", allowed_hosts=("*",))).check, asked) == 200


def test_the_fetch_of_node_is_no_browser() -> None:
    """It sends Sec-Fetch-Mode alone; browsers send Site, Mode and Dest together."""
    asked = scope((b"host", b"sagellm:8000"), (b"sec-fetch-mode", b"cors"))
    assert _status(Hosts(Settings(host="0.0.0.0")).check, asked) == 200


@pytest.mark.parametrize(
    ("site", "mode", "status"),
    [
        (b"cross-site", b"no-cors", 403),
        (b"same-site", b"no-cors", 403),
        (b"cross-site", b"", 403),
        (b"cross-site", b"navigate", 200),
        (b"same-origin", b"cors", 200),
        (b"none", b"navigate", 200),
    ],
)
def test_what_a_browser_fetches_for_another_site_is_refused(
    site: bytes, mode: bytes, status: int
) -> None:
    """An image or a script has no Origin; a link that somebody follows may lead here."""
    asked = scope(HOST, (b"sec-fetch-site", site), (b"sec-fetch-mode", mode))
    assert _status(Hosts(Settings()).check, asked) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("https://localhost:8000", 200),
        ("https://app.example", 200),
        ("http://localhost", 403),
        ("http://evil.com", 403),
        ("null", 403),
        ("", 403),
        ("ftp://localhost:8000", 403),
        ("http://localhost:8000,http://evil.com", 403),
    ],
)
def test_origins(origin: str, status: int) -> None:
    hosts = Hosts(Settings(allowed_origins=("https://app.example",)))
    assert _status(hosts.check, scope(HOST, (b"origin", origin.encode()))) == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"content-length", b"8388608")], 200),
        ([(b"content-length", b"8388609")], 413),
        ([(b"content-length", b"9" * 5000)], 413),
        ([(b"content-length", b"0" * 5000 + b"1")], 200),
        ([(b"content-encoding", b"identity")], 200),
        ([(b"content-encoding", b"gzip")], 415),
    ],
)
def test_what_is_said_of_a_body(headers: list[tuple[bytes, bytes]], status: int) -> None:
    assert (
        _status(check_body, scope(*headers), RequestLimits(), OpenBodies(RequestLimits())) == status
    )


@pytest.mark.parametrize("given", ["a", "A-z.0_9", "x" * 128])
def test_a_plain_id_is_kept(given: str) -> None:
    assert read_request_id([(b"x-request-id", given.encode())]) == given


@pytest.mark.parametrize("given", [[], [b""], [b"x" * 129], [b"a b"], [b"a\x00"], [b"a", b"b"]])
def test_any_other_id_is_replaced(given: list[bytes]) -> None:
    headers = [(b"x-request-id", value) for value in given]
    first, second = read_request_id(headers), read_request_id(headers)
    assert first != second
    assert first.isalnum()


def test_a_trace_context_is_kept_only_where_it_is_one() -> None:
    good = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert read_traceparent([(b"traceparent", good)]) == good.decode()
    assert read_traceparent([(b"traceparent", good + b"\n")]) == ""
    assert read_traceparent([(b"traceparent", b"00-zz")]) == ""


async def _endpoint(gateway: Gateway, request: Request) -> Response:
    return Response()


def test_a_route_needs_the_key_unless_it_says_otherwise() -> None:
    assert EndpointRoute("GET", "/x", _endpoint).access == "user"
    found = {route.path for route in ROUTES if route.access == "open"}
    assert found == {"/live", "/ready", "/docs", "/openapi.json"}
    assert NOT_FOUND.access == "user"


@pytest.mark.parametrize(
    "path", [b"//live", b"/live//", b"/LIVE", b"/%6cive", b"/x/../live", b"/live%00", b"live", b""]
)
def test_only_the_exact_path_is_the_route(path: bytes) -> None:
    assert RouteTable(ROUTES).find(scope(path=path)) is NOT_FOUND
    assert RouteTable(ROUTES).find(scope(path=b"/live")).access == "open"


def test_a_parameter_is_decoded_and_may_have_slashes_where_the_route_says_so() -> None:
    asked = scope(path=b"/v1/models/Qwen%2FQwen3/x")
    assert RouteTable(ROUTES).find(asked).path == "/v1/models/{id:path}"
    assert asked["path_params"] == {"id": "Qwen/Qwen3/x"}
    deep = scope(path=b"/v1/sagellm/requests/a/b/cancel", method="POST")
    assert RouteTable(ROUTES).find(deep) is NOT_FOUND


def test_a_method_that_a_path_has_not_keeps_its_access() -> None:
    asked = scope(path=b"/v1/sagellm/graph", method="DELETE")
    route = RouteTable(ROUTES).find(asked)
    assert (route.access, asked["allowed_methods"]) == ("admin", ("GET", "HEAD"))


def _status(check: Any, *args: Any) -> int:
    try:
        check(*args)
    except ApiError as error:
        return error.status
    return 200
