import numpy as np
import pytest

from whence.show.tokens import merge_special, runs, shown_once, strong_runs, unpredicted, unread


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<|endoftext|><|endoftext|> a", "<|endoftext|> a"),
        ("a</s></s>\n</s>", "a</s>"),
        ("[PAD][PAD][CLS]", "[PAD][CLS]"),
        ("<b><b> no no", "<b><b> no no"),
        ("<|a|><|b|>", "<|a|><|b|>"),
    ],
)
def test_special_tokens_once(text, shown):
    assert shown_once(text) == shown


def test_merged_tokens_keep_the_sum():
    pieces, values = merge_special(["a", "</s>", "</s>", " ", "</s>", "a", "a"], np.array([1.0, 2, 4, 8, 16, 32, 64]))
    assert pieces == ["a", "</s>", "a", "a"] and values == [1, 30, 32, 64]


def test_strong_tokens_run_together_without_their_blanks():
    found = list(strong_runs([" a", " b", " c", " d"], np.array([0.1, 1.0, 0.6, -0.9])))
    assert found == [("", 0, " a", ""), (" ", 1, "b c", ""), (" ", -1, "d", "")]
    assert list(runs(["", "x"], [2, 2])) == [("", 2, "x", "")] and list(runs([""], [2])) == [("", 2, "·", "")]


def test_what_comes_before_the_first_prediction():
    assert unpredicted("One day, it", [" day", ",", " it"]) == "One"
    assert unpredicted("One day, it", ["One", " day", ",", " it"]) == ""
    assert unpredicted("aa aa aa", [" aa", " aa"]) == "aa"
    assert unpredicted("One day, it was cut", [" day", ",", " it"]) == "One"
    assert unpredicted("user: hi", ["<|user|>", "\n", "hi"]) == "" and unpredicted("hi", []) == ""


def test_what_the_model_did_not_read():
    assert unread("One day, it was cut", ["One", " day", ",", " it"]) == len(" was cut")
    assert unread("One day", ["One", " day", "</s>"]) == 0
    assert unread("user: hi", ["<|user|>", "\n", "hi"]) == 0
