"""Streams over two workers, one behind a network of its own, whose link goes down for a while.

Run by itself, in a network namespace that it may change: see `seen_of`. It prints what it saw, as
JSON; what must hold is for the test that started it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from process_streams import EXACT, PROMPTS, SEEDED, stream_all

from sagellm import Graph, ops
from sagellm.runtime.cluster.executor_options import ProcessesOptions
from sagellm.runtime.cluster.launch import ProcessLauncher, ProcessLife
from sagellm.runtime.comm.keys import create_keys
from sagellm.session import Session

HERE, THERE = "10.9.0.1", "10.9.0.2"
NUM_STREAMS = 32


def seen_of(seconds: float) -> Any:
    """What was seen while the link was down for so long. Skips where no namespace can be had."""
    own, cable = ("unshare", "-Urn"), ("ip", "link", "add", "cable", "type", "veth")
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("no tools for network namespaces here")
    if subprocess.run((*own, *cable), capture_output=True, check=False).returncode:
        pytest.skip("no network namespaces here")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    told = subprocess.run(
        (*own, sys.executable, __file__, str(seconds)), env=env, stdout=subprocess.PIPE, check=True
    )
    return json.loads(told.stdout)


def ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True)


@contextmanager
def network() -> Iterator[str]:
    """Two namespaces and a cable: ours, and that of a process, whose id it is."""
    with subprocess.Popen(("unshare", "-n", "sleep", "1000")) as holder:
        try:
            while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
                pass
            there = ("nsenter", "-t", str(holder.pid), "-n", "ip")
            ip("link", "set", "lo", "up")
            ip("link", "add", "here", "type", "veth", "peer", "there", "netns", str(holder.pid))
            ip("addr", "add", f"{HERE}/24", "dev", "here")
            ip("link", "set", "here", "up")
            for words in (
                "link set lo up",
                f"addr add {THERE}/24 dev there",
                "link set there up",
            ):
                subprocess.run((*there, *words.split()), check=True)
            yield str(holder.pid)
        finally:
            holder.kill()


class OneFar(ProcessLauncher):
    """The first worker that it starts is far away, and whoever takes its place."""

    def __init__(self, options: ProcessesOptions, far: str) -> None:
        super().__init__("far_worker", options.address, options.keys)
        self._far = far
        self._is_first = True

    def launch(self, epoch: int) -> ProcessLife:
        if self._is_first or epoch > 1:
            os.environ["SAGELLM_TEST_FAR"] = self._far
        self._is_first = False
        try:
            return super().launch(epoch)
        finally:
            os.environ.pop("SAGELLM_TEST_FAR", None)


async def parted(session: Session, seconds: float, seen: dict[str, Any], streams: Any) -> None:
    assert session.supervisor is not None
    # All have begun, and none may have ended when the link is down.
    while (  # noqa: ASYNC110 (streams tell nobody)
        len(streams.tokens) < NUM_STREAMS or not all(streams.tokens.values())
    ):
        await trio.sleep(0.001)
    ip("link", "set", "here", "down")
    await trio.sleep(seconds)
    seen["num_up_while_parted"] = sum(one.is_serving for one in session.supervisor.workers)
    ip("link", "set", "here", "up")
    healed_s = trio.current_time()
    while not all(one.is_serving for one in session.supervisor.workers):  # noqa: ASYNC110
        await trio.sleep(0.005)
    seen["back_s"] = trio.current_time() - healed_s
    seen["epochs"] = sorted(one.epoch for one in session.supervisor.workers)


async def run(seconds: float, far: str, keys: str) -> dict[str, Any]:
    graph = Graph("far").engine("g", model="sage-tiny", replicas=2, **EXACT)
    graph >> ops.route() >> ops.generate(engine="g")
    options = {"executor.address": f"tcp://{HERE}:0", "executor.keys": keys}
    opening = graph.open(executor="processes", set=options)
    opening.launch_by(lambda asked: OneFar(asked, far))
    prompts = dict(enumerate(PROMPTS[:NUM_STREAMS]))
    seen: dict[str, Any] = {}
    async with opening as session:
        right = await stream_all(session, SEEDED, prompts=prompts)

        async def meanwhile(streams: Any) -> None:
            await parted(session, seconds, seen, streams)

        found = await stream_all(session, SEEDED, meanwhile, prompts=prompts)
        after = await stream_all(session, SEEDED, prompts=prompts)
        await session.idle()
        session.executor.core.ledger.check()
        loads = [load for replicas in session.statistics().engines.values() for load in replicas]
        seen["num_leased"] = sum(load.num_leased_blocks for load in loads)
        seen["num_moved"] = session.executor.core.recovery.num_migrated
    seen["is_identical"] = right.tokens == found.tokens == after.tokens
    seen["longest_gap_s"] = max(found.gaps_s.values())
    return seen


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, network() as far:
        keys = Path(folder) / "keys"
        create_keys(keys)
        print(json.dumps(trio.run(run, float(sys.argv[1]), far, str(keys))))


if __name__ == "__main__":
    main()
