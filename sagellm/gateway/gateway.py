"""The state of a gateway, which the app and its endpoints share: one `Gateway` for each graph."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from sagellm.chat_formats import ChatFormat, SpecialTokens, format_of
from sagellm.gateway.answers.logprobs import TokenTexts
from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.batches.batch_store import Stores
from sagellm.gateway.budgets import Budgets, Counter, LocalCounter
from sagellm.gateway.encoding import PromptEncoder
from sagellm.gateway.grammar_checks import GrammarChecker
from sagellm.gateway.graph_bridge import GraphBridge
from sagellm.gateway.item_memory import ItemMemory
from sagellm.gateway.metrics.meters import Meters
from sagellm.gateway.protocol.sampling_params import ModelBounds, ModelCard
from sagellm.gateway.readiness import Readiness
from sagellm.gateway.settings import GRAPH_ALONE, Settings
from sagellm.graphs.ir import Graph
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.models.tokenizer import Tokenizer

_SALT_BYTES = 16
_ANSWER_PREFIXES = ("chatcmpl-", "cmpl-", "msg_", "resp_")
_NUM_BROKEN = 4096  # more calls than can break off while the graph ends the requests of one call


@dataclass(slots=True)
class HostedModel:
    """A model that is served over HTTP: its card, its tokenizer and its encoder.

    `format`: how the model writes tool calls and reasoning, known by its chat template.
    """

    card: ModelCard
    tokenizer: Tokenizer
    encoder: PromptEncoder = field(init=False)
    tokens: TokenTexts = field(init=False)
    format: ChatFormat = field(init=False)
    special_tokens: SpecialTokens = field(init=False)

    def __post_init__(self) -> None:
        self.encoder = PromptEncoder(self.tokenizer)
        self.tokens = TokenTexts(self.tokenizer)
        self.format = format_of(self.tokenizer.chat_template)
        special = self.tokenizer.special_token_ids
        self.special_tokens = {self.tokenizer.token(token_id): token_id for token_id in special}

    @property
    def facts(self) -> ModelBounds:
        return self.card.facts


class ClaimedIds(NamedTuple):
    """The ids of one call. `id`: its own id, unique among open calls. `request_ids`: graph ids."""

    id: str
    request_ids: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Gateway:
    """The state of one graph that is served over HTTP. All methods are called on the app's loop.

    While `is_draining` is true, new requests are refused and open requests continue.
    """

    settings: Settings
    bridge: GraphBridge
    models: tuple[HostedModel, ...]  # the first is the default
    readiness: Readiness
    budgets: Budgets
    meters: Meters
    graph: Graph | None = None
    is_draining: bool = False
    # Requests of batches: `num_batch_calls` bounds them, so that they refuse no call of their key.
    background_budgets: Budgets = field(default_factory=lambda: Budgets(GRAPH_ALONE))
    stores: Stores | None = field(init=False, default=None)  # with `settings.data_dir`
    # Open calls, summed over all gateways of the graph.
    num_calls: Counter = field(default_factory=LocalCounter)
    grammars: GrammarChecker = field(default_factory=GrammarChecker)
    items: ItemMemory = field(default_factory=ItemMemory)
    _open_ids: dict[str, int] = field(default_factory=dict)  # id of a call -> number of requests
    # The ids of calls that ended with an exception, oldest first.
    _broken_ids: dict[str, None] = field(default_factory=dict)
    _salt_key: bytes = b""

    def __post_init__(self) -> None:
        self._salt_key = self.settings.salt_key[:64] or secrets.token_bytes(32)
        if self.settings.data_dir is not None:
            self.stores = Stores(self.settings.data_dir, self.settings.storage)

    @contextmanager
    def claim(self, request_id: str, num_requests: int = 1) -> Iterator[ClaimedIds]:
        """Reserve the id of a call for the `with` block: `request_id`, or a new id if it is in use.

        If the call has several requests, their ids are the call's id with a number. After an
        exception the id stays reserved, because the graph may not have ended the requests yet.
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
        """Return the request ids of an open call. `request_id`: the call's id or its answer's id.

        An unknown id gives an empty tuple.
        """
        for known in (request_id, plain_id(request_id)):
            if known in self._open_ids:
                return _numbered(known, self._open_ids[known])
        return ()

    def salt_of(self, tenant: str, cache_salt: str | None = None) -> str:
        """Return the prefix-cache salt of a tenant and of the client's own `cache_salt`.

        Equal arguments give equal salts within one process, or under the same `salt_key`. The salt
        is a keyed hash, so it does not reveal its arguments.
        """
        # The length keeps pairs apart: ("a", "bc") and ("ab", "c") must have different salts.
        named = f"{len(tenant)}:{tenant}{cache_salt or ''}".encode(errors="surrogatepass")
        return blake2b(named, key=self._salt_key, digest_size=_SALT_BYTES).hexdigest()


def plain_id(answer_id: str) -> str:
    """Return the id of a call from the id of its answer, which has a prefix."""
    for prefix in _ANSWER_PREFIXES:
        answer_id = answer_id.removeprefix(prefix)
    return answer_id


def call_of(request_id: str) -> str:
    """Return the id of the call from the id of one of its graph requests."""
    return request_id.partition("/")[0]


def _numbered(request_id: str, num_requests: int) -> tuple[str, ...]:
    """Return the ids of a call's requests.

    The ids are unique over all calls, because a call's own id contains no slash.
    """
    if num_requests == 1:
        return (request_id,)
    return tuple(f"{request_id}/{number}" for number in range(num_requests))


def objective_of(graph: Graph | None) -> float | None:
    """Return the longest TTFT objective of the graph's `admission` operators, in seconds.

    Return None if there is no such operator, or if one has no objective: before a call's body is
    read, any of these operators may be on its path.
    """
    nodes = graph.nodes if graph is not None else ()
    found = [node.attrs.get("slo_ttft_s") for node in nodes if node.op == "admission"]
    known = [float(each) for each in found if isinstance(each, int | float)]
    return max(known) if known and len(known) == len(found) else None


def served_model(gateway: Gateway, name: str | None) -> HostedModel:
    """Return the model with a name; the first model for None. Raises ApiError 404."""
    if name is None:
        return gateway.models[0]
    found = next((served for served in gateway.models if name in served.card.names), None)
    if found is None:
        raise _unknown(gateway, name)
    return found


def generating_model(gateway: Gateway, name: str | None) -> HostedModel:
    """Return the model with a name; for None, the first that generates. Raises ApiError."""
    if name is None:
        found = next((one for one in gateway.models if not one.card.embeds), gateway.models[0])
    else:
        found = served_model(gateway, name)
    if found.card.embeds:
        raise wrong("model", f"{found.card.id} embeds texts; send them to /v1/embeddings")
    return found


def embedding_model(gateway: Gateway, name: str | None) -> HostedModel:
    """Return the model with a name; for None, the first that embeds. Raises ApiError."""
    first = next((one for one in gateway.models if one.card.embeds), None)
    found = first if name is None else served_model(gateway, name)
    if first is None or found is None:
        raise wrong("model", "none of this server embeds; give its graph an operator `embed`")
    if not found.card.embeds:
        raise wrong("model", f"{found.card.id} generates; {first.card.id} embeds texts")
    return found


def _unknown(gateway: Gateway, name: str) -> ApiError:
    close = nearest(name, [known for served in gateway.models for known in served.card.names])
    hint = f"did you mean {close}? " if close else ""
    message = f"the model does not exist; {hint}GET /v1/models lists those that are served"
    return ApiError(404, message, param="model", code="model_not_found")
