"""The lifecycle: every move there is, every move there is not, and that the comments say the same."""

import inspect
import itertools
import re

import pytest

from pants_green import Datagram, Engine, Server, Stream, _lifecycle
from pants_green._lifecycle import DATAGRAM_MOVES, SERVER_MOVES, STREAM_MOVES, CloseReason, Event, State
from pants_green.errors import ChannelStateError

#: Where each event leads from each state; "." where it makes no sense.
STREAM_TABLE = """
            CONNECT     ESTABLISH  LISTEN  FINISH_OUTPUT  INPUT_ENDED  INPUT_ENDED_HALF_OPEN  END       STOP  CLOSE
NEW         CONNECTING  OPEN       .       .              .            .                      .         .     CLOSED
CONNECTING  .           OPEN       .       .              .            .                      .         .     CLOSED
OPEN        .           .          .       READ_ONLY      ENDING       WRITE_ONLY             DRAINING  .     CLOSED
READ_ONLY   .           .          .       .              DRAINING     DRAINING               DRAINING  .     CLOSED
WRITE_ONLY  .           .          .       DRAINING       .            .                      DRAINING  .     CLOSED
ENDING      .           .          .       DRAINING       .            .                      DRAINING  .     CLOSED
DRAINING    .           .          .       .              .            .                      .         .     CLOSED
LISTENING   .           .          .       .              .            .                      .         .     .
STOPPING    .           .          .       .              .            .                      .         .     .
CLOSED      .           .          .       .              .            .                      .         .     .
"""

SERVER_TABLE = """
            CONNECT  ESTABLISH  LISTEN     FINISH_OUTPUT  INPUT_ENDED  INPUT_ENDED_HALF_OPEN  END  STOP      CLOSE
NEW         .        .          LISTENING  .              .            .                      .    .         CLOSED
LISTENING   .        .          .          .              .            .                      .    STOPPING  CLOSED
STOPPING    .        .          .          .              .            .                      .    .         CLOSED
CONNECTING  .        .          .          .              .            .                      .    .         .
OPEN        .        .          .          .              .            .                      .    .         .
READ_ONLY   .        .          .          .              .            .                      .    .         .
WRITE_ONLY  .        .          .          .              .            .                      .    .         .
ENDING      .        .          .          .              .            .                      .    .         .
DRAINING    .        .          .          .              .            .                      .    .         .
CLOSED      .        .          .          .              .            .                      .    .         .
"""

DATAGRAM_TABLE = """
            CONNECT  ESTABLISH  LISTEN     FINISH_OUTPUT  INPUT_ENDED  INPUT_ENDED_HALF_OPEN  END       STOP  CLOSE
NEW         .        .          LISTENING  .              .            .                      DRAINING  .     CLOSED
LISTENING   .        .          .          .              .            .                      DRAINING  .     CLOSED
DRAINING    .        .          .          .              .            .                      .         .     CLOSED
CONNECTING  .        .          .          .              .            .                      .         .     .
OPEN        .        .          .          .              .            .                      .         .     .
READ_ONLY   .        .          .          .              .            .                      .         .     .
WRITE_ONLY  .        .          .          .              .            .                      .         .     .
ENDING      .        .          .          .              .            .                      .         .     .
STOPPING    .        .          .          .              .            .                      .         .     .
CLOSED      .        .          .          .              .            .                      .         .     .
"""


def read_table(text):
    """Return {(state, event): state or None} for every pair."""
    head, *rows = [line.split() for line in text.strip().splitlines()]
    return {
        (State[row[0]], Event[event]): None if cell == "." else State[cell]
        for row in rows
        for event, cell in zip(head, row[1:], strict=True)
    }


PAIRS = list(itertools.product(State, Event))
KINDS = {
    "stream": (Stream, STREAM_MOVES, read_table(STREAM_TABLE)),
    "server": (Server, SERVER_MOVES, read_table(SERVER_TABLE)),
    "datagram": (Datagram, DATAGRAM_MOVES, read_table(DATAGRAM_TABLE)),
}

both_kinds = pytest.mark.parametrize("kind", KINDS)


@both_kinds
def test_table_of_this_test_covers_every_pair(kind):
    assert set(KINDS[kind][2]) == set(PAIRS)


@both_kinds
@pytest.mark.parametrize(("state", "event"), PAIRS, ids=lambda one: one.name)
def test_move_leads_where_it_should_or_is_refused(kind, state, event):
    _, moves, wanted = KINDS[kind]
    assert moves.get((state, event)) == wanted[state, event]


@both_kinds
def test_closed_nothing_leaves_it(kind):
    assert [event for state, event in KINDS[kind][1] if state is State.CLOSED] == []


@both_kinds
def test_every_state_that_is_left_is_reached(kind):
    moves = KINDS[kind][1]
    reached = {State.NEW}
    while more := {after for (before, _), after in moves.items() if before in reached} - reached:
        reached |= more
    assert reached == {before for before, _ in moves} | {State.CLOSED}


def test_every_state_and_every_event_is_used():
    moves = {**STREAM_MOVES, **SERVER_MOVES}
    assert {before for before, _ in moves} | set(moves.values()) == set(State)
    assert {event for _, event in moves} == set(Event)


@both_kinds
def test_every_state_can_be_closed_at_once(kind):
    moves = KINDS[kind][1]
    states = {before for before, _ in moves}
    assert {moves.get((state, Event.CLOSE)) for state in states} == {State.CLOSED}


def test_states_go_forward_only():
    """No way leads back, so a stream connects once, ends once and closes once."""
    following = {state: {after for (before, _), after in STREAM_MOVES.items() if before is state} for state in State}

    def all_after(state, path=()):
        assert state not in path, f"a circle: {path}"
        return set().union(following[state], *(all_after(after, (*path, state)) for after in following[state]))

    for state in State:
        assert state not in all_after(state)


def test_comments_exits_agree_with_the_table():
    """``OPEN = "open"  # both directions work -> READ_ONLY, ...`` names exactly the states that may follow."""
    said = {}
    for name, comment in re.findall(r"^    ([A-Z_]+) = \"[\w-]+\"  # (.+)$", inspect.getsource(State), re.MULTILINE):
        _, arrow, exits = comment.partition(" -> ")
        said[name] = set(exits.split(", ")) if arrow else set()
    assert set(said) == {state.name for state in State}
    for state in State:
        exits = {after.name for _, moves, _ in KINDS.values() for (before, _), after in moves.items() if before is state}
        assert said[state.name] == exits, state.name


def test_connected_is_from_establishing_until_the_end_begins():
    assert {state for state in State if state.connected} == {State.OPEN, State.READ_ONLY, State.WRITE_ONLY}


def test_connected_once_left_never_comes_back():
    back = [(before, event) for (before, event), after in STREAM_MOVES.items() if after.connected and not before.connected]
    assert {before for before, _ in back} == {State.NEW, State.CONNECTING}
    assert {event for _, event in back} == {Event.ESTABLISH}


def test_writable_is_where_the_output_can_still_be_ended():
    can_end_output = {state for state, event in STREAM_MOVES if event is Event.FINISH_OUTPUT}
    assert {state for state in State if state.writable} == can_end_output


def test_input_can_end_only_where_reading_goes_on():
    for event in (Event.INPUT_ENDED, Event.INPUT_ENDED_HALF_OPEN):
        assert {state for state, found in STREAM_MOVES if found is event} == {State.OPEN, State.READ_ONLY}


@pytest.mark.parametrize("kind", [State, Event])
def test_members_have_plain_names_in_the_module(kind):
    """Beside ``State.OPEN`` there is ``OPEN``, the same object, for the hot path."""
    for member in kind:
        assert getattr(_lifecycle, member.name) is member


@both_kinds
@pytest.mark.parametrize(("state", "event"), PAIRS, ids=lambda one: one.name)
def test_channel_moves_as_the_table_says_or_refuses_and_stays(kind, state, event):
    make, _, wanted = KINDS[kind]
    channel = make(engine=Engine())
    channel._state = state
    following = wanted[state, event]
    if following is None:
        with pytest.raises(ChannelStateError, match=re.escape(event.value)):
            channel._move(event)
        assert channel._state is state
    else:
        channel._move(event)
        assert channel._state is following


@pytest.mark.parametrize("reason", CloseReason)
def test_close_reason_reads_as_a_sentence(reason):
    assert f"{reason}" == str(reason) == reason.value == reason
    assert "%s" % reason == reason.value  # noqa: UP031
    assert " " in reason.value
