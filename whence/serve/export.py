"""One file that shows answers without a server: the page with its data inside, and plain HTML for where no script runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from whence.report.html import as_elements, csp
from whence.serve.guard import STATIC
from whence.serve.state import now
from whence.store.plain import plain

PLACE = '<script type="application/json" id="whence-data">null</script>'
"""Where the data goes, verbatim."""

NOSCRIPT = re.compile(r"<noscript>.*?</noscript>", re.DOTALL)
"""Where the plain HTML goes."""

HIDDEN = {"text": "", "pieces": [], "token_values": [], "words": [], "place": None, "window": None}
"""Of a row, what stands for what is left out of a file that may not show texts."""


def page(
    run: Mapping[str, Any],
    answers: Sequence[dict[str, Any]],
    pairs: Mapping[str, Any],
    pinned: Sequence[Mapping[str, Any]],
    redact: bool,
) -> bytes:
    """The file; `pinned` are the entries of pinned questions (`whence.serve.state.State.asked`), with their notes."""
    template, made = STATIC / "export.html", now()
    if redact:
        answers, pairs = [_redacted(answer) for answer in answers], {}
    answers = plain(answers)
    notes = {entry["key"]: {row["id"]: row["note"] for row in entry["rows"]} for entry in pinned}
    elements, style = as_elements(answers, notes)
    about = [entry["note"] for entry in pinned if entry["note"]]
    head = Markup(
        "<header class=top><h1>{}</h1><p class=soft>Made {} with whence {} of {}. Estimates, not proof.</p>{}</header>"
    ).format(
        run.get("title") or "Which training rows made the model say this?",
        made[:10],
        run["version"],
        run.get("model", {}).get("name", ""),
        Markup("").join(Markup("<p class=note>{}</p>").format(note) for note in about),
    )
    static = f"<style>{style}</style><div class=page>{head}<main>{elements}</main></div>"
    if not template.is_file() or PLACE not in (text := template.read_text(encoding="utf-8")):
        policy = f"default-src 'none'; style-src '{csp(style)}'"
        return f"{BARE.format(policy)}{static}</html>".encode("utf-8", "replace")
    data = {"run": run, "asked": answers, "pairs": pairs, "pins": pinned, "redacted": redact, "made": made}
    inside = json.dumps(plain(data), ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    text = NOSCRIPT.sub(lambda _: f"<noscript>{static}</noscript>", text, count=1)
    text = text.replace("style-src ", f"style-src '{csp(style)}' ", 1)
    return text.replace(PLACE, PLACE.replace("null", inside, 1), 1).encode("utf-8", "replace")


BARE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    '<meta http-equiv="Content-Security-Policy" content="{}"><title>whence</title>'
)
"""How the file begins where no page was built."""


def _redacted(answer: dict[str, Any]) -> dict[str, Any]:
    sides = {side: [row | HIDDEN for row in answer["query"][side]] for side in ("raises", "lowers")}
    stages = [{**stage, "top": {"raises": [], "lowers": []}} for stage in answer["stages"]]
    return {**answer, "query": answer["query"] | sides, "stages": stages}
