"""Numbers as text, the same in every table and sentence."""

from __future__ import annotations


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def p_text(p: float) -> str:
    """A corrected p value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def dollars(value: float) -> str:
    """One or two significant digits below a dollar.

    >>> dollars(12.345), dollars(0.0071234), dollars(0)
    ('$12.35', '$0.007', '$0')
    """
    if not value:
        return "$0"
    if value >= 1:
        return f"${value:,.2f}"
    digits = 1
    while round(value, digits) < 10**-digits and digits < 12:
        digits += 1
    return f"${value:.{digits + 1}f}"


def duration(seconds: float) -> str:
    """
    >>> duration(0.42), duration(75), duration(7300)
    ('0.4 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
