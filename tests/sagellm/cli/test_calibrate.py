"""`sagellm calibrate`: an engine in, a profile out, which `sagellm simulate` takes."""

import json

import pytest
from models_on_the_fly import make_model

from sagellm.calibration.measuring import MeasuredPeriod, MeasuredRequest, Measurement
from sagellm.cli import main
from sagellm.cli.calibrate import host_cost
from sagellm.runtime.engine.costs.profile import read_profile
from sagellm.runtime.engine.costs.spread import check_spread

LOAD = "synthetic:rate=20,requests=30,input=lognormal:60:0.5,output=exponential:10"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def profile(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("profiles") / "tiny.json"
    small = {"max_model_len": 128, "max_num_seqs": 4, "num_blocks": 64, "threads": 1}
    options = [part for name, value in small.items() for part in ("--set", f"g.{name}={value}")]
    assert main(["calibrate", str(model), "-o", str(file), "--seconds", "0.1", *options]) == 0
    return file


def test_a_profile_says_what_was_measured_and_where(profile):
    found = read_profile(str(profile))
    assert (found.name, found.model, found.method) == ("tiny", "tiny-llama", "measured")
    assert found.machine.endswith(", 1 thread")
    assert found.options["g.max_num_seqs"] == 4
    assert found.cost.step_s > 0
    assert found.host.submit_s > 0
    assert found.host.deliver_s + found.host.deliver_row_s > 0
    assert found.kv_token_bytes == 2 * 2 * 4 * 16 * 4
    assert found.spread
    check_spread(found.spread)


def test_a_simulation_takes_the_profile(model, profile, capsys):
    command = ["simulate", "joint", "--set", f"g.model={model}", "--profile", str(profile)]
    assert main([*command, "--trace", LOAD, "--json", "--seeds", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["served"] == 30
    assert 0 < found["ttft_ms"]["p50"] < found["e2e_ms"]["p50"]
    assert found["estimates"]["ttft_ms.p50"]["deviation"] > 0


def test_another_model_is_refused(profile, capsys):
    command = ["simulate", "joint", "--profile", str(profile), "--trace", LOAD]
    assert main(command) == 2
    assert "measured with model tiny-llama, not sage-tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--set", "g.replicas=2"), "one engine with replicas 1"),
        (("--set", "g.kind=modelled"), "one engine with kind local"),
        (("--set", "g.speculation=ngram"), "one engine with speculation none"),
        (("-o", "no-such-folder/file.json"), "no such folder"),
        (("--set", "g.thread=1"), "threads"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, options, fault, capsys):
    assert main(["calibrate", str(model), "--seconds", "0.1", *options]) == 2
    assert fault in capsys.readouterr().err


def test_an_unknown_model_is_refused_with_the_nearest(capsys):
    assert main(["calibrate", "sage-tinny"]) != 0
    assert "sage-tiny" in capsys.readouterr().err


def test_the_host_costs_what_requests_wait_outside_of_steps():
    """1 ms and 2 us a token before; 3 ms and 0.5 ms a row after. Others than lone requests wait
    for steps of others, so they say nothing of the time before.
    """
    requests = [
        MeasuredRequest(
            length,
            sent_s=0.0,
            started_s=1e-3 + length * 2e-6 + (0.0 if rows == 1 else 0.5),
            sampled_s=2.0,
            read_s=2.003 + rows * 0.5e-3,
            num_rows=rows,
            is_alone=rows == 1,
        )
        for length in (10, 100, 1000)
        for rows in (1, 4, 16)
    ]
    found = host_cost(Measurement([MeasuredPeriod([], requests, 0.0, 1.0)]))
    assert found.submit_s == pytest.approx(1e-3, rel=0.02)
    assert found.submit_token_s == pytest.approx(2e-6, rel=0.02)
    assert found.deliver_s == pytest.approx(3e-3, rel=0.02)
    assert found.deliver_row_s == pytest.approx(0.5e-3, rel=0.02)
