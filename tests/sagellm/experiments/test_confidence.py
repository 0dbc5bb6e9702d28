"""Intervals of the difference of two arms: they hold, also when they are looked at all the time."""

import math
from random import Random
from statistics import NormalDist, fmean, variance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.experiments.confidence import (
    BETTER_A,
    BETTER_B,
    EQUAL,
    MIN_UNITS,
    OPEN,
    ABTest,
    ArmSums,
    Comparison,
)

ALPHA = 0.05


def sums(values):
    found = ArmSums()
    for unit, value in values:
        found.add(unit, value)
    return found


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.floats(-1e6, 1e6)), min_size=8, max_size=60
    ).filter(lambda values: len({unit for unit, _ in values}) > 1)
)
def test_sums_by_unit_are_those_of_the_definition(values):
    found, plain = sums(values), [value for _, value in values]
    mean, units = fmean(plain), {unit for unit, _ in values}
    residuals = [sum(value - mean for one, value in values if one == unit) for unit in units]
    spread = sum(one * one for one in residuals) / len(plain) ** 2
    near = {"rel": 1e-6, "abs": 1e-3}
    assert found.mean == pytest.approx(mean, **near)
    assert found.variance_of_mean == pytest.approx(spread * len(units) / (len(units) - 1), **near)
    assert found.plain_variance_of_mean == pytest.approx(variance(plain) / len(plain), **near)


def test_large_values_lose_no_digits():
    found = sums((str(number), 1e9 + number % 2) for number in range(1000))
    assert found.variance_of_mean == pytest.approx(0.25 / 999)


def test_the_width_is_that_of_the_published_bound():
    """Waudby-Smith et al., Time-uniform central limit theory, theorem 2.2, with t = 1000."""
    test, draw = ABTest(ALPHA, planned=1000), Random(1)
    a, b = (sums((f"{n}", draw.gauss(0, 1)) for n in range(500)) for _ in "ab")
    rho2 = (-2 * math.log(ALPHA) + math.log(-2 * math.log(ALPHA)) + 1) / 1000
    t, found = 1000, test.compare(a, b)
    width = math.sqrt((t * rho2 + 1) / (t * rho2) * math.log((t * rho2 + 1) / ALPHA**2))
    assert found.information == pytest.approx(1000)
    assert found.always == pytest.approx(found.deviation * width)
    assert found.fixed == pytest.approx(found.deviation * NormalDist().inv_cdf(0.975))
    assert 1.4 < found.always / found.fixed < 1.8  # the price of looking all the time


def peeked(draw, seed, number, *, share=0.5, users=0, effect=0.0):
    """Look after each request; the number of the request that ended the test, or None."""
    source, test = Random(f"confidence/{seed}"), ABTest(ALPHA, planned=500)
    a, b, arms = ArmSums(), ArmSums(), {}
    for place in range(number):
        unit = f"{source.randrange(users) if users else place}"
        if unit not in arms:
            arms[unit] = source.random() < share, source.gauss(0, 1) if users else 0.0
        is_b, own = arms[unit]
        (b if is_b else a).add(unit, draw(source) + own + (effect if is_b else 0.0))
        if min(a.num_units, b.num_units) >= MIN_UNITS:
            found = test.compare(a, b)
            if test.verdict(found, lower_is_better=False) != OPEN:
                return place
    return None


DRAWS = {
    "exponential": lambda source: source.expovariate(1.0),
    "lognormal": lambda source: math.exp(source.gauss(0, 1.5)),
    "rare": lambda source: float(source.random() < 0.05),
}
CASES = [
    ("exponential", 0.5, 0),
    ("lognormal", 0.5, 0),
    ("rare", 0.5, 0),
    ("exponential", 0.1, 0),
    ("rare", 0.1, 0),
    ("exponential", 0.5, 150),
]


@pytest.mark.parametrize(("name", "share", "users"), CASES)
def test_equal_arms_that_are_looked_at_all_the_time_seldom_differ(name, share, users):
    runs = 120
    ended = [peeked(DRAWS[name], seed, 700, share=share, users=users) for seed in range(runs)]
    # Three standard deviations above alpha would be 0.11.
    assert sum(one is not None for one in ended) / runs <= ALPHA


def test_a_look_at_the_fixed_interval_all_the_time_would_be_wrong_often():
    """What the always-valid interval is for; else the test above would show nothing."""
    wrong = 0
    for seed in range(120):
        source, a, b = Random(f"confidence/{seed}"), ArmSums(), ArmSums()
        for place in range(700):
            (b if source.random() < 0.5 else a).add(f"{place}", source.expovariate(1.0))
            if min(a.num_units, b.num_units) >= MIN_UNITS:
                found = ABTest(ALPHA).compare(a, b)
                if abs(found.difference) > found.fixed:
                    wrong += 1
                    break
    assert wrong / 120 > 2 * ALPHA


def test_users_must_be_counted_as_units():
    """Requests of one user are alike: counted alone, they would promise too much."""
    source, by_user, alone = Random(3), (ArmSums(), ArmSums()), (ArmSums(), ArmSums())
    for place in range(4000):
        user = place % 80
        value = source.gauss(0, 1) + 3.0 * (user % 5)
        by_user[user % 2].add(f"{user}", value)
        alone[user % 2].add(f"{place}", value)
    few, many = ABTest().compare(*by_user), ABTest().compare(*alone)
    assert few.fixed > 4 * many.fixed
    assert few.information < 400 < many.information == 4000


@pytest.mark.parametrize(("effect", "number"), [(0.5, 600), (1.0, 250)])
def test_a_real_difference_is_found_early(effect, number):
    ended = [peeked(DRAWS["exponential"], seed, number, effect=effect) for seed in range(40)]
    assert sum(one is not None for one in ended) / 40 >= 0.9


def test_before_each_arm_has_its_units_nothing_is_known():
    a = sums((f"{n}", float(n)) for n in range(100))
    b = sums((f"{n % (MIN_UNITS - 1)}", float(n)) for n in range(100))
    assert ABTest().compare(a, b) == Comparison(a.mean, b.mean)


def test_arms_without_any_spread_stay_open():
    a, b = (sums((f"{n}", value) for n in range(100)) for value in (0.0, 1.0))
    found = ABTest().compare(a, b)
    assert found.always is None
    assert ABTest().verdict(found, lower_is_better=True) == OPEN


@pytest.mark.parametrize(
    ("difference", "lower_is_better", "margin", "verdict"),
    [
        (-2.0, True, 0.0, BETTER_B),
        (2.0, True, 0.0, BETTER_A),
        (2.0, False, 0.0, BETTER_B),
        (0.5, True, 0.0, OPEN),
        (0.5, True, 1.4, OPEN),
        (0.5, True, 1.5, EQUAL),
        (-0.5, True, 1.5, EQUAL),
    ],
)
def test_the_verdict_follows_from_the_interval(difference, lower_is_better, margin, verdict):
    found = Comparison(5.0, 5.0 + difference, 0.6, 1.0)
    assert ABTest().verdict(found, lower_is_better=lower_is_better, margin=margin) == verdict


def test_the_requests_that_are_still_needed_are_enough():
    source, test = Random(5), ABTest(ALPHA)
    a, b = (sums((f"{n}", source.gauss(mean, 1)) for n in range(150)) for mean in (0.0, 0.2))
    found = test.compare(a, b)
    growth = test.growth_needed(found)
    assert growth > 1
    for factor, is_enough in ((growth, True), (growth / 1.1, False)):
        later = found.deviation / math.sqrt(factor)
        width = test._bound(found.information * factor) * later
        assert (width < abs(found.difference)) == is_enough
    assert test.growth_needed(Comparison(1.0, 1.0, 0.1, 0.2, 0.05, 300)) is None
