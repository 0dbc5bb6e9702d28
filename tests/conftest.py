"""Settings of every test: a busy machine is no failure, and what measures time has it to itself.

With SAGELLM_TEST_EXECUTOR=processes, every graph that a test opens is one of worker processes. With
SAGELLM_TEST_GATEWAYS=2, what is served on a socket is served by two gateway processes.
"""

import fcntl
import gc
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from sagellm.builder import Graph
from sagellm.opening.open_graph import OpenGraph

EXECUTOR = os.environ.get("SAGELLM_TEST_EXECUTOR")
settings.register_profile("sagellm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sagellm")
# A shell starts background jobs with Ctrl-C ignored, and so would the commands that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> None:
    """As `sagellm serve` does. A collection that visits what all tests have loaded takes 0.6 s,
    which is more CPU time than a template or a grammar may take.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=EXECUTOR is not None)
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph is opened with by those who do not say."""
    if {"autojump_clock", "mock_clock"} & set(request.fixturenames):
        pytest.skip("processes do not run in virtual time")
    if request.node.get_closest_marker("in_process") is not None:
        pytest.skip("it looks into engines of this process")
    opened = Graph.open

    def open_graph(self: Graph, **asked: Any) -> OpenGraph:
        return opened(self, **{"executor": EXECUTOR, **asked})

    monkeypatch.setattr(Graph, "open", open_graph)


@contextmanager
def locked(path: Path, kind: int) -> Iterator[None]:
    with path.open("w") as file:  # closing it frees the lock
        fcntl.flock(file, kind)
        yield


@contextmanager
def room(folder: Path, *, alone: bool) -> Iterator[None]:
    """Holds while no test that is alone runs beside another, whichever worker has it.

    All come through the door, where one that is to be alone waits until the room is empty: else
    the others, who may come in together, would keep it out for as long as there are any.
    """
    with ExitStack() as inside:
        with locked(folder / "door", fcntl.LOCK_EX):
            inside.enter_context(locked(folder / "room", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around the time-out: to wait is not to hang
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not hasattr(item.config, "workerinput"):
        return (yield)
    folder = item.config.cache.mkdir("alone")
    with room(folder, alone=item.get_closest_marker("alone") is not None):
        return (yield)
