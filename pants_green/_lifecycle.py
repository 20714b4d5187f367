"""The states of a channel and the one table of allowed moves; pure.

No socket, clock or greenlet lives here, and no side effect: a channel looks its next state up and
does what the move asks for.
"""

from enum import Enum

__all__ = [
    "CLOSED",
    "CONNECTED",
    "CONNECTING",
    "DRAINING",
    "ENDING",
    "LISTENING",
    "NEW",
    "OPEN",
    "READ_ONLY",
    "SERVER_MOVES",
    "STREAM_MOVES",
    "WRITABLE",
    "WRITE_ONLY",
    "CloseReason",
    "Event",
    "State",
]


class State(Enum):
    """Where a channel stands. Each comment names the exits."""

    NEW = "new"  # no socket at work yet -> CONNECTING, OPEN, LISTENING, CLOSED
    CONNECTING = "connecting"  # looking up and dialling -> OPEN, CLOSED
    OPEN = "open"  # both directions work -> READ_ONLY, WRITE_ONLY, ENDING, DRAINING, CLOSED
    READ_ONLY = "read-only"  # write_eof() was called -> DRAINING, CLOSED
    WRITE_ONLY = "write-only"  # half-open: the peer sent its FIN -> DRAINING, CLOSED
    ENDING = "ending"  # the peer sent its FIN, on_end runs -> DRAINING, CLOSED
    DRAINING = "draining"  # what is owed is being sent, nothing is added -> CLOSED
    LISTENING = "listening"  # a server that accepts -> CLOSED
    CLOSED = "closed"  # the end; nothing leaves it

    # Members are singletons; Enum's own hash is a Python function and is asked four times for each move.
    __hash__ = object.__hash__


# As plain names: on Python 3.11 State.OPEN runs a Python function each time, and the hot path asks often.
NEW = State.NEW
CONNECTING = State.CONNECTING
OPEN = State.OPEN
READ_ONLY = State.READ_ONLY
WRITE_ONLY = State.WRITE_ONLY
ENDING = State.ENDING
DRAINING = State.DRAINING
LISTENING = State.LISTENING
CLOSED = State.CLOSED


class Event(Enum):
    """What makes a channel move."""

    CONNECT = "connect"
    ESTABLISH = "establish"
    LISTEN = "listen"
    FINISH_OUTPUT = "write_eof"
    INPUT_ENDED = "the end of the peer's input"
    INPUT_ENDED_HALF_OPEN = "the end of the peer's input, output going on"
    END = "end"
    CLOSE = "close"

    __hash__ = object.__hash__


class CloseReason(str, Enum):
    """Why a channel closed; its value is fit for a log line."""

    CLOSED_HERE = "close() was called here"
    ENDED_HERE = "end() was called here"
    ABORTED_HERE = "abort() was called here"
    PEER_ENDED = "the peer ended the connection"
    PEER_LEFT = "the peer broke the connection off"
    CONNECT_FAILED = "the connection could not be made"
    IO_ERROR = "reading or writing failed"
    OVERFLOW = "too many bytes without a delimiter"
    CALLBACK_ERROR = "a callback raised an exception"
    FORKED = "the connection belongs to the parent process"

    __str__ = str.__str__
    __format__ = str.__format__


#: A stream counts as connected, and stands in its server's ``channels``, exactly in these states.
CONNECTED = frozenset({OPEN, READ_ONLY, WRITE_ONLY})

#: ``write()`` takes data exactly in these states.
WRITABLE = frozenset({OPEN, WRITE_ONLY, ENDING})

#: (state, event) -> state. What is missing is not allowed.
STREAM_MOVES: dict[tuple[State, Event], State] = {
    (NEW, Event.CONNECT): CONNECTING,
    (NEW, Event.ESTABLISH): OPEN,
    (NEW, Event.CLOSE): CLOSED,
    (NEW, Event.END): CLOSED,
    (CONNECTING, Event.ESTABLISH): OPEN,
    (CONNECTING, Event.END): CLOSED,
    (CONNECTING, Event.CLOSE): CLOSED,
    (OPEN, Event.FINISH_OUTPUT): READ_ONLY,
    (OPEN, Event.INPUT_ENDED): ENDING,
    (OPEN, Event.INPUT_ENDED_HALF_OPEN): WRITE_ONLY,
    (OPEN, Event.END): DRAINING,
    (OPEN, Event.CLOSE): CLOSED,
    (READ_ONLY, Event.INPUT_ENDED): DRAINING,
    (READ_ONLY, Event.INPUT_ENDED_HALF_OPEN): DRAINING,
    (READ_ONLY, Event.END): DRAINING,
    (READ_ONLY, Event.CLOSE): CLOSED,
    (WRITE_ONLY, Event.FINISH_OUTPUT): DRAINING,
    (WRITE_ONLY, Event.END): DRAINING,
    (WRITE_ONLY, Event.CLOSE): CLOSED,
    (ENDING, Event.FINISH_OUTPUT): DRAINING,
    (ENDING, Event.END): DRAINING,
    (ENDING, Event.CLOSE): CLOSED,
    (DRAINING, Event.CLOSE): CLOSED,
}

SERVER_MOVES: dict[tuple[State, Event], State] = {
    (NEW, Event.LISTEN): LISTENING,
    (NEW, Event.CLOSE): CLOSED,
    (LISTENING, Event.CLOSE): CLOSED,
}
