"""`sagellm tune`: measures the kernels on this machine, and keeps the numbers that suit it."""

import os
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from sagellm.backends.cpu.native.compiler import built_before, c_compiler, compiled
from sagellm.backends.cpu.native.library import NativeKernels, native_kernels
from sagellm.backends.cpu.native.tuning import Tuned, forget_tuned, write_tuned
from sagellm.backends.cpu.topology import threads_of_environment, usable_cores
from sagellm.backends.cpu.tuner import KernelTimes, TuningChoice, choose
from sagellm.cli.errors import Failure, warn
from sagellm.cli.terminal import show_start_progress

LABELS = {
    "threads": "threads",
    "panels": "panels of a row",
    "ahead": "bytes prefetched",
    "rows": "rows of a block",
    "quant_ahead": "of quantised",
}


def tune(
    *,
    seconds: Annotated[float, Parameter(validator=Number(gt=0, lte=60))] = 20.0,
    reset: bool = False,
    json: bool = False,
) -> int:
    """Find the numbers of threads, rows, panels and prefetched bytes that suit this machine.

    Once is enough for a machine, while it is idle. No answer depends on it, and nothing needs it.
    Engines that start later use what was found; `threads` of an engine and OMP_NUM_THREADS win.

    Parameters
    ----------
    seconds
        About how long to measure.
    reset
        Forget what was found: the defaults are used again.
    json
        Print one JSON object.
    """
    if reset:
        return _reset(json=json)
    with show_start_progress() as progress:
        kernels = native_kernels(progress)
    library = compiled() if kernels else None
    if kernels is None or library is None:
        raise _no_kernels()
    _warn_of_noise()
    tuned, choices = measured(kernels, seconds)
    file = write_tuned(library, tuned)
    if json:
        print(msgspec.json.encode(_record(file, tuned, choices)).decode())
    else:
        _print(file, choices)
    return 0


def measured(kernels: NativeKernels, seconds: float) -> tuple[Tuned, list[TuningChoice]]:
    """Measure real kernels for about `seconds`, and choose."""
    times = KernelTimes(kernels)
    try:
        return choose(usable_cores(), kernels.tuning.default, times, budget_s=seconds)
    finally:
        times.close()


def _no_kernels() -> Failure:
    if c_compiler():
        return Failure("the kernels cannot be built, so there is nothing to tune", "see the log")
    return Failure("no C compiler: without kernels, nothing is to tune", "install gcc or clang")


def _reset(*, json: bool) -> int:
    library = built_before()
    was_tuned = library is not None and forget_tuned(library)
    if json:
        print(msgspec.json.encode({"forgotten": was_tuned}).decode())
    else:
        print("forgotten: the defaults are used" if was_tuned else "nothing was tuned")
    return 0


def _warn_of_noise() -> None:
    """Warn of what makes the result less use."""
    warn_of_load("tune")
    if threads := threads_of_environment():
        warn(f"OMP_NUM_THREADS={threads} is set, and wins over the number of threads found here")


def warn_of_load(verb: str) -> None:
    """Warn of other programs, which disturb what is measured."""
    load, cpus = os.getloadavg()[0], usable_cores().num_cpus
    if load > cpus / 2:
        warn(f"other programs are busy (load {load:.1f} on {cpus} CPUs): {verb} an idle machine")


def _record(file: Path, tuned: Tuned, choices: list[TuningChoice]) -> dict[str, object]:
    values = {"threads": tuned.threads, **msgspec.structs.asdict(tuned.values)}
    return {"file": str(file), "values": values, "choices": choices}


def _print(file: Path, choices: list[TuningChoice]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for choice in choices:
        console.print(f"{LABELS[choice.name]:18}{choice.chosen:<7}{_reason(choice)}", markup=False)
    console.print(f"kept in {file}", markup=False)


def _reason(choice: TuningChoice) -> str:
    """The reason for a value: the times of the others, where the default takes 1."""
    if not choice.times:
        return "the default: there was no time to measure others"
    if len(choice.times) == 1:
        return "the only choice"
    others = ", ".join(
        f"{value}: {time:.2f}" for value, time in choice.times.items() if value != choice.default
    )
    if choice.chosen == choice.default:
        return f"the default (time with {others})"
    return f"in place of {choice.default} (time with {others})"
