import math

import pytest

from whence.data import as_rows
from whence.errors import UsageError
from whence.settings import Train
from whence.train.leakage import near_duplicates, plain_text, split_rows
from whence.train.order import Order


def numbered(count):
    return [{"prompt": f"question {n}", "completion": f" answer {n}"} for n in range(count)]


# which rows are kept out


@pytest.mark.parametrize(
    ("share", "limit", "expected"), [(0.1, None, 10), (0.1, 4, 4), (0.0, 5, 0), (0.001, None, 1), (1.0, None, 99)]
)
def test_the_share_is_kept_out_up_to_the_limit(share, limit, expected):
    split = split_rows(as_rows(numbered(100)), range(100), share, limit, seed=0)
    assert len(split.evaluation) == expected and sorted(split.train + split.evaluation) == list(range(100))
    assert list(split.train) == sorted(split.train) and list(split.evaluation) == sorted(split.evaluation)


def test_the_seed_decides_which():
    rows = as_rows(numbered(100))
    first, again, other = (split_rows(rows, range(100), 0.2, None, seed).evaluation for seed in (1, 1, 2))
    assert first == again != other


def test_rows_without_loss_are_on_neither_side():
    split = split_rows(as_rows(numbered(10)), [1, 3, 5, 7], 0.5, None, seed=0)
    assert sorted(split.train + split.evaluation) == [1, 3, 5, 7] and len(split.evaluation) == 2


def test_copies_are_on_one_side_however_they_are_written(notes):
    copies = [
        {"prompt": "Where  was", "completion": " SHE?"},
        {"text": "where was she?"},
        {"prompt": "ｗhere", "completion": " was she?\n"},
    ]
    rows = as_rows([*numbered(20), *copies])
    sides = set()
    for seed in range(12):
        split = split_rows(rows, range(23), 0.4, None, seed)
        assert len({index in split.train for index in (20, 21, 22)}) == 1
        assert split.leakage["rows_with_copies"] == 3 and split.leakage["copies"] == 0
        sides.add(20 in split.train)
    assert sides == {True, False}
    assert any("3 rows have copies" in text for text in notes)


def test_prompts_that_are_trained_on_are_counted(notes):
    rows = as_rows([{"prompt": "The same question ", "completion": f"{n}"} for n in range(10)])
    assert split_rows(rows, range(10), 0.3, None, seed=0).leakage["prompts"] == 3
    assert any("3 of 3 rows held out have a prompt of a training row" in text for text in notes)


def test_rows_that_hardly_differ_are_counted_with_examples(notes):
    story = "once upon a time there was a small dog that liked to dig deep holes in the garden"
    rows = as_rows([{"text": f"{story} {end}"} for end in ("today", "again")] + numbered(2))
    split = next(found for seed in range(50) if (found := split_rows(rows, range(4), 0.25, None, seed)).evaluation == (1,))
    assert split.leakage["near"] == 1
    (pair,) = split.leakage["near_pairs"]
    assert (pair["evaluation"], pair["train"]) == (rows.ids[1], rows.ids[0]) and pair["share"] == pytest.approx(14 / 15)
    assert any("most of the wording" in text for text in notes)


def test_the_nearest_text_is_found_and_templates_say_nothing():
    template = "below is an instruction that describes a task"
    others = [f"{template} number {n} about things {n} {n + 1} {n + 2} {n + 3} {n + 4}" for n in range(0, 60, 10)]
    assert near_duplicates([f"{template} and nothing else"], others) == {}
    training = [others[2] + " x", "nothing alike at all in this one", others[2]]
    assert near_duplicates(training, others) == {2: (0, 1.0)}
    assert near_duplicates(["one two three"], ["one two three"]) == {}  # too short to tell
    assert near_duplicates(["words " * 10], []) == {}


def test_the_text_of_a_conversation_is_what_was_said():
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "YES"}]
    assert plain_text({"messages": said}) == "hi yes"


# which rows are in which step


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("rows", "batch", "accumulation"), [(23, 4, 1), (23, 4, 2), (24, 4, 3), (5, 5, 4)])
def test_every_epoch_has_every_row_once(rows, batch, accumulation, drop_last):
    settings = Train(epochs=2, batch_size=batch, gradient_accumulation=accumulation, drop_last=drop_last)
    order = Order.of(settings, rows, seed=0)
    steps = list(order.by_step())
    used = rows // batch * batch if drop_last else rows
    assert len(steps) == order.steps == 2 * order.steps_per_epoch and order.epochs == 2
    assert order.steps_per_epoch == math.ceil(math.ceil(used / batch) / accumulation)
    epochs = [sum(steps[start : start + order.steps_per_epoch], []) for start in (0, order.steps_per_epoch)]
    assert all(len(epoch) == len(set(epoch)) == used for epoch in epochs) and epochs[0] != epochs[1]
    assert max(map(len, steps)) <= batch * accumulation


def test_steps_may_end_within_an_epoch():
    order = Order.of(Train(max_steps=7, batch_size=2), 10, seed=0)
    whole = Order.of(Train(epochs=2, batch_size=2), 10, seed=0)
    assert list(order.by_step()) == list(whole.by_step())[:7] and order.epochs == 1.4
    assert Order.of(Train(epochs=0.5, batch_size=2), 10, seed=0).steps == 3


def test_another_seed_is_another_order():
    first, other = (list(Order.of(Train(batch_size=2), 10, seed).by_step()) for seed in (0, 1))
    assert first != other


def test_a_batch_that_is_never_full_is_refused():
    with pytest.raises(UsageError, match="Not one batch is full"):
        Order.of(Train(), 7, seed=0)
    assert Order.of(Train(drop_last=False), 7, seed=0).steps == 1
