"""Token buckets: how many come through in which time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pants_green._buckets import LONGEST, TokenBucket


def taken_until(bucket, end, now=0.0):
    """Take one after the other as soon as it is allowed; return the times."""
    times = []
    while now <= end:
        delay = bucket.delay(now)
        if delay:
            now += delay
        else:
            times.append(now)
            bucket.take(1, now)
    return times


@pytest.mark.parametrize("rate", [1, 10, 100.5])
def test_bucket_begins_with_those_of_one_second_and_then_keeps_the_rate(rate):
    times = taken_until(TokenBucket(rate, 0.0), 10.0)
    at_once = [time for time in times if time == 0.0]
    assert len(at_once) == int(rate)
    gaps = [after - before for before, after in zip(times[len(at_once) :], times[len(at_once) + 1 :], strict=False)]
    assert gaps == pytest.approx([1 / rate] * len(gaps), abs=1e-4)
    assert len(times) == pytest.approx(11 * rate, abs=2)


def test_bucket_of_less_than_one_per_second_lets_the_first_through():
    assert taken_until(TokenBucket(0.5, 0.0), 10.0) == pytest.approx([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], abs=1e-4)


def test_bucket_more_was_taken_than_there_was_and_the_next_waits_for_as_much_longer():
    bucket = TokenBucket(1000, 0.0)
    bucket.take(3000, 0.0)
    assert bucket.delay(0.0) == pytest.approx(2.01)
    assert bucket.delay(2.0) == pytest.approx(0.01)
    assert bucket.delay(2.01) == 0.0


def test_bucket_of_bytes_waits_for_a_hundredth_of_a_second_so_that_none_comes_alone():
    bucket = TokenBucket(100_000, 0.0)
    bucket.take(100_000, 0.0)
    assert bucket.delay(0.0) == pytest.approx(0.01)
    assert bucket.available(0.01) == 1000


def test_bucket_available_is_what_there_is_and_never_nothing():
    bucket = TokenBucket(10, 0.0)
    assert bucket.available(0.0) == 10
    bucket.take(10, 0.0)
    assert bucket.available(0.0) == 1
    assert bucket.available(0.55) == 5


def test_bucket_that_was_left_alone_has_no_more_than_its_burst():
    bucket = TokenBucket(10, 0.0)
    bucket.take(10, 0.0)
    assert bucket.available(1000.0) == 10


def test_bucket_clock_that_goes_back_changes_nothing():
    bucket = TokenBucket(10, 100.0)
    bucket.take(5, 100.0)
    assert bucket.available(50.0) == 5
    assert bucket.available(100.0) == 5


@pytest.mark.parametrize("rate", [5e-324, 1e-9])
def test_bucket_of_next_to_nothing_asks_for_a_timer_that_a_loop_can_take(rate):
    bucket = TokenBucket(rate, 0.0)
    bucket.take(1, 0.0)
    assert bucket.delay(0.0) == LONGEST


@given(rate=st.floats(0.01, 1e7), sizes=st.lists(st.integers(1, 1 << 18), max_size=30), pauses=st.lists(st.floats(0, 3), max_size=30))
def test_bucket_never_lets_through_more_than_rate_and_burst_allow(rate, sizes, pauses):
    bucket = TokenBucket(rate, 0.0)
    now, through = 0.0, 0
    for size, pause in zip(sizes, pauses, strict=False):
        now += pause
        now += bucket.delay(now)
        if bucket.delay(now):
            continue
        size = min(size, bucket.available(now))
        bucket.take(size, now)
        through += size
        assert through <= bucket.burst + now * rate * (1 + 1e-6) + 1
