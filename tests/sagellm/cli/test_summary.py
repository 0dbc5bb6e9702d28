import json

import pytest

from sagellm.batch import LineCounts
from sagellm.cli.terminal import print_summary, show_summary, summary_rows
from sagellm.statistics import Statistics

SEEN = Statistics(
    elapsed_s=2.0,
    num_requests=4,
    num_open=0,
    ended={"length": 3, "refused": 1},
    num_tokens=30,
    ttft_p50_s=0.0251,
    ttft_p99_s=0.04,
    itl_p50_s=None,
    itl_p99_s=None,
    peak_kv_ratio=0.125,
    num_preemptions=0,
    engines={},
)


def test_the_figures() -> None:
    assert dict(summary_rows(SEEN)) == {
        "requests": "1",
        "tokens": "30",
        "tokens/s": "15.0",
        "TTFT p50/p99": "25.1 / 40.0 ms",
        "ITL p50/p99": "-",
        "peak KV use": "12.5%",
    }


@pytest.mark.parametrize(
    ("tally", "shown"),
    [
        (LineCounts(num_answered=3), "3"),
        (LineCounts(num_answered=3, num_failed=1), "4 (1 failed)"),
        (
            LineCounts(num_answered=1, num_failed=1, num_skipped=5),
            "2 (1 failed, 5 answered before)",
        ),
    ],
)
def test_requests_are_lines_of_the_file(tally: LineCounts, shown: str) -> None:
    assert dict(summary_rows(SEEN, tally))["requests"] == shown


def test_without_a_terminal_it_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(SEEN)
    shown = capsys.readouterr()
    assert shown.err.splitlines()[0] == "requests: 1"
    assert shown.out == ""


def test_on_a_terminal_it_is_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_summary(SEEN)
    assert "┃" in capsys.readouterr().err


def test_json_has_seconds_and_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(SEEN, LineCounts(num_answered=3, num_failed=1))
    found = json.loads(capsys.readouterr().out)
    assert found["ttft_s"] == {"p50": 0.0251, "p99": 0.04}
    assert found["itl_s"] == {"p50": None, "p99": None}
    assert (found["answered"], found["tokens_per_s"]) == (3, 15.0)
