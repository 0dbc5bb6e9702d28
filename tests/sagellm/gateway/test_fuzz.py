"""Calls that the OpenAPI document allows, or forbids: none breaks the gateway, or its word.

Rounds draw new calls for every operation, from seeds that count on: the first rounds are the same
in every run. SAGELLM_FUZZ_S says for how many seconds rounds are begun; else there is one.
"""

import json
import os
import time
from collections.abc import Iterator
from itertools import count

import pytest
import requests
import schemathesis
from gateway_process import ServedProcess, served_process
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    ignored_auth,
    response_schema_conformance,
    status_code_conformance,
)

FUZZ_S = float(os.environ.get("SAGELLM_FUZZ_S", "0"))
NUM_CALLS = 6  # of one operation and mode in one round
TIMEOUT_S = 20.0
USER, ADMIN = "user-key", "admin-key"
AUTH = st.sampled_from([{"Authorization": f"Bearer {key}"} for key in (USER, ADMIN)])
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance, ignored_auth]
# A call may ask for a first token, or its end, sooner than can be: 503 and 504 say so.
EXPECTED = {"checks": {"not_a_server_error": {"expected-statuses": ["2xx", "4xx", 503, 504]}}}
OPTIONS = ("--max-model-len", "32", "--admin-key", ADMIN, "--set", "admission.max_queued=65536")

pytestmark = pytest.mark.timeout(FUZZ_S + 120)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProcess]:
    """Contexts are short: 16 choices of 128 prompts take their time even without a model."""
    folder = str(tmp_path_factory.mktemp("data"))
    with served_process(*OPTIONS, "--data-dir", folder, key=USER) as served:
        yield served


@pytest.fixture(scope="module")
def schema(gateway: ServedProcess) -> schemathesis.BaseSchema:
    document = json.loads(gateway.get("/openapi.json"))
    config = SchemathesisConfig.from_dict(EXPECTED)
    return schemathesis.openapi.from_dict(document, config=config)


def explore(
    operation: schemathesis.APIOperation,
    mode: GenerationMode,
    number: int,
    gateway: ServedProcess,
    session: requests.Session,
) -> None:
    """The calls of one round, mode and operation."""

    @seed(number)
    @settings(
        max_examples=NUM_CALLS,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode), headers=AUTH)
    def holds(case: schemathesis.Case, headers: dict[str, str]) -> None:
        case.call_and_validate(
            base_url=gateway.url,
            session=session,
            headers=headers,
            checks=CHECKS,
            timeout=TIMEOUT_S,
        )

    holds()


def modes_of(operation: schemathesis.APIOperation) -> list[GenerationMode]:
    """Where nothing can be given, nothing can be wrong."""
    has_input = operation.body or operation.path_parameters
    return list(GenerationMode) if has_input else [GenerationMode.POSITIVE]


def test_no_call_breaks_the_gateway_or_its_word(
    gateway: ServedProcess, schema: schemathesis.BaseSchema
) -> None:
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 15
    until = time.monotonic() + FUZZ_S
    with requests.Session() as session:
        for number in count():
            for operation in operations:
                for mode in modes_of(operation):
                    explore(operation, mode, number, gateway, session)
            assert gateway.complete()["usage"]["completion_tokens"] == 2
            if time.monotonic() > until:
                break
    metrics = gateway.metrics()
    assert metrics["sagellm_requests_open"] == 0
    num_available = sum(metrics[f"sagellm_engine_kv_{kind}_blocks"] for kind in ("free", "cached"))
    assert num_available == metrics["sagellm_engine_kv_blocks"]
    print(number + 1, "rounds;", statuses(metrics))


def statuses(metrics: dict[str, float]) -> dict[str, int]:
    """How many calls were answered with each status."""
    found: dict[str, int] = {}
    for name, value in metrics.items():
        if name.startswith("sagellm_http_responses_total{"):
            status = name.rpartition('status_code="')[2].partition('"')[0]
            found[status] = found.get(status, 0) + int(value)
    return found
