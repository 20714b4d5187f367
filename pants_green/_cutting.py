"""The settings that say how input is cut: read_delimiter, encoding, regex_search. Their owner cuts, in its ``_cut_by``."""

from typing import Any, ClassVar

from pants_green._delimiters import framer_for
from pants_green._settings import Setting
from pants_green.errors import InvalidReadDelimiterError
from pants_green.framing import Framer

__all__ = ["Encoding", "ReadDelimiter", "RegexSearch", "framer_of", "unchecked"]

#: How many framers of delimiters that were set are kept at hand.
LATELY = 256


class ReadDelimiter(Setting[Any]):
    """What ends a chunk; setting it takes effect with the very next one."""

    #: Framers of bytes and sizes that were used lately, by both.
    lately: ClassVar[dict[Any, Framer[Any]]] = {}

    def __set__(self, instance: Any, value: Any) -> None:
        if type(value) is int or type(value) is bytes:
            # Some protocols change it for each chunk: this way that is 5 times as quick.
            framer = self.lately.get(value)
            inbox = instance._inbox
            if framer is not None and inbox.one_by_one and instance._framer and not instance._waiting and instance._encoding is None:
                instance._read_delimiter = value
                instance._framer = framer
                inbox.searched = inbox.wanted = 0
                return
        current = instance._read_delimiter
        if value is not current and (type(value) is not type(current) or value != current):
            instance._cut_by(value, instance._encoding, instance._regex_search)
            instance._read_delimiter = value
            if (type(value) is int or type(value) is bytes) and instance._encoding is None:
                if len(self.lately) >= LATELY:
                    self.lately.clear()
                self.lately[value] = instance._framer


class Encoding(Setting[str | None]):
    """Into what chunks are decoded; takes effect with the very next one."""

    def __set__(self, instance: Any, value: Any) -> None:
        value = self.check(f"{type(instance).__name__}.{self.name}", value)
        if value != instance._encoding:
            instance._cut_by(instance._read_delimiter, value, instance._regex_search)
            instance._encoding = value


class RegexSearch(Setting[bool]):
    """How a pattern is used; takes effect with the very next chunk."""

    def __set__(self, instance: Any, value: Any) -> None:
        value = self.check(f"{type(instance).__name__}.{self.name}", value)
        if value is not instance._regex_search:
            instance._cut_by(instance._read_delimiter, instance._encoding, value)
            instance._regex_search = value


def unchecked(name: str, value: Any) -> Any:
    """Check nothing."""
    # What a delimiter is worth depends on the encoding, too: see _settled and _cut_by.
    return value


def framer_of(owner: type, delimiter: Any, encoding: str | None, regex_search: bool) -> Framer[Any] | None:
    """Return what cuts by a delimiter of the class `owner`.

    Raises:
        InvalidReadDelimiterError: nothing can be cut by it.
    """
    try:
        return framer_for(delimiter, encoding, regex_search)
    except InvalidReadDelimiterError as error:
        raise type(error)(f"{owner.__name__}: {error}") from None
