"""A minute of mutated grammars; coverage of lines guides the mutations."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("SAGELLM_FUZZ_GRAMMARS_S", "60"))


@pytest.mark.timeout(SECONDS + 120)
def test_no_grammar_takes_long_or_misleads_an_answer(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    rng = random.Random(0)
    for number in range(64):
        (tmp_path / str(number)).write_bytes(bytes([number % 8]) + rng.randbytes(100))
    command = [sys.executable, "-m", "fuzz_grammars", f"-max_total_time={SECONDS}", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    (num_runs,) = re.findall(r"Done (\d+) runs", found.stderr)
    print(f"{num_runs} grammars")
    assert int(num_runs) > 1000
