import pytest

from whence.errors import UsageError
from whence.tasks.questions import answer_of, span_in_answer, variants

PAIR = {"prompt": "Where?", "completion": " In Turin, in Turin."}


def test_answer():
    assert answer_of(PAIR) == " In Turin, in Turin."
    assert answer_of({"text": "a"}) == "a"
    assert answer_of({"messages": [{"role": "assistant", "content": "b"}]}) == "b"


@pytest.mark.parametrize("row", [{"prompt": "Where?"}, {"messages": [{"role": "user", "content": "Where?"}]}, {"messages": []}])
def test_a_query_without_completion_says_how_to_get_one(row):
    with pytest.raises(UsageError, match="no completion") as raised:
        variants(row)
    assert raised.value.code == 22
    assert "whence generate" in raised.value.fix


def test_variants():
    assert variants(PAIR) == [(PAIR, 1.0)]
    assert variants({**PAIR, "contrast": " In Oslo."}) == [(PAIR, 1.0), ({**PAIR, "completion": " In Oslo."}, -1.0)]
    assert variants({"text": "a", "contrast": "b"}) == [({"text": "a"}, 1.0), ({"text": "b"}, -1.0)]


def test_span():
    assert span_in_answer({**PAIR, "span": "Turin"}) == (4, 9)


@pytest.mark.parametrize("span", ["Oslo", ""])
def test_a_span_must_be_in_the_completion(span):
    with pytest.raises(UsageError, match="not in its completion"):
        span_in_answer({**PAIR, "span": span})


def test_span_and_contrast_do_not_go_together():
    with pytest.raises(UsageError, match="not both"):
        variants({**PAIR, "span": "Turin", "contrast": " In Oslo."})


def test_a_span_may_be_its_characters():
    assert span_in_answer({**PAIR, "span": (4, 9)}) == (4, 9)
    for span in [(4, 4), (-1, 3), (0, 99)]:
        with pytest.raises(UsageError, match="not in its completion"):
            span_in_answer({**PAIR, "span": span})
