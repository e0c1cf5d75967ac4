"""How numbers are written for people."""

from __future__ import annotations

import math
from typing import Any

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def three_digits(value: float) -> str:
    """A signed number with three significant digits: +118, +4.00, -0.0123, +1.20e-05."""
    return f"{value:+#.3g}".rstrip(".")


def typeset(value: float) -> str:
    """A signed number with three significant digits, a true minus and a power of ten: +0.0213, −8,110, −3.53×10⁻⁵, 0."""
    if value == 0:
        return "0"
    if 999.5 <= abs(value) < 999_500:
        return f"{float(three_digits(value)):+,.0f}".replace("-", "−")
    digits, _, power = three_digits(value).partition("e")
    digits = digits.replace("-", "−")
    return f"{digits}×10{power_of_ten(int(power))}" if power else digits


def power_of_ten(power: int) -> str:
    """An exponent, raised: ⁻⁵."""
    return str(power).translate(_SUPERSCRIPT)


def plain_number(value: Any) -> str:
    """A number of a table in four significant digits; anything else as it is."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "–" if not math.isfinite(value) else f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain_number(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain_number, value))
    try:
        return plain_number(float(value)) if "." in str(value) else str(value)
    except ValueError:
        return str(value)


def size(count: float) -> str:
    """Bytes in GB (10^9), MB or kB."""
    for unit, least, digits in (("GB", 1e9, 1), ("MB", 1e6, 0)):
        if count >= 0.9995 * least:
            return f"{count / least:.{digits}f} {unit}"
    return f"{count / 1e3:.0f} kB"


def many(count: int, one: str, more: str = "") -> str:
    """A number of things: 1 row, 1,200 rows."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def times(value: float) -> str:
    """A factor: 1.4 ×, 27 ×, 1,200 ×."""
    return f"{value:,.2g} ×" if value < 10 else f"{value:,.0f} ×"


def percent(value: float) -> str:
    """A share in percent, of which small ones keep a digit."""
    return f"{value:.1%}" if value >= 0.001 or value == 0 else "< 0.1%"


def percentile(value: float) -> str:
    """A percentile that says 100 of nothing but the highest."""
    return f"{math.floor(10 * value) / 10:.1f}".removesuffix(".0")
