"""The graphs that the SAGE pipelines of a process share, by name."""

import atexit
import queue
import threading
from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec

from sagellm.builder import Graph
from sagellm.graphs.vocabulary import nearest
from sagellm.opening.bridge import BlockingSession, StreamEnd
from sagellm.opening.open_graph import OpenGraph
from sagellm.runtime.messages import Answer, TokenEvent
from sagellm.runtime.sampling import Sampling
from sagellm.session.requests import read_fields

PipelineRequest: TypeAlias = str | Mapping[str, Any]

_SAMPLING = frozenset(Sampling.__struct_fields__)
_HINTS = {"tenant_id": "user_id", "model_id": "model", "prefix_cache_key": "salt"}  # SAGE's names


class PipelineEvent(msgspec.Struct, frozen=True, kw_only=True):
    """New text of one request of a pipeline, or its end, or both.

    `id`: that of the request. Only the last event of a choice has a `finish_reason`, and an `error`
    if the request was refused or failed.
    """

    id: str
    choice: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    num_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None


def read_request(data: PipelineRequest) -> tuple[str | None, Any, dict[str, Any]]:
    """The id, the prompt and the other fields of a request, as `session.stream` takes them.

    `data`: a prompt, or a mapping with `prompt` or `messages`, and perhaps `id`, fields of
    `Sampling`, fields of a request, and hints of SAGE (`tenant_id`, `model_id`, `prefix_cache_key`,
    `target_ttft_ms`). Raises ValueError without a prompt, TypeError for a wrong sampling, and
    RequestError for a wrong field.
    """
    given: dict[str, Any] = {"prompt": data} if isinstance(data, str) else dict(data)
    prompt = given.pop("messages", None) or given.pop("prompt", None)
    if not prompt:
        raise ValueError("a request has neither `prompt` nor `messages`; give one of them")
    given.pop("prompt", None)
    identity = given.pop("id", None)
    target_ms = given.pop("target_ttft_ms", None)
    if target_ms is not None:
        given["slo_ttft_s"] = float(target_ms) / 1e3
    sampling = {name: given.pop(name) for name in _SAMPLING & given.keys()}
    fields = {_HINTS.get(name, name): value for name, value in given.items()}
    read_fields(fields)
    if sampling:
        fields["sampling"] = Sampling(**sampling)
    return None if identity is None else str(identity), prompt, fields


class EmbeddedGraph:
    """A graph that opens at its first use, in a thread of its own. Any thread may use it.

    `submit` returns at once; `take` returns the events of all submitted requests, in the order in
    which they came.
    """

    def __init__(self, graph: Graph | OpenGraph) -> None:
        self._opening = graph if isinstance(graph, OpenGraph) else graph.open()
        self._session: BlockingSession | None = None
        self._lock = threading.Lock()
        self._events: queue.SimpleQueue[PipelineEvent] = queue.SimpleQueue()
        self._num_open = 0
        self._num_submitted = 0
        self.is_finished = False  # no more requests will come

    @property
    def session(self) -> BlockingSession:
        """The open session. The first call opens the graph, which may take seconds."""
        with self._lock:
            if self._session is None:
                self._session = self._opening.__enter__()
            return self._session

    def submit(self, data: PipelineRequest) -> str:
        """Start a request, and return its id. Raises ValueError and RequestError for a wrong
        request.
        """
        identity, prompt, fields = read_request(data)
        session = self.session
        with self._lock:
            self._num_submitted += 1
            self._num_open += 1
            identity = str(self._num_submitted - 1) if identity is None else identity
        try:
            session.start(lambda item: self._put(identity, item), prompt, **fields)
        except BaseException:  # the graph was closed meanwhile
            with self._lock:
                self._num_open -= 1
            raise
        return identity

    def generate(self, data: PipelineRequest) -> Answer:
        """The whole answer of a request; blocks until it is there. Raises as `generate` does."""
        _, prompt, fields = read_request(data)
        return self.session.generate(prompt, **fields)

    def take(self, timeout_s: float) -> PipelineEvent | None:
        """The next event; None if none comes within `timeout_s`."""
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    @property
    def is_over(self) -> bool:
        """Whether no more requests come, and all events were taken."""
        return self.is_finished and not self._num_open and self._events.empty()

    def close(self) -> None:
        """End all requests, and close the graph. It opens again at its next use."""
        with self._lock:
            if self._session is not None:
                self._opening.__exit__(None, None, None)
                self._session = None

    def _put(self, identity: str, item: object) -> None:
        """Take an output of a request. The thread of the graph calls it."""
        if isinstance(item, StreamEnd):
            if item.error is not None:
                event = PipelineEvent(id=identity, finish_reason="failed", error=str(item.error))
                self._events.put(event)
            with self._lock:
                self._num_open -= 1
        elif isinstance(item, TokenEvent | Answer):
            self._events.put(
                PipelineEvent(
                    id=identity,
                    choice=item.choice,
                    text=item.text,
                    token_ids=item.token_ids,
                    num_tokens=item.num_tokens,
                    finish_reason=item.finish_reason,
                    error=item.error,
                )
            )


_GRAPHS: dict[str, EmbeddedGraph] = {}


def register_graph(name: str, graph: Graph | OpenGraph) -> EmbeddedGraph:
    """Name a graph for the operators of this process. It opens at its first use.

    Raises ValueError for a name that is taken.
    """
    if name in _GRAPHS:
        raise ValueError(f"there is a graph {name!r} already; choose another name")
    if not _GRAPHS:
        atexit.register(close_graphs)
    _GRAPHS[name] = EmbeddedGraph(graph)
    return _GRAPHS[name]


def graph_named(name: str) -> EmbeddedGraph:
    """Raises LookupError for an unknown name."""
    if name not in _GRAPHS:
        close = nearest(name, _GRAPHS)
        hint = f"did you mean {close!r}?" if close else "name it by register_graph first"
        raise LookupError(f"there is no graph {name!r}; {hint}")
    return _GRAPHS[name]


def finish(name: str) -> None:
    """Say that no more requests come: the source of events ends after the last one."""
    graph_named(name).is_finished = True


def close_graphs() -> None:
    """Close all graphs, and forget their names."""
    while _GRAPHS:
        _, graph = _GRAPHS.popitem()
        graph.close()
    atexit.unregister(close_graphs)
