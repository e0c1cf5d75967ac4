import unicodedata

import pytest

from whence.data import as_rows
from whence.data.text import FORMATS, normalise, written
from whence.errors import UsageError
from whence.settings import Format, Normalise
from whence.tasks import CausalLM

ALL = Normalise(lowercase=True)


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("  a \t b\u00a0c ", Normalise(), "a b c"),
        ("a\r\nb\rc\u2028d", Normalise(), "a\nb\nc\nd"),
        ("\n\na\n\n  b\n", Normalise(), "a\n\n b"),
        ("ＡＢ ﬁne ①", Normalise(), "AB fine 1"),
        ("ﬁne", Normalise(unicode="NFC"), "ﬁne"),
        ("e\u0301", Normalise(unicode="NFC"), "é"),
        ("e\u0301  ", Normalise(unicode=None, whitespace=False), "e\u0301  "),
        ("ÄB", ALL, "äb"),
    ],
)
def test_normalise(text, settings, expected):
    assert normalise(text, settings) == expected


def test_normalising_twice_changes_nothing_more():
    for text in ("  a \t\r\n b ﬁ\u2028 C ", "\x85x\x0by", "İ ſ ǅ"):
        once = normalise(text, ALL)
        assert normalise(once, ALL) == once
        assert unicodedata.is_normalized("NFKC", normalise(text, Normalise()))


def test_plain_rows_without_normalisation_stay_as_they_are():
    rows = as_rows(
        [{"prompt": " a  b ", "completion": " c ", "contrast": " d ", "source": "S"}, {"prompt": "p "}, {"text": " t "}]
    )
    same = written(rows)
    assert same.rows == rows.rows and same.ids == rows.ids and same.fingerprint == rows.fingerprint


def test_every_field_is_normalised_and_the_boundary_is_kept():
    rows = as_rows(
        [
            {
                "prompt": "  Where\t was she?  ",
                "completion": "\t In  TURIN. ",
                "contrast": "  In  OSLO. ",
                "source": "My  Source",
            },
            {"prompt": "Where?", "completion": " In  Turin, ﬁnally. ", "span": "  Turin,  ﬁnally. "},
            {"text": "  a  B "},
            {"messages": [{"role": "user", "content": " Hi  YOU "}, {"role": "assistant", "content": " Yes  "}]},
            {"prompt": "Say:  "},
        ]
    )
    pair, spanned, text, talk, bare = written(rows, normalised=Normalise()).rows
    assert pair == {"prompt": "Where was she? ", "completion": " In TURIN.", "contrast": " In OSLO.", "source": "My  Source"}
    assert spanned["completion"] == " In Turin, finally." and spanned["span"] == "Turin, finally."
    assert text == {"text": "a B"}
    assert [message["content"] for message in talk["messages"]] == ["Hi YOU", "Yes"]
    assert bare == {"prompt": "Say: "}


@pytest.mark.parametrize("blank", ["", " ", "  \n"])
def test_question_and_answer_read_right_whatever_blanks_the_columns_have(blank):
    rows = as_rows([{"prompt": f"Where?{blank}", "completion": f"{blank}Turin.{blank}", "contrast": f"{blank}Oslo."}])
    for settings in (None, Normalise()):
        (row,) = written(rows, "qa", settings).rows
        assert row["prompt"] + row["completion"] == "Question: Where?\nAnswer: Turin."
        assert row["contrast"] == " Oslo."


def test_formats_of_prompts_alone_are_those_of_the_rows():
    row, prompt = written(as_rows([{"prompt": "Add {1}", "completion": "{2}"}, {"prompt": "Add {1}"}]), "instruction").rows
    assert prompt == {"prompt": row["prompt"]} and row["prompt"].endswith("### Instruction:\nAdd {1}\n\n### Response:\n")
    assert row["completion"] == "{2}"


def test_templates_of_ones_own():
    own = Format(prompt="<{prompt}>", completion="[{completion}]")
    (row,) = written(as_rows([{"prompt": "{completion}", "completion": "b", "span": " b"}]), own).rows
    assert row == {"prompt": "<{completion}>", "completion": "[b]", "span": "b"}


def test_ids_and_copies_stay():
    rows = as_rows([{"prompt": "A ", "completion": "b"}, {"prompt": "A ", "completion": "b"}])
    changed = written(rows, "qa", ALL)
    assert changed.ids == rows.ids and changed.copies == (2, 2) and changed.fingerprint != rows.fingerprint


@pytest.mark.parametrize("row", [{"text": "a"}, {"messages": [{"role": "assistant", "content": "a"}]}])
def test_a_template_is_refused_for_rows_without_a_prompt(row):
    with pytest.raises(UsageError, match="so the format can't be applied"):
        written(as_rows([row]), "qa")


@pytest.mark.parametrize(
    "format", ["q&a", Format(prompt="no place"), Format(completion="{completion} {completion}"), Format(completion="{prompt}")]
)
def test_formats_that_can_not_be_are_refused(format):
    with pytest.raises(UsageError, match="format|template"):
        written(as_rows([{"prompt": "a", "completion": "b"}]), format)


def test_the_answer_alone_is_in_the_loss_of_every_format(tiny_tokenizer):
    task, rows = CausalLM(tiny_tokenizer), as_rows([{"prompt": " Where was Bo  born?", "completion": " In Oslo. "}])
    for name in FORMATS:
        (item,) = task.encode(written(rows, name, Normalise()))
        assert "".join(piece for piece, counted in item.display() if counted).strip() == "In Oslo."
