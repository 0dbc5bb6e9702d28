import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from child_processes import children

from benchmarks.cells import Cell
from benchmarks.machine import Limits
from benchmarks.peers.engines import OURS, Peer
from benchmarks.peers.environments import NotInstalled
from benchmarks.peers.group import Group
from benchmarks.peers.models import DRIVERS
from benchmarks.peers.plan import MEMORY, START, Subject, too_long, weights_and_kv
from benchmarks.peers.report import cell_record, table
from benchmarks.peers.rounds import Found, Rounds
from benchmarks.peers.timing import Figure
from benchmarks.shape import LLAMA15M, QWEN05_2L, Shape

FAKE = Path(__file__).parent / "fake_driver.py"
CELL = Cell("decode-1", "decode", 1, 4, 5)
SUBJECT = Subject(LLAMA15M, (CELL,))
LIMITS = Limits(read_bytes_per_s=20e9, fp32_flops_per_s=1e11, bf16_flops_per_s=2e10)


class Fake(Peer):
    """A peer whose driver is the fake one."""

    def command(self) -> list[str]:
        return [sys.executable, "-S", str(FAKE), str(DRIVERS), *self.preloads]


def no_model(shape: Shape, row: str) -> Path:
    return Path("model")


def broken_model(shape: Shape, row: str) -> Path:
    raise NotInstalled("environment b: no matching distribution")


def fake(name: str, mode: str = "", rows: Sequence[str] = ("bf16",)) -> Peer:
    return Fake(name, None, FAKE, no_model, tuple(rows), preloads=(mode,))


def steady() -> float:
    return 10e9


def opened(*peers: Peer) -> Group:
    """Prepared, and every engine started that can be."""
    group = Group(peers, SUBJECT, "bf16", threads=1)
    group.prepare()
    for name in group.names:
        with group.noting(name):
            group.start(name)
    return group


def test_engines_take_turns_and_their_rounds_are_kept() -> None:
    with opened(fake(OURS), fake("a")) as group:
        found = Rounds(steady, 3, spend_s=60).measure(group, CELL)
    assert {name: len(figures) for name, figures in found.figures.items()} == {OURS: 3, "a": 3}
    assert found.figures["a"][0].value == pytest.approx(1000)
    assert (found.moved, len(found.bandwidths)) == ([], 6)


def test_a_peer_that_has_spent_its_time_has_one_round() -> None:
    with opened(fake(OURS), fake("a")) as group:
        found = Rounds(steady, 3, spend_s=0).measure(group, CELL)
    assert (len(found.figures[OURS]), len(found.figures["a"])) == (3, 1)


def test_a_round_in_which_the_machine_moved_is_measured_again_and_then_marked() -> None:
    once: Iterator[float] = iter([10e9, 8e9, 10e9, 10e9])
    twice: Iterator[float] = iter([10e9, 8e9, 10e9, 8e9])
    with opened(fake(OURS)) as group:
        repeated = Rounds(lambda: next(once), 1, spend_s=60).measure(group, CELL)
        marked = Rounds(lambda: next(twice), 1, spend_s=60).measure(group, CELL)
    assert (repeated.moved, len(repeated.figures[OURS])) == ([], 1)
    assert (marked.moved, len(marked.figures[OURS])) == ([0], 1)


class Watching(Group):
    """A group that notes how many processes there are beside one engine when that engine runs."""

    seen: list[tuple[int, int]]  # the number of each run, and the processes beside its engine
    others: set[psutil.Process]

    def run(self, name: str, cell: Cell, number: int, cap_s: float) -> Figure:
        self.seen.append((number, len(children() - self.others) - 1))
        return super().run(name, cell, number, cap_s)


def test_each_round_is_alone_and_then_beside_processes_that_spin() -> None:
    group = Watching([fake(OURS)], SUBJECT, "bf16", threads=1)
    group.others = children()
    with group:
        group.seen = []
        group.start(OURS)
        found = Rounds(steady, 2, spend_s=60, spinning=2).measure(group, CELL)
    assert [beside for _, beside in group.seen] == [0, 2, 0, 2]
    assert len({number for number, _ in group.seen}) == 4  # no two runs have the same prompts
    assert (len(found.figures[OURS]), len(found.beside[OURS])) == (2, 2)


def test_starting_and_a_measurement_without_spinning_are_alone_only() -> None:
    with opened(fake(OURS)) as group:
        assert Rounds(steady, 1, spend_s=60, spinning=1).measure(group, START).beside == {}
        assert Rounds(steady, 1, spend_s=60).measure(group, CELL).beside == {}


def test_a_peer_whose_time_is_spent_alone_or_beside_has_one_round_of_both() -> None:
    with opened(fake(OURS), fake("a")) as group:
        found = Rounds(steady, 3, spend_s=0, spinning=1).measure(group, CELL)
    assert (len(found.figures["a"]), len(found.beside["a"])) == (1, 1)
    assert (len(found.figures[OURS]), len(found.beside[OURS])) == (3, 3)


def test_a_moved_round_is_repeated_beside_the_processes_too() -> None:
    bandwidths: Iterator[float] = iter([10e9, 8e9, 10e9, 10e9])
    with opened(fake(OURS)) as group:
        found = Rounds(lambda: next(bandwidths), 1, spend_s=60, spinning=1).measure(group, CELL)
    assert (found.moved, len(found.beside[OURS])) == ([], 1)


def test_starting_is_a_new_process_each_round() -> None:
    with Group([fake(OURS)], SUBJECT, "bf16", threads=1) as group:
        found = Rounds(steady, 2, spend_s=60).measure(group, START)
        assert [figure.value > 0 for figure in found.figures[OURS]] == [True, True]
        assert group.memory(OURS).value > 0


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        (fake("b", "die"), "SIGILL"),
        (fake("b", "refuse"), "no row bf16"),
        (fake("b", "exit"), "code 3: out of memory"),
        (fake("b", rows=["int8"]), "has no row bf16"),
        (Fake("b", None, FAKE, broken_model, ("bf16",)), "no matching distribution"),
    ],
)
def test_a_peer_that_fails_is_reported_and_the_others_go_on(peer: Peer, why: str) -> None:
    with opened(fake(OURS), peer) as group:
        found = Rounds(steady, 2, spend_s=60).measure(group, CELL)
    assert list(found.figures) == [OURS]
    assert why in group.failed["b"]
    kept = cell_record(CELL, "llama15m", "bf16", found, group.failed, 2000.0)
    assert (kept["best_peer"], kept["ratio_to_best_peer"]) == (None, None)
    shown = table({**NAMED, "peers": ["b"], "cells": [kept]})
    assert any(line.startswith("- b, llama15m bf16:") and why in line for line in shown.split("\n"))


NAMED = {
    "date": "2026-01-01",
    "command": "sagellm bench peers",
    "machine": {"cpu": "A", "cores": 2, "threads": 2, "capability": "AVX2"},
}


def kept(cell: Cell, ours: float, **peers: float) -> dict[str, object]:
    figures = {name: [Figure(value)] for name, value in {OURS: ours, **peers}.items()}
    return cell_record(cell, "m", "bf16", Found(figures), {}, 40.0)


def test_the_ratio_is_to_the_best_peer_and_to_the_limit() -> None:
    found = kept(CELL, 20.0, a=10.0, b=25.0)
    assert (found["ours"], found["peers"]) == (20.0, {"a": 10.0, "b": 25.0})
    assert (found["best_peer"], found["ratio_to_best_peer"]) == ("b", 0.8)
    assert found["ratio_to_limit"] == 0.5
    line = "| bf16 | decode-1 | tokens/s | 20 | 10 | **25** | 0.8 | 40 | 0.5 |"
    assert line in table({**NAMED, "peers": ["a", "b"], "cells": [found]}).splitlines()


def test_where_less_is_better_the_least_is_the_best() -> None:
    found = kept(START, 2.0, a=1.0, b=4.0)
    assert (found["best_peer"], found["ratio_to_best_peer"], found["better"]) == ("a", 0.5, "lower")


def test_medians_extrapolations_and_moved_rounds_are_said() -> None:
    figures = {OURS: [Figure(1.0), Figure(9.0), Figure(2.0)], "a": [Figure(1.0, 7)]}
    found = Found(figures, [10e9, 8e9], [1])
    one = cell_record(CELL, "m", "bf16", found, {"c": "NotBuilt: no option"}, None)
    assert (one["ours"], one["rounds"][OURS]) == (2.0, [1.0, 9.0, 2.0])
    assert (one["extrapolated_from_tokens"], one["moved_rounds"]) == ({"a": 7}, [2])
    shown = table({**NAMED, "peers": ["a", "c"], "cells": [one]})
    assert "| decode-1 (moved) |" in shown
    assert "| **1**\\* | not built |" in shown


def test_a_long_context_is_left_out_where_filling_it_takes_too_long() -> None:
    cell = Cell("decode-32k-8", "decode", 8, 32768, 32)
    why = too_long(cell, QWEN05_2L, LIMITS, spend_s=60)
    assert why is not None
    assert "--spend-s" in why
    assert too_long(cell, QWEN05_2L, LIMITS, spend_s=600) is None


def spun(kind: str, ours: list[float], peer: list[float]) -> dict[str, Any]:
    """The record of a cell; each list has the figures of two rounds alone, then beside."""
    alone = {OURS: [Figure(one) for one in ours[:2]], "a": [Figure(one) for one in peer[:2]]}
    beside = {OURS: [Figure(one) for one in ours[2:]], "a": [Figure(one) for one in peer[2:]]}
    cell = Cell("c", kind, 1, 4, 5)
    return cell_record(cell, "m", "bf16", Found(alone, beside=beside), {}, None)


def test_the_share_of_a_figure_alone_is_that_within_a_round() -> None:
    found = spun("decode", [10.0, 20.0, 5.0, 5.0], [4.0, 4.0, 3.0, 3.0])["beside_spinning"]
    assert found["figures"] == {OURS: 5.0, "a": 3.0}
    assert found["share_of_alone"] == {OURS: 0.375, "a": 0.75}
    assert found["relative_to_best_peer"] == 0.5
    assert found["rounds"] == {OURS: [5.0, 5.0], "a": [3.0, 3.0]}


def test_a_time_that_doubles_is_a_share_of_a_half() -> None:
    found = spun("ttft", [10.0, 10.0, 20.0, 20.0], [10.0, 10.0, 40.0, 40.0])["beside_spinning"]
    assert found["share_of_alone"] == {OURS: 0.5, "a": 0.25}
    assert found["relative_to_best_peer"] == 2.0


def test_a_table_of_its_own_says_which_engine_falls_further() -> None:
    worse = spun("decode", [8.0, 8.0, 2.0, 2.0], [4.0, 4.0, 2.0, 2.0])
    better = spun("decode", [8.0, 8.0, 6.0, 6.0], [4.0, 4.0, 2.0, 2.0])
    lines = table({**NAMED, "peers": ["a"], "spinning": 2, "cells": [worse, better]}).splitlines()
    assert "Beside 2 spinning processes (share of the figure alone):" in lines
    assert "| bf16 | c | tokens/s | 2 (0.25) | **2** (0.5) | 0.5 | yes |" in lines
    assert "| bf16 | c | tokens/s | 6 (0.75) | **2** (0.5) | 1.5 | no |" in lines


def test_without_spinning_there_is_no_such_table() -> None:
    shown = table({**NAMED, "peers": ["a"], "cells": [kept(CELL, 20.0, a=10.0)]})
    assert "spinning" not in shown


def test_peak_memory_is_a_multiple_of_weights_and_kv() -> None:
    cells = (Cell("decode-1", "decode", 1, 100, 10), Cell("batch-2", "batch", 2, 100, 10), MEMORY)
    least = weights_and_kv(LLAMA15M, 0.5, cells)
    assert least == LLAMA15M.num_weights / 2 + 220 * LLAMA15M.kv_bytes_a_token
    found = Found({OURS: [Figure(1.5)], "a": [Figure(1.2)]})
    one = cell_record(MEMORY, "m", "int4", found, {}, 1.2)
    assert (one["ratio_to_best_peer"], one["ratio_to_limit"]) == (0.8, 0.8)
    lines = table({**NAMED, "peers": ["a"], "cells": [one]}).splitlines()
    assert "m int4 peak-memory: sagellm takes 1.25x of weights + KV (1.2 GB, the limit)." in lines
