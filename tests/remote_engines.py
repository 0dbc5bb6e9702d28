"""Engines as a graph sees them over a channel, and as they are in their workers."""

from dataclasses import dataclass
from typing import Any

import trio

from sagellm.runtime.comm.channel import MemoryChannel, memory_channels
from sagellm.runtime.engine.engine_server import EngineServer
from sagellm.runtime.engine.kinds.modelled import ModelledOptions, open_modelled
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.remote_kv import RemoteKVEngine
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.sampling import Sampling

PROMPT = tuple(range(1, 41))


@dataclass
class Pair:
    """An engine as the graph sees it, and as it is in its worker."""

    remote: RemoteKVEngine
    local: LocalEngine
    channel: MemoryChannel  # the graph's side

    def lose(self) -> None:
        self.channel.close("it was killed")


def open_null(name: str = "e", **options: Any) -> LocalEngine:
    return open_modelled(ModelledOptions(**{"model": "null", **options}), name=name)


def live(remote: RemoteKVEngine, local: LocalEngine, nursery: trio.Nursery) -> MemoryChannel:
    """Begin a life of `remote`."""
    here, there = memory_channels()
    nursery.start_soon(EngineServer(local, there).run)
    nursery.start_soon(remote.live, here)
    return here


def sequence(request_id: str = "r", **fields: Any) -> SequenceState:
    sampling = Sampling(max_tokens=fields.pop("max_tokens", 16), ignore_eos=True, seed=7)
    return SequenceState(
        owner="test",
        request_id=request_id,
        sampling=sampling,
        **{"prompt_token_ids": PROMPT, **fields},
    )
