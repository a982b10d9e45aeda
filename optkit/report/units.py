"""Numbers as a person reads them, for the terminal and the report."""

from __future__ import annotations

import math

MISSING = "-"


def size(value: float | None) -> str:
    """Return bytes as a person reads them (1 MB = 10^6 bytes)."""
    if value is None:
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f} B"


def count(value: float) -> str:
    """Return a large count with its prefix (k, M, G)."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Return seconds as a person reads them."""
    return _scaled(seconds, "s")


def energy(joules: float | None) -> str:
    """Return joules as a person reads them."""
    return _scaled(joules, "J")


def _scaled(value: float | None, unit: str) -> str:
    """Return a quantity in its unit or in thousandths or millionths of it, three digits, never an exponent."""
    if value is None:
        return MISSING
    prefix, scale = next(((p, s) for p, s in (("", 1.0), ("m", 1e-3)) if value >= 0.9995 * s), ("µ", 1e-6))
    number = value / scale
    return f"{number:.0f} {prefix}{unit}" if number >= 99.95 else f"{number:.3g} {prefix}{unit}"


def decibel(value: float | None) -> str:
    """Return an SQNR; infinite means bit-equal, minus infinity that shapes or non-finite values differ."""
    if value is None or value == math.inf:
        return "equal"
    return "not comparable" if value == -math.inf else f"{value:.1f} dB"


def difference(decibels: float) -> str:
    """Return the difference of two SQNRs with its sign; none at a tenth of a decibel is 0."""
    rounded = round(decibels, 1)
    return f"{rounded:+.1f} dB" if rounded else "0 dB"


def share(value: float | None) -> str:
    """Return a share in percent."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def small(value: float | None) -> str:
    """Return an error: 0, or two digits and a power of ten below a thousandth."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "∞"
    return "0" if value == 0 else f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.2g}"
