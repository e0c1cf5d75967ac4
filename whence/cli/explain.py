"""`whence explain`: what a code in a message means, from the page of the documentation that lists them."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from whence.cli import options
from whence.errors import UsageError

PACKAGE = Path(__file__).parents[1]
PAGES = PACKAGE / "errors.md", PACKAGE.parent / "docs" / "errors.md"
"""Where the page may be: in a wheel within the package (hatch_build.py puts it there), in a checkout among the others."""


@dataclass(frozen=True)
class Entry:
    """A code: what raises it, what happened, and all that the page says about it."""

    code: str
    kind: str
    what: str
    text: str


def explain(
    code: Annotated[str, typer.Argument(metavar="[CODE]", help="Such as WHENCE-07, or 7; default: list all.")] = "",
    as_json: options.AsJson = False,
) -> None:
    """Explain the code of a message: what happened, why, and what helps.

    \b
    Examples
      whence explain WHENCE-07
      whence explain
    """
    from whence.cli.console import print_json, print_table, say

    known = entries()
    if not code:
        if as_json:
            print_json([asdict(entry) for entry in known.values()])
        else:
            print_table(("code", "what happened"), [(entry.code, entry.what) for entry in known.values()], range(2))
        return
    number = re.fullmatch(r"(?:whence-?)?0*(\d+)", code.strip("[] "), re.IGNORECASE)
    entry = known.get(int(number[1])) if number else None
    if entry is None:
        raise UsageError(f"No message has the code {code}.", accepted=", ".join(each.code for each in known.values()))
    if as_json:
        print_json(asdict(entry))
        return
    say(f"{entry.code}  {entry.kind}", "bold")
    say(entry.text)


def entries() -> dict[int, Entry]:
    """All codes, in order, without the page's Markdown."""
    page = next(path for path in PAGES if path.is_file()).read_text(encoding="utf-8")
    found = re.findall(r"^\*\*(WHENCE-(\d\d))\*\* ([^*]*?)[.:] (.+?)(?=\n\n|\Z)", page, re.MULTILINE | re.DOTALL)
    listed = {int(number): Entry(code, _bare(kind), _first(text), _plain(text)) for code, number, kind, text in found}
    return dict(sorted(listed.items()))


def _first(text: str) -> str:
    """What happened, which the page has in italics."""
    return _bare(text.split("*")[1] if text.startswith("*") else text).rstrip(".")


def _bare(text: str) -> str:
    return _plain(text).replace("`", "")


def _plain(text: str) -> str:
    """Markdown as text: a link is its words, with the file that it leads to."""
    text = re.sub(r"\[([^]]+)\]\((\w[\w-]*\.md)[^)]*\)", r"\1 (docs/\2)", text)
    text = re.sub(r"(?<!\w)\*([^*]+)\*", r"\1", text).replace("$", "").replace("\n", " ")
    return text[:1].upper() + text[1:]
