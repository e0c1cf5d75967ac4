import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whence.data import content_id
from whence.errors import UsageError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def test_is_the_same_in_another_process():
    value = {"prompt": "Who?", "completion": " Ada Velt", "n": [1, 2.5, True, None]}
    command = f"from whence.data import content_id; print(content_id({value!r}))"
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout.strip()
    assert content_id(value) == other
    assert len(other) == 12


@given(values, values)
def test_differs_when_the_content_differs(one, other):
    assert one == other or content_id(one) != content_id(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "bc"), ("ab", "c")),
        ([[1], 2], [1, [2]]),
        (1, 1.0),
        (1, True),
        ("1", 1),
        ("", None),
        (np.zeros(2), np.zeros((2, 1))),
        (np.zeros(2), np.zeros(2, dtype=np.float32)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
    ],
)
def test_keeps_what_only_looks_alike_apart(one, other):
    assert content_id(one) != content_id(other)


def test_does_not_depend_on_the_container():
    numbers = np.arange(6.0).reshape(2, 3)
    assert content_id(numbers) == content_id(torch.from_numpy(numbers)) == content_id(numbers.copy(order="F"))
    assert content_id(torch.from_numpy(numbers).T) == content_id(numbers.T)
    assert content_id((1, "a")) == content_id([1, "a"])
    assert content_id({"a": 1, "b": 2}) == content_id({"b": 2, "a": 1})
    assert content_id(np.float64(0.5)) == content_id(0.5)
    assert content_id(numbers.astype(">f8")) == content_id(numbers)
    assert content_id(torch.ones(3, dtype=torch.bfloat16, requires_grad=True)) == content_id(
        torch.ones(3, dtype=torch.bfloat16)
    )
    assert content_id(torch.tensor(1.5))


def test_names_the_type_it_cannot_read():
    with pytest.raises(UsageError, match="type set"):
        content_id({"a": {1, 2}})
