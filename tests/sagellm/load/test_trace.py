import time
from pathlib import Path
from typing import Any

import pytest

from sagellm.load import RequestRecord
from sagellm.load.report import write_csv_file
from sagellm.load.traces import (
    PlannedRequest,
    TraceError,
    read_trace,
    stream_trace,
    write_trace,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,0
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 600, "output_length": 6, "hash_ids": [0, 1]}

{"timestamp": 1250, "input_length": 1024, "output_length": 92, "hash_ids": [0, 2]}
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
7,ChatGPT,310,25,335,Conversation log
9,GPT-4,800,0,800,Conversation log
12.5,GPT-4,60,140,200,API log
"""
OWN = """{"at_s": 0, "input_len": 40, "output_len": 8}
{"at_s": 1.5, "input_len": 700, "output_len": 9, "block_ids": [4], "user_id": "ann",
"priority": "high", "slo_ttft_s": 0.5, "model": "small"}
""".replace(",\n", ", ")
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


def test_azure_of_2024_has_a_zone_in_its_times(tmp_path: Path) -> None:
    header = AZURE.splitlines()[0]
    rows = "2024-05-10 00:00:01.500000+00:00,90,7\n2024-05-10 02:00:02+02:00,30,2\n"
    assert read_trace(write(tmp_path, f"{header}\n{rows}")) == [
        PlannedRequest(0.0, 90, 7),
        PlannedRequest(0.5, 30, 2),
    ]


def test_burstgpt_without_the_requests_that_failed(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path, BURSTGPT)) == [
        PlannedRequest(0.0, 310, 25, model="ChatGPT"),
        PlannedRequest(5.5, 60, 140, model="GPT-4"),
    ]


def test_burstgpt_with_sessions(tmp_path: Path) -> None:
    text = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens\n"
    (found,) = read_trace(write(tmp_path, f"{text}3,s1,2.5,GPT-4,20,6,26\n"))
    assert found == PlannedRequest(0.0, 20, 6, model="GPT-4")


FULL = PlannedRequest(1.5, 700, 9, (4,), "ann", 1, 0.5, "small")


def test_our_own_format(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path, OWN)) == [PlannedRequest(0.0, 40, 8), FULL]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    requests = [PlannedRequest(0.0, 40, 8), FULL]
    write_trace(tmp_path / "trace", requests)
    assert read_trace(tmp_path / "trace") == requests
    first = (tmp_path / "trace").read_text().splitlines()[0]
    assert first == '{"at_s":0.0,"input_len":40,"output_len":8}'


def test_results_of_a_load_are_a_trace(tmp_path: Path) -> None:
    """The length of a prompt is the server's count, or else the planned one."""
    records = [RequestRecord(0, 2.0, 2.1, 30, 5), RequestRecord(1, 2.5, 2.5, 40, 6)]
    records[0].prompt_tokens = 33
    write_csv_file(tmp_path / "requests.csv", records)
    expected = [PlannedRequest(0.0, 33, 5), PlannedRequest(0.5, 40, 6)]
    assert read_trace(tmp_path / "requests.csv") == expected


def test_a_byte_order_mark_is_no_part_of_the_trace(tmp_path: Path) -> None:
    assert len(read_trace(write(tmp_path, "\ufeff" + AZURE))) == 3
    assert len(read_trace(write(tmp_path, "\ufeff" + OWN))) == 2


def test_lines_are_read_when_they_are_needed(tmp_path: Path) -> None:
    found = stream_trace(write(tmp_path, OWN + "no request\n"))
    assert [next(found), next(found)] == [PlannedRequest(0.0, 40, 8), FULL]
    with pytest.raises(TraceError, match="line 3"):
        next(found)


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
        (AZURE + "2023-11-16 18:15:46,many,2\n", "line 5: ContextTokens: 'many' is no whole"),
        (AZURE + "2023-11-16 18:15:46,1\n", "line 5: GeneratedTokens: '' is no whole"),
        (AZURE + "2023-11-16 18:15:46,-1,2\n", "line 5: ContextTokens: '-1' is no whole"),
        (AZURE + "2023-11-16 18:15:46," + "1" * 200_000 + ",2\n", "line 5: field larger"),
        (BURSTGPT + "soon,GPT-4,1,2,3,API log\n", "line 5: Timestamp: 'soon' is no number"),
        (BURSTGPT + "nan,GPT-4,1,2,3,API log\n", "line 5: Timestamp: 'nan' is no number"),
        ("Timestamp,Model,Request tokens\n", "line 1: no column Response tokens"),
        (OWN + '{"at_s": 3, "input_len": 1}\n', "line 3: .*output_len"),
        (OWN + '{"at_s": 3, "input_len": 1, "output_len": 1, "user": "a"}\n', "mean `user_id`"),
        (OWN + '{"at_s": 3, "input_len": 1, "output_len": 1, "priority": 5}\n', r"priority"),
        (
            OWN + '{"at_s": 3, "input_len": 1, "output_len": 1, "priority": "hihg"}\n',
            "line 3: no priority 'hihg': did you mean high",
        ),
        ('{"time": 1}\n', "line 1: neither `at_s`"),
        ('{\n "settings": {}\n}\n', "line 1: the object does not end"),
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
    mean = {1155: 211, 15_325: 149}
    lengths = (sum(one.input_len for one in found), sum(one.output_len for one in found))
    assert mean[round(lengths[0] / num)] == round(lengths[1] / num)


def test_times_without_a_zone_are_of_none(tmp_path: Path, monkeypatch: Any) -> None:
    """The clocks of Berlin move forward by an hour between these two times."""
    text = f"{AZURE.splitlines()[0]}\n2024-03-31 01:59:59,1,1\n2024-03-31 03:00:01,1,1\n"
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Europe/Berlin")
        time.tzset()
        found = read_trace(write(tmp_path, text))
    time.tzset()
    assert found[1].at_s == 3602.0
