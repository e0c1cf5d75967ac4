from hypothesis import given
from hypothesis import strategies as st

from whence.data import plan_batches

sizes_of_examples = st.lists(st.integers(0, 40), max_size=60)
limits = st.one_of(st.none(), st.integers(1, 8))


def test_packs_the_longest_first():
    assert plan_batches([3, 0, 5, 3, 1], max_tokens=6) == [[2], [0, 3], [4]]


def test_an_example_that_is_too_long_is_alone():
    assert plan_batches([100, 100, 2], max_tokens=10) == [[0], [1], [2]]


@given(sizes_of_examples, st.integers(1, 100), limits)
def test_every_example_with_a_size_is_in_one_batch(sizes, max_tokens, max_examples):
    batches = plan_batches(sizes, max_tokens, max_examples)
    assert sorted(i for batch in batches for i in batch) == [i for i, size in enumerate(sizes) if size]


@given(sizes_of_examples, st.integers(1, 100), limits)
def test_batches_respect_the_limits(sizes, max_tokens, max_examples):
    for batch in plan_batches(sizes, max_tokens, max_examples):
        longest = max(sizes[i] for i in batch)
        assert longest == sizes[batch[0]]
        assert len(batch) == 1 or longest * len(batch) <= max_tokens
        assert len(batch) <= (max_examples or len(batch))


@given(sizes_of_examples, st.integers(1, 100))
def test_no_batch_could_take_the_next_example(sizes, max_tokens):
    batches = plan_batches(sizes, max_tokens)
    for batch in batches[:-1]:
        assert sizes[batch[0]] * (len(batch) + 1) > max_tokens
