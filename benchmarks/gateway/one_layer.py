"""The gateway and llama.cpp's own HTTP server, both with the same model of one layer.

A server of llama.cpp cannot run without a model. These figures therefore include a model: with the
same weights, in the same run, computed by one thread, greedy, without waits.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gateway.runs import CHUNKS, Figures, Load, median_of, run_once
from benchmarks.peers.models import gguf_file
from benchmarks.shape import ONE_LAYER
from benchmarks.weights import model_folder

GRAPH = Path(__file__).parent / "one_layer.yaml"
LLAMA = "llama-server"
LOAD = Load("stream", stream=True, temperature=0.0)
CONTEXT = 256  # tokens of a slot; a request has 3 tokens in and 64 out


def measure(
    llama_server: Path, servers: Sequence[str], connections: int, seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """A row for each server: medians of rounds in turns, with ratios to llama-server."""
    commands = {
        LLAMA: partial(_llama_command, llama_server, gguf_file(ONE_LAYER), connections),
        **{name: partial(_our_command, name, model_folder(ONE_LAYER)) for name in servers},
    }
    runs: dict[str, list[Figures]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, found in runs.items():
            ready = "/health" if name == LLAMA else "/ready"
            found.append(run_once(commands[name], LOAD, connections, seconds, ready))
            print(f"one layer {name}: {found[-1]}", file=sys.stderr)
    return rows({name: median_of(found) for name, found in runs.items()})


def rows(medians: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The medians of each server, and its cost as a multiple of llama-server's cost."""
    peer = medians[LLAMA]
    return [
        {
            "server": name,
            "model": "one-layer model included",
            **found,
            "ratio_of_request": round(found["cpu_us_per_request"] / peer["cpu_us_per_request"], 2),
            "ratio_of_event": round(found["cpu_us_per_event"] / peer["cpu_us_per_event"], 2),
        }
        for name, found in medians.items()
    ]


def _our_command(server: str, model: Path, port: int) -> Sequence[str]:
    options = ["--model", str(model), "--port", str(port), "--server", server]
    options += ["--served-model-name", "null", "--log-level", "warning"]
    return [sys.executable, "-m", "sagellm", "serve", str(GRAPH), *options]


def _llama_command(binary: Path, model: Path, slots: int, port: int) -> Sequence[str]:
    options = ["--port", str(port), "--parallel", str(slots), "--ctx-size", str(slots * CONTEXT)]
    options += ["--threads", "1", "--no-kv-unified", "--cache-ram", "0", "--log-disable"]
    return [str(binary), "--model", str(model), *options]


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        f"Streams of {CHUNKS} tokens, one-layer model included:",
        "",
        "| server | CPU us a request | CPU us an event | request / llama-server | "
        "event / llama-server | events per s | p99 ms |",
        "|---|---|---|---|---|---|---|",
    ]
    names = ("server", "cpu_us_per_request", "cpu_us_per_event", "ratio_of_request")
    for row in found:
        figures = [row[name] for name in (*names, "ratio_of_event", "events_per_s", "p99_ms")]
        lines.append(f"| {' | '.join(map(str, figures))} |")
    return "\n".join(lines)
