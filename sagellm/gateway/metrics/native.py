"""The metrics sagellm_*: of operators, edges, engines, phases of requests, and HTTP calls."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import Metric

from sagellm.gateway.metrics.meters import BatchMeters, Counts, HttpMeters
from sagellm.gateway.metrics.snapshot import (
    EngineReading,
    Labels,
    Snapshot,
    counter,
    gauge,
    histogram,
)
from sagellm.runtime.containers import Buckets
from sagellm.runtime.core.experiments import ARM, ExperimentTally
from sagellm.runtime.executors.reading import OperatorReading, Shares

# Each table maps the end of a metric's name to the metric's help text and its value.
_TOTALS: dict[str, tuple[str, Callable[[OperatorReading], float]]] = {
    "in": ("Items that an operator was given.", lambda one: one.num_in),
    "out": ("Items that it sent, the last events of refusals too.", lambda one: one.num_out),
    "errors": ("Items that failed in it.", lambda one: one.num_errors),
    "process_seconds": ("Time in its calls, which may overlap.", lambda one: one.process_s),
    "busy_seconds": ("Time with something to do.", lambda one: one.busy_s),
    "backpressured_seconds": ("Time waiting for credit.", lambda one: one.backpressured_s),
}
_LEVELS: dict[str, tuple[str, Callable[[OperatorReading], float]]] = {
    "inflight": ("Items that it holds.", lambda one: one.num_in_flight),
    "queue_depth": ("Items that wait in it or before it.", lambda one: one.queue_depth),
}
_SHARES: dict[str, tuple[str, Callable[[Shares], float]]] = {
    "busy_ratio": ("Share of the last seconds with something to do.", lambda one: one.busy),
    "idle_ratio": ("Share of the last seconds without.", lambda one: one.idle),
    "backpressured_ratio": (
        "Share of the last seconds waiting for credit.",
        lambda one: one.backpressured,
    ),
}
_ENGINE_LEVELS: dict[str, tuple[str, Callable[[EngineReading], float]]] = {
    "running": ("Sequences that it computes.", lambda engine: engine.load.num_running),
    "waiting": ("Sequences that wait in it.", lambda engine: engine.load.num_waiting),
    "kv_usage_ratio": ("Share of its blocks that is leased.", lambda engine: engine.kv_usage),
    "kv_blocks": ("Blocks of its pool.", lambda engine: engine.load.num_blocks),
    "kv_free_blocks": ("Blocks that hold nothing.", lambda engine: engine.load.num_free_blocks),
    "kv_cached_blocks": (
        "Blocks of no sequence, kept for their prefix.",
        lambda engine: engine.load.num_cached_blocks,
    ),
    "known_prefix_blocks": ("Of its prefixes, known to routers.", lambda e: e.num_known_blocks),
    "step_p99_seconds": ("Of its steps, so far.", lambda engine: engine.health.step_p99_s or 0.0),
    "up": ("0 where its worker is missing.", lambda engine: engine.is_up),
    "ejected": ("1 while no request is placed there.", lambda engine: engine.is_ejected),
    "failing": ("1 where its workers die too often.", lambda engine: engine.is_failing),
    "hung": ("1 where it has work and nothing moves.", lambda engine: engine.health.is_hung),
}
_ENGINE_TOTALS: dict[str, tuple[str, Callable[[EngineReading], float]]] = {
    "restarts": ("Workers that took the place of another.", lambda engine: engine.num_restarts),
    "ejections": ("Times that its transfers failed too often.", lambda e: e.num_ejections),
    "steps": ("Steps that it ran.", lambda engine: engine.load.num_steps),
    "preemptions": ("Sequences that it put back.", lambda engine: engine.load.num_preemptions),
    "prefix_queried_tokens": ("Looked up in its cache.", lambda e: e.load.num_prefix_queries),
    "prefix_hit_tokens": ("Found in its cache.", lambda e: e.load.num_prefix_hits),
    "kv_evicted_blocks": ("Cached, then reused.", lambda e: e.load.num_evicted_blocks),
    "kv_early_blocks": (
        "Received before their prompt was whole.",
        lambda e: e.load.num_early_blocks,
    ),
    "kv_checksum_failures": ("Chunks that came damaged.", lambda e: e.load.num_damaged_chunks),
}
_COUNTED: dict[str, tuple[str, Callable[[Counts], float]]] = {
    "requests_accepted": ("Choices let in.", lambda counts: counts.num_accepted),
    "prompt_tokens": ("Prompt tokens prefilled.", lambda counts: counts.prompt_tokens),
    "generation_tokens": ("Tokens delivered.", lambda counts: counts.generation_tokens),
    "goodput_tokens": ("Tokens of answers in time.", lambda counts: counts.goodput_tokens),
    "kv_transfer_bytes": ("Bytes moved between pools.", lambda counts: counts.kv_transfer_bytes),
}


def graph_families(shown: Snapshot) -> Iterator[Metric]:
    """Yield the metric families of the graph: operators, engines and requests."""
    yield from _operators(shown)
    yield from _engines(shown)
    yield from _requests(shown)
    if shown.shadows:
        yield from _shadows(shown)
    if any(one.kind == ARM for one in shown.tallies):
        yield from _arms(shown)
    if shown.scalings:
        yield from _scalings(shown)


def _shadows(shown: Snapshot) -> Iterator[Metric]:
    """Yield what shadows would have decided otherwise, and what became of these requests."""
    places = [
        ({"graph": shown.graph, "operator": one.node, "kind": one.kind}, one)
        for one in shown.shadows
    ]
    compared = [(labels, one.num_decisions) for labels, one in places]
    yield counter("sagellm_shadow_decisions", "Decisions compared with a shadow's.", compared)
    off = [(labels, float(one.is_off)) for labels, one in places]
    yield gauge("sagellm_shadow_off", "1 after an error of the shadow.", off)
    tallies = [
        ({"graph": shown.graph, "operator": one.node, "kind": one.kind, "label": one.label}, one)
        for one in shown.tallies
        if one.kind != ARM
    ]
    differ = [(labels, one.num_notes) for labels, one in tallies]
    yield counter(
        "sagellm_shadow_disagreements", "Decisions of which the shadow's differs.", differ
    )
    predicted = [(labels, one.num_predicted) for labels, one in tallies]
    yield counter("sagellm_shadow_predictions", "Of these, both of which predicted.", predicted)
    gains = [(labels, one.gain_s) for labels, one in tallies]
    yield gauge("sagellm_shadow_gain_seconds", "Predicted TTFT saved, in all.", gains)
    tokens = [(labels, float(one.gain_tokens)) for labels, one in tallies]
    yield gauge("sagellm_shadow_gain_cached_tokens", "Tokens found in caches, in all.", tokens)
    yield counter("sagellm_shadow_outcomes", "Of requests decided otherwise.", _outcomes(tallies))


def _outcomes(
    tallies: Iterable[tuple[Labels, ExperimentTally]],
) -> Iterator[tuple[Labels, float]]:
    for labels, one in tallies:
        for outcome, number in one.outcomes.items():
            yield {**labels, "outcome": outcome}, number


def _arms(shown: Snapshot) -> Iterator[Metric]:
    """Yield the counts and latencies of each arm of an A/B test."""
    arms: list[tuple[Labels, ExperimentTally]] = [
        ({"graph": shown.graph, "operator": one.node, "arm": one.label}, one)
        for one in shown.tallies
        if one.kind == ARM
    ]
    assigned = [(labels, one.num_notes) for labels, one in arms]
    yield counter("sagellm_arm_requests", "Choices assigned to an arm.", assigned)
    yield counter("sagellm_arm_outcomes", "Of their first tokens.", _outcomes(arms))
    ended = [
        ({**labels, "finish_reason": reason}, number)
        for labels, one in arms
        for reason, number in one.ended.items()
    ]
    yield counter("sagellm_arm_ended", "Choices of an arm that ended, by reason.", ended)
    first = [(labels, one.ttft_s) for labels, one in arms]
    yield histogram("sagellm_arm_time_to_first_token_seconds", "By arm.", first)
    whole = [(labels, one.e2e_s) for labels, one in arms]
    yield histogram("sagellm_arm_e2e_seconds", "Of served choices, by arm.", whole)


def _operators(shown: Snapshot) -> Iterator[Metric]:
    operators = shown.reading.operators
    for name, (documentation, of) in _TOTALS.items():
        values = [(_place(shown, one), of(one)) for one in operators]
        yield counter(f"sagellm_operator_{name}", documentation, values)
    for name, (documentation, of) in _LEVELS.items():
        values = [(_place(shown, one), of(one)) for one in operators]
        yield gauge(f"sagellm_operator_{name}", documentation, values)
    bounded = [
        (_place(shown, one), one.queue_capacity)
        for one in operators
        if one.queue_capacity is not None
    ]
    yield gauge("sagellm_operator_queue_capacity", "How much may wait or be held.", bounded)
    for name, (documentation, share) in _SHARES.items():
        spent = [
            (_place(shown, one), share(shown.shares[one.node, one.replica])) for one in operators
        ]
        yield gauge(f"sagellm_operator_{name}", documentation, spent)
    yield counter("sagellm_edge_items", "Items that passed an edge.", _edges(shown))


def _place(shown: Snapshot, one: OperatorReading) -> Labels:
    """Return the labels of an operator's replica."""
    # `replica` and not `instance`: Prometheus reserves the label `instance`.
    return {
        "graph": shown.graph,
        "operator": one.node,
        "op": one.op,
        "replica": str(one.replica),
    }


def _edges(shown: Snapshot) -> Iterator[tuple[Labels, float]]:
    for edge in shown.reading.edges:
        ends = {"source": edge.source, "outlet": edge.outlet, "target": edge.target}
        yield {"graph": shown.graph, **ends}, edge.num_items


def _engines(shown: Snapshot) -> Iterator[Metric]:
    for name, (documentation, of) in _ENGINE_LEVELS.items():
        values = [(_engine(shown, one), of(one)) for one in shown.engines]
        yield gauge(f"sagellm_engine_{name}", documentation, values)
    for name, (documentation, of) in _ENGINE_TOTALS.items():
        values = [(_engine(shown, one), of(one)) for one in shown.engines]
        yield counter(f"sagellm_engine_{name}", documentation, values)
    deaths = [
        ({**_engine(shown, one), "blame": blame}, number)
        for one in shown.engines
        for blame, number in one.deaths.items()
    ]
    yield counter("sagellm_engine_deaths", "Workers that died, by what is to blame.", deaths)


def _scalings(shown: Snapshot) -> Iterator[Metric]:
    scalings = [({"graph": shown.graph, "engine": one.engine}, one) for one in shown.scalings]
    wanted = [(labels, one.num_wanted) for labels, one in scalings]
    yield gauge("sagellm_autoscale_wanted_replicas", "As the operator decided last.", wanted)
    ready = [(labels, one.num_ready) for labels, one in scalings]
    yield gauge("sagellm_autoscale_ready_replicas", "Replicas that are up.", ready)
    changes = [
        ({**labels, "reason": reason}, number)
        for labels, one in scalings
        for reason, number in one.changes.items()
    ]
    yield counter("sagellm_autoscale_changes", "Changes of their number, by reason.", changes)
    failed = [(labels, one.num_failed) for labels, one in scalings]
    yield counter("sagellm_autoscale_failures", "Changes that failed.", failed)


def _engine(shown: Snapshot, one: EngineReading) -> Labels:
    return {"graph": shown.graph, "engine": one.name, "replica": str(one.replica)}


def _requests(shown: Snapshot) -> Iterator[Metric]:
    by_model = shown.counts.items()
    for name, (documentation, of) in _COUNTED.items():
        values = [({"model_name": model}, of(counts)) for model, counts in by_model]
        yield counter(f"sagellm_{name}", documentation, values)
    yield counter("sagellm_requests", "Choices that ended, by reason.", _ended(shown))
    yield counter("sagellm_admission_rejections", "Requests refused.", _rejections(shown))
    opened = [({"model_name": model.name}, model.num_open) for model in shown.models]
    yield gauge("sagellm_requests_open", "Choices under way.", opened)
    yield histogram("sagellm_request_phase_seconds", "Time of each phase.", _phases(shown))
    transfers = [({"model_name": model}, counts.kv_transfer) for model, counts in by_model]
    yield histogram("sagellm_kv_transfer_seconds", "From prefill to decode.", transfers)
    migrated = [({"graph": shown.graph}, shown.num_migrated)]
    yield counter("sagellm_migrations", "Requests that went in again, engines lost.", migrated)
    gaps = [({"graph": shown.graph}, shown.migration_gaps)]
    yield histogram("sagellm_migration_gap_seconds", "From a loss to the next token.", gaps)
    failed = sum(one.num_errors for one in shown.reading.operators if one.op == "kv_transfer")
    failures = [({"graph": shown.graph}, failed)]
    yield counter("sagellm_kv_transfer_failures", "Transfers that failed.", failures)


def _ended(shown: Snapshot) -> Iterator[tuple[Labels, float]]:
    for model, counts in shown.counts.items():
        for reason, number in counts.ended.items():
            yield {"model_name": model, "finish_reason": reason}, number


def _rejections(shown: Snapshot) -> Iterator[tuple[Labels, float]]:
    for model, counts in shown.counts.items():
        for (code, priority), number in counts.rejected.items():
            yield {"model_name": model, "reason": code, "class": priority}, number


def _phases(shown: Snapshot) -> Iterator[tuple[Labels, Buckets]]:
    for model, counts in shown.counts.items():
        for phase, seconds in counts.phases.items():
            yield {"model_name": model, "phase": phase}, seconds


def http_families(http: HttpMeters, lags: Iterable[tuple[str, Buckets]]) -> Iterator[Metric]:
    """Yield the metric families of HTTP calls. `lags`: pairs of a loop's name and its lag."""
    yield counter(
        "sagellm_http_requests",
        "Calls that came in.",
        [(call._asdict(), number) for call, number in http.requests.items()],
    )
    yield counter(
        "sagellm_http_responses",
        "Calls that ended, 499 where the client went first.",
        [
            ({**call._asdict(), "status_code": str(status)}, number)
            for (call, status), number in http.responses.items()
        ],
    )
    yield gauge("sagellm_http_requests_active", "Calls under way.", [({}, http.num_active)])
    seconds = [(call._asdict(), taken) for call, taken in http.seconds.items()]
    yield histogram("sagellm_http_request_seconds", "Time of whole calls.", seconds)
    gone: list[tuple[Labels, float]] = [({}, http.num_disconnects)]
    yield counter("sagellm_client_disconnects", "Clients that left before the end.", gone)
    dropped: list[tuple[Labels, float]] = [({}, http.num_dropped_lines)]
    yield counter("sagellm_log_lines_dropped", "That stderr did not take.", dropped)
    yield from _batches(http.batches)
    late = [({"loop": loop}, lag) for loop, lag in lags]
    yield histogram("sagellm_event_loop_lag_seconds", "How late sleepers are woken.", late)


def _batches(batches: BatchMeters) -> Iterator[Metric]:
    working: list[tuple[Labels, float]] = [({}, batches.num_working)]
    yield gauge("sagellm_batches_working", "Batches that have not ended.", working)
    ended = [({"status": status}, number) for status, number in batches.batches.items()]
    yield counter("sagellm_batches", "Batches that ended, by status.", ended)
    requests = [({"outcome": outcome}, number) for outcome, number in batches.requests.items()]
    yield counter("sagellm_batch_requests", "Requests of batches, by outcome.", requests)
