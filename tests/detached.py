"""A backend whose memory nobody else may touch: what runs on it assumes no CPU.

It computes with the kernels of `cpu`. Pools are opaque, and full of garbage until they are written;
bytes get in and out by explicit copies alone. A launch is over for the host some time after the
next one has begun: what it samples is fed to that on the device. There are two devices.
"""

import queue
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import xxhash

from sagellm.backends import (
    KVLayout,
    KVStorage,
    LaunchError,
    Program,
    Sampled,
    StepBatch,
    Ticket,
    get_backend,
)
from sagellm.backends.cpu.kv_storage import CpuStorage, allocate
from sagellm.backends.interface import Progress, Region, RunPairs, Runs, Stage, Weights, silent
from sagellm.backends.sampler import sample, score
from sagellm.backends.step_inputs import feed, step_inputs
from sagellm.graphs.ir import Graph

LATE_S = 0.002  # without another launch, the host hears of the last one


class Touched(AssertionError):
    """Something outside of the backend touched memory of a device."""


class Memory:
    """Of a device. Only `opened` gives what is in it."""

    def __init__(self, content: Any) -> None:
        self.__content = content

    def opened(self, key: object) -> Any:
        if key is not _KEY:
            raise Touched("memory of a device was opened")
        return self.__content

    def __getattr__(self, name: str) -> Any:
        raise Touched(f"memory of a device was asked for {name}")

    def __getitem__(self, index: object) -> Any:
        raise Touched("memory of a device was indexed")

    def __array__(self, *_: object) -> Any:
        raise Touched("memory of a device was made an array")

    def __buffer__(self, flags: int) -> memoryview:
        raise Touched("memory of a device was read as bytes")


_KEY = object()


@dataclass
class Staging:
    """Buffers of the host, of which `commit` makes a copy to the device."""

    pool: CpuStorage
    runs: Runs
    layers: range
    views: list[memoryview] = field(init=False)

    def __post_init__(self) -> None:
        there = self.pool.read(self.runs, self.layers)
        self.views = [memoryview(bytearray(len(view))) for view in there]

    def commit(self) -> None:
        there = self.pool.read(self.runs, self.layers)
        for view, landed in zip(there, self.views, strict=True):
            view[:] = landed


class DetachedStorage:
    """Implements KVStorage."""

    def __init__(self, device: str, layout: KVLayout, num_blocks: int) -> None:
        self.device = device
        self.layout = layout
        self.num_blocks = num_blocks
        pool = allocate(layout, num_blocks)
        pool.pool.view(np.uint8).fill(0xFF)  # NaNs
        self.pool = Memory(pool)

    def copy(self, source: KVStorage, pairs: RunPairs, layers: range) -> None:
        if not isinstance(source, DetachedStorage):
            raise TypeError(f"detached copies from detached, not from {type(source).__name__}")
        _inside(self).copy(_inside(source), pairs, layers)

    def receive(self, memory: memoryview, pairs: RunPairs, layers: range) -> int:
        return _inside(self).receive(memory, pairs, layers)

    def read(self, runs: Runs, layers: range) -> list[memoryview]:
        return [memoryview(bytes(view)) for view in _inside(self).read(runs, layers)]

    def stage(self, runs: Runs, layers: range) -> Staging:
        return Staging(_inside(self), runs, layers)

    def checksum(self, runs: Runs, layers: range) -> int:
        return xxhash.xxh3_64_intdigest(b"".join(self.read(runs, layers)))

    def register(self) -> Region:
        raise Touched("the host cannot register this memory")


def _inside(storage: DetachedStorage) -> CpuStorage:
    inside: CpuStorage = storage.pool.opened(_KEY)
    return inside


@dataclass(frozen=True)
class DetachedProgram:
    """Weights are on one device."""

    device: str
    inside: Memory


@dataclass
class DetachedLaunch:
    program: DetachedProgram
    storage: DetachedStorage
    batch: StepBatch
    inputs: Any
    ticket: Ticket = field(default_factory=Future)
    sampled: Sampled | None = None  # on the device; the host hears of it by the ticket
    error: BaseException | None = None


class DetachedQueue:
    """Begins what is launched at once, so that nothing is recalled; says late that it is over."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.num_fed = 0  # launches that began before the host had heard of the one before
        self._launches: queue.SimpleQueue[DetachedLaunch | None] = queue.SimpleQueue()
        self._of: dict[Ticket, DetachedLaunch] = {}
        self._thread = threading.Thread(target=self._work, name="sagellm-engine")
        self._thread.start()

    def launch(self, program: Program, storage: KVStorage, batch: StepBatch) -> Ticket:
        assert isinstance(program, DetachedProgram)
        assert isinstance(storage, DetachedStorage)
        assert program.device == storage.device == self.device
        inputs = step_inputs(batch, storage.layout.block_size)
        launch = DetachedLaunch(program, storage, batch, inputs)
        launch.ticket.set_running_or_notify_cancel()
        self._of[launch.ticket] = launch
        self._launches.put(launch)
        return launch.ticket

    def close(self) -> None:
        self._launches.put(None)
        self._thread.join()

    def _work(self) -> None:
        before: DetachedLaunch | None = None  # over, and not told of
        while True:
            try:
                launch = self._launches.get(timeout=LATE_S if before else None)
            except queue.Empty:
                before = self._tell(before)
                continue
            if launch is not None:
                self._compute(launch)
            if before is not None:
                self._tell(before)
            if launch is None:
                return
            before = launch

    def _compute(self, launch: DetachedLaunch) -> None:
        try:
            launch.sampled = self._sampled(launch)
        except BaseException as error:
            launch.error = error

    def _sampled(self, launch: DetachedLaunch) -> Sampled:
        batch, inputs = launch.batch, launch.inputs
        if batch.after is not None:
            before = self._of.get(batch.after)
            self.num_fed += before is not None and not batch.after.done()
            sampled = before.sampled if before else batch.after.result()
            if sampled is None:
                raise LaunchError("the launch before has failed")
            feed(batch, inputs, sampled.token_ids)
        program = launch.program.inside.opened(_KEY)
        with program.lock:
            logits = program.run(inputs, _inside(launch.storage).pool, 1)
        found = sample(logits[: len(batch.rows)], batch.rows)
        if batch.scored:
            found.prompt_logprobs.extend(score(logits[len(batch.rows) :], batch.scored))
        return found

    def _tell(self, launch: DetachedLaunch | None) -> None:
        assert launch is not None
        if launch.error is not None:
            launch.ticket.set_exception(launch.error)
        else:
            assert launch.sampled is not None
            launch.ticket.set_result(launch.sampled)
        del self._of[launch.ticket]


@dataclass(frozen=True)
class DetachedDevice:
    name: str
    queues: list[DetachedQueue] = field(default_factory=list, compare=False)

    @property
    def memory_bytes(self) -> int:
        return 2**30

    def allocate(
        self, layout: KVLayout, num_blocks: int, memory: memoryview | None = None
    ) -> DetachedStorage:
        return DetachedStorage(self.name, layout, num_blocks)

    def lower(
        self,
        graph: Graph,
        weights: Weights,
        *,
        layout: KVLayout,
        dtype: str,
        deterministic: bool,
        quantization: str | None = None,
        progress: Progress = silent,
    ) -> DetachedProgram:
        program = (
            get_backend("cpu")
            .device()
            .lower(graph, weights, layout=layout, dtype=dtype, deterministic=deterministic)
        )
        return DetachedProgram(self.name, Memory(program))

    def open_queue(self, threads: int | None = None) -> DetachedQueue:
        self.queues.append(DetachedQueue(self.name))
        return self.queues[-1]


class DetachedBackend:
    """Implements Backend."""

    name = "detached"
    quantizations: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._devices = [DetachedDevice(f"detached:{index}") for index in range(2)]

    @property
    def stages(self) -> Mapping[str, Stage]:
        return get_backend("cpu").stages

    def devices(self) -> tuple[str, ...]:
        return tuple(device.name for device in self._devices)

    def device(self, index: int = 0) -> DetachedDevice:
        return self._devices[index]

    @property
    def num_fed(self) -> int:
        """Launches of all queues that were fed on the device, before the host knew."""
        return sum(queue.num_fed for device in self._devices for queue in device.queues)


class _Entry:
    """What an installed package would say."""

    name = "detached"

    def __init__(self, backend: DetachedBackend) -> None:
        self._backend = backend

    def load(self) -> DetachedBackend:
        return self._backend


@contextmanager
def installed() -> Iterator[DetachedBackend]:
    """The backend under its name, as one of a package would be."""
    backend = DetachedBackend()
    with pytest.MonkeyPatch.context() as patched:
        found = {"detached": _Entry(backend)}
        patched.setattr("sagellm.backends.interface._installed", lambda: found)
        yield backend
