import datasets
import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch

from whence.data import as_rows
from whence.data.containers import sequence_of
from whence.engine.stream import encode, read
from whence.errors import ColumnError, UsageError
from whence.tasks import CausalLM, Classification

RECORDS = [{"prompt": "q1", "completion": "a1"}, {"prompt": "q2", "completion": None}, {"prompt": "q3", "completion": "a3"}]
READ = tuple({key: value for key, value in row.items() if value is not None} for row in RECORDS)
COLUMNS = {key: [row[key] for row in RECORDS] for key in RECORDS[0]}

TABLES = {
    "DataFrame": lambda: pd.DataFrame(RECORDS),
    "lists by column": lambda: COLUMNS,
    "arrow table": lambda: pyarrow.table(COLUMNS),
    "Dataset": lambda: datasets.Dataset.from_list(RECORDS),
    "DatasetDict": lambda: datasets.DatasetDict(
        {"test": datasets.Dataset.from_list(RECORDS[:1]), "train": datasets.Dataset.from_list(RECORDS)}
    ),
    "DatasetDict of one": lambda: datasets.DatasetDict({"all": datasets.Dataset.from_list(RECORDS)}),
    "tuple": lambda: tuple(RECORDS),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_hold_the_same_rows(name):
    assert as_rows(TABLES[name]()).rows == READ
    assert read(TABLES[name]()).rows == READ


def test_series_and_data_sets_of_torch():
    class Texts(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, number):
            if number >= 2:
                raise IndexError
            return {"text": f"text {number}"}

    assert as_rows(pd.Series(["a", "b"])).rows == ({"text": "a"}, {"text": "b"})
    assert read(Texts()).rows == ({"text": "text 0"}, {"text": "text 1"})


REFUSED = {
    "generator": (lambda: (row for row in RECORDS), "only once", "list(rows)"),
    "iterator": (lambda: iter(RECORDS), "only once", "list(rows)"),
    "DataLoader": (lambda: torch.utils.data.DataLoader(RECORDS), "batches are made by whence", "loader.dataset"),
    "IterableDataset": (
        lambda: datasets.Dataset.from_list(RECORDS).to_iterable_dataset(),
        "no length",
        "list(data.take(10_000))",
    ),
    "splits": (
        lambda: datasets.DatasetDict({name: datasets.Dataset.from_list(RECORDS) for name in ("a", "b")}),
        "these are splits",
        'data["a"]',
    ),
    "one row": (lambda: RECORDS[0], "neither lists of one length", "[row, ...]"),
    "columns of other lengths": (lambda: {"a": ["x"], "b": ["x", "y"]}, "a: 1, b: 2", "[row, ...]"),
    "inputs and too few targets": (lambda: (torch.zeros(3, 2), torch.zeros(2)), "as many inputs as targets", ""),
    "number": (lambda: 3, "no length", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sequence_is_refused_with_what_to_pass(name):
    make, message, fix = REFUSED[name]
    with pytest.raises(UsageError) as raised:
        read(make())
    assert message in str(raised.value)
    assert fix in raised.value.fix


@pytest.mark.parametrize("kind", ["tensors", "arrays", "two rows"])
def test_inputs_and_targets_are_pairs(kind):
    inputs, targets = torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 1])
    if kind == "arrays":
        inputs, targets = inputs.numpy(), targets.numpy()
    if kind == "two rows":  # as many as there are parts
        inputs, targets = inputs[:2], targets[:2]
    examples = encode(Classification(), (inputs, targets))
    assert len(examples) == len(inputs)
    assert [int(target) for _, target in examples.items] == targets.tolist()
    assert np.asarray(examples.items[1][0]).tolist() == [2.0, 3.0]


def test_columns_of_tensors_are_examples():
    (first, _) = sequence_of({"input": torch.eye(2), "labels": torch.tensor([1, 0])})
    assert first["input"].tolist() == [1.0, 0.0]
    assert first["labels"] == 1


@pytest.mark.parametrize(
    "rows", [torch.tensor([[1, 2], [3, 4]]), [torch.tensor([1, 2])], [[1, 2], [3]], [{"input_ids": torch.tensor([1])}]]
)
def test_token_ids_are_no_text(rows, tiny_tokenizer):
    with pytest.raises(UsageError, match="reads rows of text") as raised:
        encode(CausalLM(tiny_tokenizer), rows)
    assert "batch_decode" in raised.value.fix


def test_columns_of_token_ids_are_no_text():
    with pytest.raises(ColumnError, match="holds token ids"):
        as_rows([{"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 2]}])
