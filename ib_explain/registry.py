"""A dict with a decorator: names to methods, metrics and gates. Filled at import, afterwards only read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from ib_explain.checks import did_you_mean

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one `kind` of thing, in the order of their `rank` and, of one rank, as they were registered.

    >>> GATES: Registry[type] = Registry("gate")
    >>> @GATES.register("identity")
    ... class Identity: "Lets everything pass."
    >>> list(GATES), GATES.get("identity") is Identity
    (['identity'], True)
    """

    def __init__(self, kind: str, *, rank: Callable[[T], int] = lambda entry: 0) -> None:
        self.kind, self.rank = kind, rank
        self._entries: dict[str, T] = {}
        self._sources: dict[str, str] = {}

    def register(self, name: str, *, origin: Any = None) -> Callable[[T], T]:
        """Decorator that files the decorated object under `name`.

        Args:
            name: for `get`.
            origin: the user's function that the object was made of, if it is not the object itself.

        Raises:
            TypeError: `name` is no text (the decorator needs one: `@register("mine")`), or the object is not callable.
            ValueError: the name is empty, or taken. Only what `__main__` defined is replaced, by what is called as it:
                a notebook's cell can run again.
        """
        self.check_name(name)

        def file(entry: T) -> T:
            if not callable(entry):
                raise TypeError(f"{self.kind} {name!r} must be callable, got {entry!r}")
            source = _called(entry if origin is None else origin)
            again = source.startswith("__main__.") and source == self._sources.get(name)  # a notebook's cell, run again
            if name in self._entries and not again:
                raise ValueError(f"{self.kind} {name!r} is already registered, to {self._sources[name]}")
            self._entries[name], self._sources[name] = entry, source
            self._entries = dict(sorted(self._entries.items(), key=lambda item: self.rank(item[1])))
            return entry

        return file

    def check_name(self, name: Any) -> None:
        """Refuse what can be no name, such as the function itself where the decorator was given none."""
        if not isinstance(name, str):
            raise TypeError(
                f'the name of a {self.kind} must be a str, got {name!r}; name it in the decorator: ("mine")'
            )
        if not name.strip() or "," in name:  # the command line takes several names with commas between them
            raise ValueError(f"the name of a {self.kind} must not be empty nor hold a comma, got {name!r}")

    def get(self, name: str) -> T:
        """Return the entry, or raise a ValueError with the nearest names; a TypeError for what is no name."""
        if not isinstance(name, str):
            raise TypeError(f"the name of a {self.kind} must be a str, got {name!r}")
        if name not in self._entries:
            raise ValueError(f"unknown {self.kind} {name!r}{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def summaries(self) -> dict[str, str]:
        """Each name with the first line of its docstring."""
        return {name: (entry.__doc__ or "").strip().split("\n")[0] for name, entry in self._entries.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)


def _called(entry: Any) -> str:
    """Module and qualified name."""
    return f"{getattr(entry, '__module__', '')}.{getattr(entry, '__qualname__', repr(entry))}"
