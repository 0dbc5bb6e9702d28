import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pvariance

import msgspec
import pytest

from sagellm.load.synthetic import parse_synthetic
from sagellm.load.traces import BLOCK_LEN, PlannedRequest, TraceError


def made(text: str) -> list[PlannedRequest]:
    return list(parse_synthetic(f"synthetic:{text}").generate())


def gaps(text: str) -> list[float]:
    return [after.at_s - before.at_s for before, after in pairwise(made(text))]


def test_the_defaults_are_a_workload() -> None:
    found = made("")
    assert len(found) == 1000
    assert {(one.input_len, one.output_len, one.priority) for one in found} == {(128, 64, 2)}


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [("constant", 0), ("poisson", 1), ("gamma,cv=3", 3), ("gamma,cv=0.5", 0.5)],
)
def test_gaps_have_their_mean_and_their_variation(arrivals: str, cv: float) -> None:
    found = gaps(f"rate=4,requests=40000,arrivals={arrivals}")
    mean = fmean(found)
    assert mean == pytest.approx(0.25, rel=0.05)
    assert pvariance(found) ** 0.5 / mean == pytest.approx(cv, rel=0.05, abs=1e-9)


def test_diurnal_arrivals_follow_the_sine() -> None:
    text = "rate=100,arrivals=diurnal,period_s=100,amplitude=1,seconds=100"
    quarters = Counter(int(one.at_s // 25) for one in made(text))
    # The integral of 100 * (1 + sin) over each quarter of the period.
    expected = [2500 + 1592, 2500 + 1592, 2500 - 1592, 2500 - 1592]
    assert [quarters[quarter] for quarter in range(4)] == pytest.approx(expected, rel=0.08)


def test_a_workload_ends_at_its_time_or_its_number() -> None:
    assert len(made("rate=100,arrivals=constant,seconds=30")) == 3000
    assert len(made("rate=100,arrivals=constant,seconds=30,requests=7")) == 7


@pytest.mark.parametrize(
    ("input_len", "mean", "deviation"),
    [
        ("fixed:70", 70, 0),
        ("uniform:50:150", 100, 29.1),
        ("lognormal:1000:0.8", 1000, 947),  # mean * sqrt(exp(sigma ** 2) - 1)
        ("exponential:150", 150, 150),
    ],
)
def test_lengths_have_their_distribution(input_len: str, mean: float, deviation: float) -> None:
    found = [one.input_len for one in made(f"input={input_len},requests=40000")]
    assert fmean(found) == pytest.approx(mean, rel=0.02)
    assert pvariance(found) ** 0.5 == pytest.approx(deviation, rel=0.06)
    assert min(found) >= 1


def test_lengths_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = "2023-11-16 18:15:46,10,3\n2023-11-16 18:15:47,20,4\n"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    found = made(f"input=empirical:{path},output=empirical:{path}")
    assert {one.input_len for one in found} == {10, 20}
    assert {one.output_len for one in found} == {3, 4}


def test_budgets_are_numbers_with_weights() -> None:
    found = Counter(one.cost_budget for one in made("budgets=0.5:3+10:1,requests=8000"))
    assert set(found) == {0.5, 10.0}
    assert found[0.5] / found[10.0] == pytest.approx(3, rel=0.1)
    assert made("requests=1")[0].cost_budget is None


def test_users_priorities_and_models_have_their_weights() -> None:
    text = "users=a:3+b,priorities=critical:1+4:9,models=x,slo_ttft_s=0.5,requests=20000"
    found = made(text)
    users = Counter(one.user_id for one in found)
    priorities = Counter(one.priority for one in found)
    assert users["a"] / users["b"] == pytest.approx(3, rel=0.05)
    assert priorities[4] / priorities[0] == pytest.approx(9, rel=0.1)
    assert set(priorities) == {0, 4}
    assert {(one.model, one.slo_ttft_s) for one in found} == {("x", 0.5)}


def test_prompts_begin_with_shared_prefixes_of_zipf_weights() -> None:
    found = made("prefixes=3,prefix_len=1024,zipf=1,input=30,requests=20000")
    assert {one.input_len for one in found} == {2 * BLOCK_LEN + 30}
    families = Counter(one.block_ids for one in found)
    assert set(families) == {(0, 1), (2, 3), (4, 5)}
    assert families[0, 1] / families[2, 3] == pytest.approx(2, rel=0.06)
    assert families[0, 1] / families[4, 5] == pytest.approx(3, rel=0.06)


ALL = (
    "rate=8,arrivals=gamma,cv=2,input=lognormal:1000:0.8,output=exponential:150,requests=500,"
    "users=a:1+b:2,priorities=high:1+low:2,prefixes=5,zipf=1.2"
)


def test_equal_seeds_are_equal_workloads() -> None:
    assert made(f"{ALL},seed=3") == made(f"{ALL},seed=3") != made(f"{ALL},seed=4")


def test_a_workload_is_the_same_on_every_machine() -> None:
    """Times are rounded: the mathematical functions of C libraries differ in the last bit."""
    found = [msgspec.structs.replace(one, at_s=round(one.at_s, 6)) for one in made(ALL)]
    digest = hashlib.sha256(msgspec.json.encode(found)).hexdigest()
    assert digest[:16] == "46d7935c26241781"


def test_one_key_does_not_change_what_others_sample() -> None:
    plain, more = made("requests=50"), made("requests=50,users=a+b,input=uniform:1:9")
    assert [one.at_s for one in plain] == [one.at_s for one in more]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rat=8", "no key 'rat': did you mean rate"),
        ("arival=gamma", "no key 'arival': did you mean arrivals"),
        ("rate=8,rate=9", "rate is given twice"),
        ("rate=fast", "rate=fast: no number"),
        ("rate=0", "rate=0: too small"),
        ("rate=inf", "rate=inf: no number"),
        ("requests=1.5", "requests=1.5: no number"),
        ("seconds=-1", "seconds=-1: too small"),
        ("input=", "input has no value"),
        ("arrivals=bursty", "no arrivals 'bursty'"),
        ("cv=2", "cv is of gamma arrivals"),
        ("arrivals=gamma,period_s=9", "period_s is of diurnal arrivals"),
        ("arrivals=diurnal,amplitude=1.5", "amplitude above 1"),
        ("prefix_len=1024", "prefix_len is of shared prefixes"),
        ("prefixes=2,prefix_len=1000", "prefix_len=1000 is no whole number"),
        ("input=normal:9", "input=normal:9 is no distribution"),
        ("output=lognormal:9", "output=lognormal:9 is no distribution"),
        ("output=fixed:-3", "is no distribution"),
        ("input=uniform:9:3", "9 is above 3"),
        ("users=a:0", "'a:0' has no weight above 0"),
        ("budgets=1:9+much:1", "budgets: 'much' is no number of at least 0"),
        ("budgets=-1", "budgets: '-1' is no number of at least 0"),
        ("priorities=hihg", "priorities: no priority 'hihg': did you mean high"),
    ],
)
def test_a_wrong_text_is_said(text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message) as raised:
        parse_synthetic(text)
    assert raised.value.fix
