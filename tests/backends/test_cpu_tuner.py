"""How numbers are chosen: measured in turns, and the default stays unless another is surely
faster.
"""

from collections.abc import Callable

import pytest
from tile_kernels import kernels_by

from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.native.tuning import Tuning
from sagellm.backends.cpu.topology import CpuTopology
from sagellm.backends.cpu.tuner import (
    DECODE,
    INT4,
    INT8,
    NUMBERS,
    PREFILL,
    KernelSetting,
    KernelTimes,
    TuningChoice,
    Work,
    choose,
    thread_candidates,
)

DEFAULT = Tuning(rows=48, panels=4, ahead=4096, quant_ahead=4096)  # of the made-up machine
OF_KERNELS = Tuning(rows=48, panels=1, ahead=4096, quant_ahead=4096)
FOUR = CpuTopology(((0,), (1,), (2,), (3,)))


class Machine:
    """A machine whose clock advances by what a work takes: 1 s, times the factors of its values."""

    def __init__(self, factor: Callable[[Work, KernelSetting], float]) -> None:
        self.now, self.asked = 0.0, list[tuple[Work, KernelSetting]]()
        self._factor = factor

    def measure(self, work: Work, setting: KernelSetting) -> float:
        took = self._factor(work, setting)
        self.asked.append((work, setting))
        self.now += took
        return took

    def choose(
        self, budget_s: float = 1e9, topology: CpuTopology = FOUR
    ) -> dict[str, TuningChoice]:
        tuned, choices = choose(
            topology, DEFAULT, self.measure, budget_s=budget_s, clock=lambda: self.now
        )
        found = {choice.name: choice for choice in choices}
        assert found["threads"].chosen == tuned.threads
        for name in Tuning.__struct_fields__:
            assert found[name].chosen == getattr(tuned.values, name)
        assert tuned.fits(topology)
        return found


def test_a_value_that_is_faster_is_chosen() -> None:
    found = Machine(lambda work, setting: 1.0 if setting.values.panels == 2 else 1.1).choose()
    assert found["panels"].chosen == 2
    assert found["panels"].times == {1: pytest.approx(1), 2: pytest.approx(1 / 1.1), 4: 1}
    assert [found[name].chosen for name in ("threads", "rows", "quant_ahead")] == [4, 48, 4096]


def test_a_gain_below_three_percent_changes_nothing() -> None:
    def factor(work: Work, setting: KernelSetting) -> float:
        return 0.975 if setting.values.rows == 64 else 1.0

    assert Machine(factor).choose()["rows"].chosen == 48


def test_a_value_that_is_faster_in_half_of_the_rounds_is_not_chosen() -> None:
    """The median alone would choose it."""
    turn = dict.fromkeys((1, 2, 4), 0)

    def factor(work: Work, setting: KernelSetting) -> float:
        panels = setting.values.panels
        turn[panels] += 1
        return (0.5 if turn[panels] % 5 < 3 else 1.2) if panels == 2 else 1.0

    found = Machine(factor).choose()["panels"]
    assert found.times[2] == 0.5
    assert found.chosen == 4


def test_a_round_that_is_disturbed_does_not_count() -> None:
    calls = iter(range(10**6))

    def factor(work: Work, setting: KernelSetting) -> float:
        return (30.0 if next(calls) % 7 == 0 else 1.0) * (
            0.9 if setting.values.quant_ahead == 8192 else 1.0
        )

    assert Machine(factor).choose()["quant_ahead"].chosen == 8192


def test_threads_are_chosen_for_a_request_of_512_tokens_with_128_answered() -> None:
    def factor(work: Work, setting: KernelSetting) -> float:
        if work == PREFILL:
            return 128 * 4 / setting.threads
        return 1.0 if setting.threads == 2 else 1.6  # decode: the memory is busy with two

    assert Machine(factor).choose()["threads"].chosen == 4  # 128 + 205 against 256 + 128
    decoding = Machine(lambda work, s: factor(work, s) / (8 if work == PREFILL else 1))
    assert decoding.choose()["threads"].chosen == 2


def test_a_number_is_measured_with_what_was_chosen_before() -> None:
    machine = Machine(lambda work, setting: 1.0 if setting.threads == 1 else 2.0)
    assert machine.choose()["threads"].chosen == 1
    quantised = [setting for work, setting in machine.asked if work == INT4]
    assert {setting.threads for setting in quantised} == {1}


def test_candidates_take_turns() -> None:
    machine = Machine(lambda work, setting: 1.0)
    machine.choose(topology=CpuTopology(((0,),)))
    seen = [setting.values.panels for work, setting in machine.asked if work == DECODE][:9]
    assert seen == [4, 1, 2, 1, 2, 4, 2, 4, 1]


def test_the_budget_is_kept_and_the_default_stays_where_rounds_are_missing() -> None:
    machine = Machine(lambda work, setting: 1.0 if setting.values.rows == 64 else 2.0)
    found = machine.choose(budget_s=20.0)
    assert machine.now < 20.0 + 4 * 2 * 2  # each number may end in the middle of a candidate
    assert found["rows"] == TuningChoice("rows", 48, 48, {})


def test_one_core_has_no_choice_of_threads() -> None:
    machine = Machine(lambda work, setting: 1.0)
    found = machine.choose(topology=CpuTopology(((0,),)))["threads"]
    assert (found.chosen, found.times) == (1, {})


@pytest.mark.parametrize(
    ("topology", "threads"),
    [
        (FOUR, (1, 2, 3, 4)),
        (CpuTopology(((0, 2), (1, 3))), (1, 2, 4)),
        (CpuTopology(((0, 1),)), (1, 2)),
        (CpuTopology(((0, 2), (1, 3)), 3.0), (1, 2, 3)),
        (CpuTopology(((0, 2), (1, 3)), 1.5), (1, 2)),
        (CpuTopology(((0, 2), (1, 3)), 1.0), (1,)),
        (CpuTopology(tuple((cpu,) for cpu in range(64))), (8, 16, 24, 32, 40, 48, 56, 64)),
    ],
)
def test_the_threads_to_try(topology: CpuTopology, threads: tuple[int, ...]) -> None:
    assert thread_candidates(topology) == threads


def test_each_default_is_among_the_candidates() -> None:
    assert all(getattr(DEFAULT, number.name) in number.candidates for number in NUMBERS)


KERNELS = native_kernels()


@pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
def test_real_kernels_are_measured_and_have_their_values_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert KERNELS is not None
    assert KERNELS.tuning.default == OF_KERNELS
    monkeypatch.setattr("sagellm.backends.cpu.tuner._WEIGHT_BYTES", 32 << 20)
    times = KernelTimes(KERNELS)
    try:
        other = Tuning(rows=24, panels=1, ahead=512, quant_ahead=1024)
        works = {work for number in NUMBERS for work in number.weights} | {PREFILL}
        for work in works:
            assert times(work, KernelSetting(other, 1)) > 0
        assert KERNELS.tuning.used == other
        with pytest.raises(ValueError, match="refuse"):
            times(DECODE, KernelSetting(Tuning(rows=65, panels=1, ahead=512, quant_ahead=1024), 1))
    finally:
        times.close()
    assert KERNELS.tuning.used == OF_KERNELS


@pytest.mark.parametrize(("has_tiles", "kind"), [(True, "tiles"), (False, "pairs")])
def test_the_kernels_that_engines_use_are_measured(
    monkeypatch: pytest.MonkeyPatch, has_tiles: bool, kind: str
) -> None:
    kernels = kernels_by("model")
    monkeypatch.setattr("sagellm.backends.cpu.tuner._WEIGHT_BYTES", 32 << 20)
    monkeypatch.setattr(type(kernels), "has_tiles", has_tiles)
    monkeypatch.setattr(type(kernels), "has_pairs", True)
    times = KernelTimes(kernels)
    assert [one.run for one in times._linears(PREFILL)] == [
        kernels.function(f"sage_gated_{kind}"),
        kernels.function(f"sage_multiply_{kind}"),
    ]
    assert all(one.levels for one in times._linears(INT4))
    assert not any(one.levels for one in times._linears(INT8))
    times.close()
