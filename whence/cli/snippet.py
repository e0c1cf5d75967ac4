"""Text with its strong tokens marked: by colour, or between brackets where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.text import Text

from whence.report.tokens import BREAK, strong_runs, strongest

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


def marked(pieces: Sequence[str], values: np.ndarray, coloured: bool) -> Text:
    """The tokens joined, the strong ones marked; neighbours of one sign are marked together."""
    text = Text()
    for before, sign, words, after in strong_runs(pieces, values):
        if sign == 0:
            text.append(words)
            continue
        shown = words if coloured else f"⟦{words}⟧"
        text.append(before).append(shown, style=f"bold underline {RAISES if sign > 0 else LOWERS}").append(after)
    return text


def one_line(text: Text) -> Text:
    """The text with each line break as one sign."""
    line = text.copy()
    line.plain = text.plain.replace("\n", BREAK).replace("\r", " ").replace("\t", " ")
    return line
