"""The benchmark of methods: it counts the passes that there are, finds oracles, and what is committed has every method."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.methods import LARGER, Counter, main
from whence.methods.base import recipes

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    main(["--methods", "gradient-dot,bm25,tracin", "--out", str(folder)])
    return {row["method"]: row for row in json.loads((folder / "methods.json").read_text())["rows"]}, folder


@pytest.mark.slow
def test_methods_agree_with_their_oracles_and_passes_are_counted(written):
    rows, folder = written
    both = 1 + LARGER.queries / LARGER.rows
    assert rows["gradient-dot"]["AdamW"]["difference"] < 1e-9 and "SGD" not in rows["gradient-dot"]
    assert rows["tracin"]["SGD"]["difference"] < 1e-9
    assert rows["gradient-dot"]["forward"] == rows["gradient-dot"]["backward"] == pytest.approx(both, abs=0.01)
    assert rows["tracin"]["backward"] == pytest.approx(3 * both, abs=0.1) and rows["bm25"]["backward"] == 0
    assert "| TracIn (`tracin`) |" in (folder / "methods.md").read_text()


def test_rows_are_counted_below_every_transform():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    counter, x = Counter(model, "0"), torch.randn(5, 7, 3)  # five rows of seven positions
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def outputs(values):
        return torch.func.functional_call(model, values, (x,))

    model(x).sum().backward()
    assert (counter.forward, counter.backward) == (5, 5)
    _, back = torch.func.vjp(outputs, weights)
    torch.vmap(back)(torch.randn(6, 5, 7, 2))
    assert (counter.forward, counter.backward) == (10, 35), "six adjoints of each row"
    counter.handle.remove()


def test_every_method_is_committed():
    found = json.loads((RESULTS / "methods.json").read_text())["rows"]
    assert {row["method"] for row in found} == set(recipes()), "python -m benchmarks.methods"
    assert all(row["AdamW"]["correlation"] > 0.99 for row in found)
