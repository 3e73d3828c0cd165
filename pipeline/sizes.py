"""Amounts of bytes as people write them."""

from __future__ import annotations

import re

from segkd.storage.errors import ConfigError

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("k", "M", "G", "T", "P"), start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T", "P"), start=1)},
}
"""Decimal and binary units, as the SI and the IEC have them."""

_UNIT_OF = {name.lower(): factor for name, factor in UNITS.items()}
_WRITTEN = re.compile(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """``200GB``, ``1.5 TiB`` … in bytes; upper and lower case alike. Raises ConfigError."""
    match = _WRITTEN.fullmatch(text)
    factor = _UNIT_OF.get(match[2].lower()) if match else None
    if match is None or factor is None or float(match[1]) == 0:
        raise ConfigError(f"{text!r} is no amount of bytes; write a number and one of {', '.join(UNITS)}: 200GB")
    return int(float(match[1]) * factor)


def format_bytes(count: float) -> str:
    """A count in the largest decimal unit that it fills, three digits: ``24.8 kB``."""
    decimal = list(UNITS.items())[:6]
    name, factor = max((unit for unit in decimal if unit[1] <= count), key=lambda unit: unit[1], default=decimal[0])
    value = count / factor
    digits = 0 if factor == 1 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {name}"
