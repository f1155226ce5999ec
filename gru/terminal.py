"""Text for people: a model's text without control characters, numbers of things, durations, and sparklines."""

from collections.abc import Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BARS = "▁▂▃▄▅▆▇█"


def printable(text: str) -> str:
    """Return the text with U+FFFD in place of control characters, except line breaks and tabs.

    A model that has learned little may generate any character, and a terminal would obey some of them.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else REPLACEMENT for c in text.replace("\r\n", "\n"))


def one_line(text: str, most: int = 200) -> str:
    """Return the text as one printable line of at most `most` characters; each run of white space becomes a space."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def counted(number: int, noun: str) -> str:
    """Return a number of things: `1 file`, `2 files`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Return a duration as minutes:seconds, or hours:minutes:seconds from one hour on."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def sparkline(values: Sequence[float], most: int = 12) -> str:
    """Return one bar for each value, the lowest as the lowest bar; of more than `most` values, evenly spaced ones.

    The first and the last value are always among them.
    """
    if len(values) > most:
        values = [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)
