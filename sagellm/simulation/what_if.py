"""What other options would have done: the requests of a decision log, simulated twice."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sagellm.graphs.text.codec import from_msgpack
from sagellm.graphs.text.yaml import Document
from sagellm.load.traces import BLOCK_LEN, PlannedRequest
from sagellm.runtime.core.decision_log import DecisionReader
from sagellm.runtime.core.events import Arrived, Event
from sagellm.runtime.messages import ChoiceKey, Request
from sagellm.simulation.simulation_run import SimulatedRequest, SimulationPoint, simulate
from sagellm.tracing.critical_path import RequestPath, request_paths


@dataclass(frozen=True, slots=True)
class WhatIf:
    """One request in three runs: as the log has it, simulated as it was, and with other options."""

    path: RequestPath
    as_it_was: SimulatedRequest
    changed: SimulatedRequest

    @property
    def gain_s(self) -> float:
        """The end-to-end time that the other options save; negative: that they cost."""
        return self.as_it_was.e2e_s - self.changed.e2e_s


def what_if(
    reader: DecisionReader, overrides: Mapping[str, Any], profile: str = ""
) -> list[WhatIf]:
    """Simulate the requests of a log with the options of its graph, and with `overrides`.

    Only requests that ended in the log are played. Engines are models: `profile` names the profile
    of engines that compute. Raises LogError, GraphError, SimulationError.
    """
    requests: dict[ChoiceKey, Request] = {}
    paths = list(request_paths(_noting(reader, requests)))
    paths.sort(key=lambda path: path.arrived_s)
    workload = _workload(paths, requests)
    document = Document(from_msgpack(reader.header.graph), {})
    point = SimulationPoint(document, workload, profile=profile, seed=reader.header.seed)
    before = simulate(point).requests
    after = simulate(replace(point, overrides=overrides)).requests
    return [WhatIf(*three) for three in zip(paths, before, after, strict=True)]


def _noting(
    reader: DecisionReader, requests: dict[ChoiceKey, Request]
) -> Iterator[tuple[float, Event, bytes]]:
    """The events of a log; keeps each request that arrives."""
    for now, event, effects in reader:
        if isinstance(event, Arrived):
            requests.update((one.key, one) for one in event.requests)
        yield now, event, effects


def _workload(
    paths: Sequence[RequestPath], requests: Mapping[ChoiceKey, Request]
) -> list[PlannedRequest]:
    """The requests as a workload: an answer is as long as it was, a refused one as long as asked.

    Each choice of a request is a request of its own.
    """
    start_s = paths[0].arrived_s if paths else 0.0
    known: dict[bytes, int] = {}
    return [
        _planned(requests[path.request_id, path.choice], path, start_s, known) for path in paths
    ]


def _planned(
    request: Request, path: RequestPath, start_s: float, known: dict[bytes, int]
) -> PlannedRequest:
    return PlannedRequest(
        path.arrived_s - start_s,
        max(1, len(request.prompt_token_ids)),
        path.num_tokens or request.sampling.max_tokens,
        _block_ids(request, known),
        request.user_id,
        request.priority,
        request.slo_ttft_s,
        request.model,
        request.cost_budget,
    )


def _block_ids(request: Request, known: dict[bytes, int]) -> tuple[int, ...]:
    """An id for each whole block of the prompt: equal ids for equal tokens after equal tokens."""
    ids, digest, tokens = [], request.salt.encode(errors="surrogatepass"), request.prompt_token_ids
    for end in range(BLOCK_LEN, len(tokens) + 1, BLOCK_LEN):
        content = repr(tokens[end - BLOCK_LEN : end]).encode()
        digest = hashlib.blake2b(digest + content, digest_size=16).digest()
        ids.append(known.setdefault(digest, len(known)))
    return tuple(ids)
