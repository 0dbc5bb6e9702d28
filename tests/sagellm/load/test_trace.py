import time
from pathlib import Path
from typing import Any

import pytest

from sagellm.load.workload import PlannedRequest, TraceError, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,0
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 600, "output_length": 6, "hash_ids": [0, 1]}

{"timestamp": 1250, "input_length": 1024, "output_length": 92, "hash_ids": [0, 2]}
"""
TRACES = Path(__file__).parents[4] / "shared" / "traces"


def write(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_azure(tmp_path: Path) -> None:
    first, second, third = read_trace(write(tmp_path, AZURE))
    assert first == PlannedRequest(0.0, 374, 44)
    assert second.at_s == pytest.approx(4.314579, abs=1e-5)
    assert (third.input_len, third.output_len) == (879, 1)


def test_mooncake(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path, MOONCAKE)) == [
        PlannedRequest(0.0, 600, 6, (0, 1)),
        PlannedRequest(0.25, 1024, 92, (0, 2)),
    ]


def test_requests_come_in_order_of_time(tmp_path: Path) -> None:
    lines = MOONCAKE.split("\n\n")
    found = read_trace(write(tmp_path, lines[1] + lines[0]))
    assert [arrival.input_len for arrival in found] == [600, 1024]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column TIMESTAMP"),
        ("a,b\n1,2\n", "no column TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        (AZURE + "yesterday,1,2\n", "line 5: Invalid isoformat"),
        (AZURE + "2023-11-16 18:15:46,many,2\n", "line 5: invalid literal"),
        (AZURE + "2023-11-16 18:15:46,1\n", "line 5: invalid literal"),
        (MOONCAKE + "{\n", "line 4"),
        (MOONCAKE + '{"timestamp": 1, "input_length": 0, "output_length": 1}\n', "input_length"),
        (MOONCAKE + '{"timestamp": -1, "input_length": 1, "output_length": 1}\n', "timestamp"),
    ],
)
def test_what_is_no_trace_is_said_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(write(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "num"),
    [("azure_llm_inference_2023_conv.csv", 19_366), ("mooncake_synthetic.jsonl", 3_993)],
)
def test_the_published_traces_are_read_as_they_are(name: str, num: int) -> None:
    if not (TRACES / name).is_file():
        pytest.skip(f"{name} is not here")
    found = read_trace(TRACES / name)
    assert len(found) == num
    assert found[0].at_s == 0


def test_times_without_a_zone_are_of_none(tmp_path: Path, monkeypatch: Any) -> None:
    """The clocks of Berlin move forward by an hour between these two times."""
    text = f"{AZURE.splitlines()[0]}\n2024-03-31 01:59:59,1,1\n2024-03-31 03:00:01,1,1\n"
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Europe/Berlin")
        time.tzset()
        found = read_trace(write(tmp_path, text))
    time.tzset()
    assert found[1].at_s == 3602.0
