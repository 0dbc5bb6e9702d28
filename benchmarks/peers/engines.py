"""The engines, the environment of each, and the formats that each reads."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import environments
from benchmarks.peers.models import DRIVERS, folder, gguf_file, openvino_folder
from benchmarks.shape import Shape

OURS = "sagellm"
ROWS = ("bf16", "int8", "w8a8", "int4")
BYTES_A_WEIGHT = {"bf16": 2.0, "int8": 1.0, "w8a8": 1.0, "int4": 0.5}
_TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine. `rows`: formats of weights; `environment`: None is the project's own."""

    name: str
    environment: str | None
    driver: Path
    model: Callable[[Shape, str], Path]
    rows: tuple[str, ...]
    reads_long: bool = False  # also runs the cells of long contexts
    preloads: tuple[str, ...] = ()  # libraries in its environment to preload, if they exist

    def command(self) -> list[str]:
        """The command line of the driver. Raises NotInstalled."""
        python = environments.ready(self.environment) if self.environment else sys.executable
        return [str(python), str(self.driver)]

    def variables(self, threads: int) -> dict[str, str]:
        """The environment variables of the driver's process: the user's, and `threads` threads."""
        found = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        found |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        found |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if self.environment is None:
            return found
        found.pop("PYTHONPATH", None)
        if libraries := self._libraries():
            found["LD_PRELOAD"] = ":".join(libraries)
        return found

    def _libraries(self) -> list[str]:
        if not self.preloads:
            return []
        home = environments.ENVIRONMENTS[str(self.environment)].folder
        wanted = [*(home / name for name in self.preloads), _TCMALLOC]
        return [str(library) for library in wanted if library.exists()]


PEERS = {
    peer.name: peer
    for peer in (
        Peer(OURS, None, DRIVERS / "sagellm_driver.py", folder, ROWS, reads_long=True),
        Peer(
            "llama.cpp",
            "llama.cpp",
            DRIVERS / "llama_cpp_driver.py",
            gguf_file,
            ROWS,
            reads_long=True,
        ),
        Peer(
            "ik_llama.cpp",
            "ik_llama.cpp",
            DRIVERS / "ik_llama_cpp_driver.py",
            gguf_file,
            ROWS,
            reads_long=True,
        ),
        Peer(
            "openvino",
            "openvino",
            DRIVERS / "openvino_driver.py",
            openvino_folder,
            ("bf16", "int8", "w8a8"),
        ),
        Peer(
            "vllm",
            "vllm",
            DRIVERS / "vllm_driver.py",
            folder,
            ("bf16",),
            preloads=("lib/libiomp5.so",),
        ),
        Peer(
            "vllm+zentorch",
            "vllm+zentorch",
            DRIVERS / "vllm_driver.py",
            folder,
            ("bf16",),
            preloads=("lib/libiomp5.so",),
        ),
        Peer(
            "transformers",
            "transformers",
            DRIVERS / "transformers_driver.py",
            folder,
            ("bf16",),
        ),
    )
}
