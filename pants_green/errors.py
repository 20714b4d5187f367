"""Every exception that pants_green raises or delivers; imports nothing.

    PantsError
      ChannelStateError (RuntimeError)      you called this in the wrong state
        ChannelClosed                       ... and it will not open again
      WrongThreadError (RuntimeError)       you called this in the wrong thread
      InvalidAddressFormatError (ValueError)
      InvalidReadDelimiterError
        ReadDelimiterTypeError (TypeError)  no such kind of delimiter
        ReadDelimiterValueError (ValueError) a delimiter that could never end a chunk
      StreamConnectError (OSError)          the dial failed
      DatagramTooLong (OSError)             no packet can be as long as that; a ValueError, too
      ProxyHeaderError (ValueError)         what came is no PROXY header
      StreamBufferOverflow                  too many bytes without a delimiter, or not sent
      ReadTimeout (TimeoutError)            no whole chunk came in time
      WriteTimeout (TimeoutError)           the peer took nothing for too long
      IdleTimeout (TimeoutError)            nothing came or went for too long
      CallbackTimeout (TimeoutError)        a callback took too long
      HandshakeTimeout (TimeoutError)       the TLS handshake was not done in time

Your mistake is raised at you; the world's mistake is delivered to an ``on_*_error`` callback.
"""

__all__ = [
    "CallbackTimeout",
    "ChannelClosed",
    "ChannelStateError",
    "DatagramTooLong",
    "HandshakeTimeout",
    "IdleTimeout",
    "InvalidAddressFormatError",
    "InvalidReadDelimiterError",
    "PantsError",
    "ProxyHeaderError",
    "ReadDelimiterTypeError",
    "ReadDelimiterValueError",
    "ReadTimeout",
    "StreamBufferOverflow",
    "StreamConnectError",
    "WriteTimeout",
    "WrongThreadError",
]


class PantsError(Exception):
    """The root of everything below."""

    #: Whether a ``read()``, or a ``write()`` that waited, raised it: then it is the world's doing, although it is raised.
    _no_mistake: bool = False

    #: Whether it did so because the peer had ended its side.
    _at_end: bool = False


class ChannelStateError(PantsError, RuntimeError):
    """A method was called in a state in which it makes no sense, such as a second ``listen()``."""


class ChannelClosed(ChannelStateError):
    """The channel takes no more output: it is closed, closing, or was never connected.

    Args:
        message: what was asked, on which channel, and what to do instead.
        channel: the channel that refused, or None.
    """

    def __init__(self, message: str, channel: object = None) -> None:
        super().__init__(message)
        self.channel = channel


class WrongThreadError(PantsError, RuntimeError):
    """An engine or one of its channels was used outside the thread that runs it."""


class InvalidAddressFormatError(PantsError, ValueError):
    """Nobody can parse this address."""


class InvalidReadDelimiterError(PantsError):
    """The value cannot delimit anything; caught as TypeError or ValueError too, as fits."""


class ReadDelimiterTypeError(InvalidReadDelimiterError, TypeError):
    """No kind of delimiter has this type."""


class ReadDelimiterValueError(InvalidReadDelimiterError, ValueError):
    """The type is right, but this value would match nothing or match for ever."""


class StreamConnectError(PantsError, OSError):
    """A connection could not be made; ``errno`` and ``strerror`` say why, as in any OSError."""


class DatagramTooLong(PantsError, OSError, ValueError):
    """More bytes than one packet can carry; ``errno`` is EMSGSIZE."""


class ProxyHeaderError(PantsError, ValueError):
    """What has come can never become a valid header of the PROXY protocol.

    Args:
        message: what was expected, at which byte, and what is there.
        position: the byte in question, counted from 0.
    """

    def __init__(self, message: str, position: int = 0) -> None:
        super().__init__(message)
        self.position = position


class StreamBufferOverflow(PantsError):
    """More bytes wait than is allowed: for their delimiter, or to be sent.

    Args:
        message: names the channel and what to raise.
        size: bytes that were waiting, or were announced.
        limit: bytes that were allowed.
        setting: what says so: "buffer_size", also for the ``max_size`` of a Framer; "write_limit"; the server's "write_budget".
    """

    def __init__(self, message: str, size: int = 0, limit: int = 0, setting: str = "buffer_size") -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit
        self.setting = setting


class ReadTimeout(PantsError, TimeoutError):
    """``read()`` got no whole chunk in time. What has come of it stays and is read next."""


class WriteTimeout(PantsError, TimeoutError):
    """The peer took none of the pending output for ``write_timeout`` seconds."""


class IdleTimeout(PantsError, TimeoutError):
    """Nothing was received or sent for ``idle_timeout`` seconds."""


class CallbackTimeout(PantsError, TimeoutError):
    """A callback took longer than ``callback_timeout`` seconds; raised inside of it."""


class HandshakeTimeout(PantsError, TimeoutError):
    """The TLS handshake was not done within ``handshake_timeout`` seconds."""

    @classmethod
    def _after(cls, seconds: float) -> "HandshakeTimeout":
        return cls(f"the TLS handshake was not done within handshake_timeout, {seconds:g} seconds")
