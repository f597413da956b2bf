"""Intervals against scipy's, and by how often they hold the truth."""

import math

import numpy as np
import pytest
from atlasvid.engine.quality.statistics import (
    Estimate,
    bootstrap_interval,
    mean_interval,
    paired,
    paired_difference,
    t_quantile,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats


@settings(deadline=None)
@given(st.integers(1, 300), st.floats(0.5, 0.999))
def test_t_is_students(freedom, confidence):
    expected = stats.t.ppf((1 + confidence) / 2, freedom)
    assert t_quantile(confidence, freedom) == pytest.approx(expected, rel=1e-6)


def test_the_interval_is_scipys():
    values = np.random.default_rng(0).normal(3, 2, 12)
    estimate = mean_interval(values)
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    assert estimate.mean == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(("interval", "least"), [(mean_interval, 0.93), (bootstrap_interval, 0.90)])
def test_the_interval_holds_the_true_mean_about_as_often_as_it_says(interval, least):
    rng = np.random.default_rng(1)
    options = {} if interval is mean_interval else {"resamples": 500}
    held = 0
    for _ in range(400):
        estimate = interval(rng.normal(1, 3, 15), **options)
        held += estimate.low <= 1 <= estimate.high
    assert least < held / 400 < 0.98


def test_the_bootstrap_is_repeatable_and_agrees_where_values_are_normal():
    values = np.random.default_rng(0).normal(3, 2, 200)
    first, again = bootstrap_interval(values, seed=5), bootstrap_interval(values, seed=5)
    assert first == again != bootstrap_interval(values, seed=6)
    exact = mean_interval(values)
    assert (first.low, first.high) == pytest.approx((exact.low, exact.high), abs=0.03)


def test_pairs_show_a_difference_that_their_spread_hides():
    clips = np.random.default_rng(0).normal(30, 5, 10)
    ours = clips + 0.5 + np.random.default_rng(1).normal(0, 0.2, 10)
    difference = paired_difference(ours, clips)
    assert difference.is_zero_outside
    assert difference.low < 0.5 < difference.high
    apart = mean_interval(ours)
    assert apart.low < clips.mean() < apart.high
    assert not paired_difference(clips, clips).is_zero_outside
    assert paired([3, 2], [1, 5]) == [2, -3]


def test_one_value_has_no_end_and_none_or_a_wrong_one_is_refused():
    assert mean_interval([2.0]) == (2.0, -math.inf, math.inf)
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="one or more finite"):
            mean_interval(values)
    with pytest.raises(ValueError, match=r"confidence is 95"):
        mean_interval([1.0, 2.0], 95)
    with pytest.raises(ValueError, match="2 and 1 values"):
        paired_difference([1.0, 2.0], [1.0])
    assert str(Estimate(1.0, 0.5, 1.5)) == "1 [0.5, 1.5]"
