"""Every route of the OpenAPI document with every kind of key: which key opens which route."""

import json
from collections.abc import Iterator

import pytest
from gateway_served import KEYS, SERVERS, Reply, ask, null_gateway

from sagellm.gateway.http.call import EndpointRoute
from sagellm.gateway.http.routes import ROUTES

USER, ADMIN = "Authorization: Bearer user-key", "Authorization: Bearer admin-key"
STRANGERS = {
    "nothing": "X: y",
    "wrong": "Authorization: Bearer nonsense",
    "basic": "Authorization: Basic dXNlci1rZXk=",
    "two": f"{USER}\r\nAuthorization: Bearer x",
    "cookie": "Cookie: api_key=user-key",
}


@pytest.fixture(scope="module", params=SERVERS)
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    with null_gateway(request.param, **KEYS) as port:
        yield port


def call(port: int, method: str, path: str, header: str) -> Reply:
    lines = (f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Length: 2", header, "", "{}")
    return ask(port, "\r\n".join(lines).encode())


def routes() -> list[object]:
    return [pytest.param(route, id=f"{route.method} {route.path}") for route in ROUTES]


def example(route: EndpointRoute) -> str:
    return route.path.replace("{id:path}", "m").replace("{id}", "x")


@pytest.mark.parametrize("route", routes())
def test_who_is_let_in(port: int, route: EndpointRoute) -> None:
    path = example(route)
    for kind, header in STRANGERS.items():
        expected = {200} if route.access == "open" else {401}
        assert call(port, route.method, path, header).status in expected, kind
    by_user = call(port, route.method, path, USER).status
    assert (by_user == 403) == (route.access == "admin")
    assert call(port, route.method, path, ADMIN).status not in (401, 403)


@pytest.mark.parametrize("route", routes())
def test_no_way_round(port: int, route: EndpointRoute) -> None:
    path = example(route)
    others = (
        f"/{path}",
        f"{path}/",
        f"/x/..{path}",
        f"/%2e%2e{path}",
        path.upper(),
        f"{path}%00",
        f"{path}?api_key=user-key",
    )
    for other in others:
        is_query = "?" in other
        expected = 200 if is_query and route.access == "open" else 401
        assert call(port, route.method, other, "X: y").status == expected, other
    if route.access != "open":
        assert call(port, "OPTIONS", path, "X: y").status == 401
        assert call(port, "BREW", path, "X: y").status in (400, 401)


def test_the_document_names_every_route(port: int) -> None:
    document = json.loads(call(port, "GET", "/openapi.json", USER).body)
    for route in ROUTES:
        path = route.path.replace(":path", "")
        assert document["paths"][path][route.method.lower()]["security"] or route.access == "open"
