"""What stands in the JSON of a run folder, looked at before it is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..errors import FileFormatError


def object_of(content: str, what: str, format: str | None = None) -> dict[str, Any]:
    """The JSON object that a text holds; its "format" is `format`, if one is given.

    Raises: `FileFormatError` for anything else.
    """
    try:
        data = json.loads(content)
        json.dumps(data, ensure_ascii=False).encode()  # JSON may write half a character, which no text can hold
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{what} is no JSON, it may be cut off ({error})") from None
    if not isinstance(data, dict) or (format is not None and data.get("format") != format):
        raise FileFormatError(
            f"{what} is not what it should be: " + (f'"format" is not "{format}"' if format else "no JSON object")
        )
    return data


def fields_of(data: Mapping[str, Any], wanted: Mapping[str, type], what: str) -> dict[str, Any]:
    """Exactly the fields `wanted`, each of its type; whole numbers pass for floats.

    Raises: `FileFormatError` that names the field.
    """
    for key, kind in wanted.items():
        value: Any = data.get(key)
        right = type(value) is kind or (kind is float and type(value) is int)
        if not right or (kind is float and not math.isfinite(value)):
            raise FileFormatError(f'{what}: "{key}" should be {kind.__name__}, it is {str(value)[:60]!r}')
    if extra := sorted(set(data) - set(wanted)):
        raise FileFormatError(f"{what} has unknown fields: {', '.join(extra)}")
    return {key: float(data[key]) if kind is float else data[key] for key, kind in wanted.items()}
