import dataclasses

import numpy as np
import pandas
import pytest
from scipy.stats import hypergeom

from whence.filter import keywords
from whence.filter.keywords import keyword_overlap
from whence.store.scores import Scores

TEXTS = ["a zebra in the zoo", "the striped zebra"] + [f"the row number {n} of the zoo" for n in range(38)]


def scores(raw, **queries):
    table = pandas.DataFrame({"id": [f"q{n}" for n in range(len(raw))], **queries})
    ids = [f"r{n}" for n in range(len(TEXTS))]
    examples = pandas.DataFrame({"id": ids, "source": None, "copies": 1, "tokens": 5, "text": TEXTS})
    return Scores(np.asarray(raw, float), len(TEXTS), examples, table)


def test_rare_words_of_prompt_and_answer():
    asked = {"text": ["What has stripes? The zebra of the zoo"], "prompt": ["What has stripes?"], "completion": [" The zebra"]}
    raw = -np.arange(40.0)[None]
    (found,) = keyword_overlap(scores(raw, **asked), k=4)
    (answer,) = found  # no row has "what" or "stripes"; all have "the"
    assert (answer.part, answer.words, answer.top, answer.rows) == ("answer", ("zebra",), 2, 4)
    assert answer.share == 2 / 40 and answer.expected == pytest.approx(0.2)
    assert answer.p_value == pytest.approx(hypergeom.sf(1, 40, 2, 4)) and answer.as_json()["words"] == ["zebra"]
    (reverse,) = keyword_overlap(scores(-raw, **asked), k=4)[0]
    assert reverse.top == 0 and reverse.p_value == 1


def test_a_query_without_an_answer_and_one_without_words():
    found = keyword_overlap(scores([[0.0] * 40] * 2, text=["A ZEBRA number 7, 11", ""]), k=3)
    assert [part.part for part in found[0]] == ["text"] and set(found[0][0].words) == {"zebra", "11"}
    assert found[1] == ()


def test_many_rows_are_sampled(monkeypatch):
    monkeypatch.setattr(keywords, "SAMPLE", 20)
    one = scores(-np.arange(40.0)[None], text=["zebra"])
    (part,) = keyword_overlap(one, k=2)[0]
    assert part.top == 2 and part.share == 1 / 20, "every second row: one of both zebras"
    nothing = dataclasses.replace(one, examples=one.examples.assign(text=""))
    assert keyword_overlap(nothing) == [()]
