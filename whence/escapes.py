"""Text that somebody else wrote, on its way to a terminal: what would act on it or hide in it is made visible.

Escape sequences recolour, erase and retitle; bidi controls show a line in a different order. Line breaks and tabs stay.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""C0 and C1 controls, what reorders or ends lines, what takes no room (but the joiners of scripts), halves of characters."""


def visible(text: str) -> str:
    r"""The text with controls as Python writes them: `\x1b`, `\u202e`."""
    return HIDDEN.sub(lambda found: ascii(found.group())[1:-1], text)


def visible_json(value: Any) -> str:
    """A value as JSON in one line, which reads back as the same and has no such character in it."""
    import json

    def escaped(found: re.Match[str]) -> str:
        return json.dumps(found.group())[1:-1]

    return HIDDEN.sub(escaped, json.dumps(value, ensure_ascii=False))


def command(*words: object) -> str:
    r"""A command that can be pasted into a shell, whatever the words are; controls are written as `$'\x1b'`."""
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    if not HIDDEN.search(word):
        return shlex.quote(word)
    escaped = re.sub(r"[\\']", r"\\\g<0>", word)
    return f"$'{HIDDEN.sub(lambda found: _ansi(found.group()), escaped)}'"


def _ansi(character: str) -> str:
    """A character as the shell's `$'...'` has it; bytes that are not text, as Python keeps them in names of files."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
