"""Plain text for people: aligned tables, readable sizes, nothing that steers a terminal. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["one_line", "printable", "readable", "readable_bytes", "readable_seconds", "table"]

# Control characters (of ASCII and of Latin-1) and lone surrogates, which no encoding can write.
_UNPRINTABLE = dict.fromkeys([*range(32), *range(0x7F, 0xA0), *range(0xD800, 0xE000)], "\ufffd")
_UNPRINTABLE |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters become U+FFFD, carriage returns are left out.

    Line ends, tabs and everything that is not a control character stay. Pieces of a text may be given one by one.
    """
    return text.translate(_UNPRINTABLE)


def one_line(message: str) -> str:
    """A message as a single printable line."""
    return printable(" ".join(message.split()))


def table(rows: Sequence[Sequence[object]], *, header: bool = True) -> str:
    """Rows as lines with aligned columns, numbers to the right; with a rule under the first row if it is a header."""
    cells = [["" if cell is None else one_line(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    body = cells[1:] if header else cells
    numeric = [all(row[i][:1].isdigit() or not row[i] for row in body) for i in range(len(widths))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths).rstrip())
    return "\n".join(lines)


def readable(number: float, unit: str = "") -> str:
    """1234567 -> "1.235 M": four digits and a decimal prefix."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.4g} {prefix}{unit}"
    return f"{number:.4g} {unit}".rstrip()


def readable_bytes(number: float) -> str:
    """2684354560 -> "2.50 GiB": the unit in which memory is sold."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} B"


def readable_seconds(seconds: float) -> str:
    """0.0155 -> "15.5 ms"."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.4g} {unit}"
    return f"{seconds * 1e9:.4g} ns"
