"""Conversations as the text that the model was trained on, and where in it the assistant speaks."""

from __future__ import annotations

import json
import re
from typing import Any

from jinja2 import TemplateError

from whence.errors import ChatTemplateError
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

Answers = tuple[tuple[int, int], ...]
"""Stretches of a text, `(first, one past last)` character."""

MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\b")


def chat_template_of(tokenizer: Any, chosen: str | None) -> str | None:
    """Choose the template to use: the one that was asked for, else the tokenizer's own; None if there is none."""
    if chosen is not None:
        return CHATML if chosen == "chatml" else chosen
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def render(tokenizer: Any, template: str | None, messages: list[dict[str, str]]) -> Passage:
    """Write a conversation through the chat template; every turn of the assistant is an answer.

    The template says itself what the assistant's part is if it has `{% generation %}`; otherwise a turn is what it
    adds to the conversation before it. Raises `ChatTemplateError` when there is no template, or when it changes an answer.
    """
    text = write(tokenizer, template, messages)
    find = _marked_answers if MARKS_ANSWERS.search(template or "") else _added_answers
    answers = find(tokenizer, template, messages, text)
    spoken = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    written = "\n".join(text[first:last] for first, last in answers)
    for content in spoken:
        if content not in written:
            raise _rewritten(content, text)
    return Passage(text, answers, special=False)


def write(tokenizer: Any, template: str | None, messages: list[dict[str, str]], **options: Any) -> str:
    """Write messages through the template; `ChatTemplateError` where there is none, or where it refuses them."""
    if template is None:
        raise ChatTemplateError(
            "The rows are conversations, and this tokenizer has no chat template.",
            given=f"messages and a {type(tokenizer).__name__} without chat_template",
            accepted="a template as the model was trained with, or rows of prompt and completion",
            fix='chat_template="chatml" (--template chatml) or one of your own; see the result with: whence data preview',
        )
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    except TemplateError as error:
        raise ChatTemplateError(
            "The chat template refuses a conversation.",
            given=f"{error}; {json.dumps(messages, ensure_ascii=False)[:500]}",
            accepted="conversations as the model was trained on, or another template",
            fix='chat_template="chatml" (--template chatml), or rows of prompt and completion',
        ) from error


def _marked_answers(tokenizer: Any, template: str | None, messages: list[dict[str, str]], text: str) -> Answers:
    """Find the stretches between `{% generation %}` and `{% endgeneration %}`.

    Characters are exact; the tokens that `apply_chat_template` returns for them miss answers that begin with white space
    when the tokenizer leaves it out of its offsets.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    stretches: Any
    _, stretches = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
    )
    return tuple((first, last) for first, last in stretches[0])


def _added_answers(tokenizer: Any, template: str | None, messages: list[dict[str, str]], text: str) -> Answers:
    """Find what each turn of the assistant adds to the text of the conversation before it."""
    answers = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = write(tokenizer, template, messages[:i], add_generation_prompt=True)
            after = write(tokenizer, template, messages[: i + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise _rewritten(message["content"], text)
            answers.append((len(before), len(after)))
    return tuple(answers)


def _rewritten(content: str, text: str) -> ChatTemplateError:
    return ChatTemplateError(
        "The chat template changes what the assistant said, so its answer can't be found in the row.",
        given=f"the answer {content[:200]!r} in the row {text[:2000]!r}",
        accepted="a template that writes every answer as it is, after the text that comes before it",
        fix='chat_template="chatml" (--template chatml), a template with {% generation %} around the answer, '
        "or rows of prompt and completion",
    )
