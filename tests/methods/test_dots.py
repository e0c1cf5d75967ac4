"""Methods of gradients alone are what their papers say, and controls do not read the query."""

import numpy as np
import pytest
from models import llama, randomised, texts, tokenizer
from oracle import agree

from benchmarks.oracles.base import Case
from benchmarks.oracles.gradients import ORACLES
from whence.data import as_rows
from whence.errors import StaleArtifact, UsageError
from whence.fitting import fit
from whence.methods.base import attribute
from whence.tasks import CausalLM

ROWS, QUERIES = as_rows(texts(8, seed=1)), as_rows(texts(6, seed=2)[::2])
CONTROLS = {"self-influence": "nats of the row itself per copy", "gradient-norm": "gradient norm", "random": "random number"}
UNITS = {"gradient-dot": "nats per step on the row", "gradient-cosine": "cosine", "relatif": "relative influence", **CONTROLS}


@pytest.fixture(scope="module")
def case():
    return Case(randomised(llama()).double().eval(), CausalLM(tokenizer()), ROWS, QUERIES)


def found_by(case, method, **settings):
    return attribute(method, case.model, case.task, case.queries, case.rows, **settings)


@pytest.mark.parametrize(
    ("method", "settings"),
    [*((name, {}) for name in UNITS), ("relatif", {"norm": "weights", "damping": 0.02}), ("random", {"seed": 3})],
)
def test_it_is_its_oracle(case, method, settings):
    found = found_by(case, method, **settings)
    agree(found.values, ORACLES[method](case, **settings), 1e-8)
    assert found.unit == UNITS[method] and found.shape == (3, 8)
    assert found.directed == (method != "gradient-norm" and method != "random")
    assert (np.ptp(found.values, axis=0).max() < 1e-12) == (method in ("self-influence", "gradient-norm"))


def test_both_kinds_of_relatif_resume(case, tmp_path):
    for norm in ("loss", "weights"):
        first = found_by(case, "relatif", norm=norm, out=tmp_path / norm)
        again = found_by(case, "relatif", norm=norm, out=tmp_path / norm)
        np.testing.assert_array_equal(first.raw, again.raw)
        assert {file.name for file in (tmp_path / norm).iterdir() if file.is_dir()} == set()


def test_what_has_no_parts_says_so(case):
    from whence.settings import Score

    with pytest.raises(UsageError, match="one number per query and row"):
        attribute("gradient-cosine", case.model, case.task, QUERIES, ROWS, Score(per="token"))


def test_modules_are_chosen_without_factors_and_come_with_them(case, tmp_path):
    everywhere = Case(case.model, case.task, ROWS, QUERIES, modules="all")
    found = found_by(case, "gradient-dot", modules="all", out=tmp_path / "all")
    agree(found.values, ORACLES["gradient-dot"](everywhere), 1e-8)
    with pytest.raises(StaleArtifact, match="modules"):
        found_by(case, "gradient-dot", modules="attention", out=tmp_path / "all")
    with pytest.raises(UsageError, match="those of the factors"):
        found_by(case, "ekfac", modules="all", factors=fit(case.model, case.task, ROWS))
