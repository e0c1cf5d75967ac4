import json

import pytest

from whence.data import as_rows
from whence.errors import ChatTemplateError
from whence.tasks import CausalLM
from whence.tasks.chat import CHATML, chat_template_of, render

TALK = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "In Turin."},
    {"role": "user", "content": "And Bo?"},
    {"role": "assistant", "content": "In Oslo."},
]
PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<{% generation %}{{ m['content'] }};{% endgeneration %}>"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}[{{ m['role'] }}] {{ m['content'] }}\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def answers(tokenizer, template, messages=TALK):
    passage = render(tokenizer, template, messages)
    return [passage.text[first:last] for first, last in passage.answers]


def test_template_without_marks(tiny_tokenizer):
    assert answers(tiny_tokenizer, PLAIN) == ["In Turin.\n", "In Oslo.\n"]
    assert not render(tiny_tokenizer, PLAIN, TALK).special


def test_template_with_marks(tiny_tokenizer):
    assert answers(tiny_tokenizer, MARKED) == ["In Turin.;", "In Oslo.;"]


@pytest.mark.parametrize("content", [" In Turin.", " ", " \n In Turin. \n", "戦 x 戦"])
def test_answers_keep_their_white_space(framing_tokenizer, content):
    talk = [TALK[0], {"role": "assistant", "content": content}, *TALK[2:]]
    for template, ending in ((PLAIN, "\n"), (MARKED, ";")):
        assert answers(framing_tokenizer, template, talk) == [content + ending, "In Oslo." + ending]


def test_chatml(tiny_tokenizer):
    assert chat_template_of(tiny_tokenizer, "chatml") == CHATML
    assert answers(tiny_tokenizer, CHATML) == ["In Turin.<|im_end|>", "In Oslo.<|im_end|>"]
    assert render(tiny_tokenizer, CHATML, TALK[:1]).answers == ()


def test_template_of_the_tokenizer(tiny_tokenizer):
    assert chat_template_of(tiny_tokenizer, None) is None
    tiny_tokenizer.chat_template = PLAIN
    assert chat_template_of(tiny_tokenizer, None) == PLAIN
    assert chat_template_of(tiny_tokenizer, MARKED) == MARKED
    tiny_tokenizer.chat_template = {"default": PLAIN, "tools": "x"}
    assert chat_template_of(tiny_tokenizer, None) == PLAIN


def test_no_template(tiny_tokenizer):
    with pytest.raises(ChatTemplateError, match="no chat template") as raised:
        CausalLM(tiny_tokenizer).encode([{"messages": TALK}])
    assert raised.value.code == 5
    assert 'chat_template="chatml"' in raised.value.fix


@pytest.mark.parametrize(
    "template",
    [PLAIN.replace("m['content']", "m['content'] | upper"), FORGETFUL, MARKED.replace("m['content'] }};", "'...' }};")],
)
def test_template_that_changes_the_answer_shows_the_row(tiny_tokenizer, template):
    with pytest.raises(ChatTemplateError, match="changes what the assistant said") as raised:
        render(tiny_tokenizer, template, TALK)
    assert "Where?" in raised.value.given or "WHERE?" in raised.value.given


def test_template_that_trims_the_answer_is_fine(tiny_tokenizer):
    talk = [TALK[0], {"role": "assistant", "content": "  In Turin.\n"}]
    assert answers(tiny_tokenizer, PLAIN.replace("m['content']", "m['content'] | trim"), talk) == ["In Turin.\n"]


def test_template_that_refuses(tiny_tokenizer):
    with pytest.raises(ChatTemplateError, match="refuses a conversation") as raised:
        render(tiny_tokenizer, "{{ raise_exception('roles must alternate') }}", TALK)
    assert "roles must alternate" in raised.value.given


def test_tokens_of_the_answers_are_in_the_loss(tiny_tokenizer):
    task = CausalLM(tiny_tokenizer, chat_template=MARKED)
    (item,) = task.encode([{"messages": TALK}])
    assert "".join(piece for piece, in_loss in task.display(item) if in_loss) == "In Turin.;In Oslo.;"
    assert "".join(piece for piece, _ in task.display(item)) == item.text


def test_queries_ask_about_the_last_answer(tiny_tokenizer):
    task = CausalLM(tiny_tokenizer, chat_template=PLAIN)
    (((item, weight),),) = task.encode_queries([{"messages": TALK}])
    assert weight == 1.0
    assert "".join(piece for piece, in_loss in task.display(item) if in_loss).strip() == "In Oslo."


def test_queries_ask_about_a_span_or_a_contrast_of_the_last_answer(tiny_tokenizer):
    task = CausalLM(tiny_tokenizer, chat_template=PLAIN)
    (((item, _),),) = task.encode_queries([{"messages": TALK, "span": "Oslo"}])
    assert "".join(piece for piece, in_loss in task.display(item) if in_loss).strip() == "Oslo"
    (pair,) = task.encode_queries([{"messages": TALK, "contrast": "In Lyon."}])
    assert [item.text.splitlines()[-1] for item, _ in pair] == ["[assistant] In Oslo.", "[assistant] In Lyon."]
    assert [weight for _, weight in pair] == [1.0, -1.0]


QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Reasoning, even none, is written in the last turn only."""
THINKS = QWEN3.replace(
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
    "{{ m.content }}{% else %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endif %}",
)
"""Leaves out the reasoning that earlier turns hold."""
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}<s>{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {% if system and m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{{ system }}\n\n{% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>{% endif %}"
    "{% endfor %}"
)
"""The system's words go before the last thing that the user says."""
FIRST = "{{ '[' + messages[0]['role'] + ' first]' }}" + PLAIN
"""Looks at the first turn, which an empty conversation doesn't have."""


def test_template_that_writes_reasoning_in_the_last_turn_only(tiny_tokenizer):
    assert answers(tiny_tokenizer, QWEN3) == ["In Turin.<|im_end|>\n", "<think>\n\n</think>\n\nIn Oslo.<|im_end|>\n"]


def test_template_that_moves_the_words_of_the_system(tiny_tokenizer):
    talk = [{"role": "system", "content": "Be brief."}, *TALK]
    assert answers(tiny_tokenizer, MISTRAL, talk) == [" In Turin.</s>", " In Oslo.</s>"]


@pytest.mark.parametrize("template", [QWEN3, MISTRAL])
@pytest.mark.parametrize("said", ["Where?", "In Oslo.", "e", "In Turin. In Oslo."])
def test_answers_that_stand_elsewhere_too_are_found_where_they_were_given(tiny_tokenizer, template, said):
    talk = [{"role": "system", "content": "In Turin."}, TALK[0], {"role": "assistant", "content": said}, *TALK[2:]]
    passage = render(tiny_tokenizer, template, talk)
    first, second = (passage.text[begin:end] for begin, end in passage.answers)
    assert first.strip().removesuffix("</s>").removesuffix("<|im_end|>") == said
    assert "In Oslo." in second
    assert passage.text[passage.answers[0][1] :].count("And Bo?") == 1


@pytest.mark.parametrize("template", [PLAIN, MARKED, CHATML, FIRST, QWEN3])
def test_a_conversation_may_begin_with_the_assistant(tiny_tokenizer, template):
    talk = [{"role": "assistant", "content": "Hello."}, *TALK[:2]]
    (first, second) = answers(tiny_tokenizer, template, talk)
    assert first.startswith("Hello.")
    assert "In Turin." in second


@pytest.mark.parametrize("template", [PLAIN, MARKED, QWEN3])
@pytest.mark.parametrize("silent", [0, 1])
def test_turns_that_are_not_trained_on_are_not_in_the_loss(tiny_tokenizer, template, silent):
    talk = [dict(turn) for turn in TALK]
    talk[1 + 2 * silent]["train"] = False
    kept = answers(tiny_tokenizer, template, talk)
    assert len(kept) == 1
    assert ["In Turin.", "In Oslo."][1 - silent] in kept[0]
    task = CausalLM(tiny_tokenizer, chat_template=template)
    (item,), (whole,) = task.encode([{"messages": talk}]), task.encode([{"messages": TALK}])
    assert item.ids.tolist() == whole.ids.tolist()
    assert 0 < item.in_loss.sum() < whole.in_loss.sum()


def test_a_query_asks_about_a_turn_that_was_not_trained_on(tiny_tokenizer):
    task = CausalLM(tiny_tokenizer, chat_template=PLAIN)
    (((item, _),),) = task.encode_queries([{"messages": [*TALK[:3], {**TALK[3], "train": False}]}])
    assert "".join(piece for piece, in_loss in task.display(item) if in_loss).strip() == "In Oslo."


WITH_CALLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CALLING = [
    TALK[0],
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "find"}}]},
    {"role": "tool", "content": "Turin"},
    TALK[1],
]


def test_calls_of_tools_are_answers(tiny_tokenizer, notes):
    assert answers(tiny_tokenizer, WITH_CALLS, CALLING) == ['<call>{"name": "find"}</call>', "In Turin."]
    CausalLM(tiny_tokenizer, chat_template=WITH_CALLS).encode([{"messages": CALLING, "tools": [{"name": "find"}]}])
    assert notes == []


@pytest.mark.parametrize(
    ("extra", "tools", "named"),
    [({"reasoning_content": "Hm."}, {}, "reasoning_content"), ({}, {"tools": [{"name": "find"}]}, "tools"), ({}, {}, None)],
)
def test_what_the_template_does_not_write_is_named(tiny_tokenizer, notes, extra, tools, named):
    row = {"messages": [TALK[0], {**TALK[1], **extra}], **tools}
    CausalLM(tiny_tokenizer, chat_template=PLAIN).encode([row] * 2)
    assert notes == (
        [f"warning: the chat template does not write {named}, so the model never sees it (first in row 0)"] if named else []
    )


def test_calls_that_the_template_does_not_write_are_named(tiny_tokenizer, notes):
    CausalLM(tiny_tokenizer, chat_template=PLAIN).encode([{"messages": CALLING}])
    assert [note for note in notes if "does not write tool_calls" in note]


DATED = (
    "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}; {{ strftime_now(\"%Y-%m-%d\") }}\n{% endif %}"
    + PLAIN
)


@pytest.mark.parametrize(
    "template", [DATED, "{% set form = '%d %b %Y; %Y-%m-%d' %}Today: {{ strftime_now(form) }}\n" + PLAIN, MARKED]
)
def test_todays_date_is_one_day(tiny_tokenizer, template, notes):
    tiny_tokenizer.chat_template = template
    task = CausalLM(tiny_tokenizer)
    (item,) = task.encode([{"messages": TALK}])
    if template is MARKED:
        assert notes == []
    else:
        assert item.text.startswith("Today: 26 Jul 2024; 2024-07-26\n[user] Where?")
        assert len([note for note in notes if "26 July 2024" in note]) == 1
        assert task.settings()["chat_template"] == CausalLM(tiny_tokenizer).settings()["chat_template"]


@pytest.mark.parametrize("name", ["chatml", "ChatML", "CHATML"])
def test_known_templates_in_any_case(tiny_tokenizer, name):
    assert chat_template_of(tiny_tokenizer, name) == CHATML


def test_template_of_a_file_or_of_a_name(tiny_tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(PLAIN)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": PLAIN}))
    assert chat_template_of(tiny_tokenizer, str(tmp_path / "chat.jinja")) == PLAIN
    assert chat_template_of(tiny_tokenizer, str(tmp_path / "tokenizer_config.json")) == PLAIN
    tiny_tokenizer.chat_template = {"default": MARKED, "tool_use": PLAIN}
    assert chat_template_of(tiny_tokenizer, "tool_use") == PLAIN
    assert chat_template_of(tiny_tokenizer, "none") is None
    with pytest.raises(ChatTemplateError, match="no chat template 'chatlm'") as raised:
        chat_template_of(tiny_tokenizer, "chatlm")
    assert raised.value.accepted == "chatml, none, default, tool_use, a file, such as chat_template.jinja"


def test_a_conversation_that_the_template_refuses_is_named(tiny_tokenizer):
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user begins') }}{% endif %}" + PLAIN
    rows = as_rows([{"messages": TALK}, {"messages": TALK[1:]}])
    with pytest.raises(ChatTemplateError, match="refuses a conversation") as raised:
        CausalLM(tiny_tokenizer, chat_template=strict).encode(rows)
    assert raised.value.given.startswith(f"{rows.ids[1]}: a user begins; ")


def test_reasoning_that_earlier_turns_lose_is_named(tiny_tokenizer, notes):
    thinking = [
        {**turn, "content": f"<think>\nHm.\n</think>\n\n{turn['content']}"} if n % 2 else turn for n, turn in enumerate(TALK)
    ]
    assert answers(tiny_tokenizer, THINKS, thinking) == [
        "In Turin.<|im_end|>\n",
        "<think>\nHm.\n</think>\n\nIn Oslo.<|im_end|>\n",
    ]
    assert notes == ["warning: the chat template leaves out, or rewrites, what turns of the assistant hold up to </think>"]


def test_calls_of_tools_where_the_words_of_the_system_move(tiny_tokenizer):
    calls = MISTRAL.replace(
        "{% elif m.role == 'assistant' %}",
        "{% elif m.tool_calls %}{{ m.tool_calls | tojson }}</s>{% elif m.role == 'assistant' %}",
    )
    talk = [{"role": "system", "content": "Be brief."}, *CALLING, *TALK[2:]]
    written = ['[{"type": "function", "function": {"name": "find"}}]</s>', "In Turin.</s>", " In Oslo.</s>"]
    assert [answer.strip() for answer in answers(tiny_tokenizer, calls, talk)] == [answer.strip() for answer in written]
