"""Conversations as the text that the model was trained on, and where in it the assistant speaks."""

from __future__ import annotations

import datetime
import itertools
import json
import os.path
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from whence.errors import ChatTemplateError
from whence.progress import note
from whence.tasks.tokens import Passage

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The widespread ChatML format, for tokenizers that bring no template: `chat_template="chatml"`."""

DATE = datetime.datetime(2024, 7, 26)
"""The day that templates get when they ask for today's; those of Llama 3 name it themselves where they can't ask."""

Answers = list[tuple[int, int]]
"""Stretches of a text, `(first, one past last)` character."""

MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\b")
ASKS_DATE = "strftime_now"
MARK = "\ue000"
"""A character of nobody's, that stands where the assistant would speak."""
FLAG = "train"
"""Of a turn: False leaves it out of the loss. No template sees it."""


def chat_template_of(tokenizer: Any, chosen: str | None) -> str | None:
    """Choose the template to use, with one day for every day; None if there is none.

    `chosen` is "chatml", "none", the name of one of the tokenizer's templates, a file, or the template itself; without it the
    tokenizer's own is taken. Raises ChatTemplateError for anything else.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {"default": own}
    if chosen is None:
        return _of_one_day(named.get("default"))
    if chosen.casefold() in ("chatml", "none"):
        return CHATML if chosen.casefold() == "chatml" else None
    if chosen in named:
        return _of_one_day(named[chosen])
    if "{{" in chosen or "{%" in chosen:
        return _of_one_day(chosen)
    file = Path(chosen).expanduser()
    if not file.is_file():
        names = [name for name, template in named.items() if template]
        raise ChatTemplateError(
            f"There is no chat template {chosen!r}.",
            given="neither a known name, nor a file, nor Jinja (which has {{ }} or {% %} in it)",
            accepted=", ".join(["chatml", "none", *names, "a file, such as chat_template.jinja"]),
            fix="--template chatml, or --template FILE (Python: chat_template=...)",
        )
    text = file.read_text(encoding="utf-8")
    return _of_one_day(json.loads(text)["chat_template"] if file.suffix == ".json" else text)


def _of_one_day(template: str | None) -> str | None:
    """Let a template that asks for today's date always get the same, so that rows are the same tomorrow."""
    if template is None or ASKS_DATE not in template:
        return template
    codes = {code: DATE.strftime(f"%{code}") for code in "aAbBcdDeFHIjmMpSTuwxXyY"} | {"-d": DATE.day, "-m": DATE.month}
    written = "".join(f" | replace('%{code}', '{said}')" for code, said in codes.items())
    return f"{{% macro {ASKS_DATE}(format) %}}{{{{ format{written} }}}}{{% endmacro %}}{{{{ '' }}}}" + template


def render(tokenizer: Any, template: str | None, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None) -> Passage:
    """Write a conversation through the chat template; every turn of the assistant is an answer, unless its `train` is False.

    The template says itself what the assistant's part is if it has `{% generation %}`; otherwise a turn is what it
    adds to the conversation before it. Raises `ChatTemplateError` when there is no template, or when it changes an answer.
    """
    turns = [{key: value for key, value in message.items() if key != FLAG} for message in messages]
    options = {"tools": tools} if tools else {}
    text = write(tokenizer, template, turns, **options)
    if MARKS_ANSWERS.search(template or ""):
        answers = _marked_answers(tokenizer, template, turns, options)
    else:
        answers = _added_answers(tokenizer, template, turns, text, options)
    said = [message for message in messages if message["role"] == "assistant"]
    written = "\n".join(text[first:last] for first, last in answers)
    for content in (message["content"] for message in said):
        if _core(content, text) not in written:
            raise _rewritten(content, text)
        if _core(content, text) != content.strip():
            note("warning: the chat template leaves out, or rewrites, what turns of the assistant hold up to </think>")
    silent = [message.get(FLAG) is False for message in said]
    if any(silent) and len(answers) != len(said):
        raise ChatTemplateError(
            "It is not clear which turns of a conversation are to be left out of the loss.",
            given=f"{len(said)} turns of the assistant, {len(answers)} stretches that the template marks: {text[:500]!r}",
            accepted="a template that marks each turn of the assistant once with {% generation %}",
            fix='another template, such as chat_template="chatml" (--template chatml)',
        )
    return Passage(text, tuple(answer for n, answer in enumerate(answers) if not (any(silent) and silent[n])), special=False)


def write(tokenizer: Any, template: str | None, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """Write messages through the template; `ChatTemplateError` where there is none, or where it refuses them."""
    if template is None:
        raise ChatTemplateError(
            "The rows are conversations, and this tokenizer has no chat template.",
            given=f"messages and a {type(tokenizer).__name__} without chat_template",
            accepted="a template as the model was trained with, or rows of prompt and completion",
            fix='chat_template="chatml" (--template chatml) or one of your own; see the result with: whence data preview',
        )
    try:
        return tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise ChatTemplateError(
            "The chat template refuses a conversation.",
            given=f"{error}; {json.dumps(messages, ensure_ascii=False)[:500]}",
            accepted="conversations as the model was trained on, or another template",
            fix='chat_template="chatml" (--template chatml), or rows of prompt and completion',
        ) from error


def unwritten(tokenizer: Any, template: str | None, messages: Sequence[dict[str, Any]], tools: Any, text: str) -> list[str]:
    """Name what of the turns, beside role and content, makes no difference to the text: the template leaves it out."""
    turns = [{key: value for key, value in message.items() if key != FLAG} for message in messages]
    options = {"tools": tools} if tools else {}
    missing = []
    for name in dict.fromkeys(key for turn in turns for key in turn if key not in ("role", "content")):
        fewer = [{key: value for key, value in turn.items() if key != name} for turn in turns]
        if write(tokenizer, template, fewer, **options) == text:
            missing.append(name)
    if tools and write(tokenizer, template, turns) == text:
        missing.append("tools")
    return missing


def _marked_answers(
    tokenizer: Any, template: str | None, messages: Sequence[dict[str, Any]], options: dict[str, Any]
) -> Answers:
    """Find the stretches between `{% generation %}` and `{% endgeneration %}`.

    Characters are exact; the tokens that `apply_chat_template` returns for them miss answers that begin with white space
    when the tokenizer leaves it out of its offsets.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    stretches: Any
    _, stretches = render_jinja_template(
        [list(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
        **options,
    )
    return [(first, last) for first, last in stretches[0]]


def _added_answers(
    tokenizer: Any, template: str | None, messages: Sequence[dict[str, Any]], text: str, options: dict[str, Any]
) -> Answers:
    """Find what each turn of the assistant adds to the text of the conversation before it.

    Some templates write a turn otherwise when others follow it (they leave out reasoning, or move the system's words). There
    the answer is found by its place, with what the template puts around it when it is the last turn.
    """
    answers: Answers = []
    places: Answers | None = None
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for number, i in enumerate(spoken):
        content = messages[i]["content"]
        before = _alone(tokenizer, template, messages[:i], {"add_generation_prompt": True, **options})
        after = _alone(tokenizer, template, messages[: i + 1], options) or content
        added = after[len(before) :] if before is not None and after.startswith(before) else None
        if before is not None and added is not None and text.startswith(after):
            answers.append((len(before), len(after)))
            continue
        core = _core(content, after)
        if not core and added is None:  # what a turn of words would begin after
            said = _alone(tokenizer, template, [*messages[:i], {"role": "assistant", "content": MARK}], options) or ""
            added = after[len(os.path.commonprefix([said.partition(MARK)[0], after])) :]
        if not core and added and (at := text.find(added, answers[-1][1] if answers else 0)) >= 0:
            answers.append((at, at + len(added)))  # calls of tools
            continue
        at = after.rfind(core)
        if not core or at < 0:
            raise _rewritten(content, text)
        places = places or _places(tokenizer, template, messages, text, options)
        first, last = places[number]
        lead = "" if added is None else after[len(after) - len(added) : at]
        if text[:first].endswith(lead):
            first -= len(lead)
        for character in after[at + len(core) :]:
            if text[last : last + 1] != character:
                break
            last += 1
        answers.append((first, last))
    return answers


def _alone(tokenizer: Any, template: str | None, messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> str | None:
    """The beginning of a conversation as a whole one; None where the template does not write it: nothing, for one."""
    try:
        return write(tokenizer, template, messages, **options)
    except ChatTemplateError:
        return None


def _places(
    tokenizer: Any, template: str | None, messages: Sequence[dict[str, Any]], text: str, options: dict[str, Any]
) -> Answers:
    """Find where each turn of the assistant stands in the text, by a mark put before and one after what it says."""
    opening, closing = itertools.islice((mark for mark in map(chr, itertools.count(ord(MARK))) if mark not in text), 2)
    marked = []
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant" and content.strip():
            lead, core, tail = content.rpartition(_core(content, text))
            message = {**message, "content": f"{lead}{opening}{core}{closing}{tail}"}
        marked.append(message)
    written = write(tokenizer, template, marked, **options)
    places, end, marks = [], 0, 0
    for message in messages:
        if message["role"] == "assistant":
            core = _core(message["content"], text)
            at = written.find(f"{opening}{core}{closing}", end) if core else end
            if at < 0:
                raise _rewritten(message["content"], text)
            places.append((at - marks, at - marks + len(core)))
            if core:
                end, marks = at + len(core) + 2, marks + 2
    if written.replace(opening, "").replace(closing, "") != text:
        raise _rewritten(messages[-1]["content"], text)
    return places


def _core(content: str, text: str) -> str:
    """What a turn says without the white space around it; where the text has not all of it, without its reasoning."""
    said = content.strip()
    return said if said in text else said.rpartition("</think>")[2].strip()


def _rewritten(content: str, text: str) -> ChatTemplateError:
    return ChatTemplateError(
        "The chat template changes what the assistant said, so its answer can't be found in the row.",
        given=f"the answer {content[:200]!r} in the row {text[:2000]!r}",
        accepted="a template that writes every answer verbatim",
        fix='chat_template="chatml" (--template chatml), a template with {% generation %} around the answer, '
        "or rows of prompt and completion",
    )
