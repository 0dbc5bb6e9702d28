"""Keys: who is let in, as whom, and how little that tells."""

import hmac
from typing import Any

import pytest

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.http.checks import ANONYMOUS, Access, ApiKeys, Caller
from sagellm.gateway.settings import Settings

KEYED = ApiKeys(Settings(api_keys={"alice": "ka", "bob": "kb"}, admin_key="root"))
KEYLESS = ApiKeys(Settings())


def scope(*values: bytes) -> dict[str, Any]:
    return {"headers": [(b"authorization", value) for value in values]}


def status(keys: ApiKeys, access: Access, *values: bytes) -> int:
    try:
        keys.caller(scope(*values), access)
    except ApiError as error:
        return error.status
    return 200


def test_a_key_names_its_tenant() -> None:
    assert KEYED.caller(scope(b"Bearer ka"), "user") == Caller("alice")
    assert KEYED.caller(scope(b"bearer kb"), "user") == Caller("bob")
    assert KEYED.caller(scope(b"Bearer root"), "user") == Caller("admin", is_admin=True)


@pytest.mark.parametrize(
    "values",
    [(), (b"",), (b"Bearer",), (b"Bearer kc",), (b"Basic ka",), (b"ka",), (b"Bearer ka",) * 2],
)
def test_anything_else_is_refused(values: tuple[bytes, ...]) -> None:
    assert status(KEYED, "user", *values) == 401
    assert status(KEYED, "metrics", *values) == 401
    assert status(KEYED, "admin", *values) == 401
    assert status(KEYED, "open", *values) == 200


def test_a_user_is_no_admin() -> None:
    assert status(KEYED, "admin", b"Bearer ka") == 403
    assert status(KEYED, "admin", b"Bearer root") == 200


def test_without_keys_all_but_the_admin_routes_are_open() -> None:
    assert KEYLESS.caller(scope(b"Bearer anything"), "user") == ANONYMOUS
    assert status(KEYLESS, "admin", b"Bearer anything") == 403
    assert status(KEYLESS, "admin", b"Bearer ") == 403


def test_metrics_are_open_where_the_settings_say_so() -> None:
    keys = ApiKeys(Settings(api_keys={"a": "k"}, open_metrics=True))
    assert status(keys, "metrics") == 200
    assert status(keys, "user") == 401


@pytest.mark.parametrize("value", [b"Bearer ka", b"Bearer kb", b"Bearer no", b""])
def test_every_key_is_compared_whatever_was_given(
    value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return hmac.compare_digest(given, known)

    monkeypatch.setattr("sagellm.gateway.http.checks.hmac.compare_digest", hmac.compare_digest)
    counted = type("Counted", (), {"compare_digest": staticmethod(compare)})
    monkeypatch.setattr("sagellm.gateway.http.checks.hmac", counted)
    status(KEYED, "user", value)
    assert len(compared) == 3
