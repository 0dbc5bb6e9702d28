"""Opens an engine of a model folder, generates, and prints its memory in bytes, as JSON.

python tests/engine_memory.py '{"model": FOLDER, OPTION: VALUE, ...}' PROMPT_LEN

The prompt goes through the vocabulary in equal steps. `steady`: resident after the answer.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import trio
from engine_driver import running

from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.options import EngineOptions


async def generate(options: dict[str, Any], prompt_len: int) -> None:
    engine = open_engine(EngineOptions(**options), name="e")
    config = json.loads((Path(options["model"]) / "config.json").read_text())
    step = max(1, config["vocab_size"] // prompt_len)
    async with running(engine) as (driver,):
        prompt = [index * step % config["vocab_size"] for index in range(prompt_len)]
        reply = await driver.submit("r", prompt, max_tokens=8)
        await reply.done.wait()
    assert len(reply.token_ids) == 8


def status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


if __name__ == "__main__":
    trio.run(generate, json.loads(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps({"peak": status("VmHWM"), "steady": status("VmRSS")}))
