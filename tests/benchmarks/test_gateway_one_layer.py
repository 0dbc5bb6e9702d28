from typing import Any

from benchmarks.gateway.one_layer import LLAMA, rows, table


def medians(request_us: float, event_us: float) -> dict[str, Any]:
    costs = {"cpu_us_per_request": request_us, "cpu_us_per_event": event_us}
    return {**costs, "requests_per_s": 10.0, "events_per_s": 660.0, "p50_ms": 1.0, "p99_ms": 2.0}


def test_ratios_are_to_llama_server_and_the_model_is_named() -> None:
    peer, ours = rows({LLAMA: medians(1000.0, 20.0), "uvicorn": medians(1500.0, 10.0)})
    assert (peer["ratio_of_request"], ours["ratio_of_request"], ours["ratio_of_event"]) == (
        1,
        1.5,
        0.5,
    )
    assert ours["model"] == "one-layer model included"
    shown = table([peer, ours])
    assert "one-layer model included" in shown
    assert "| uvicorn | 1500.0 | 10.0 | 1.5 | 0.5 | 660.0 | 2.0 |" in shown.splitlines()
