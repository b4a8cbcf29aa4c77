"""JSON text of documents: that of `json.dumps(value, indent=2, sort_keys=True)`, byte for byte, in half of the time.

With an indent Python's own encoder works value by value, which for the histograms of a hundred thousand records takes
minutes.
"""

from __future__ import annotations

__all__ = ["json_text"]

import json
import math
from json.encoder import encode_basestring_ascii
from typing import Any


def json_text(value: Any, indent: str = "") -> str:
    """Write a JSON value with sorted keys and an indent of two.

    Parameters
    ----------
    value : dict, list, str, int, float, bool or None
        Keys are strings.
    indent : str
        That of the line on which the value starts.

    Raises
    ------
    ValueError
        A number is NaN or infinite.
    """
    kind = type(value)
    if kind is str:
        return encode_basestring_ascii(value)
    if kind is int or kind is float:
        return _number(value)
    deeper = f"{indent}  "
    if kind is dict:
        parts = [f"{encode_basestring_ascii(key)}: {json_text(value[key], deeper)}" for key in sorted(value)]
        return _between("{", parts, "}", indent)
    if kind is list:
        return _between("[", [json_text(item, deeper) for item in value], "]", indent)
    return json.dumps(value)


def _number(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError("Out of range float values are not JSON compliant")
    return repr(value)


def _between(start: str, parts: list[str], end: str, indent: str) -> str:
    if not parts:
        return start + end
    separator = f",\n{indent}  "
    return f"{start}\n{indent}  {separator.join(parts)}\n{indent}{end}"
