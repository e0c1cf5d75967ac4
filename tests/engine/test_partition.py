"""How work is cut: groups, chunks and batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CASES

from whence.coverage import cover
from whence.engine.partition import data_chunks, module_groups, run_chunk
from whence.errors import OutOfMemory
from whence.progress import Silent, report_to

SITES = cover(CASES["llama"].model(), "all").sites


@given(count=st.integers(1, 12))
def test_module_groups_keep_the_order_and_leave_nothing_out(count):
    groups = module_groups(SITES, count)
    assert [name for group in groups for name in group] == list(SITES)
    assert len(groups) <= count and all(groups)


def test_module_groups_cost_about_the_same():
    first, second = module_groups(SITES, 2)
    assert all(".0." in name for name in first) and all(".1." in name for name in second)


def test_modules_that_may_read_one_input_stay_together():
    groups = module_groups(SITES, 100)
    assert [len(group) for group in groups] == [4, 3, 4, 3]
    assert len(module_groups(cover(CASES["mlp"].model(), "all").sites, 100)) == 3


@given(sizes=st.lists(st.integers(1, 30), min_size=1), count=st.integers(1, 10))
def test_data_chunks_hold_every_example_once(sizes, count):
    chunks = data_chunks(range(len(sizes)), sizes, count)
    assert sorted(index for chunk in chunks for index in chunk) == list(range(len(sizes)))
    assert len(chunks) <= count and all(chunks)
    flat = [sizes[index] for chunk in chunks for index in chunk]
    assert flat == sorted(flat, reverse=True)
    positions = [sum(sizes[index] for index in chunk) for chunk in chunks]
    assert max(positions) <= sum(sizes) / count + max(sizes)


def limited(room, seen):
    """A run in which batches of more than `room` positions do not fit."""

    def run(batches):
        for batch in batches:
            if len(batch) * 4 > room:
                raise torch.OutOfMemoryError("no room")
            seen.append(batch)

    return run


class Notes(Silent):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


def test_batches_are_halved_and_what_was_done_is_undone():
    seen, notes = [], Notes()
    with report_to(notes):
        fitted = run_chunk(range(9), [4] * 9, 32, limited(8, seen), seen.clear)
    assert fitted == 8 and notes.texts == [f"out of memory: batches halved to {n} positions" for n in (16, 8)]
    assert sorted(index for batch in seen for index in batch) == list(range(9))


def test_a_budget_far_above_the_batch_is_brought_down_first():
    seen = []
    assert run_chunk(range(9), [4] * 9, 10**9, limited(8, seen), seen.clear) <= 9


def test_a_single_example_that_does_not_fit():
    with pytest.raises(OutOfMemory, match="no room"):
        run_chunk(range(3), [4] * 3, 4, limited(3, []), lambda: None)


def test_errors_that_say_so_in_words_count_and_others_do_not():
    def run(text):
        def fail(batches):
            raise RuntimeError(text)

        return fail

    for text in ("not enough memory: you tried to allocate", "can't allocate memory: you tried to allocate"):
        with pytest.raises(OutOfMemory):
            run_chunk([0], [4], 4, run(f"DefaultCPUAllocator: {text}"), lambda: None)
    with pytest.raises(RuntimeError, match="bad shape"):
        run_chunk([0], [4], 4, run("bad shape"), lambda: None)
