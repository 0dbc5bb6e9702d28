"""The body of a new batch, and the queries of lists."""

import json
from typing import Any

import pytest

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.batch_bodies import PageQuery, read_batch, read_page
from sagellm.gateway.settings import RequestLimits

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
GOOD = {"input_file_id": "file-1", "endpoint": ENDPOINTS[0], "completion_window": "24h"}
KNOWN = ("limit", "after", "order", "purpose")


def read(body: Any) -> Any:
    return read_batch(json.dumps(body).encode(), RequestLimits(), ENDPOINTS)


def test_a_body_is_read() -> None:
    life = {"anchor": "created_at", "seconds": 3600}
    found = read({**GOOD, "metadata": {"a": "b"}, "output_expires_after": life})
    assert (found.input_file_id, found.endpoint, found.metadata) == (
        "file-1",
        ENDPOINTS[0],
        {"a": "b"},
    )
    assert found.output_expires_after.seconds == 3600
    assert read({**GOOD, "metadata": None, "output_expires_after": None}).metadata is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": 1}, "input_file_id"),
        ({"input_file_id": "x" * 65}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"x" * 65: ""}}, "metadata"),
        ({"metadata": {"x": "y" * 513}}, "metadata"),
        ({"output_expires_after": 1}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after.seconds"),
        (
            {"output_expires_after": {"anchor": "x", "seconds": 3600}},
            "output_expires_after.anchor",
        ),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            "output_expires_after.seconds",
        ),
        ({"prompt": 1}, "prompt"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        read({**GOOD, **fields})
    assert error.value.status == 400
    assert (error.value.param or "").startswith(param.partition(".")[0])
    assert param == error.value.param or param in ("metadata",)


def test_the_served_endpoints_are_named() -> None:
    with pytest.raises(ApiError, match=r"/v1/chat/completions, /v1/completions"):
        read({**GOOD, "endpoint": "/v1/embeddings"})


def test_a_query_is_read() -> None:
    query = [("limit", "5"), ("after", "file-1"), ("order", "asc"), ("purpose", "batch")]
    found = read_page(query, known=KNOWN, default=20, most=100)
    assert found == PageQuery(5, "file-1", False, "batch")
    assert read_page([], known=KNOWN, default=20, most=100) == PageQuery(20)


@pytest.mark.parametrize(
    "query",
    [
        [("limit", "0")],
        [("limit", "101")],
        [("limit", "-1")],
        [("limit", "x")],
        [("limit", "\u0665")],
        [("limit", "9" * 5000)],
        [("limit", "1"), ("limit", "2")],
        [("order", "up")],
        [("limits", "1")],
        [("\u2028", "1")],
    ],
)
def test_a_wrong_query_is_refused(query: list[tuple[str, str]]) -> None:
    with pytest.raises(ApiError) as error:
        read_page(query, known=KNOWN, default=20, most=100)
    assert error.value.status == 400
