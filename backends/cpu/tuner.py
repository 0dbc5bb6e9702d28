"""Chooses the numbers of a machine's kernels by measuring: candidates take turns, medians count."""

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import msgspec
import numpy as np
import psutil

from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.backends.cpu.native.tuning import Tuned, Tuning
from sagellm.backends.cpu.quantised_linear import NativeQuant
from sagellm.backends.cpu.topology import CpuTopology
from sagellm.backends.quantised_weight import GROUP_SIZE, LEVELS

_HIDDEN, _INNER = 896, 4864  # of a model with 0.5 billion weights
_SHAPES = ((2 * _INNER, _HIDDEN), (_HIDDEN, _INNER))  # of the linears that hold most weights
_WEIGHT_BYTES = 256 << 20  # more than most caches hold, as in a model
_SLACK_BYTES = 1 << 20  # behind the last weight: kernels prefetch beyond their weights
_SETTLE_S = 0.001  # until the helper threads of the last candidate sleep


@dataclass(frozen=True, slots=True)
class Work:
    """Products of `num_rows` rows with the weights of `num_layers` layers, at most as many as there
    are. `bits`, `row_bits`: of a quantised weight and its rows; 0: the weight is bfloat16.
    """

    num_rows: int
    num_layers: int
    bits: int = 0
    row_bits: int = 0


DECODE, FEW, BLOCK, PREFILL = Work(1, 99), Work(4, 99), Work(64, 2), Work(512, 1)
INT8, INT4 = Work(1, 99, 8, 16), Work(1, 99, 4, 8)
# A request of 512 tokens and an answer of 128, by the layers that each work computes.
_REQUEST = {PREFILL: 1.0, DECODE: 128.0}


@dataclass(frozen=True, slots=True)
class KernelSetting:
    """One choice of all numbers."""

    values: Tuning
    threads: int


MeasureKernels: TypeAlias = Callable[[Work, KernelSetting], float]  # seconds of a layer of the work


@dataclass(frozen=True, slots=True)
class TuningChoice:
    """The result for one number. `times`: the median time with each value that was tried,
    where the default takes 1; empty: there was no time to try any.
    """

    name: str
    default: int
    chosen: int
    times: Mapping[int, float]


_LEAST_GAIN = 0.03  # a smaller gain may be noise
_MOST_ROUNDS, _LEAST_ROUNDS = 25, 5


@dataclass(frozen=True, slots=True)
class _Number:
    """A number to choose. `weights`: how much the time of each work counts; `share`: of the time
    for measuring.
    """

    name: str
    candidates: tuple[int, ...]
    weights: Mapping[Work, float]
    share: float


NUMBERS = (
    _Number("panels", (1, 2, 4), {DECODE: 1.0}, 0.15),
    _Number("ahead", (1024, 2048, 4096, 8192, 16384, 1 << 18), {DECODE: 1.0, FEW: 1.0}, 0.15),
    _Number("rows", (24, 32, 48, 56, 64), {BLOCK: 1 / 64, PREFILL: 1 / 512}, 0.2),
    _Number("quant_ahead", (1024, 2048, 4096, 8192, 16384), {INT8: 1.0, INT4: 1.0}, 0.2),
)


def thread_candidates(topology: CpuTopology) -> tuple[int, ...]:
    """Numbers of threads to try: all up to 8, above these eighths of the cores; and one for each
    hyper-thread, if the quota allows more threads than cores.
    """
    most = topology.threads
    found = {-(-most * eighth // 8) for eighth in range(1, 9)}
    if most == topology.num_cores:
        found.add(min(topology.num_cpus, topology.num_allowed))
    return tuple(sorted(found))


def choose(
    topology: CpuTopology,
    default: Tuning,
    measure: MeasureKernels,
    *,
    budget_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Tuned, list[TuningChoice]]:
    """Choose one number after the other, within about `budget_s`: each with what was chosen before.

    A number stays at its default unless another is faster by 3 % in the median, and faster in three
    rounds of four.
    """
    setting, choices = KernelSetting(default, topology.threads), []
    end = clock()
    threads = _Number("threads", thread_candidates(topology), _REQUEST, 0.3)
    for number in (threads, *NUMBERS):
        end += number.share * budget_s
        has_time = partial(_is_before, clock, end)
        choice = _choose(number, setting, measure, has_time)
        setting = _with(setting, number.name, choice.chosen)
        choices.append(choice)
    found = topology.num_cores, topology.num_cpus, topology.num_allowed
    return Tuned(setting.values, setting.threads, *found), choices


def _is_before(clock: Callable[[], float], end: float) -> bool:
    return clock() < end


def _with(setting: KernelSetting, name: str, value: int) -> KernelSetting:
    if name == "threads":
        return replace(setting, threads=value)
    return replace(setting, values=msgspec.structs.replace(setting.values, **{name: value}))


def _choose(
    number: _Number, setting: KernelSetting, measure: MeasureKernels, has_time: Callable[[], bool]
) -> TuningChoice:
    """Choose one number. `setting`: the others, and the number's default."""
    default = setting.threads if number.name == "threads" else getattr(setting.values, number.name)
    values = [default, *(value for value in number.candidates if value != default)]
    ratios: dict[int, list[float]] = {value: [] for value in values}
    for turn in range(_MOST_ROUNDS if len(values) > 1 else 0):
        start = turn % len(values)
        took: dict[int, float] = {}
        for value in values[start:] + values[:start]:
            if not has_time():
                break
            tried = _with(setting, number.name, value)
            took[value] = sum(w * measure(work, tried) for work, w in number.weights.items())
        else:
            for value in values:
                ratios[value].append(took[value] / took[default])
            continue
        break
    if len(ratios[default]) < _LEAST_ROUNDS:
        return TuningChoice(number.name, default, default, {})
    times = {value: statistics.median(ratios[value]) for value in sorted(values)}
    return TuningChoice(number.name, default, _best(default, ratios, times), times)


def _best(default: int, ratios: Mapping[int, Sequence[float]], times: Mapping[int, float]) -> int:
    """The fastest value, if it is surely faster than the default."""
    best = min(times, key=times.__getitem__)
    is_sure = statistics.quantiles(ratios[best], n=4)[2] < 1
    return best if times[best] <= 1 - _LEAST_GAIN and is_sure else default


class KernelTimes:
    """Measures real kernels on made-up weights: a `MeasureKernels`. Takes 256 MiB, or a quarter of
    the free memory if that is less. `close` gives the kernels their values back.
    """

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels
        self._before = kernels.tuning.used
        self._weights = _noise(min(_WEIGHT_BYTES, psutil.virtual_memory().available // 4))
        # The kernels that engines use on this CPU for weights in bfloat16.
        self._kind = "tiles" if kernels.has_tiles else "pairs" if kernels.has_pairs else "bfloat"
        self._scales = np.full(_INNER * _HIDDEN // 8, 0.01, np.float16)
        self._levels = np.array(LEVELS, np.int8)
        self._x = np.random.default_rng(0).standard_normal((512, _INNER), np.float32)
        self._out = np.empty((512, 2 * _INNER), np.float32)
        self._layers: dict[Work, list[NativeQuant]] = {}
        # The C kernels keep a team of threads for each calling thread: a number has its own caller,
        # so that no helper thread is awake that the number does not need.
        self._callers: dict[int, ThreadPoolExecutor] = {}
        types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_long)
        product = ctypes.CFUNCTYPE(None, *types, ctypes.c_long, ctypes.c_int)
        self._product = product(kernels.function("sage_linear"))

    def __call__(self, work: Work, setting: KernelSetting) -> float:
        if work not in self._layers:
            self._layers[work] = [*self._linears(work)]
        if setting.threads not in self._callers:
            self._callers[setting.threads] = ThreadPoolExecutor(1)
        if not self._kernels.tuning.use(setting.values):
            raise ValueError(f"the kernels refuse {setting.values}")
        time.sleep(_SETTLE_S)
        caller = self._callers[setting.threads]
        return caller.submit(self._seconds, self._layers[work], work.num_rows, setting).result()

    def close(self) -> None:
        for caller in self._callers.values():
            caller.shutdown()
        self._kernels.tuning.use(self._before)

    def _seconds(
        self, linears: Sequence[NativeQuant], num_rows: int, setting: KernelSetting
    ) -> float:
        self._multiply(linears[-1:], 1, setting.threads)  # wake the helper threads
        start = time.perf_counter()
        self._multiply(linears, num_rows, setting.threads)
        return (time.perf_counter() - start) / (len(linears) // len(_SHAPES))

    def _multiply(self, linears: Iterable[NativeQuant], num_rows: int, threads: int) -> None:
        x, out = (self._x.ctypes.data, _INNER), (self._out.ctypes.data, 2 * _INNER)
        for linear in linears:
            self._product(ctypes.byref(linear), *x, *out, num_rows, threads)

    def _linears(self, work: Work) -> Iterator[NativeQuant]:
        """The linears of the layers, one after the other in the memory of the weights."""
        place = self._weights.ctypes.data
        sizes = [rows * depth * (work.bits or 16) // 8 for rows, depth in _SHAPES]
        room = len(self._weights) - _SLACK_BYTES
        for _ in range(max(1, min(work.num_layers, room // sum(sizes)))):
            for shape, size in zip(_SHAPES, sizes, strict=True):
                yield self._linear(work, shape, place)
                place += size

    def _linear(self, work: Work, shape: tuple[int, int], place: int) -> NativeQuant:
        kernel = f"sage_multiply_{self._kind}"
        if work.bits:
            kernel = f"sage_quant_{work.bits}_{work.row_bits}"
        elif shape[0] > shape[1]:  # gate and up
            kernel = kernel.replace("multiply", "gated")
        linear = NativeQuant(self._kernels.function(kernel), weight=place)
        if work.bits:
            linear.scales, linear.group = self._scales.ctypes.data, GROUP_SIZE
        if work.bits == 4:
            linear.levels = self._levels.ctypes.data
        linear.num_cols, linear.k = shape
        return linear


def _noise(num_bytes: int) -> "np.typing.NDArray[np.uint8]":
    """Memory in large pages, full of bfloat16 numbers. As codes of quantised weights, they do."""
    memory = mmap.mmap(-1, max(num_bytes, 32 << 20))
    with suppress(AttributeError, OSError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    found = np.frombuffer(memory, np.uint8)
    numbers = np.random.default_rng(0).standard_normal(1 << 19, np.float32)
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    for start in range(0, len(found), len(block)):
        part = found[start : start + len(block)]
        part[:] = block[: len(part)]
    return found
