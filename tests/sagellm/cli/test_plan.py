"""`sagellm plan`: a model and a trace in, a placement out that `sagellm simulate` confirms."""

import json
import shlex
from pathlib import Path

import pytest

from sagellm import runtime
from sagellm.cli import main

LOAD = "synthetic:rate=20,requests=40,input=lognormal:1500:0.6,output=exponential:30"
QUICK = ("--max-num-seqs", "64", "--max-num-batched-tokens", "2048", "--policy", "fifo")


@pytest.fixture
def plan(capsys):
    def command(
        *options,
        model="llama-3-8b",
        slo="ttft=0.5,tpot=0.02",
        gpus=2,
        gpu="h100-sxm",
        code=0,
        load=LOAD,
    ):
        given = ["--gpus", str(gpus), "--gpu", gpu, "--slo", slo, "--trace", load]
        found = main(["plan", model, *given, "--seeds", "1", *QUICK, *options])
        out, err = capsys.readouterr()
        assert found == code, err
        return out if not code else err

    return command


def test_the_graph_simulates_to_the_same_figures(plan, tmp_path, capsys):
    file = tmp_path / "plan.yaml"
    options = ("-o", str(file), "--price", "2.5", "--rate", "17", "--json")
    found = json.loads(plan(*options))
    winner = found["winner"]
    assert winner["graph"] == file.read_text()
    words = shlex.split(found["command"])
    assert main([*words[1:], "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {name: figures[name] for name in winner["figures"]} == winner["figures"]
    assert figures["slo_attainment"] >= 0.9
    assert main(["graph", "check", str(file)]) == 0


def test_the_placement_is_shown_with_its_certainty_and_the_advice(plan):
    shown = plan()
    assert "placement:  TP1; 64 seqs, 2048 tokens; fifo" in shown
    assert "1 of 1 resampled traces meet the level" in shown
    assert "the profile is a roofline, not measured" in shown
    assert "advised: 2 x TP1" in shown
    assert "advised: TP2" in shown
    assert "s of a device for 1,000 tokens" in shown
    assert "left out: EP: needs a mixture of experts, and the model is dense" in shown


def test_equal_arguments_plan_the_same(plan):
    assert plan("--json") == plan("--json", "--processes", "2")


def test_what_does_not_fit_is_named(plan):
    message = plan(model="llama-3-70b", code=3)
    assert "no placement on up to 2 x h100-sxm" in message
    assert "weights take 141.1 GB of 72.0 GB a device" in message


def test_the_nearest_placement_is_explained_if_none_meets_the_level(plan):
    """Alone, each prompt is in time; together, they wait for each other."""
    load = "synthetic:rate=12,requests=40,input=4000,output=4"
    message = plan("--num-requests", "30", slo="ttft=0.12,tpot=1", gpus=1, code=3, load=load)
    assert "the nearest, TP1; 64 seqs, 2048 tokens; fifo, attains" in message
    assert "bound by compute of g" in message


def test_a_folder_is_placed_within_its_context(plan):
    folder = str(Path(runtime.__file__).parent / "models" / "sage_tiny")
    assert "clip them with --max-input-len" in plan(model=folder, code=2)
    found = json.loads(
        plan("--max-input-len", "64", "--max-output-len", "16", "--json", model=folder)
    )
    assert found["winner"]["name"].startswith("TP1;")
    assert "--max-input-len 64" in found["command"]


def test_experts_are_placed(plan):
    found = json.loads(plan("--json", model="mixtral-8x7b", slo="ttft=1,tpot=0.05"))
    assert "EP2" not in found["misfits"]
    assert found["misfits"]["TP1"].startswith("weights take 93.4 GB")
    assert "EP2" in json.dumps(found["runners_up"]) + found["winner"]["name"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slo": "tftt=1"}, "did you mean ttft?"),
        ({"slo": "ttft=never"}, "no number above 0"),
        ({"model": "lama-3-8b"}, "did you mean llama-3-8b?"),
        ({"load": "synthetic:rat=1"}, "rate"),
        ({"gpu": "h100"}, "did you mean h100-sxm?"),
        ({"gpus": 0}, "--gpus"),
    ],
)
def test_bad_input_has_a_fix(plan, options, message):
    assert message in plan(code=2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "slo_awar"), "did you mean slo_aware?"),
        (("--rate", "2", "--speedup", "2"), "leave one out"),
        (("--gpu-memory", "80 bananas"), "80GB"),
    ],
)
def test_a_bad_option_has_a_fix(plan, options, message):
    assert message in plan(*options, code=2)


def test_a_measured_profile_needs_the_memory_of_its_device(plan, tmp_path):
    profile = {
        "name": "mine",
        "model": "llama-3-8b",
        "device": "mine",
        "method": "measured",
        "made_on": "2026-11-25",
        "cost": {
            "form": "fitted",
            "step_s": 0.002,
            "tokens": [0, 1000],
            "token_seconds": [0, 0.02],
            "prefill_pair_s": 0,
            "contexts": [0, 1000],
            "context_seconds": [0, 0],
            "row_s": 0,
        },
    }
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(profile))
    assert "--gpu-memory" in plan(gpu=str(file), code=2)
    shown = plan("--gpu-memory", "80GB", gpu=str(file))
    assert "mine (measured profile)" in shown
    assert "not measured" not in shown
    assert "TP2: profile mine is of one device as it was measured" in shown
    assert "measured with model llama-3-8b" in plan(
        "--gpu-memory", "80GB", gpu=str(file), model="llama-3-70b", code=2
    )
