"""The timer heap and the beat of cycles; no clock runs here."""

import gc
import math
import weakref

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pants_green._timers import SWEEP_AT, Timer, TimerHeap, next_beat


def timer(when, name="it"):
    return Timer(lambda: name, when=when)


def pushed(heap, *whens):
    timers = [timer(when) for when in whens]
    for one in timers:
        heap.push(one)
    return timers


def drain(heap, now=math.inf):
    """Return all timers that are due at `now`, in order."""
    found = []
    while (one := heap.pop_due(now)) is not None:
        found.append(one)
    return found


def test_empty_heap_has_nothing_due():
    heap = TimerHeap()
    assert (len(heap), heap.next_due(), heap.pop_due(math.inf)) == (0, None, None)


def test_pop_due_gives_the_earliest_first():
    heap = TimerHeap()
    late, early, middle = pushed(heap, 3.0, 1.0, 2.0)
    assert drain(heap) == [early, middle, late]


def test_pop_due_leaves_what_is_not_due():
    heap = TimerHeap()
    early, late = pushed(heap, 1.0, 2.0)
    assert heap.pop_due(0.999) is None
    assert drain(heap, 1.0) == [early]
    assert (len(heap), heap.next_due()) == (1, 2.0)
    assert drain(heap, 2.0) == [late]


def test_ties_come_out_in_the_order_in_which_they_went_in():
    heap = TimerHeap()
    timers = pushed(heap, *[5.0] * 50)
    assert drain(heap) == timers


def test_ties_after_cancelling_and_sweeping_keep_their_order():
    heap = TimerHeap()
    timers = pushed(heap, *[5.0] * 500)
    for one in timers[::3] + timers[1::3]:
        one.cancel()
    assert drain(heap) == timers[2::3]


@pytest.mark.parametrize("place", range(4))
def test_e1_5_cancel_among_equal_due_times_cancels_the_right_timer(place):
    heap = TimerHeap()
    timers = pushed(heap, 1.0, 1.0, 1.0, 1.0)
    timers[place].cancel()
    assert drain(heap) == timers[:place] + timers[place + 1 :]


def test_cancel_by_calling_it_does_the_same():
    heap = TimerHeap()
    (one,) = pushed(heap, 1.0)
    one()
    assert one.cancelled
    assert drain(heap) == []


def test_cancel_twice_counts_once():
    heap = TimerHeap()
    first, second = pushed(heap, 1.0, 2.0)
    first.cancel()
    first.cancel()
    first()
    assert len(heap) == 1
    assert drain(heap) == [second]
    assert len(heap) == 0


def test_cancel_after_it_was_taken_out_leaves_the_others():
    heap = TimerHeap()
    first, second = pushed(heap, 1.0, 2.0)
    assert heap.pop_due(1.0) is first
    first.cancel()
    assert len(heap) == 1
    assert drain(heap) == [second]


def test_cancel_before_it_was_put_in_is_harmless():
    one = timer(1.0)
    one.cancel()
    assert one.cancelled


def test_cancel_forgets_function_and_arguments():
    """What was cancelled keeps nothing alive, however far away its time is."""

    class Precious:
        def method(self):
            pass

    precious = Precious()
    alive = weakref.ref(precious)
    heap = TimerHeap()
    one = Timer(precious.method, (precious,), {"key": precious}, when=1e9)
    heap.push(one)
    del precious
    one.cancel()
    gc.collect()
    assert alive() is None


def test_cancelled_earliest_next_due_is_that_of_the_next():
    heap = TimerHeap()
    first, second, third = pushed(heap, 1.0, 2.0, 3.0)
    first.cancel()
    second.cancel()
    assert (heap.next_due(), len(heap)) == (3.0, 1)
    third.cancel()
    assert (heap.next_due(), len(heap)) == (None, 0)


def test_sweep_many_cancelled_timers_do_not_stay():
    """A program that arms and cancels a time limit for each request must not keep them until they would be due."""
    heap = TimerHeap()
    keeper = timer(1e9)
    heap.push(keeper)
    most = 0
    for number in range(10_000):
        one = timer(1e6 + number)
        heap.push(one)
        one.cancel()
        most = max(most, len(heap._heap))
    assert most <= 2 * SWEEP_AT + 2
    assert (len(heap), heap.next_due()) == (1, 1e9)
    assert drain(heap) == [keeper]


def test_sweep_only_when_more_than_half_is_cancelled():
    """It looks at every timer, so it must not happen at each cancel."""
    heap = TimerHeap()
    timers = pushed(heap, *map(float, range(1000)))
    before = heap._heap
    for one in timers[500:]:
        one.cancel()
        assert heap._heap is before
    timers[499].cancel()
    assert len(heap._heap) == len(heap) == 499


def test_sweep_of_a_few_does_not_happen():
    heap = TimerHeap()
    timers = pushed(heap, *map(float, range(SWEEP_AT + 1)))
    before = heap._heap
    for one in timers[1:]:
        one.cancel()
        assert heap._heap is before
    timers[0].cancel()
    assert len(heap._heap) == 0


def test_sweep_of_timers_in_no_order_leaves_the_others_in_order():
    heap = TimerHeap()
    whens = [float(number * 7919 % 1009) for number in range(1009)]
    timers = pushed(heap, *whens)
    for place, one in enumerate(timers):
        if place % 5:
            one.cancel()
    assert [one.when for one in drain(heap)] == sorted(whens[::5])


def test_sweep_cancelled_after_it_are_counted_right():
    heap = TimerHeap()
    timers = pushed(heap, *map(float, range(400)))
    for count, one in enumerate(timers, 1):
        one.cancel()
        assert len(heap) == 400 - count
    assert drain(heap) == []


def test_push_of_a_cycle_again_after_its_run_is_due_again():
    heap = TimerHeap()
    one = Timer(int, when=1.0, interval=1.0)
    heap.push(one)
    assert heap.pop_due(1.0) is one
    one.when = 2.0
    heap.push(one)
    assert heap.next_due() == 2.0
    one.cancel()
    assert (len(heap), heap.next_due()) == (0, None)


def test_timer_holds_what_it_was_given():
    def function():
        pass

    one = Timer(function, (1, 2), {"a": 3}, 4.0, 5.0, "context")
    assert (one.function, one.args, one.kwargs, one.when, one.interval, one.context) == (function, (1, 2), {"a": 3}, 4.0, 5.0, "context")
    assert not one.cancelled


def test_timer_repr_names_its_function_and_says_when_it_is_cancelled():
    one = Timer(test_timer_repr_names_its_function_and_says_when_it_is_cancelled)
    assert repr(one) == "<Timer test_timer_repr_names_its_function_and_says_when_it_is_cancelled>"
    one.cancel()
    assert repr(one) == "<Timer cancelled>"


def test_timers_are_never_compared():
    """Equal due times must not come down to comparing the functions, or the timers."""

    class Incomparable(Timer):
        __slots__ = ()

        def __lt__(self, other):
            raise AssertionError("compared")

        __gt__ = __le__ = __ge__ = __lt__

    heap = TimerHeap()
    for _ in range(20):
        heap.push(Incomparable(int, when=1.0))
    assert len(drain(heap)) == 20


operations = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 9)),
        st.tuples(st.just("cancel"), st.integers(0, 200)),
        st.tuples(st.just("pop"), st.integers(0, 9)),
    ),
    max_size=80,
)


@pytest.mark.parametrize("sweep_at", [0, 3, SWEEP_AT])
@given(operations=operations)
def test_heap_any_history_gives_what_a_sorted_list_gives(sweep_at, operations):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pants_green._timers.SWEEP_AT", sweep_at)
        heap = TimerHeap()
        waiting, every = [], []  # waiting: in the order of going in; sorted() is stable
        for operation, number in operations:
            if operation == "push":
                one = timer(float(number))
                heap.push(one)
                waiting.append(one)
                every.append(one)
            elif operation == "cancel" and every:
                one = every[number % len(every)]
                one.cancel()
                waiting = [other for other in waiting if other is not one]
            elif operation == "pop":
                due = sorted((one for one in waiting if one.when <= number), key=lambda one: one.when)
                assert heap.pop_due(float(number)) is (due[0] if due else None)
                waiting = [one for one in waiting if not due or one is not due[0]]
            assert len(heap) == len(waiting)
            assert heap.next_due() == min((one.when for one in waiting), default=None)


def test_next_beat_in_time_is_one_interval_later():
    assert next_beat(10.0, 2.0, 10.0) == 12.0
    assert next_beat(10.0, 2.0, 11.9) == 12.0


def test_next_beat_late_leaves_the_missed_ones_out():
    assert next_beat(10.0, 2.0, 12.0) == 14.0
    assert next_beat(10.0, 2.0, 17.5) == 18.0
    assert next_beat(10.0, 2.0, 18.0) == 20.0


def test_next_beat_called_early_is_one_interval_after_the_beat():
    assert next_beat(10.0, 2.0, 9.9) == 12.0


def test_next_beat_many_rounds_do_not_drift():
    due = 0.0
    for _ in range(1000):
        due = next_beat(due, 0.25, due + 0.2)
    assert due == 250.0


# Due times, delays and intervals as a clock that counts seconds since the machine started can tell them apart.
@given(
    due=st.floats(0, 1e7),
    interval=st.floats(1e-3, 1e5),
    late=st.one_of(st.floats(0, 10), st.floats(0, 1e7)),
)
def test_next_beat_is_the_first_beat_after_now(due, interval, late):
    now = due + late
    following = next_beat(due, interval, now)
    slack = 1e-6 * max(interval, 1e-3) + 1e-7
    assert following > now
    assert following <= now + interval + slack
    beats = (following - due) / interval
    assume(beats < 1e9)
    assert abs(beats - round(beats)) <= 1e-6 + slack / interval
    assert round(beats) >= 1
