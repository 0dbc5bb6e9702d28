"""The gateway: the state that the app and its endpoints share, for one open graph."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from sagellm.gateway.answers.logprobs import TokenTexts
from sagellm.gateway.budgets import Budgets, Counter, LocalCounter
from sagellm.gateway.encoding import PromptEncoder
from sagellm.gateway.graph_bridge import GraphBridge
from sagellm.gateway.metrics.meters import Meters
from sagellm.gateway.protocol.sampling_params import ModelBounds, ModelCard
from sagellm.gateway.readiness import Readiness
from sagellm.gateway.settings import Settings
from sagellm.graphs.ir import Graph
from sagellm.runtime.models.tokenizer import Tokenizer

_SALT_BYTES = 16
_NUM_BROKEN = 4096  # more calls than break off while the graph ends one of them


@dataclass(slots=True)
class HostedModel:
    """A model that is served over HTTP: its card, its tokenizer and its encoder."""

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
    """The id of a call, unique among the open calls, and the ids of its requests in the graph."""

    id: str
    request_ids: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Gateway:
    """One open graph that is served over HTTP. All methods are called on the app's loop.

    While `is_draining`, new requests are refused, and open requests go on.
    """

    settings: Settings
    bridge: GraphBridge
    models: tuple[HostedModel, ...]  # the first is the default
    readiness: Readiness
    budgets: Budgets
    meters: Meters
    graph: Graph | None = None
    is_draining: bool = False
    num_calls: Counter = field(
        default_factory=LocalCounter
    )  # open calls of all gateways of the graph
    _open_ids: dict[str, int] = field(default_factory=dict)  # id of a call -> number of requests
    _broken_ids: dict[str, None] = field(default_factory=dict)  # calls that broke off, oldest first
    _salt_key: bytes = b""

    def __post_init__(self) -> None:
        self._salt_key = self.settings.salt_key[:64] or secrets.token_bytes(32)

    @contextmanager
    def claim(self, request_id: str, num_requests: int = 1) -> Iterator[ClaimedIds]:
        """Reserve the id of a call for the `with` block: `request_id`, or a new id if that is used.

        Several requests of a call have the id with a number. The id of a call that broke off stays
        reserved: the graph may not have ended its requests yet.
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
        """Return the request ids of an open call, by its id or by the id of its answer."""
        for known in (request_id, plain_id(request_id)):
            if known in self._open_ids:
                return _numbered(known, self._open_ids[known])
        return ()

    def salt_of(self, tenant: str, cache_salt: str | None = None) -> str:
        """Return the salt that separates the prefix blocks of tenants and of their cache salts.

        Equal arguments have equal salts in one process, or under one `salt_key`. The salt is a
        keyed hash, so it reveals nothing of its arguments.
        """
        named = f"{len(tenant)}:{tenant}{cache_salt or ''}".encode(errors="surrogatepass")
        return blake2b(named, key=self._salt_key, digest_size=_SALT_BYTES).hexdigest()


def plain_id(answer_id: str) -> str:
    """Return the id of a call from the id of its answer."""
    return answer_id.removeprefix("chatcmpl-").removeprefix("cmpl-")


def call_of(request_id: str) -> str:
    """Return the id of the call that a request of the graph belongs to."""
    return request_id.partition("/")[0]


def _numbered(request_id: str, num_requests: int) -> tuple[str, ...]:
    """Return the ids of a call's requests. Ids of calls have no slash, so these are unique."""
    if num_requests == 1:
        return (request_id,)
    return tuple(f"{request_id}/{number}" for number in range(num_requests))


def objective_of(graph: Graph | None) -> float | None:
    """Return the longest TTFT objective among the graph's `admission` operators.

    None where some `admission` has no objective: which operator a call meets is not known before
    its body is read.
    """
    nodes = graph.nodes if graph is not None else ()
    found = [node.attrs.get("slo_ttft_s") for node in nodes if node.op == "admission"]
    known = [float(each) for each in found if isinstance(each, int | float)]
    return max(known) if known and len(known) == len(found) else None
