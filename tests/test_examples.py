"""Every example runs as a user would run it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# One trains for an hour, two are its data, and one has functions for others.
NOT_PLAIN = {"train_sage_tiny.py", "exercises.py", "tool_exercises.py", "weather_tools.py"}
EXAMPLES = sorted(p.name for p in (ROOT / "examples").glob("*.py") if p.name not in NOT_PLAIN)

SAYS = {
    "quickstart.py": "68",
    "python_graph.py": " words: ",
    "own_operator.py": "refused: the prompt holds",
    "own_engine.py": "a graph of operators",
    "own_engine_kind.py": "tokens: 4",
    "own_family.py": "68",
    "own_transport.py": "transports: memory, tcp, nixl, file",
    "own_policy.py": "[16, 4, 8, 12]",
    "simulate_own_policy.py": "least_work       92.4% in time",
    "experiment.py": "TTFT: b - a = +24.55 ms: a is better",
    "simulated_scenarios.py": "objective, 2 + 2: 97% in time",
    "plan_placement.py": "TP4; 64 seqs, 512 tokens; fifo: 100.0% in time",
    "own_strategy.py": "[0, 0, 0, 1, 1, 1]",
    "own_chat_format.py": """['I add.', '', '{"x"', ': 1}']""",
    "own_backend.py": "(0, 1, 2, 3, 4)",
    "embed_in_asyncio.py": "elppa",
    "batch_file.py": '"id":"batch"',
    "client.py": "400 max_tokens",
    "embeddings.py": "12 + 7 = 19",
    "structured.py": "Ada will be 32 in Rome",
    "tools.py": "It is sunny in Paris, 21 degrees.",
    "two_models.py": "echo reads 23 as (205, 204) and answers '68'",
    "own_server.py": '400 {"error":{"message":"the prompt is longer than 200 characters',
}
ARGUMENTS = {"own_server.py": ("--once",)}  # else it serves until somebody stops it


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    done = run([f"examples/{name}", *ARGUMENTS.get(name, ())])
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout


def test_the_training_script_starts(tmp_path: Path) -> None:
    train("--steps", "1", "--tool-steps", "1", "--out", str(tmp_path))
    assert (tmp_path / "model.safetensors").stat().st_size < 8 * 2**20


def test_the_training_goes_on_from_a_folder(tmp_path: Path) -> None:
    shipped = ROOT / "runtime" / "models" / "sage_tiny"
    reported = train("--resume", str(shipped), "--tool-steps", "0", "--out", str(tmp_path))
    assert "sum 100.0%" in reported
    for file in shipped.rglob("*"):
        if file.is_file():
            written = tmp_path / file.relative_to(shipped)
            assert written.read_bytes() == file.read_bytes(), file.name


def train(*options: str) -> str:
    done = run(["examples/train_sage_tiny.py", *options])
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
