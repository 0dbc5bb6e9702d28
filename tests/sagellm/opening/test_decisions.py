"""Decision logs: a running graph writes them, and a replay repeats them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sagellm
from sagellm import Graph, Sampling, ops
from sagellm.cli import main
from sagellm.opening.decisions import DecisionFile, replay
from sagellm.runtime.core.decision_log import are_same

FIVE = Sampling(max_tokens=5, ignore_eos=True)
NULL = {"model": "null", "device": "null"}


async def asked(graph: Graph, log: Path, num_requests: int = 6, **options: Any) -> None:
    async with graph.open(decisions=log, **options) as session:
        for number in range(num_requests):
            await session.generate([number + 1] * 40, sampling=FIVE)


def run_elsewhere(*arguments: str) -> tuple[int, str]:
    """A command in another process, whose hashes of strings differ."""
    command = [sys.executable, "-m", "sagellm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


async def test_a_log_of_worker_processes_replays_in_another_process(tmp_path: Path) -> None:
    log, null = (
        tmp_path / "log",
        {f"{name}.{key}": value for name in "pd" for key, value in NULL.items()},
    )
    await asked(Graph.load("pd_many"), log, set=null, executor="processes")
    code, said = run_elsewhere("replay", str(log))
    assert (code, said.split(":")[0]) == (0, "identical")
    code, said = run_elsewhere("replay", str(log), "--set", "route.strategy=random", "--json")
    found = json.loads(said)
    assert code == 1
    assert found["difference"]["recorded"] != found["difference"]["replayed"]


async def test_functions_of_ones_own_replay_from_what_is_registered(tmp_path: Path) -> None:
    sagellm.register_function(lambda item: item.prompt + "!", "louder_for_replay")
    graph = Graph("own").engine("g", **NULL)
    graph >> ops.map("louder_for_replay") >> ops.policy_sort() >> ops.generate(engine="g")
    async with graph.open(decisions=tmp_path / "log") as session:
        await session.generate("hear", sampling=FIVE)
    functions = {"louder_for_replay": lambda item: item.prompt + "!"}
    assert replay(tmp_path / "log", functions=functions).difference is None
    other = replay(tmp_path / "log", functions={"louder_for_replay": lambda item: item.prompt})
    assert other.difference is not None


async def test_errors_of_ones_own_replay(tmp_path: Path) -> None:
    def fails(item: Any) -> Any:
        raise KeyError("secret")

    sagellm.register_function(fails, "fails_for_replay")
    graph = Graph("own").engine("g", **NULL)
    graph >> ops.map("fails_for_replay") >> ops.generate(engine="g")
    async with graph.open(decisions=tmp_path / "log") as session:
        with pytest.raises(sagellm.RequestFailed):
            await session.generate("hear", sampling=FIVE)
    assert replay(tmp_path / "log", functions={"fails_for_replay": fails}).difference is None
    assert b"secret" not in (tmp_path / "log").read_bytes()


async def test_a_log_keeps_its_bound_and_replays_as_far_as_it_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph = Graph("g").engine("g", **NULL)
    opening = (graph >> ops.policy_sort() >> ops.generate(engine="g")).open()
    opening.record_to(DecisionFile(tmp_path / "log", max_bytes=4000))
    async with opening as session:
        for _ in range(9):
            await session.generate([1, 2], sampling=FIVE)
    assert (tmp_path / "log").stat().st_size <= 4010
    assert caplog.text.count("decisions_full") == 1
    replayed = replay(tmp_path / "log", functions={})
    assert replayed.is_cut
    assert replayed.difference is None
    assert replayed.num_events > 3


async def test_only_its_owner_may_read_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").touch(0o644)  # the file exists, and others may read it
    await asked(Graph.load("joint"), tmp_path / "log", 1, model="null", set={"g.device": "null"})
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "it is no log of decisions"),
        (b"sagellm decisions 1\n", "it ends before its header"),
        (b"sagellm decisions 1\n\xff\xff\xff\xff", "it is damaged"),
        (b"sagellm decisions 1\n\x00\x00\x00\x02ab", "it is damaged"),
    ],
)
def test_what_is_no_log_is_refused(
    content: bytes, cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log").write_bytes(content)
    assert main(["replay", str(tmp_path / "log")]) == 2
    assert cause in capsys.readouterr().err


def test_a_log_of_an_earlier_version_replays() -> None:
    """The graph `pd` still had the outlet `joint`, and three short prompts went through it."""
    found = replay(Path(__file__).parent / "pd_with_joint.log", functions={})
    assert (found.difference, found.num_events) == (None, 42)


@pytest.mark.parametrize(
    ("recorded", "replayed", "same"),
    [
        ([{"a": 1}], [{"a": 1, "later": None}], True),
        ([{"a": [{"b": 2}]}], [{"a": [{"b": 2, "later": None}]}], True),
        ([{"a": 1}], [{"a": 1, "later": 0}], False),
        ([{"a": 1, "gone": None}], [{"a": 1}], False),
        ([{"a": 1}], [{"a": 2}], False),
        ([{"a": 1}], [{"a": True}], False),
        ([{"a": 1}], [], False),
    ],
)
def test_only_null_fields_of_later_versions_may_be_more(
    recorded: object, replayed: object, same: bool
) -> None:
    assert are_same(recorded, replayed) is same
