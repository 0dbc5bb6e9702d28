import subprocess
import sys

import pytest

from sagellm.load import RequestRecord
from sagellm.load.report import Objective, percentile, spread, summarise


def record(
    number: int, sent_s: float, tokens_s: tuple[float, ...], **fields: object
) -> RequestRecord:
    """A request planned and sent at a time, with a token at each of these."""
    made = RequestRecord(number, sent_s, sent_s, input_len=4, output_len=len(tokens_s))
    for at_s in tokens_s:
        made.token(at_s)
    made.ended_s = tokens_s[-1] if tokens_s else sent_s
    for name, value in fields.items():
        setattr(made, name, value)
    return made


FAST = record(0, 0.0, (0.1, 0.2, 0.3), prompt_tokens=4, completion_tokens=3)
SLOW = record(1, 1.0, (2.0, 2.5), prompt_tokens=6, completion_tokens=2)
FAILED = record(2, 2.0, (), error="http_429", ended_s=4.0, num_refusals=2, num_attempts=2)


def test_latencies_of_one_request() -> None:
    assert FAST.ttft_s == pytest.approx(0.1)
    assert FAST.itl_s == pytest.approx([0.1, 0.1])
    assert FAST.tpot_s == pytest.approx(0.1)
    assert FAST.e2e_s == pytest.approx(0.3)


def test_tokens_that_share_an_event_do_not_touch_the_tpot() -> None:
    coalesced = record(0, 0.0, (0.1, 0.5), completion_tokens=5)
    assert coalesced.itl_s == pytest.approx([0.4])
    assert coalesced.tpot_s == pytest.approx(0.1)


def test_a_token_without_text_is_the_last() -> None:
    ended = record(0, 0.0, (0.1, 0.2), completion_tokens=3)
    ended.last(0.3)
    assert ended.tpot_s == pytest.approx(0.1)
    assert len(ended.itl_s) == 1
    alone = record(0, 0.0, (), completion_tokens=1)
    alone.last(0.2)
    assert alone.ttft_s == pytest.approx(0.2)


def test_one_token_has_no_tpot() -> None:
    assert record(0, 0.0, (0.1,)).tpot_s is None


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1.0), (0.5, 2.5), (0.9, 3.7), (0.99, 3.97), (1.0, 4.0)]
)
def test_a_percentile_lies_between_the_closest_ranks(share: float, value: float) -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], share) == pytest.approx(value)


def test_nothing_has_no_spread() -> None:
    assert spread([None, None]) is None
    one = spread([None, 2.0])
    assert one is not None
    assert (one.mean, one.p50, one.p99, one.max) == (2.0, 2.0, 2.0, 2.0)


def test_a_summary_of_known_records() -> None:
    found = summarise([FAST, SLOW, FAILED], cpu_s=0.4, num_open_peak=2, is_open_loop=True)
    assert (found.num_sent, found.num_ok, found.num_failed) == (3, 2, 1)
    assert found.errors == {"http_429": 1}
    assert (found.num_refusals, found.num_retries) == (2, 1)
    assert found.elapsed_s == 4.0
    assert (found.prompt_tokens, found.completion_tokens) == (10, 5)
    assert found.tokens_per_s == pytest.approx(5 / 4)
    assert found.tokens_per_event == 1.0
    assert found.offered_per_s == pytest.approx(1.0)
    assert found.reached_per_s == pytest.approx(0.5)
    assert found.ttft_s is not None
    assert found.ttft_s.p50 == pytest.approx(0.55)
    assert found.itl_s is not None
    assert found.itl_s.max == pytest.approx(0.5)
    assert found.goodput is None
    assert found.client.cpu_ratio == pytest.approx(0.1)
    assert found.client.cpu_us_per_event == pytest.approx(0.4e6 / 5)


@pytest.mark.parametrize(
    ("objective", "num_good"),
    [
        (Objective(), 2),
        (Objective(ttft_s=1.0), 2),
        (Objective(ttft_s=0.5), 1),
        (Objective(itl_s=0.4), 1),
        (Objective(ttft_s=0.05), 0),
        (Objective(ttft_s=1.0, itl_s=0.5), 2),
    ],
)
def test_goodput_counts_what_meets_the_objective(objective: Objective, num_good: int) -> None:
    records = [FAST, SLOW, FAILED]
    found = summarise(records, cpu_s=0, num_open_peak=1, objective=objective).goodput
    assert found is not None
    assert found.num_good == num_good
    assert found.ratio == pytest.approx(num_good / 3)
    assert found.per_s == pytest.approx(num_good / 4)


def test_a_server_without_usage_is_known_as_one() -> None:
    told = summarise([record(0, 0.0, (0.1, 0.2))], cpu_s=0, num_open_peak=1)
    assert (told.completion_tokens, told.is_token_count_known) == (2, False)


def test_no_record_is_a_summary_too() -> None:
    empty = summarise([], cpu_s=0, num_open_peak=0)
    assert (empty.num_sent, empty.elapsed_s, empty.ttft_s) == (0, 0.0, None)


def test_a_client_that_is_busy_says_so() -> None:
    assert summarise([FAST], cpu_s=0.29, num_open_peak=1).client.is_saturated
    assert not summarise([FAST], cpu_s=0.1, num_open_peak=1).client.is_saturated


def test_a_report_needs_no_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import sagellm.load.report"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
