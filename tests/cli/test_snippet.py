import numpy as np
import pytest

from whence.cli.ranking import marked, snippet, strongest

PIECES = ["One", " day", ",", " Ada", " saw", " a", " big", " dog", ".\n", " The", " end"]


def values(**strong):
    """Weak everywhere but at the words given."""
    return np.array([strong.get(piece.strip(), 0.01) for piece in PIECES])


def test_strong_tokens_are_marked_and_neighbours_together():
    assert marked(PIECES, values(big=1.0, dog=0.8, Ada=-0.9, day=0.4), coloured=False).plain == (
        "One day, ⟦Ada⟧ saw a ⟦big dog⟧.\n The end"
    )


def test_colours_stand_in_for_brackets_and_tell_the_sign():
    text = marked(PIECES, values(dog=1.0, Ada=-0.9), coloured=True)
    assert "⟦" not in text.plain and {span.style for span in text.spans} == {
        "bold underline dodger_blue1",
        "bold underline dark_orange",
    }


def test_brackets_in_the_text_are_text():
    assert marked(["[bold]", " x"], np.array([0.0, 1.0]), coloured=False).plain == "[bold] ⟦x⟧"


@pytest.mark.parametrize(
    ("pieces", "shown"), [(["a", "\n", "b"], "a⟦\n⟧b"), (["a", "", "b"], "a⟦·⟧b"), (["a", " ", "b"], "a⟦ ⟧b")]
)
def test_tokens_that_spell_nothing_can_be_seen(pieces, shown):
    assert marked(pieces, np.array([0.0, 1.0, 0.0]), coloured=False).plain == shown


def test_nothing_is_marked_where_nothing_counts():
    assert marked(PIECES, np.zeros(len(PIECES)), coloured=False).plain == "".join(PIECES)


def test_the_strongest_stretch_is_found():
    first, last = strongest(PIECES, values(big=1.0, dog=0.8), 10)
    assert "".join(PIECES[first:last]) in (" a big dog", " big dog.\n")
    assert strongest(PIECES, values(), 1000) == (0, len(PIECES))
    assert strongest(["longer than the width"], np.ones(1), 5) == (0, 1)


def test_a_snippet_is_one_line_that_says_where_it_was_cut():
    shown = snippet(PIECES, values(The=1.0, dog=0.9), 25, coloured=False).plain
    assert shown == "... big ⟦dog⟧.↵ ⟦The⟧..."
