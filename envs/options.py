"""Options in the names of environments: the values that each may have, read and written."""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What an option may be."""

    value_of: Callable[[str], Any]  # of a text; ValueError if it stands for none
    allows: Callable[[Any], bool]
    words: str  # what is allowed
    default: Any = None  # None if it depends on the task or the device


def choice(*values: str) -> Kind:
    """One of these words."""
    return Kind(str, lambda value: value in values, f"one of {', '.join(values)}")


def _pair(text: str) -> tuple[float, float]:
    low, high = map(float, text.split(","))
    return low, high


FLAG = Kind(lambda text: json.loads(text.lower()), lambda x: isinstance(x, bool), "true or false")
COUNT = Kind(int, lambda x: 0 < x < 2**31, "a positive integer below 2**31")
NUMBER = Kind(float, math.isfinite, "a finite number")
SIZE = Kind(float, lambda x: 0 <= x < math.inf, "a finite number, at least 0")
RANGE = Kind(_pair, lambda x: x[0] <= x[1], "low,high with low <= high")


def read(text: str, kind: Kind, what: str) -> Any:
    """The value of a text; ValueError in one line if it is not of this kind."""
    try:
        value = kind.value_of(text)
    except ValueError:
        value = None
    if value is None or not kind.allows(value):
        example = "" if kind.default is None else f", such as the default, {spell(kind.default)}"
        raise ValueError(f"{what}={text!r} must be {kind.words}{example}")
    return value


def spell(value: Any) -> str:
    """The text of a value, in one spelling."""
    if isinstance(value, tuple):
        return ",".join(map(spell, value))
    return str(value).lower()
