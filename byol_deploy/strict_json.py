"""Typed values from a stranger's JSON: every fault is noted with its place, nothing is believed.

Limits keep a hostile document from costing memory; paths are such as stay in their folder on every system.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_TEXT = 4096
"""Characters of one text."""
_MAX_ITEMS = 100_000
_WINDOWS_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


class Reader:
    """Reads typed values from one JSON object and notes every fault with its place.

    What is missing or of another kind is a fault, and a harmless value is given in its place.

    Args:
        data: The object.
        place: Its key in the document, for messages.
        faults: Where faults are noted; None makes a list, :attr:`faults`.
    """

    def __init__(self, data: Mapping[str, Any], place: str = "", faults: list[str] | None = None) -> None:
        self.data = data
        self.place = place
        self.faults: list[str] = [] if faults is None else faults

    def fault(self, key: str, expected: str) -> None:
        """Note that the value of ``key`` is missing or not what is expected."""
        where = f"{self.place}.{key}" if self.place else key
        found = f"is {short(self.data[key])}" if key in self.data else "is missing"
        self.faults.append(f"{where} {found}; it must be {expected}")

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        """A text of at most :data:`MAX_TEXT` characters, all of which fit the pattern."""
        value = self.data.get(key)
        if not isinstance(value, str) or len(value) > MAX_TEXT or (pattern and not pattern.fullmatch(value)):
            self.fault(key, f"text like {pattern.pattern}" if pattern else "text")
            return ""
        return value

    def path(self, key: str) -> str:
        """A path that stays in its folder."""
        value = self.text(key)
        if isinstance(self.data.get(key), str) and not is_plain_path(value):
            self.fault(key, "a path that stays in the bundle, such as model.onnx")
        return value

    def choice(self, key: str, only: Any) -> Any:
        """The one value that is allowed."""
        if self.data.get(key) != only:
            self.fault(key, repr(only))
        return only

    def count(self, key: str, low: int = 0) -> int:
        """A whole number from ``low``."""
        value = self.data.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
            self.fault(key, f"a whole number from {low}")
            return low
        return value

    def optional_count(self, key: str) -> int | None:
        """A whole number from 0; None where it is absent or null."""
        return self.count(key) if self.data.get(key) is not None else None

    def counts(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """A list of whole numbers from ``low`` to ``high``."""
        values = self.sequence(key)
        whole = all(isinstance(value, int) and not isinstance(value, bool) and low <= value <= high for value in values)
        if not whole:
            self.fault(key, f"a list of whole numbers from {low} to {high}")
            return ()
        return tuple(values)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object, as it is."""
        value = self.data.get(key)
        if not isinstance(value, Mapping):
            self.fault(key, "an object")
            return {}
        return value

    def sequence(self, key: str) -> Sequence[Any]:
        """A list, as it is."""
        value = self.data.get(key)
        if not isinstance(value, list) or len(value) > _MAX_ITEMS:
            self.fault(key, f"a list of at most {_MAX_ITEMS} items")
            return []
        return value

    def section(self, key: str) -> Reader:
        """A reader of the object at ``key``; its faults are noted here too."""
        return Reader(self.mapping(key), f"{self.place}.{key}" if self.place else key, self.faults)

    def items(self, key: str) -> list[Reader]:
        """A reader for each object in a list."""
        values = self.sequence(key)
        if not all(isinstance(value, Mapping) for value in values):
            self.fault(key, "a list of objects")
            return []
        return [Reader(value, f"{key}[{number}]", self.faults) for number, value in enumerate(values)]

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self.sequence(key)
        if not all(isinstance(value, str) and len(value) <= MAX_TEXT for value in values):
            self.fault(key, "a list of texts")
            return ()
        return tuple(values)


def is_plain_path(name: str) -> bool:
    """Whether ``name`` is a relative path with forward slashes that stays in its folder on every system."""
    parts = name.split("/")
    return (
        0 < len(name) <= 255
        and not any(char in '\\:*?"<>|' or ord(char) < 32 for char in name)
        and not any(part in ("", ".", "..") or part != part.strip(" ") or part.endswith(".") for part in parts)
        and not any(_WINDOWS_RESERVED.fullmatch(part) for part in parts)
    )


def is_finite(value: object) -> bool:
    """Whether a value is a number that a float can hold."""
    # The bound keeps out whole numbers that are too large.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def short(value: object) -> str:
    """How a message shows a value: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
