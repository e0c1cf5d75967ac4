"""Text with its strong tokens marked: by colour, or between brackets where there is none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from rich.text import Text

STRONG = 0.5
"""Share of the strongest token's effect from which a token is marked."""

BREAK, NOTHING = "↵", "·"
"""Stand for a line break, and for a token that spells nothing of its own."""


RAISES, LOWERS = "dodger_blue1", "dark_orange"
"""Apart for colour-blind eyes too; words and signs say the same everywhere."""


def snippet(pieces: Sequence[str], values: np.ndarray, width: int, coloured: bool) -> Text:
    """The stretch of about `width` characters whose tokens together have the largest effect, in one line."""
    first, last = strongest(pieces, values, width - 10)
    text = marked(pieces[first:last], values[first:last], coloured)
    line = Text("..." if first else "")
    line.append_text(text)
    if last < len(pieces):
        line.append("...")
    return one_line(line)


def strongest(pieces: Sequence[str], values: np.ndarray, width: int) -> tuple[int, int]:
    """First and one past the last token of the stretch of at most `width` characters with the largest absolute sum."""
    ends, sums = np.cumsum([0, *map(len, pieces)]), np.cumsum([0.0, *values])
    best, where = -1.0, (0, len(pieces))
    for first in range(len(pieces)):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + width, side="right")) - 1)
        if abs(sums[last] - sums[first]) > best:
            best, where = abs(sums[last] - sums[first]), (first, last)
        if last == len(pieces):
            break
    return where


def marked(pieces: Sequence[str], values: np.ndarray, coloured: bool) -> Text:
    """The tokens joined, the strong ones marked; neighbours of one sign are marked together."""
    text, limit = Text(), STRONG * np.abs(values).max(initial=0.0)
    signs = [int(np.sign(value)) if value and abs(value) >= limit else 0 for value in values]
    for sign, run in itertools.groupby(zip(pieces, signs, strict=True), key=lambda pair: pair[1]):
        words = "".join(piece for piece, _ in run)
        if sign == 0:
            text.append(words)
            continue
        inner = words.strip(" ") or words
        before, after = words[: words.index(inner)], words[words.index(inner) + len(inner) :]
        shown = (inner or NOTHING) if coloured else f"⟦{inner or NOTHING}⟧"
        text.append(before).append(shown, style=f"bold underline {RAISES if sign > 0 else LOWERS}").append(after)
    return text


def one_line(text: Text) -> Text:
    """The text with each line break as one sign."""
    line = text.copy()
    line.plain = text.plain.replace("\n", BREAK).replace("\r", " ").replace("\t", " ")
    return line
