import itertools
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from whence.errors import EmptyLossError, UsageError
from whence.tasks import CausalLM
from whence.tasks.tokens import Passage, _align, pad, padding_id, report_lengths, tokenize

texts = st.text(st.sampled_from("abc  \n\t,é戦🙂́") | st.characters(codec="utf-8"), max_size=20)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def prompt_and_completion(prompt, completion):
    return Passage(prompt + completion, ((len(prompt), len(prompt) + len(completion) + 1),))


def check_alignment(tokenizer, prompt, completion):
    """Pieces join to the text, and exactly those that hold a character of the completion are in the loss."""
    (tokens,) = tokenize(tokenizer, [prompt_and_completion(prompt, completion)], 512)
    real = [i for i, token in enumerate(tokens.ids) if token not in tokenizer.all_special_ids]
    if real:
        assert "".join(tokens.pieces) == prompt + completion
    ends = np.cumsum([len(piece) for piece in tokens.pieces])
    for piece, end, in_loss in zip(tokens.pieces, ends, tokens.in_loss, strict=True):
        if piece:
            assert in_loss == (end > len(prompt))
    flagged = [in_loss for in_loss, _ in itertools.groupby(tokens.in_loss)]
    assert flagged in ([], [False], [True], [False, True])


@quick
@given(texts, texts)
@example("hello ", " world  ")
@example("  ", "  ")
@example("é", "é戦🙂")
@example("", " a")
def test_byte_level(tiny_tokenizer, prompt, completion):
    check_alignment(tiny_tokenizer, prompt, completion)


@quick
@given(texts, texts)
@example("hello ", " world  ")
@example(" ", " ")
@example("", "  a")
def test_byte_level_with_trimmed_offsets_and_special_tokens(framing_tokenizer, prompt, completion):
    check_alignment(framing_tokenizer, prompt, completion)


@pytest.mark.parametrize("name", ["models/stories260K/hf", "models/babyllama105/hf", "models/babyllama361/hf"])
def test_real_sentencepiece_tokenizers(name, shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / name)
    for prompt, completion in [("Once upon", " a time"), ("Ein Ké", "é戦🙂 ok"), ("a\n", "\n b  c "), ("", "Lily")]:
        check_alignment(tokenizer, prompt, completion)


def real_tokenizer(shared_data, name):
    from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

    folder = shared_data / "tokenizers" / name
    if name == "gpt2":
        return GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_real_byte_level_tokenizers(name, shared_data):
    tokenizer = real_tokenizer(shared_data, name)
    for prompt, completion in [("Once upon", " a time"), ("Ein Ké", "é戦🙂 ok"), ("a\n", "\n b  c \n\n"), ("", "  Lily")]:
        check_alignment(tokenizer, prompt, completion)


def test_a_character_of_several_tokens_belongs_to_the_first(tiny_tokenizer):
    (tokens,) = tokenize(tiny_tokenizer, [Passage("a戦b", ((1, 2),))], 512)
    assert tokens.pieces == ["a", "戦", "", "", "b"]
    assert tokens.display() == [("a", False), ("戦", True), ("", True), ("", True), ("b", False)]


def test_special_tokens_spell_nothing_and_only_the_end_is_in_the_loss(framing_tokenizer):
    (tokens,) = tokenize(framing_tokenizer, [prompt_and_completion("a", "b")], 512)
    assert tokens.display() == [("", False), ("a", False), ("b", True), ("", True)]
    (inside,) = tokenize(framing_tokenizer, [Passage("ab", ((1, 2),))], 512)
    assert inside.in_loss.tolist() == [False, False, True, False]


def test_end_of_sequence_is_appended_once(tiny_tokenizer, framing_tokenizer):
    (tokens,) = tokenize(tiny_tokenizer, [prompt_and_completion("a", "b")], 512, append_eos=True)
    assert tokens.ids[-1] == tiny_tokenizer.eos_token_id
    assert tokens.in_loss.tolist() == [False, True, True]
    (framed,) = tokenize(framing_tokenizer, [prompt_and_completion("a", "b")], 512, append_eos=True)
    assert framed.ids.tolist().count(framing_tokenizer.eos_token_id) == 1


def test_passages_may_write_their_own_special_tokens(framing_tokenizer):
    with_them, without = tokenize(framing_tokenizer, [Passage("ab", ()), Passage("ab", (), special=False)], 512)
    assert with_them.ids.tolist() == [0, *without.ids.tolist(), 1]


def test_cut(tiny_tokenizer):
    (whole,) = tokenize(tiny_tokenizer, [prompt_and_completion("Ada Velt was born", " in Turin.")], 512)
    (cut,) = tokenize(tiny_tokenizer, [prompt_and_completion("Ada Velt was born", " in Turin.")], 4)
    assert cut.ids.tolist() == whole.ids[:4].tolist()
    assert (cut.length, cut.needed) == (whole.length, whole.needed) == (len(whole.ids), len(whole.ids))
    assert "Ada Velt was born in Turin.".startswith("".join(cut.pieces))


def test_empty_text(tiny_tokenizer):
    (tokens,) = tokenize(tiny_tokenizer, [prompt_and_completion("", "")], 512)
    assert (len(tokens.ids), tokens.length, tokens.needed, tokens.pieces) == (0, 0, 0, [])
    assert tokenize(tiny_tokenizer, [], 512) == []


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UsageError, match="can't tell which characters"):
        tokenize(Slow(), [], 512)


def test_pad():
    rows = [np.array([1, 2, 3]), np.array([4])]
    assert pad(rows, 0).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert pad(rows, 9, "left").tolist() == [[1, 2, 3], [9, 9, 4]]


def test_padding_id(tiny_tokenizer):
    assert padding_id(tiny_tokenizer) == tiny_tokenizer.eos_token_id
    tiny_tokenizer.pad_token = "<s>"
    assert padding_id(tiny_tokenizer) == 0


def test_report_of_lengths(tiny_tokenizer, notes):
    tokens = tokenize(tiny_tokenizer, [prompt_and_completion("", text) for text in ("a", "Ada Velt was born", "b", "c")], 3)
    report_lengths(tokens, [0, 3, 1, 1], 3, ["w", "x", "y", "z"])
    assert notes == [
        f"1 of 4 rows (25.0%) are cut at max_length=3; the longest has {tokens[1].length} tokens",
        "1 of 4 rows have no token in the loss and are left out: w",
    ]


def test_report_stops_when_most_rows_are_empty(tiny_tokenizer):
    tokens = tokenize(tiny_tokenizer, [prompt_and_completion("", "a")] * 3, 3)
    with pytest.raises(EmptyLossError, match="2 of 3 rows have no token in the loss") as raised:
        report_lengths(tokens, [0, 0, 1], 3, ["x", "y", "z"])
    assert raised.value.code == 6
    assert "x, y" in raised.value.given
    report_lengths(tokens[:2], [0, 1], 3, ["x", "y"])


@pytest.mark.parametrize("text", ["<s>a b", "a b</s>", "<s>a b</s>", "<s>", "</s>", "a <s> b"])
def test_special_tokens_that_a_text_spells_are_there_once(framing_tokenizer, text, notes):
    (tokens,) = tokenize(framing_tokenizer, [Passage(text, ())], 512)
    plain = framing_tokenizer(text, add_special_tokens=False)["input_ids"]
    begun, ended = text.startswith("<s>"), text.endswith("</s>")
    assert tokens.ids.tolist() == [*([] if begun else [0]), *plain, *([] if ended else [1])]
    assert "".join(tokens.pieces) == text
    assert len(notes) == begun + ended


def test_a_beginning_that_the_text_spells_is_not_in_the_loss(framing_tokenizer):
    """Nothing predicts it: a second one would be predicted by the first."""
    spelt, plain = CausalLM(framing_tokenizer).encode([{"text": "<s>a b"}, {"text": "a b"}])
    assert spelt.ids.tolist() == plain.ids.tolist()
    assert spelt.in_loss.tolist() == plain.in_loss.tolist()
    (row,) = CausalLM(framing_tokenizer).encode([{"prompt": "<s>a", "completion": " b</s>"}])
    assert row.ids.tolist().count(0) == row.ids.tolist().count(1) == 1
    assert row.in_loss[-1]


def one_by_one(total, offsets, added, answers):
    """Where each token's characters begin and end, and whether any is in an answer: token by token."""
    last_real = max((i for i, special in enumerate(added) if not special), default=-1)
    begins, ends, end = [], [], 0
    for i, ((first, last), special) in enumerate(zip(offsets, added, strict=True)):
        begins.append(end if special else min(first, end))
        if not special:
            end = total if i == last_real else min(total, max(end, last, end + 1 if first == last else 0))
        ends.append(end)
    spans = list(zip(begins, ends, strict=True))
    return ends, [any(end > first and begin < last for first, last in answers) for begin, end in spans]


def test_characters_go_to_tokens_as_one_by_one_whatever_the_offsets_say():
    draw, empty, special = random.Random(0), 0, 0
    for _ in range(3000):
        total, count = draw.randrange(20), draw.randrange(9)
        firsts = [draw.randrange(total + 1) for _ in range(count)]
        offsets = [(first, first + draw.choice([0, 0, 1, 3])) for first in (sorted(firsts) if draw.random() < 0.7 else firsts)]
        added = [int(draw.random() < 0.2) for _ in range(count)]
        answers = tuple((first, first + draw.randrange(6)) for first in draw.choices(range(total + 1), k=draw.randrange(3)))
        found = _align(Passage("x" * total, answers), list(range(count)), offsets, added, None, 512)
        assert (found.ends.tolist(), found.in_loss.tolist()) == one_by_one(total, offsets, added, answers)
        empty, special = empty + any(first == last for first, last in offsets), special + any(added)
    assert empty > 1000 and special > 1000
