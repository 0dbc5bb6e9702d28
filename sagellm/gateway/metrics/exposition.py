"""The text of /metrics, in the format of Prometheus or OpenMetrics."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.process_collector import ProcessCollector

from sagellm.gateway.metrics.meters import Counts, HttpMeters, LoopLag, lengths
from sagellm.gateway.metrics.native import graph_families, http_families
from sagellm.gateway.metrics.observer import KVShape, Measure, RequestObserver
from sagellm.gateway.metrics.snapshot import (
    EngineReading,
    ModelReading,
    Snapshot,
    read_engines,
    read_scalings,
    read_shadows,
    read_tallies,
)
from sagellm.gateway.metrics.vllm import instrumentator_families, vllm_families
from sagellm.gateway.protocol.sampling_params import ModelCard
from sagellm.graphs.sections import model_operators
from sagellm.runtime.executors.reading import Window, option_of
from sagellm.session import Session
from sagellm.session.models import Model


class ExpositionFormat(NamedTuple):
    """A text format of metrics. `encode` writes all metrics of a registry, with names unescaped."""

    encode: Callable[[CollectorRegistry], bytes]
    content_type: str


TEXT = ExpositionFormat(generate_latest, CONTENT_TYPE_PLAIN_0_0_4)
OPEN_METRICS = ExpositionFormat(
    partial(openmetrics.generate_latest, escaping=openmetrics.ALLOWUTF8, version="1.0.0"),
    "application/openmetrics-text; version=1.0.0; charset=utf-8",
)
_TEXT_TYPES = frozenset({"text/plain", "text/*", "*/*"})
_OPEN_METRICS_TYPE = "application/openmetrics-text"


def format_of(accept: str) -> ExpositionFormat:
    """Return the format that an Accept header asks for; the default is Prometheus text."""
    accepted = set(_media_types(accept))
    return OPEN_METRICS if _OPEN_METRICS_TYPE in accepted and not accepted & _TEXT_TYPES else TEXT


def _media_types(accept: str) -> Iterator[str]:
    """Yield the media types that an Accept header allows."""
    # A weight of 0 means "not acceptable" (RFC 9110, 12.4.2).
    for part in accept.lower().split(","):
        media_type, *parameters = (word.strip() for word in part.split(";"))
        weights = [word[2:] for word in parameters if word.startswith("q=")]
        if not any(weight.strip("0.") == "" for weight in weights):
            yield media_type


WINDOW_S = 10.0  # the window of the metrics *_ratio of operators


class _Scrape:
    """A collector of prometheus_client that yields the metric families of the current scrape."""

    def __init__(self) -> None:
        self.families: Iterable[Metric] = ()

    def collect(self) -> Iterator[Metric]:
        yield from self.families


class GatewayMeters(HttpMeters):
    """The meters of a session and its gateway, and their exposition.

    The object is made on the session's loop, where `run` samples. The app calls the other methods
    on its own loop, which may be in another thread.

    `models`: the served models; metrics show the first name of each model. `endpoints`: the paths
    of the route table. `compat`: "vllm" adds the metrics of vLLM.
    """

    def __init__(
        self,
        session: Session,
        *,
        models: Sequence[ModelCard],
        endpoints: Iterable[str],
        compat: Collection[str] = ("vllm",),
    ) -> None:
        super().__init__(endpoints)
        self._session = session
        self._models = tuple(models)
        self._is_vllm = "vllm" in compat
        self._thread, self._token = threading.get_ident(), anyio.lowlevel.current_token()
        self._window = Window(WINDOW_S)
        self._sample()
        self._observer = _observer(session, models)
        session.observers.append(self._observer)
        self._graph_lag = LoopLag(tick=self._sample)
        self._scrape = _Scrape()
        # A private registry: a program that embeds the gateway may have metrics of its own.
        self._registry = CollectorRegistry()
        self._registry.register(self._scrape)
        ProcessCollector(registry=self._registry)

    async def run(self) -> None:
        """Sample the lag of the session's loop and the operators' meters, until cancelled."""
        await self._graph_lag.run()

    async def exposition(
        self, accept: str = "", http: HttpMeters | None = None
    ) -> tuple[bytes, str]:
        """Return the text of /metrics and its content type.

        `http`: the summed HTTP meters of all gateway processes; the default is this process's.
        """
        encode, content_type = format_of(accept)
        shown = await self.snapshot()
        self._scrape.families = self.families(shown, http)
        return encode(self._registry), content_type

    async def snapshot(self) -> Snapshot:
        """Return a snapshot of the graph. May be called on any loop."""
        if threading.get_ident() == self._thread:  # the executor may be read in its thread only
            return self._take()
        cross = partial(anyio.from_thread.run_sync, self._take, token=self._token)
        return await anyio.to_thread.run_sync(cross)

    def _take(self) -> Snapshot:
        executor, supervisor = self._session.executor, self._session.supervisor
        reading, counts = executor.reading(), self._observer.snapshot()
        engines = read_engines(executor, supervisor.workers if supervisor else ())
        return Snapshot(
            graph=executor.plan.graph.name,
            models=self._read_models(counts, engines),
            counts=counts,
            reading=reading,
            shares=self._window.shares(reading),
            engines=engines,
            graph_lag=self._graph_lag.seconds.copy(),
            num_migrated=executor.core.recovery.num_migrated,
            migration_gaps=executor.core.recovery.gaps_s.copy(),
            shadows=read_shadows(executor.core),
            tallies=read_tallies(executor.core),
            scalings=read_scalings(executor, engines),
        )

    def _read_models(
        self, counts: Mapping[str, Counts], engines: tuple[EngineReading, ...]
    ) -> tuple[ModelReading, ...]:
        """Return one reading for each model."""
        # The ledger counts all open choices, probes too. It does not tell models apart, so several
        # models are counted by the observer, without probes.
        every = self._session.models
        if not every.is_several:
            num_open = self._session.executor.core.ledger.num_open
            return (ModelReading(self._models[0].id, num_open, engines),)
        return tuple(
            ModelReading(
                card.id,
                counts[card.id].num_open,
                tuple(engine for engine in engines if engine.name in model.served.engines),
            )
            for card, model in zip(self._models, every.all, strict=True)
        )

    def _sample(self) -> None:
        self._window.add(self._session.executor.reading())

    def families(self, shown: Snapshot, http: HttpMeters | None = None) -> Iterator[Metric]:
        """Yield all metric families: those of a snapshot, and those of HTTP calls."""
        if self._is_vllm:
            yield from vllm_families(shown)
        yield from graph_families(shown)
        lags = [("graph", shown.graph_lag)]
        http = http or self
        if self._is_vllm:
            yield from instrumentator_families(http)
        if http.app_lag.seconds.num_samples:
            lags.append(("app", http.app_lag.seconds))
        yield from http_families(http, lags)


def _observer(session: Session, models: Sequence[ModelCard]) -> RequestObserver:
    """Return the observer that counts the session's requests by model."""
    executor = session.executor
    facts = [engine.facts for engine in executor.all_engines]
    longest = max((each.max_model_len for each in facts), default=1)
    table = {"": models[0].id}
    for card in models:
        table |= dict.fromkeys((card.key or card.id, *card.names), card.id)
    own = {
        card.id: _measure(session, model)
        for card, model in zip(models, session.models.all, strict=True)
    }
    first = own[models[0].id]
    return RequestObserver(executor.now, table, lengths(longest), first.kv, first.slo_ttft_s, own)


def _measure(session: Session, model: Model) -> Measure:
    """Return the KV shape of a model's first engine, and the TTFT objective on its path."""
    executor = session.executor
    replicas = executor.engines.get(model.served.engines[0], ())
    kv = KVShape()
    if replicas:
        kv = KVShape(replicas[0].facts.shape, replicas[0].facts.kv_block_bytes)
    passed = model_operators(executor.plan.graph, model.key)
    objectives = [
        option_of(executor.plan, name, "slo_ttft_s")
        for name in executor.core.logic_graph.cells
        if name in passed
    ]
    return Measure(kv, next((each for each in objectives if each is not None), None))
