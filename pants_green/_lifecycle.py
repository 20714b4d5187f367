"""The states of a channel and the one table of allowed moves; pure.

No socket, clock or greenlet lives here, and no side effect: a channel looks its next state up and
does what the move asks for.
"""

from enum import Enum, StrEnum

__all__ = [
    "CLOSE",
    "CLOSED",
    "CONNECT",
    "CONNECTING",
    "DATAGRAM_MOVES",
    "DRAINING",
    "END",
    "ENDING",
    "ESTABLISH",
    "FINISH_OUTPUT",
    "INPUT_ENDED",
    "INPUT_ENDED_HALF_OPEN",
    "LISTEN",
    "LISTENING",
    "NEW",
    "OPEN",
    "READ_ONLY",
    "SERVER_MOVES",
    "STOP",
    "STOPPING",
    "STREAM_MOVES",
    "WRITE_ONLY",
    "CloseReason",
    "Event",
    "State",
]


class State(Enum):
    """Where a channel stands. Each comment names the exits.

    Attributes:
        connected: a stream counts as connected, and stands in its server's ``channels``, exactly in these states.
        writable: ``write()`` takes data exactly in these states.
    """

    NEW = "new"  # no socket at work yet -> CONNECTING, OPEN, LISTENING, DRAINING, CLOSED
    CONNECTING = "connecting"  # looking up and dialling -> OPEN, CLOSED
    OPEN = "open"  # both directions work -> READ_ONLY, WRITE_ONLY, ENDING, DRAINING, CLOSED
    READ_ONLY = "read-only"  # write_eof() was called -> DRAINING, CLOSED
    WRITE_ONLY = "write-only"  # half-open: the peer sent its FIN -> DRAINING, CLOSED
    ENDING = "ending"  # the peer sent its FIN and on_end runs -> DRAINING, CLOSED
    DRAINING = "draining"  # what is owed is being sent, nothing is added -> CLOSED
    LISTENING = "listening"  # a server that accepts, a datagram channel that receives -> DRAINING, STOPPING, CLOSED
    STOPPING = "stopping"  # a server that accepts no more and waits for its connections -> CLOSED
    CLOSED = "closed"  # the end; nothing leaves it

    def __init__(self, label: str) -> None:
        self.connected = label in ("open", "read-only", "write-only")
        self.writable = label in ("open", "write-only", "ending")

    # Members are singletons, and Enum's own hash is a Python function.
    __hash__ = object.__hash__


# As plain names: on Python 3.11 State.OPEN costs ten times as much, and the hot path asks often.
NEW = State.NEW
CONNECTING = State.CONNECTING
OPEN = State.OPEN
READ_ONLY = State.READ_ONLY
WRITE_ONLY = State.WRITE_ONLY
ENDING = State.ENDING
DRAINING = State.DRAINING
LISTENING = State.LISTENING
STOPPING = State.STOPPING
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
    STOP = "stop"
    CLOSE = "close"

    __hash__ = object.__hash__


CONNECT = Event.CONNECT
ESTABLISH = Event.ESTABLISH
LISTEN = Event.LISTEN
FINISH_OUTPUT = Event.FINISH_OUTPUT
INPUT_ENDED = Event.INPUT_ENDED
INPUT_ENDED_HALF_OPEN = Event.INPUT_ENDED_HALF_OPEN
END = Event.END
STOP = Event.STOP
CLOSE = Event.CLOSE


class CloseReason(StrEnum):
    """Why a channel closed; its value is fit for a log line."""

    CLOSED_HERE = "close() was called here"
    ENDED_HERE = "end() was called here"
    ABORTED_HERE = "abort() was called here"
    PEER_ENDED = "the peer ended the connection"
    PEER_LEFT = "the peer broke the connection off"
    CONNECT_FAILED = "the connection could not be made"
    IO_ERROR = "reading or writing failed"
    OVERFLOW = "too many bytes without a delimiter, or not sent"
    BAD_INPUT = "the input made no sense"
    TIMED_OUT = "a time limit was hit"
    TLS_FAILED = "TLS failed"
    STOPPED = "the server has stopped"
    CALLBACK_ERROR = "a callback raised an exception"
    FORKED = "the connection belongs to the parent process"


#: (state, event) -> state. What is missing is not allowed.
STREAM_MOVES: dict[tuple[State, Event], State] = {
    (NEW, CONNECT): CONNECTING,
    (NEW, ESTABLISH): OPEN,
    (NEW, CLOSE): CLOSED,
    (CONNECTING, ESTABLISH): OPEN,
    (CONNECTING, CLOSE): CLOSED,
    (OPEN, FINISH_OUTPUT): READ_ONLY,
    (OPEN, INPUT_ENDED): ENDING,
    (OPEN, INPUT_ENDED_HALF_OPEN): WRITE_ONLY,
    (OPEN, END): DRAINING,
    (OPEN, CLOSE): CLOSED,
    (READ_ONLY, INPUT_ENDED): DRAINING,
    (READ_ONLY, INPUT_ENDED_HALF_OPEN): DRAINING,
    (READ_ONLY, END): DRAINING,
    (READ_ONLY, CLOSE): CLOSED,
    (WRITE_ONLY, FINISH_OUTPUT): DRAINING,
    (WRITE_ONLY, END): DRAINING,
    (WRITE_ONLY, CLOSE): CLOSED,
    (ENDING, FINISH_OUTPUT): DRAINING,
    (ENDING, END): DRAINING,
    (ENDING, CLOSE): CLOSED,
    (DRAINING, CLOSE): CLOSED,
}

SERVER_MOVES: dict[tuple[State, Event], State] = {
    (NEW, LISTEN): LISTENING,
    (NEW, CLOSE): CLOSED,
    (LISTENING, STOP): STOPPING,
    (LISTENING, CLOSE): CLOSED,
    (STOPPING, CLOSE): CLOSED,
}

DATAGRAM_MOVES: dict[tuple[State, Event], State] = {
    (NEW, LISTEN): LISTENING,
    (NEW, END): DRAINING,
    (NEW, CLOSE): CLOSED,
    (LISTENING, END): DRAINING,
    (LISTENING, CLOSE): CLOSED,
    (DRAINING, CLOSE): CLOSED,
}
