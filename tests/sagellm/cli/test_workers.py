"""The output of `sagellm ps`, and the names of workers in commands."""

import msgspec
import pytest
from rich.cells import cell_len

from sagellm.cli import main, workers
from sagellm.cli.workers import _print
from sagellm.runtime.cluster.control import ControlReply, ControlRequest, ReplicaStatus

ROW = ReplicaStatus(
    graph="pd_many",
    graph_pid=4_194_304,
    operator="generate",
    replica=10,
    engine="decode",
    pid=4_194_303,
    state="starting",
    restarts=12,
    num_running=256,
    num_waiting=1024,
    kv_ratio=1.0,
)


@pytest.mark.parametrize("graph", ["pd_many", "a_graph_with_quite_a_long_name"])
def test_a_row_fits_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], graph: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _print([msgspec.structs.replace(ROW, graph=graph)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= 80
    words = ("4194304", "4194303", "starting", "1024", "100%")
    assert all(word in "".join(lines) for word in words)
    assert (len(lines) == 2) == (graph == "pd_many")


def test_a_graph_without_workers_cannot_be_restarted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def answers(_: object) -> dict[str, ControlReply]:
        return {"path": ControlReply(rows=(msgspec.structs.replace(ROW, executor="tasks"),))}

    monkeypatch.setattr(workers, "answers", answers)
    assert main(["restart", "generate"]) == 2
    assert "no graph with workers runs here" in capsys.readouterr().err
    assert main(["ps", "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out)[0]["executor"] == "tasks"


@pytest.mark.parametrize("command", ["drain", "restart"])
@pytest.mark.parametrize(
    ("arguments", "replica"),
    [(["decode"], None), (["decode", "--replica", "1"], 1), (["decode[1]"], 1),
     (["decode[1]", "--replica", "1"], 1)],
)  # fmt: skip
def test_a_worker_is_named_as_ps_shows_it(
    command: str, arguments: list[str], replica: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ControlRequest] = []
    monkeypatch.setattr(workers, "_change", lambda asked, *_: seen.append(asked) or 0)
    assert main([command, *arguments]) == 0
    assert [(one.command, one.operator, one.replica) for one in seen] == [
        (command, "decode", replica)
    ]


def test_two_replicas_are_not_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", "decode[1]", "--replica", "0"]) == 2
    assert "decode[1] is not --replica 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [["scale", "decode", "1.5"], ["restart", "decode", "--replica", "0.5"]],
    ids=" ".join,
)
def test_a_number_that_is_not_whole_is_refused(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line) == 2
    assert "is no whole number" in capsys.readouterr().err
