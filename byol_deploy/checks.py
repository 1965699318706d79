"""Checks of single settings: each takes a value, returns what is kept, and raises ValueError(expectation)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

Check = Callable[[Any], Any]
# YAML 1.1 as PyYAML reads it takes `1e-3` for text; YAML 1.2 and every reader take it for a number.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\Z")


def number(low: float, high: float, *, above: bool = False, integer: bool = False, auto: bool = False) -> Check:
    """A number in [low, high] ((low, high] when ``above``), or "auto"."""
    kind = "a whole number" if integer else "a number"
    if math.isinf(high):
        span = f"above {low:g}" if above else f"of at least {low:g}"
    else:
        span = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
    expectation = f"{kind} {span}" + (", or auto" if auto else "")

    def check(value: Any) -> Any:
        if auto and value == "auto":
            return "auto"
        if isinstance(value, str) and _NUMBER.match(value.strip()):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(expectation)
        if value < low or value > high or (above and value == low) or (integer and value != int(value)):
            raise ValueError(expectation)
        return int(value) if integer else float(value)

    return check


def odd_size(value: Any) -> Any:
    expectation = "an odd whole number from 1 to 255, or auto"
    try:
        size = number(1, 255, integer=True, auto=True)(value)
    except ValueError:
        raise ValueError(expectation) from None
    if size != "auto" and size % 2 == 0:
        raise ValueError(expectation)
    return size


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a name such as resnet18, timm/convnext_nano or module:callable")
    return value.strip()


def choice(*names: str) -> Check:
    def check(value: Any) -> str:
        # `32` in YAML or on the command line is a number; the choice is the text "32".
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(text, str) or text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return check


def numbers(length: int, low: float, high: float, *, rising: bool = False, above: bool = False) -> Check:
    one = number(low, high, above=above)
    order = ", the smaller one first" if rising else ""
    bounds = f"{'above' if above else 'from'} {low:g} {'and up ' if above else ''}to {high:g}"
    expectation = f"{length} numbers {bounds}{order}, such as [{', '.join(['0.5'] * length)}]"

    def check(value: Any) -> tuple[float, ...]:
        if not isinstance(value, list | tuple) or len(value) != length:
            raise ValueError(expectation)
        try:
            result = tuple(one(item) for item in value)
        except ValueError:
            raise ValueError(expectation) from None
        if rising and list(result) != sorted(result):
            raise ValueError(expectation)
        return result

    return check


def plain_mapping(value: Any) -> dict[str, Any]:
    def plain(item: Any) -> Any:
        if item is None or isinstance(item, bool | int | float | str):
            return item
        if isinstance(item, list | tuple):
            return [plain(part) for part in item]
        if isinstance(item, Mapping) and all(isinstance(key, str) for key in item):
            return {key: plain(part) for key, part in item.items()}
        raise ValueError("a mapping of names to plain values (texts, numbers, true or false, lists)")

    if not isinstance(value, Mapping):
        raise ValueError("a mapping of names to plain values (texts, numbers, true or false, lists)")
    return cast(dict[str, Any], plain(value))
