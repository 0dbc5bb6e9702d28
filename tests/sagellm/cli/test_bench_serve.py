import csv
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_server import MODEL, Call, Server, error, scripted, telling, text

from sagellm.cli import main

GOOD = telling("a", "b", "c")


def bench(server: Server, *options: str) -> int:
    return main(["bench", "serve", "--url", server.url, *options])


def test_a_closed_loop_says_what_came(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(GOOD) as server:
        assert bench(server, "--num-requests", "6", "--concurrency", "2", "--slo-ttft", "60") == 0
    said = capsys.readouterr().out
    assert "6 served, 0 failed" in said
    assert "18 in, 18 out" in said
    assert "100.0% of requests" in said
    assert "TTFT" in said
    assert "p99" in said
    assert len(server.asked) == 7  # one of them warms up


def test_what_is_asked_is_what_the_options_say() -> None:
    options = ("--num-requests", "1", "--warmup", "0", "--input-len", "9", "--output-len", "4")
    with scripted(GOOD) as server:
        bench(server, *options, "--vocab-size", "5")
    (asked,) = server.asked
    assert len(asked["prompt"]) == 9
    assert max(asked["prompt"]) < 5
    assert (asked["max_tokens"], asked["ignore_eos"], asked["temperature"]) == (4, True, 0.0)


def test_a_chat_is_asked_in_words() -> None:
    options = ("--num-requests", "1", "--warmup", "0", "--input-len", "9", "--stop-at-eos")
    with scripted(GOOD) as server:
        bench(server, *options, "--endpoint", "chat")
    (asked,) = server.asked
    assert len(asked["messages"][0]["content"].split()) == 9
    assert "ignore_eos" not in asked


def test_equal_seeds_ask_the_same() -> None:
    def prompts(seed: str) -> list[Any]:
        options = ("--num-requests", "4", "--warmup", "0", "--spread", "0.5", "--concurrency", "1")
        with scripted(GOOD) as server:
            bench(server, *options, "--seed", seed)
        return [asked["prompt"] for asked in server.asked]

    assert prompts("1") == prompts("1") != prompts("2")


def test_an_open_loop_says_offered_and_reached_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(GOOD) as server:
        assert bench(server, "--rate", "200", "--num-requests", "20", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["num_ok"] == 20
    assert said["offered_per_s"] == pytest.approx(200, rel=0.8)
    assert said["reached_per_s"] > 0
    assert said["lag_s"]["p50"] < 1


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    line = '{{"timestamp": {0}, "input_length": {1}, "output_length": 9, "hash_ids": [1, {2}]}}\n'
    trace.write_text(line.format(0, 700, 2) + line.format(1000, 1000, 3))
    options = ("--speedup", "100", "--max-input-len", "600", "--max-output-len", "5")
    with scripted(GOOD) as server:
        assert bench(server, "--trace", str(trace), *options, "--warmup", "0") == 0
    first, second = (asked["prompt"] for asked in server.asked)
    assert len(first) == len(second) == 600
    assert first[:512] == second[:512]
    assert first != second
    assert [asked["max_tokens"] for asked in server.asked] == [5, 5]


def test_a_synthetic_workload_is_sent() -> None:
    text = "synthetic:arrivals=constant,rate=100,requests=12,input=100,output=40,users=ann"
    options = ("--window", ":0.1", "--every", "5", "--repeat", "2", "--scale-input-len", "0.1")
    with scripted(GOOD) as server:
        lengths = ("--scale-output-len", "0.5", "--warmup", "0")
        assert bench(server, "--trace", text, *options, *lengths) == 0
    assert len(server.asked) == 4
    assert {len(asked["prompt"]) for asked in server.asked} == {10}
    assert {(asked["max_tokens"], asked["user"]) for asked in server.asked} == {(20, "ann")}


def test_results_are_a_trace(tmp_path: Path) -> None:
    options = ("--num-requests", "3", "--warmup", "0")
    with scripted(GOOD) as server:
        assert bench(server, *options, "--output", str(tmp_path), "--output-len", "7") == 0
        again = str(tmp_path / "requests.csv")
        assert bench(server, "--trace", again, "--warmup", "0") == 0
    assert [asked["max_tokens"] for asked in server.asked] == [7] * 6


def test_results_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    options = ("--num-requests", "3", "--output", str(folder), "--plot", "--slo-itl", "1")
    with scripted(GOOD) as server:
        assert bench(server, *options, "--api-key", "secret") == 0
        assert bench(server, *options) == 2
        assert "the folder holds results" in capsys.readouterr().err
        assert bench(server, *options, "--force") == 0
    whole = json.loads((folder / "bench.json").read_text())
    assert (whole["settings"]["model"], whole["settings"]["num_requests"]) == (MODEL, 3)
    assert len(whole["requests"]) == whole["summary"]["num_ok"] == 3
    assert len(whole["requests"][0]["itl_s"]) == 2
    assert "secret" not in (folder / "bench.json").read_text()
    with (folder / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["0", "1", "2"]
    assert float(rows[0]["ttft_s"]) == whole["requests"][0]["ttft_s"]
    assert (folder / "cdf.png").read_bytes().startswith(b"\x89PNG")
    wrote = f"wrote bench.json, requests.csv, cdf.png to {folder}"
    assert wrote in capsys.readouterr().err


KEPT_LOADS = {
    "closed": (
        [],
        {"concurrency": 8, "num_requests": 2, "input_len": 128, "output_len": 64, "spread": 0.0},
    ),
    "open": (["--rate", "500"], {"rate": 500.0, "concurrency": None, "vocab_size": 256}),
    "chat": (["--endpoint", "chat"], {"prompts": "words", "vocab_size": None}),
    "given": (["--input-len", "9", "--spread", "0.5"], {"input_len": 9, "spread": 0.5}),
}


@pytest.mark.parametrize(("options", "held"), KEPT_LOADS.values(), ids=KEPT_LOADS)
def test_the_settings_that_are_kept_are_those_that_held(
    options: list[str], held: dict[str, object], tmp_path: Path
) -> None:
    with scripted(GOOD) as server:
        assert bench(server, "--num-requests", "2", "--output", str(tmp_path), *options) == 0
    kept = json.loads((tmp_path / "bench.json").read_text())["settings"]
    assert held.items() <= kept.items()


def test_a_trace_has_lengths_of_its_own(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 3, "output_length": 2}\n')
    with scripted(GOOD) as server:
        bench(server, "--trace", str(trace), "--output", str(tmp_path))
    kept = json.loads((tmp_path / "bench.json").read_text())["settings"]
    assert (kept["input_len"], kept["speedup"], kept["trace"]) == (None, 1.0, str(trace))
    assert (kept["every"], kept["scale_input_len"], kept["window"]) == (1, 1.0, None)
    assert "replay" not in kept


def test_failures_are_counted_and_are_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[Call] = []

    async def moody(call: Call) -> None:
        calls.append(call)
        if len(calls) == 2:
            return await call.whole(error("full", 429), 429)
        if len(calls) == 3:
            await call.events(text("a"))
            return await call.cut()
        await GOOD(call)

    with scripted(moody) as server:
        assert bench(server, "--num-requests", "4", "--concurrency", "1", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["errors"] == {"http_429": 1, "cut_off": 1}
    assert (said["num_ok"], said["num_refusals"], said["num_retries"]) == (2, 1, 0)


def test_a_refusal_is_tried_again_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    refused: list[Call] = []

    async def full_once(call: Call) -> None:
        if not refused:
            refused.append(call)
            return await call.whole(error("full", 503), 503, Retry_After="0")
        await GOOD(call)

    options = ("--num-requests", "1", "--warmup", "0", "--retries", "1")
    with scripted(full_once) as server:
        assert bench(server, *options) == 0
    assert "1, 1 tried again" in capsys.readouterr().out


def test_a_server_without_usage_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    async def terse(call: Call) -> None:
        await call.events(text("a"), text("b", "stop"))
        await call.done()

    with scripted(terse) as server:
        bench(server, "--num-requests", "2")
    assert "tells no usage" in capsys.readouterr().out


def test_a_warm_up_that_fails_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    async def strict(call: Call) -> None:
        await call.whole(error("ignore_eos: unknown field", 400), 400)

    with scripted(strict) as server:
        assert bench(server, "--num-requests", "5") == 1
    said = capsys.readouterr().err
    assert "ignore_eos: unknown field" in said
    assert "--stop-at-eos" in said
    assert len(server.asked) == 1


LONG = "prompt: has 4000 tokens; this model's maximum context length is 2048 tokens"
VLLM_LONG = "This model's maximum context length is 2048 tokens. However, you requested 4064"
WARM_UPS = {
    "ours": (400, {"message": LONG, "code": "context_length_exceeded"}, "lower --input-len or"),
    "vLLM's": (400, {"message": VLLM_LONG, "code": 400}, "lower --input-len or --output-len"),
    "OpenAI's": (400, {"message": "Unrecognized argument: ignore_eos"}, "add --stop-at-eos"),
    "another": (400, {"message": "temperature: 0 to 100"}, "change the option that the server"),
    "a key": (401, {"message": "a valid API key is needed"}, "give --api-key"),
    "full": (503, {"message": "overloaded"}, "--retries"),
    "broken": (500, {"message": "internal error"}, "look at the server"),
}


@pytest.mark.parametrize(("status", "body", "fix"), WARM_UPS.values(), ids=WARM_UPS)
def test_a_warm_up_that_fails_says_what_to_change(
    status: int, body: dict[str, object], fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def strict(call: Call) -> None:
        await call.whole({"error": body}, status)

    with scripted(strict) as server:
        assert bench(server, "--input-len", "4000") == 1
    shown = capsys.readouterr().err
    assert fix in shown
    assert ("--stop-at-eos" in shown) == ("ignore_eos" in str(body))


def test_ctrl_c_ends_it_with_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[Call] = []

    async def interrupting(call: Call) -> None:
        calls.append(call)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        await GOOD(call)

    with scripted(interrupting) as server:
        assert bench(server, "--duration", "600", "--concurrency", "1", "--warmup", "0") == 130
    shown = capsys.readouterr()
    assert "sending no more" in shown.err
    assert "0 failed" in shown.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rate", "1", "--concurrency", "2"], "contradict"),
        (["--rate", "1", "--trace", "t.csv"], "contradict"),
        (["--speedup", "2"], "--speedup is of a trace"),
        (["--max-input-len", "2"], "--max-input-len clips a trace"),
        (["--window", "1:2"], "--window is of a trace"),
        (["--scale-output-len", "2"], "--scale-output-len scales a trace"),
        (["--every", "2"], "--every samples a trace"),
        (["--repeat", "2"], "--repeat repeats a trace"),
        (["--trace", "synthetic:", "--window", "5"], "--window 5 is no window"),
        (["--trace", "synthetic:", "--window", "5:2"], "--window 5:2 is no window"),
        (["--trace", "synthetic:", "--window", "a:2"], "--window a:2 is no window"),
        (["--trace", "synthetic:", "--window", "1e9:"], "--window holds no request"),
        (["--trace", "synthetic:rat=2"], "did you mean rate"),
        (["--trace", "synthetic:input=empirical:nowhere.csv"], "no such file"),
        (["--trace", "t.csv", "--input-len", "2"], "--input-len contradicts --trace"),
        (["--endpoint", "chat", "--prompts", "ids"], "no token ids"),
        (["--prompts", "words", "--vocab-size", "9"], "--vocab-size is of token ids"),
        (["--plot"], "--plot needs a folder"),
        (["--force"], "--force needs a folder"),
        (["--rate", "0"], "Must be > 0"),
        (["--trace", "nowhere.csv"], "no such file"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_trace_that_is_none_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("a,b\n")
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9", "--trace", str(trace)]) == 2
    assert "no column TIMESTAMP" in capsys.readouterr().err


def test_without_matplotlib_a_plot_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "sagellm.load.plots", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with scripted(GOOD) as server:
        assert bench(server, "--plot", "--output", str(tmp_path)) == 3
    shown = capsys.readouterr().err
    assert f"{sys.executable} -m pip install matplotlib" in shown  # the pip of this environment
    assert "leave --plot out" in shown
    assert server.calls == []


def test_results_are_kept_though_the_reader_of_stdout_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("sagellm.cli.bench._print_load_summary", left)
    monkeypatch.setattr("sagellm.cli.show_failure", lambda failure: None)
    with scripted(GOOD) as server:
        bench(server, "--num-requests", "2", "--output", str(tmp_path))
    assert len(json.loads((tmp_path / "bench.json").read_text())["requests"]) == 2
