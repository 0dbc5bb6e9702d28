"""GET /metrics of a served graph, on both servers: the scrape crosses from the app's loop."""

import pytest
import trio
from gateway_served import KEYS, SERVERS, ask, get, null_gateway, post
from prometheus_client.parser import text_string_to_metric_families as parse
from waiting import until

Found = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped(port: int, *headers: str) -> Found:
    reply = ask(port, get("/metrics", *headers))
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert reply.headers["cache-control"] == "no-store"
    samples = [one for family in parse(reply.body.decode()) for one in family.samples]
    return {(one.name, frozenset(one.labels.items())): one.value for one in samples}


def scraped_at_rest(port: int) -> Found:
    """The samples once all earlier calls have ended. A client may have the whole answer of a call
    before the server's task goes on from its last send and counts the call.
    """
    found: Found = {}

    def is_alone() -> bool:
        found.clear()
        found.update(scraped(port))
        return value(found, "sagellm_http_requests_active") == 1  # the scrape itself

    trio.run(until, is_alone)
    return found


def value(found: Found, name: str, **labels: str) -> float:
    return sum(
        number for (known, has), number in found.items() if known == name and labels.items() <= has
    )


@pytest.mark.parametrize("server", SERVERS)
def test_what_clients_did_is_counted(server: str) -> None:
    completion = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True}
    with null_gateway(server) as port:
        for stream in (False, True):
            assert (
                ask(port, post("/v1/completions", {**completion, "stream": stream})).status == 200
            )
        assert ask(port, post("/v1/completions", {**completion, "model": "x"})).status == 404
        assert ask(port, get("/no/such/path")).status == 404
        found = scraped_at_rest(port)
    assert value(found, "vllm:request_success_total", finished_reason="length") == 2
    assert value(found, "vllm:generation_tokens_total", model_name="m") == 10
    assert value(found, "vllm:prompt_tokens_total", model_name="m") == 6
    responses = "sagellm_http_responses_total"
    assert value(found, responses, endpoint="/v1/completions", status_code="200") == 2
    assert value(found, responses, endpoint="/v1/completions", status_code="404") == 1
    assert value(found, responses, endpoint="unknown", status_code="404") == 1
    ok = {"handler": "/v1/completions", "method": "POST", "status": "2xx"}
    assert value(found, "http_requests_total", **ok) == 2
    assert value(found, "http_requests_total", handler="none", status="4xx") == 1
    assert value(found, "http_request_duration_seconds_count", handler="/v1/completions") == 3
    assert value(found, "http_request_duration_highr_seconds_count") == 4
    assert value(found, "vllm:request_num_preemptions_count") == 2
    assert value(found, "sagellm_http_requests_active") == 1  # this scrape
    assert value(found, "sagellm_operator_in_total", operator="generate") >= 2  # and the probes


@pytest.mark.parametrize("is_open", [True, False])
def test_it_needs_the_key_unless_it_is_open(is_open: bool) -> None:
    with null_gateway("hypercorn", open_metrics=is_open, **KEYS) as port:
        assert ask(port, get("/metrics")).status == (200 if is_open else 401)
        assert scraped(port, "Authorization: Bearer user-key")
