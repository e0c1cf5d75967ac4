"""The tokens of a row that carry its score: which are strong, and the stretch of the text that has most of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

STRONG = 0.5
"""Share of the strongest token's effect from which a token is marked."""

BREAK, NOTHING = "↵", "·"
"""Stand for a line break, and for a token that spells nothing of its own."""

SPECIAL = r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:pad|bos|eos|unk)>|\[(?:PAD|CLS|SEP|UNK|MASK)\]"
"""How tokenizers write their special tokens."""

_REPEATED = re.compile(rf"({SPECIAL})(?:\s*\1)+")
_SPECIAL = re.compile(SPECIAL)

HEAD = 60
"""Characters within which the first predicted token of a row begins."""


def strongest(pieces: Sequence[str], values: np.ndarray, width: int) -> tuple[int, int]:
    """First and one past the last token of the stretch of at most `width` characters with the largest absolute sum."""
    if not len(pieces):
        return 0, 0
    ends, sums = np.cumsum([0, *map(len, pieces)]), np.cumsum([0.0, *values])
    firsts = np.arange(len(pieces))
    lasts = np.maximum(firsts + 1, np.searchsorted(ends, ends[:-1] + width, side="right") - 1)
    firsts = firsts[: int(np.argmax(lasts == len(pieces))) + 1]  # later stretches are parts of the one that reaches the end
    best = int(np.argmax(np.abs(sums[lasts[: len(firsts)]] - sums[firsts])))
    return best, int(lasts[best])


def strong_runs(pieces: Sequence[str], values: np.ndarray) -> Iterator[tuple[str, int, str, str]]:
    """Neighbouring tokens of one kind as `(blanks before, sign, words, blanks after)`.

    Sign is 0 for tokens below `STRONG` times the strongest, whose words have no blanks taken off.
    """
    limit = STRONG * np.abs(values).max(initial=0.0)
    return runs(pieces, [int(np.sign(value)) if value and abs(value) >= limit else 0 for value in values])


def runs(pieces: Sequence[str], levels: Sequence[int]) -> Iterator[tuple[str, int, str, str]]:
    """Neighbouring tokens of one level as `(blanks before, level, words, blanks after)`; level 0 keeps its blanks."""
    for level, run in itertools.groupby(zip(pieces, levels, strict=True), key=lambda pair: pair[1]):
        words = "".join(piece for piece, _ in run)
        if level == 0:
            yield "", 0, words, ""
            continue
        inner = words.strip(" ") or words
        at = words.index(inner)
        yield words[:at], level, inner or NOTHING, words[at + len(inner) :]


def shown_once(text: str) -> str:
    """The text with special tokens that repeat shown once."""
    return _REPEATED.sub(r"\1", text)


def merge_special(pieces: Sequence[str], values: np.ndarray) -> tuple[list[str], list[float]]:
    """The tokens with special tokens that repeat, with nothing but blanks between, as one, whose value is their sum."""
    kept: list[str] = []
    sums: list[float] = []
    for piece, value in zip(pieces, values.tolist(), strict=True):
        kept.append(piece)
        sums.append(value)
        if not _SPECIAL.fullmatch(piece.strip()):
            continue
        before = next((place for place in range(len(kept) - 2, -1, -1) if kept[place].strip()), None)
        if before is not None and kept[before].strip() == piece.strip():
            sums[before] = sum(sums[before:])
            del kept[before + 1 :], sums[before + 1 :]
    return kept, sums


def unpredicted(text: str, pieces: Sequence[str]) -> str:
    """What of the text comes before the first token that is predicted: most often its first token."""
    spelt = "".join(itertools.takewhile(lambda piece: not _SPECIAL.fullmatch(piece), pieces))
    before = len(text) - len(spelt)
    if spelt and 0 <= before <= HEAD and text.endswith(spelt):
        return text[:before]
    begins = spelt[:40]
    at = text[: HEAD + len(begins)].find(begins) if begins else -1
    return text[:at] if at > 0 else ""


def unread(text: str, pieces: Sequence[str]) -> int:
    """How many characters at the end of the text were cut off; 0 where the tokens spell another text, as chats do."""
    at = 0
    for piece in pieces:
        if text.startswith(piece, at):
            at += len(piece)
        elif not _SPECIAL.fullmatch(piece.strip()):
            return 0
    return len(text) - at
