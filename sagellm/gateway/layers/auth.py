"""Who calls: a key in `Authorization: Bearer`, and nowhere else."""

import hmac
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from starlette.types import Scope

from sagellm.gateway.failure import ApiError
from sagellm.gateway.settings import Settings

Access = Literal["open", "user", "admin", "metrics"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose key was given."""

    tenant: str
    is_admin: bool = False


ANONYMOUS = Caller("anonymous")
ADMIN = Caller("admin", is_admin=True)


class Keys:
    """All keys, by their hashes.

    A call is compared with every one of them, whatever it gives: neither the time that it takes nor
    the answer tells which keys there are.
    """

    def __init__(self, settings: Settings) -> None:
        self._users = [(name, _digest(key)) for name, key in settings.api_keys.items()]
        self._admin = settings.admin_key and _digest(settings.admin_key)
        self._open_metrics = settings.open_metrics

    def caller(self, scope: Scope, access: Access) -> Caller:
        """Raises ApiError 401 without a key that is known, 403 for a user on admin routes."""
        if access == "open" or (access == "metrics" and self._open_metrics):
            return ANONYMOUS
        caller = self._known(_digest_of(scope))
        if caller is None:
            raise ApiError(401, "a valid API key is needed", code="invalid_api_key")
        if access == "admin" and not caller.is_admin:
            raise ApiError(403, "this needs the admin key", code="admin_only")
        return caller

    def _known(self, given: bytes) -> Caller | None:
        found = None if self._users else ANONYMOUS
        for name, digest in self._users:
            if hmac.compare_digest(given, digest):
                found = Caller(name)
        if self._admin and hmac.compare_digest(given, self._admin):
            found = ADMIN
        return found


def tenants(settings: Settings) -> tuple[str, ...]:
    """All that `Keys` may name."""
    return (*settings.api_keys, ADMIN.tenant, ANONYMOUS.tenant)


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


def _digest_of(scope: Scope) -> bytes:
    """Of the key that was given; equal to no key's where there is none, or more than one."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    return sha256(key.strip()).digest() if scheme.lower() == b"bearer" else bytes(32)
