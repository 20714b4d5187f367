"""Attributes of a class that are checked wherever they are set; knows nothing of what they mean."""

import math
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast, overload

__all__ = ["Setting", "SettingsType", "byte_count", "duration", "one_of", "patience", "per_second", "positive_count", "seconds", "truth"]

T = TypeVar("T")


class Setting(Generic[T]):
    """An attribute with a default on the class, overridable in subclasses and on instances, checked wherever it is set.

    Args:
        default: the value where nothing else is set.
        check: ``check(name, value)`` returns the value to keep, or raises an error that names the fix.
    """

    def __init__(self, default: T, check: Callable[[str, Any], T]) -> None:
        self.check = check
        self.default = default
        self.name = "?"
        self.slot = "?"

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.slot = "_" + name

    @overload
    def __get__(self, instance: None, owner: type) -> T: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> T:
        if instance is None:
            return self.default
        value: T = getattr(instance, self.slot)
        return value

    def __set__(self, instance: object, value: Any) -> None:
        setattr(instance, self.slot, self.check(f"{type(instance).__name__}.{self.name}", value))

    def redefined(self, owner: type, value: Any) -> "Setting[T]":
        """Return the setting that `owner`, a subclass that says ``name = value``, gets in its place."""
        setting = type(self)(self.check(f"{owner.__name__}.{self.name}", value), self.check)
        setting.__set_name__(owner, self.name)
        return setting


class SettingsType(ABCMeta):
    """The type of classes with settings: what a class says of one is checked, when it is made and whenever it is changed.

    An ABCMeta, so that such a class can be an abstract one too.
    """

    #: Names of other attributes of which `_settled` wants to know.
    _watched: frozenset[str] = frozenset()

    #: The settings of the class by name, its own and the inherited ones.
    _settings: dict[str, Setting[Any]]

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(name, bases, namespace, **kwargs)
        if cls.__hash__ is None:
            cls.__hash__ = object.__hash__
        cls._settle()

    def __setattr__(cls, name: str, value: Any) -> None:
        settings = vars(cls).get("_settings", {})
        if name in settings and not isinstance(value, Setting):
            value = settings[name].redefined(cls, value)
        elif name == "__hash__" and value is None:
            value = object.__hash__  # a dataclass, say, takes the hash away; but channels are kept in sets
        before = vars(cls).get(name, cls)
        super().__setattr__(name, value)
        if name in settings or name in cls._watched:
            cls._settle_or_undo(name, before)

    def __delattr__(cls, name: str) -> None:
        before = vars(cls).get(name, cls)
        super().__delattr__(name)
        if name in cls._settings or name in cls._watched:
            cls._settle_or_undo(name, before)

    def _settle_or_undo(cls, name: str, before: Any) -> None:
        """Settle after a change; if it does not go with the other settings, of this class or of a subclass, take it back.

        Args:
            before: what the class itself said of `name` before; the class if it said nothing.
        """
        try:
            cls._settle()
        except BaseException:
            if before is not cls:
                super().__setattr__(name, before)
            elif name in vars(cls):
                super().__delattr__(name)
            cls._settle()
            raise

    def _settle(cls) -> None:
        """Make a setting of everything that this class, or a mixin of it, says of one; then see to the subclasses."""
        found: dict[str, Setting[Any]] = {}
        for base in reversed(cls.__mro__):
            found.update((name, value) for name, value in vars(base).items() if isinstance(value, Setting))
        for name, setting in found.items():
            nearest = next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
            if not isinstance(nearest, (Setting, property)):  # a property of another base is no value
                found[name] = setting.redefined(cls, nearest)
                super().__setattr__(name, found[name])
        cls._settled()
        super().__setattr__("_settings", found)
        subclasses: list[Any] = cls.__subclasses__()
        for subclass in subclasses:
            if "_settings" in vars(subclass):  # else its own making was refused, and it only waits for the garbage collector
                subclass._settle()

    def _settled(cls) -> None:
        """Called when the settings of the class are known or have changed."""


def byte_count(name: str, value: Any) -> int:
    """Check a number of bytes of at least 1; for a `Setting`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a number of bytes, an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} is a number of bytes and at least 1, not {value}")
    return value


def seconds(name: str, value: Any) -> float | None:
    """Check a number of seconds of more than 0, or None for no limit; for a `Setting`."""
    return None if value is None else _more_than_none(name, value, ", or None for no limit")


def duration(name: str, value: Any) -> float:
    """Check a number of seconds of more than 0; for a `Setting`."""
    return _more_than_none(name, value, "")


def patience(name: str, value: Any) -> float | None:
    """Check a number of seconds of 0 or more, or None for no limit."""
    if value is None or (type(value) in (int, float) and value == 0):
        return cast(float | None, value)
    return _more_than_none(name, value, ", or None for no limit", "0 or more")


def _more_than_none(name: str, value: Any, other: str, least: str = "more than 0") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number of seconds{other}, not {value!r}")
    if _positive(value):
        return value
    raise ValueError(f"{name} is a finite number of seconds and {least}{other}, not {value!r:.100}")


def _positive(value: float) -> bool:
    try:
        return math.isfinite(value) and value > 0
    except OverflowError:
        return False  # an int that no float can hold


def positive_count(name: str, value: Any) -> int | None:
    """Check a number of things of 1 or more, or None for no limit; for a `Setting`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a whole number, an int, or None for no limit, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} is at least 1, or None for no limit, not {value}")
    return value


def per_second(name: str, value: Any) -> float | None:
    """Check a rate, a number per second, or None for no limit; for a `Setting`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number per second, or None for no limit, not {value!r}")
    if not _positive(value):
        raise ValueError(f"{name} is a finite number per second and more than 0, or None for no limit, not {value!r:.100}")
    return value


def truth(name: str, value: Any) -> bool:
    """Check a bool; for a `Setting`."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {value!r}")
    return value


def one_of(*values: str) -> Callable[[str, Any], str]:
    """Return a check for one of several words; for a `Setting`."""

    def check(name: str, value: Any) -> str:
        if value not in values:
            raise ValueError(f"{name} is one of {', '.join(map(repr, values))}, not {value!r}")
        return str(value)

    return check
