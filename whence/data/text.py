"""How rows are written before they are tokenized: plain characters and blanks, and the templates around them.

Training, factors and scores must read the same text, so all of them take their rows from `written`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, Literal

from whence.data.rows import Rows, with_contents
from whence.errors import UsageError
from whence.settings import Format, Normalise

FORMATS: Mapping[str, Format] = {
    "plain": Format(),
    "qa": Format(prompt="Question: {prompt}\nAnswer:", completion=" {completion}"),
    "instruction": Format(
        prompt="Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{prompt}\n\n### Response:\n",
        completion="{completion}",
    ),
}
"""Formats by name; `instruction` is that of Alpaca (Taori et al. 2023)."""

PLAIN = FORMATS["plain"]

LINE_BREAKS = re.compile("\r\n?|[\x85\u2028\u2029]")
BLANKS = re.compile(r"[^\S\n]+")

REASONING = ("reasoning_content", "reasoning", "thinking")
"""What turns say beside their content."""

Ends = Literal["both", "left", "right", "none"]


def normalise(text: str, settings: Normalise, *, ends: Ends = "both") -> str:
    r"""Write the text in one Unicode form, with single blanks; `ends` says from which ends blanks and line breaks go.

    Line breaks stay, all as "\n"; any other run of white space becomes one blank.
    """
    if settings.unicode:
        text = unicodedata.normalize(settings.unicode, text)
    if settings.lowercase:
        text = text.lower()
    if settings.whitespace:
        text = BLANKS.sub(" ", LINE_BREAKS.sub("\n", text))
        text = text.lstrip() if ends in ("both", "left") else text
        text = text.rstrip() if ends in ("both", "right") else text
    return text


def written(rows: Rows, format: str | Format = "plain", normalised: Normalise | None = None) -> Rows:
    """Normalise the texts of the rows, then put prompts and completions into the templates; ids and copies stay.

    Contrast and span of a query change with its completion. What lies between prompt and completion is kept: where the
    format is plain, one's last and the other's first blanks; elsewhere what the templates put there, in place of them.
    Prompts without completion are written too.

    Raises `UsageError` for an unknown format, a template without its placeholder, and rows that a template can't write.
    """
    template = _template(format)
    change: Callable[[str, Ends], str] = (
        (lambda text, ends: normalise(text, normalised, ends=ends)) if normalised is not None else (lambda text, ends: text)
    )
    return with_contents(rows, [_write(row, name, template, change) for name, row in zip(rows.ids, rows, strict=True)])


def asked(rows: Rows, format: str | Format = "plain", normalised: Normalise | None = None) -> Rows:
    """Queries as `written`, but for those that are written so already, or that no template of prompts fits."""
    template = _template(format)
    apart = [number for number, row in enumerate(rows) if "prompt" not in row or is_written(row, template)]
    plain = dict(zip(apart, written(rows.take(apart), PLAIN, normalised), strict=True))
    rest = [number for number in range(len(rows)) if number not in plain]
    changed = plain | dict(zip(rest, written(rows.take(rest), template, normalised), strict=True))
    return with_contents(rows, [changed[number] for number in range(len(rows))])


def is_written(row: Mapping[str, Any], format: str | Format) -> bool:
    """Whether a row's prompt, and its completion where it has one, begin and end as the templates do."""
    template = _template(format)
    pairs = [(row[part], getattr(template, part).split(f"{{{part}}}")) for part in ("prompt", "completion") if part in row]
    return "prompt" in row and all(text.startswith(first) and text.endswith(last) for text, (first, last) in pairs)


def _template(format: str | Format) -> Format:
    """Look up a format by name, and check that its templates have room for the texts."""
    if isinstance(format, str):
        if format not in FORMATS:
            raise UsageError(
                f"There is no format {format!r}.", accepted=f"{', '.join(FORMATS)}, or templates for prompt and completion"
            )
        format = FORMATS[format]
    for part in ("prompt", "completion"):
        placeholder = f"{{{part}}}"
        if getattr(format, part).count(placeholder) != 1:
            raise UsageError(
                f"The template of the {part} must hold {placeholder} once.",
                given=repr(getattr(format, part)),
                accepted=f"such as {getattr(FORMATS['qa'], part)!r}",
            )
    return format


def _write(row: Mapping[str, Any], name: str, template: Format, change: Callable[[str, Ends], str]) -> dict[str, Any]:
    new = dict(row)
    if template != PLAIN and "prompt" not in row:
        kind = "a conversation, which its chat template writes" if "messages" in row else "one text, without a prompt"
        raise UsageError(
            f"Row {name} is {kind}, so the format can't be applied to it.",
            given=f"a row with {', '.join(row)}, and the format {template.prompt!r} {template.completion!r}",
            accepted="rows of prompt and completion, or format plain",
            fix='name the columns: columns={"prompt": "...", "completion": "..."}, or leave the format out',
        )
    if "messages" in row:
        new["messages"] = [
            {**message, **{part: change(message[part], "both") for part in ("content", *REASONING) if part in message}}
            for message in row["messages"]
        ]
    if "text" in row:
        new["text"] = change(row["text"], "both")
    if "prompt" in row:
        new["prompt"] = _fill(template.prompt, "{prompt}", change(row["prompt"], "left"))
    answers_text = "prompt" not in row  # a text or a conversation is asked about as a whole: no boundary to keep
    for part in ("completion", "contrast"):
        if part in row:
            text = change(row[part], "both" if answers_text else "right")
            new[part] = text if answers_text else _fill(template.completion, "{completion}", text)
    if "span" in row:
        new["span"] = change(row["span"], "none")
        answer = new.get("completion", new.get("text"))
        if answer is not None and new["span"] not in answer:  # its ends may have been the answer's, which are gone
            new["span"] = new["span"].strip()
    return new


def _fill(template: str, placeholder: str, text: str) -> str:
    """Put the text in; a template of its own says what stands around it, so the text's blank ends go."""
    return text if template == placeholder else template.replace(placeholder, text.strip())
