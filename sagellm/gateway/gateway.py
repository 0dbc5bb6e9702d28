"""The gateway: the one object that the app's layers and endpoints share, for one open graph."""

import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple, Protocol

from sagellm.gateway.answers.logprobs import TokenTexts
from sagellm.gateway.budgets import Counter, LocalCounter
from sagellm.gateway.encoding import PromptEncoder
from sagellm.gateway.graph_bridge import GraphBridge
from sagellm.gateway.metrics.meters import Meters
from sagellm.gateway.protocol.sampling_params import ModelBounds, ModelCard
from sagellm.gateway.settings import Settings
from sagellm.graphs.ir import Graph
from sagellm.runtime.models.tokenizer import Tokenizer

_SALT_BYTES = 16
_NUM_BROKEN = 4096  # more calls than break off while the graph ends one


@dataclass(slots=True)
class HostedModel:
    """A model behind HTTP: what clients are told of it, and its own text side."""

    card: ModelCard
    tokenizer: Tokenizer
    encoder: PromptEncoder = field(init=False)
    tokens: TokenTexts = field(init=False)

    def __post_init__(self) -> None:
        self.encoder = PromptEncoder(self.tokenizer)
        self.tokens = TokenTexts(self.tokenizer)

    @property
    def facts(self) -> ModelBounds:
        return self.card.facts


class ClaimedIds(NamedTuple):
    """The id of a call, unique among those under way, and those of its requests in the graph."""

    id: str
    request_ids: tuple[str, ...]


class Readiness(Protocol):
    """Whether tokens are being produced end to end."""

    @property
    def is_ready(self) -> bool: ...

    @property
    def reason(self) -> str: ...


class Hold(Protocol):
    """Places in a tenant's budget."""

    def first_token(self) -> None:
        """The call waits no longer."""


class Budgets(Protocol):
    """What each tenant may have under way."""

    def hold(self, tenant: str, num_requests: int = 1) -> AbstractContextManager[Hold]:
        """Places, given back at the end. Raises ApiError 429 where there are none."""

    def may_retry(self, tenant: str) -> bool:
        """Whether a call that the graph refused is told to try again: x-should-retry."""


@dataclass(slots=True, kw_only=True)
class Gateway:
    """One open graph behind HTTP. Lives on one event loop; all that changes is here or beside it.

    `is_draining`: new requests are refused, those under way go on.
    """

    settings: Settings
    bridge: GraphBridge
    models: tuple[HostedModel, ...]  # the first serves requests that name none
    readiness: Readiness
    budgets: Budgets
    meters: Meters
    graph: Graph | None = None
    is_draining: bool = False
    num_calls: Counter = field(default_factory=LocalCounter)  # of all gateways before the graph
    _open_ids: dict[str, int] = field(default_factory=dict)  # with the number of their requests
    _broken_ids: dict[str, None] = field(default_factory=dict)  # oldest first
    _salt_key: bytes = b""

    def __post_init__(self) -> None:
        self._salt_key = self.settings.salt_key[:64] or secrets.token_bytes(32)

    @contextmanager
    def claim(self, request_id: str, num_requests: int = 1) -> Iterator[ClaimedIds]:
        """The id of one call, which is `request_id` unless that is in use now, for the `with`
        block; the requests of a call that has several have numbers behind it.

        An id counts as in use also after a block that was broken off: the graph may not have ended
        its requests yet.
        """
        while request_id in self._open_ids or request_id in self._broken_ids:
            request_id = secrets.token_hex(16)
        self._open_ids[request_id] = num_requests
        try:
            yield ClaimedIds(request_id, _numbered(request_id, num_requests))
        except BaseException:
            self._broken_ids[request_id] = None
            if len(self._broken_ids) > _NUM_BROKEN:
                del self._broken_ids[next(iter(self._broken_ids))]
            raise
        finally:
            del self._open_ids[request_id]

    def requests_of(self, request_id: str) -> tuple[str, ...]:
        """The graph's requests of an open call, by its id or by that of its answer; or none."""
        for known in (request_id, plain_id(request_id)):
            if known in self._open_ids:
                return _numbered(known, self._open_ids[known])
        return ()

    def salt_of(self, tenant: str, cache_salt: str | None = None) -> str:
        """What keeps the prefix blocks of tenants, and of salts inside a tenant, apart.

        Equal for equal arguments in one process (or under one `salt_key`); says nothing of them.
        """
        named = f"{len(tenant)}:{tenant}{cache_salt or ''}".encode(errors="surrogatepass")
        return blake2b(named, key=self._salt_key, digest_size=_SALT_BYTES).hexdigest()


def plain_id(answer_id: str) -> str:
    """The id of the call whose answer has that id."""
    return answer_id.removeprefix("chatcmpl-").removeprefix("cmpl-")


def call_of(request_id: str) -> str:
    """The id of the call that a request of the graph belongs to."""
    return request_id.partition("/")[0]


def _numbered(request_id: str, num_requests: int) -> tuple[str, ...]:
    """What a call names has no slash, so that the ids of one call never equal another's."""
    if num_requests == 1:
        return (request_id,)
    return tuple(f"{request_id}/{number}" for number in range(num_requests))
