import subprocess
from typing import Any

import pytest

from sagellm.cli import main


@pytest.mark.parametrize(
    ("ambient", "tokens", "expected"),
    [
        (None, (), "2"),
        ("3", (), "3"),
        ("3", ("--threads", "4"), "4"),
        ("3", ("--threads=4", "--rounds", "1"), "4"),
    ],
)
def test_threads_are_those_of_the_option_then_of_the_environment(
    ambient: str | None, tokens: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        ran.append((command, options["env"]))
        return subprocess.CompletedProcess(command, 0)

    ran: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if ambient:
        monkeypatch.setenv("OMP_NUM_THREADS", ambient)
    assert main(["bench", "engine", "--", *tokens]) == 0
    ((command, env),) = ran
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == expected
    assert expected in " ".join(command).split("--threads")[1]
