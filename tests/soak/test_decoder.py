"""A minute of mutated messages; coverage of lines guides the mutations."""

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from sagellm.runtime.comm import protocol
from sagellm.runtime.kv.transport import SharedBlocks, TcpBlocks
from sagellm.runtime.messages import LeaseRef, TokenEvent
from sagellm.runtime.port import EngineHealth, EngineLoad, LeaseOffer

SECONDS = int(os.environ.get("SAGELLM_FUZZ_DECODER_S", "60"))
LEASE = LeaseRef(engine="p", replica=0, lease_id=1, request_id="r", choice=0, epoch=0, num_tokens=4)
BLOCKS = SharedBlocks(pid=1, descriptor=3, size=100, blocks=(1, 2), sums=(7,))
SEALED = TcpBlocks(host="h", port=1, export=b"e", key=b"k", num_blocks=2)
OFFER = LeaseOffer(request_id="r", choice=0, epoch=0, num_tokens=4, layout_hash="h")
SEEDS = (
    protocol.Open(graph=b"g", engine="e", replica=0, block_key=b"s"),
    protocol.Import(call=1, offer=OFFER),
    protocol.Receive(call=1, lease=LEASE, source=SEALED),
    protocol.Exported(call=1, source=BLOCKS),
    protocol.Events(
        owner="o", events=(TokenEvent(request_id="r", token_ids=(1,)),), load=EngineLoad()
    ),
    protocol.Pong(load=EngineLoad(), health=EngineHealth()),
    protocol.Refused(call=1, kind="stale", error="x"),
)


@pytest.mark.timeout(SECONDS + 120)
def test_no_message_harms_whoever_receives_it(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    for number, message in enumerate(SEEDS):
        for kind in (0, 1):
            seed = bytes([kind]) + msgspec.msgpack.encode(message)
            (tmp_path / f"{number}-{kind}").write_bytes(seed)
    command = [sys.executable, "-m", "fuzz_decoder", f"-max_total_time={SECONDS}", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    (num_runs,) = re.findall(r"Done (\d+) runs", found.stderr)
    print(f"{num_runs} messages")
    assert int(num_runs) > 1000
