"""Operators for SAGE pipelines: a sink that submits, a source of events, a map of whole answers.

SAGE takes a class and the arguments of its constructor, and accepts any class with `execute` and a
`ctx` that can be set. It walks each packet through the whole pipeline under one lock: a map that
waits for answers serves one request at a time, while the sink and the source serve all at once.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from sagellm.runtime.messages import Answer
from sagellm.sage.embedded_graphs import PipelineEvent, PipelineRequest, graph_named

_WAIT_S = 0.001  # of one call of the source, which SAGE calls again and again


class SubmitRequests:
    """A sink that submits each packet as a request, without waiting for the answer.

    `graph`: a name given to `register_graph`. `defaults`: fields that packets may leave out, such
    as `max_tokens`.
    """

    def __init__(self, graph: str, **defaults: Any) -> None:
        self.ctx: Any = None
        self._graph = graph_named(graph)
        self._defaults = defaults

    def execute(self, data: PipelineRequest) -> None:
        """Raises ValueError and RequestError for a wrong request."""
        self._graph.submit(_with_defaults(data, self._defaults))


class TokenEvents:
    """A source of the events of all requests that were submitted to a graph.

    `num_requests`: the source ends after so many requests have ended; None: it ends after `finish`.
    """

    def __init__(self, graph: str, *, num_requests: int | None = None) -> None:
        self.ctx: Any = None
        self._graph = graph_named(graph)
        self._num_left = num_requests
        self._stop = importlib.import_module("sage.runtime").StopSignal

    def execute(self) -> PipelineEvent | Any | None:
        """The next event, None if there is none now, or SAGE's StopSignal at the end."""
        if self._num_left == 0 or self._graph.is_over:
            return self._stop("sagellm")
        event = self._graph.take(_WAIT_S)
        if event is not None and event.is_last and self._num_left is not None:
            self._num_left -= 1
        return event


class GenerateAnswers:
    """A map from requests to whole answers. Each call blocks until its answer is there."""

    def __init__(self, graph: str, **defaults: Any) -> None:
        self.ctx: Any = None
        self._graph = graph_named(graph)
        self._defaults = defaults

    def execute(self, data: PipelineRequest) -> Answer:
        """Raises ValueError and RequestError for a wrong request."""
        return self._graph.generate(_with_defaults(data, self._defaults))


def _with_defaults(data: PipelineRequest, defaults: Mapping[str, Any]) -> PipelineRequest:
    given = {"prompt": data} if isinstance(data, str) else data
    return {**defaults, **given} if defaults else given
