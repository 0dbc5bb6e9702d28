"""A driver for tests: an engine that makes a token every millisecond, and fails when it is told.

    python fake_driver.py WIRE_FOLDER [MODE]

Modes: none, "die" (illegal instruction at load), "refuse" (an error at load), "exit" (at a run),
"mute" (never answers a run), "noise" (prints on stdout), "spin" (a thread that never sleeps).
"""

import os
import signal
import sys
import threading
import time

sys.path.insert(0, sys.argv[1])
from wire import Ask, Load, serve

MODE = sys.argv[2] if len(sys.argv) > 2 else ""


class Fake:
    def load(self, request: Load) -> None:
        if MODE == "die":
            os.kill(os.getpid(), signal.SIGILL)
        if MODE == "refuse":
            raise ValueError(f"no row {request.row}")
        if MODE == "spin":
            threading.Thread(target=_spin, daemon=True).start()

    def run(self, request: Ask) -> list[list[float]]:
        if MODE == "noise":
            print("I print where I should not", flush=True)
            os.system("echo so do I")
        if MODE == "exit":
            print("out of memory", file=sys.stderr)
            sys.exit(3)
        if MODE == "mute":
            time.sleep(60)
        one = [0.001 * (number + 1) for number in range(request.num_out)]
        return [one for _ in request.prompts]

    def score(self, prompt: list[int]) -> list[float]:
        return [-1.0 - 0.1 * token for token in prompt[1:]]


def _spin() -> None:
    while True:
        pass


if __name__ == "__main__":
    serve(Fake())
