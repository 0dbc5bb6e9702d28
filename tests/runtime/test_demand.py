"""Forecasts of demand, against small cases worked by hand."""

import pytest

from sagellm.runtime.demand import Demand, MeanLength, RateForecast


def after(method, *rates, seconds=0.1):
    """The forecast after these rates; in a tenth of a second, all of them may be chance."""
    forecast = RateForecast(method)
    for rate in rates:
        forecast = forecast.after(rate, seconds)
    return forecast


def test_a_constant_forecast_is_the_latest_rate():
    assert after("constant", 4.0, 9.0, 2.0).at(10) == 2.0


def test_the_mean_moves_towards_the_latest_rate():
    found = after("ewma", 10.0, 20.0)
    assert found.level == pytest.approx(10 + 0.4 * 10)
    assert found.at(0) == found.at(100) == found.level


def test_the_damped_trend_of_holt():
    found = after("holt", 10.0, 20.0)
    assert (found.level, found.trend) == (pytest.approx(14.0), pytest.approx(0.8))
    # One interval ahead, the trend adds 0.9 of itself, and then 0.81.
    assert found.at(1) == pytest.approx(14 + 0.9 * 0.8)
    assert found.at(2) == pytest.approx(14 + (0.9 + 0.81) * 0.8)
    third = found.after(14 + 0.9 * 0.8, 0.1)  # as predicted: the trend fades, and nothing else
    assert third.level == pytest.approx(14 + 0.9 * 0.8)
    assert third.trend == pytest.approx(0.9 * 0.8)


@pytest.mark.parametrize(("rate", "is_new"), [(5.8, False), (6.0, True)])
def test_a_rate_that_is_no_chance_is_the_new_level(rate, is_new):
    # Of 40 expected requests in 10 s, 59 are three standard deviations more.
    found = after("holt", 4.0, rate, seconds=10.0)
    assert (found.level == rate) == is_new
    assert (found.trend == 0.0) == is_new


def test_what_is_usual_in_bursts_is_no_new_level():
    forecast = after("holt", *(4.0, 12.0) * 20, seconds=10.0)
    found = forecast.after(18.0, 10.0)
    assert 6.0 < forecast.level < found.level < 14.0
    assert forecast.after(40.0, 10.0).level == 40.0


def test_a_fall_is_never_a_new_level():
    assert after("holt", 4.0, 0.0, seconds=1000.0).level == pytest.approx(2.4)


def test_a_trend_leads_a_steady_rise_and_no_forecast_is_negative():
    rising = after("holt", *range(60))
    assert rising.at(0) < 59 < rising.at(6)
    falling = after("holt", *(100.0 - 10 * n for n in range(10)), 0.0, 0.0)
    assert falling.at(50) == 0.0


@pytest.mark.parametrize("method", ["constant", "ewma", "holt"])
def test_nothing_known_and_nothing_coming_are_zero(method):
    assert RateForecast(method).at(3) == 0.0
    assert RateForecast(method).after_gap(9, 1.0).level is None
    assert after(method, 50.0).after_gap(10**9, 1.0).at(5) == pytest.approx(0.0, abs=1e-3)


def test_an_interval_gives_its_rate():
    demand = Demand(RateForecast("constant"), begun_s=100.0)
    for _ in range(6):
        demand = demand.with_request(10, 5)
    closed = demand.closed(103.0)
    assert (closed.rate.level, closed.num_arrived, closed.begun_s) == (2.0, 0, 103.0)
    assert closed.closed(104.0).peak(5) == 0.0


def test_time_without_requests_counts_as_empty_intervals():
    demand = Demand(RateForecast("ewma", level=10.0), begun_s=0.0)
    resumed = demand.resumed(25.0, 10.0)
    assert resumed.rate.level == pytest.approx(10 * 0.6**2)
    assert resumed.begun_s == 25.0


def test_the_peak_is_the_higher_of_now_and_later():
    falling = Demand(after("holt", 30.0, 20.0, 10.0))
    assert falling.peak(8) == falling.rate.at(0) > falling.rate.at(8)


def test_longer_requests_stretch_the_demand():
    demand = Demand(RateForecast())
    for _ in range(1000):
        demand = demand.with_request(100, 100)
    assert demand.stretch(counts_outputs=True) == 1.0
    for _ in range(200):
        demand = demand.with_request(200, 100)
    assert demand.stretch(counts_outputs=False) > demand.stretch(counts_outputs=True) > 1.2
    for _ in range(300):
        demand = demand.with_request(100_000, 100)
    assert demand.stretch(counts_outputs=True) == 2.0


def test_the_first_requests_have_their_plain_mean():
    length = MeanLength().after(10).after(30)
    assert (length.recent, length.usual) == (20.0, 20.0)
