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
    BlockSums,
    Comparison,
    Sums,
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


def both(values):
    """The sums of (unit, block, value, is b)."""
    found = Sums()
    for unit, block, value, is_b in values:
        found.add(unit, block, value, is_b=is_b)
    return found


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.booleans(), st.floats(-1e3, 1e3)), min_size=6, max_size=40
    ).filter(lambda values: {is_b for _, is_b, _ in values} == {True, False})
)
def test_sums_by_block_are_those_of_the_definition(steps):
    block, values = 0, []
    for step, is_b, value in steps:
        block += step
        values.append((f"{len(values)}", block, value, is_b))
    sums, blocks = both(values), {block for _, block, _, _ in values}
    if len(blocks) == 1:
        return
    arms = [[value for _, _, value, is_b in values if is_b == arm] for arm in (False, True)]
    spread = 0.0
    for number in blocks:
        parts = [
            sum(v - fmean(arms[arm]) for _, one, v, is_b in values if (one, is_b) == (number, arm))
            for arm in (False, True)
        ]
        spread += (parts[1] / len(arms[1]) - parts[0] / len(arms[0])) ** 2
    expected = spread * len(blocks) / (len(blocks) - 1)
    assert sums.blocks.variance(sums.a, sums.b) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_large_values_lose_no_digits():
    found = sums((str(number), 1e9 + number % 2) for number in range(1000))
    assert found.variance_of_mean == pytest.approx(0.25 / 999)


def test_the_width_is_that_of_the_published_bound():
    """Waudby-Smith et al., Time-uniform central limit theory, theorem 2.2, with t = 1000."""
    test, draw = ABTest(ALPHA, planned=1000), Random(1)
    sums = both((f"{n}", n, draw.gauss(0, 1), n % 2) for n in range(1000))
    sums.blocks = LikeUnits(num_blocks=MIN_UNITS)
    rho2 = (-2 * math.log(ALPHA) + math.log(-2 * math.log(ALPHA)) + 1) / 1000
    t, found = 1000, test.compare(sums)
    width = math.sqrt((t * rho2 + 1) / (t * rho2) * math.log((t * rho2 + 1) / ALPHA**2))
    assert found.information == pytest.approx(1000)
    assert found.always == pytest.approx(found.deviation * width)
    assert found.fixed == pytest.approx(found.deviation * NormalDist().inv_cdf(0.975))
    assert 1.4 < found.always / found.fixed < 1.8  # the price of looking all the time


class LikeUnits(BlockSums):
    """Blocks that do not count."""

    def variance(self, a, b):
        return 0.0


def peeked(draw, seed, number, *, share=0.5, users=0, effect=0.0, block_len=5):
    """Look after each request; the number of the request that ended the test, or None."""
    source, test = Random(f"confidence/{seed}"), ABTest(ALPHA, planned=500)
    sums, arms = Sums(), {}
    for place in range(number):
        unit = f"{source.randrange(users) if users else place}"
        if unit not in arms:
            arms[unit] = source.random() < share, source.gauss(0, 1) if users else 0.0
        is_b, own = arms[unit]
        value = draw(source) + own + (effect if is_b else 0.0)
        sums.add(unit, place // block_len, value, is_b=is_b)
        if sums.is_enough:
            found = test.compare(sums)
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
        source, sums = Random(f"confidence/{seed}"), Sums()
        for place in range(700):
            value, is_b = source.expovariate(1.0), source.random() < 0.5
            sums.add(f"{place}", place // 5, value, is_b=is_b)
            if sums.is_enough:
                found = ABTest(ALPHA).compare(sums)
                if abs(found.difference) > found.fixed:
                    wrong += 1
                    break
    assert wrong / 120 > 2 * ALPHA


def queued(seed, number, block_len):
    """A test of equal arms, each with a queue: its waits are alike for some forty requests."""
    source, test, sums = Random(f"queued/{seed}"), ABTest(ALPHA, planned=500), Sums()
    waits, is_wrong = [0.0, 0.0], False
    for place in range(number):
        arm = source.random() < 0.5
        waits[arm] = 0.95 * waits[arm] + source.gauss(0, 1)
        sums.add(f"{place}", place // block_len, waits[arm], is_b=arm)
        if sums.is_enough and not is_wrong:
            found = test.compare(sums)
            is_wrong = test.verdict(found, lower_is_better=True) != OPEN
    return is_wrong, sums.blocks.correlation


def test_requests_that_share_a_queue_must_share_a_block():
    long, short = ([queued(seed, 7500, length) for seed in range(12)] for length in (240, 5))
    assert sum(is_wrong for is_wrong, _ in long) <= 1
    assert sum(is_wrong for is_wrong, _ in short) >= 4
    assert all(correlation > 0.3 for _, correlation in short)  # which tells that they are too short
    assert fmean(correlation for _, correlation in long) < 0.3


def test_what_slows_both_arms_does_not_count():
    source, sums = Random(4), Sums()
    for place in range(4000):
        burst = 10.0 * (place // 40 % 2)
        value = source.gauss(0, 1) + burst
        sums.add(f"{place}", place // 40, value, is_b=source.random() < 0.5)
    by_blocks = math.sqrt(sums.blocks.variance(sums.a, sums.b))
    alone = math.sqrt(sums.a.variance_of_mean + sums.b.variance_of_mean)
    assert by_blocks < 1.5 * alone  # of single requests, whose spread is that of the bursts


def test_users_must_be_counted_as_units():
    """Requests of one user are alike: counted alone, they would promise too much."""
    source, by_user, alone = Random(3), Sums(), Sums()
    for place in range(4000):
        user = place % 80
        value, is_b = source.gauss(0, 1) + 3.0 * (user % 5), user % 2 == 1
        by_user.add(f"{user}", place // 80, value, is_b=is_b)
        alone.add(f"{place}", place // 80, value, is_b=is_b)
    few, many = ABTest().compare(by_user), ABTest().compare(alone)
    assert few.fixed > 4 * many.fixed
    assert few.information < 400
    assert many.information > 2000


@pytest.mark.parametrize(("effect", "number"), [(0.5, 600), (1.0, 250)])
def test_a_real_difference_is_found_early(effect, number):
    ended = [peeked(DRAWS["exponential"], seed, number, effect=effect) for seed in range(40)]
    assert sum(one is not None for one in ended) / 40 >= 0.9


def test_before_each_arm_has_its_units_nothing_is_known():
    few = both(
        (f"{n % (2 * MIN_UNITS - 1)}", n, float(n), n % (2 * MIN_UNITS - 1) >= MIN_UNITS)
        for n in range(200)
    )
    assert (few.a.num_units, few.b.num_units) == (MIN_UNITS, MIN_UNITS - 1)
    assert ABTest().compare(few) == Comparison(few.a.mean, few.b.mean)
    short = both((f"{n}", n * (MIN_UNITS - 1) // 200, float(n), n % 2) for n in range(200))
    assert ABTest().compare(short) == Comparison(short.a.mean, short.b.mean)


def test_arms_without_any_spread_stay_open():
    found = ABTest().compare(both((f"{n}", n, float(n % 2), n % 2) for n in range(200)))
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
    values = ((f"{n}", n // 4, source.gauss(0.2 * (n % 2), 1), n % 2) for n in range(300))
    found = test.compare(both(values))
    growth = test.growth_needed(found)
    assert growth > 1
    for factor, is_enough in ((growth, True), (growth / 1.1, False)):
        later = found.deviation / math.sqrt(factor)
        width = test._bound(found.information * factor) * later
        assert (width < abs(found.difference)) == is_enough
    assert test.growth_needed(Comparison(1.0, 1.0, 0.1, 0.2, 0.05, 300)) is None
