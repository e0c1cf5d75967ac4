import pytest

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
    assert chat_template_of(tiny_tokenizer, "other") == "other"
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
