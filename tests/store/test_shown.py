"""Scores as a REPL, `print` and a notebook show them: short, in words, and nothing of a user's text acts."""

from html.parser import HTMLParser

import numpy as np
import pandas
import pytest

from whence.store.ranked import Ranked
from whence.store.scores import Scores

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> $x$ \x1b[31m\u202e & \"quoted\" 'too'</table>"


def scores(queries: int = 2, rows: int = 12, tokens: bool = True) -> Scores:
    """Scores of hostile rows, some longer than a cell."""
    raw = np.linspace(-3, 5, queries * rows).reshape(rows, queries).T
    pieces = [[HOSTILE, " long " * 80, " end"]] * rows
    examples = {
        "id": [f"{HOSTILE}-{n}" for n in range(rows)],
        "source": [HOSTILE] * rows,
        "copies": [1] * rows,
        "tokens": [3] * rows,
        "text": ["".join(pieces[0])] * rows,
        "pieces": pieces,
    }
    asked = {"id": [f"q{n}" for n in range(queries)], "text": [HOSTILE] * queries, "prompt": [HOSTILE] * queries}
    asked |= {"completion": [HOSTILE] * queries, "contrast": [None] * queries, "measured": [-1.0] * queries}
    return Scores(
        raw=raw,
        n_train=rows,
        examples=pandas.DataFrame(examples),
        queries=pandas.DataFrame(asked),
        about={"operator": "ekfac", "measurement": "logprob"},
        tokens=np.repeat(raw / 3, 3, axis=1) if tokens else None,
    )


class Tags(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.names, self.text = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


PLAIN = {"div", "table", "thead", "tbody", "tr", "td", "th", "span", "details", "summary"}


@pytest.mark.parametrize("tokens", [True, False])
def test_nothing_of_a_row_acts_on_the_page(tokens):
    found = scores(tokens=tokens)
    for page in (found._repr_html_(), found.top(0)._repr_html_()):
        seen = Tags(page)
        assert seen.tags <= PLAIN and seen.names <= {"class", "style"}
        assert "<script>alert(1)</script>" in seen.text and "\x1b" not in page and "\u202e" not in page


def test_the_repr_is_a_line_and_print_is_a_page():
    found = scores(queries=9, rows=400)
    assert repr(found) == "Scores(9 queries x 400 rows, nats per copy, by ekfac, also per token)"
    lines = str(found).splitlines()
    assert len(lines) < 40 and "and 6 more queries: scores.top(3)" in lines[-1]
    assert all("\x1b" not in line and "\u202e" not in line for line in lines)
    assert any("raises" in line for line in lines) and any("lowers" in line for line in lines)


def test_signs_are_said_in_words_and_by_the_kind_of_line():
    page = scores()._repr_html_()
    assert "raises +" in page and "lowers -" in page and "solid" in page and "dashed" in page
    assert "#fff" not in page and "background:#" not in page  # light and dark are the page's own


def test_a_ranking_is_a_table_whose_parts_are_plain():
    found = scores().top(0, 3)
    assert isinstance(found, Ranked) and found.unit == "nats per copy"
    assert len(repr(found).splitlines()) == 3 and "raises" in repr(found)
    part = found[["rank", "value"]]
    assert type(part) is pandas.DataFrame and list(part["rank"]) == [1, 2, 3]
    assert type(found.head(2)) is pandas.DataFrame
    assert repr(scores().top(0, 0)) == "no rows"


def test_a_likeness_raises_nothing():
    found = scores().named("cosine of embeddings", unit="cosine")
    text = str(found)
    assert "raises" not in text and "lowers" not in text and "scores +" in text
