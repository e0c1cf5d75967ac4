"""Settings: declared once, checked wherever they are made."""

import subprocess
import sys

import pytest

from whence.config import checked
from whence.errors import UsageError
from whence.precision import Precision
from whence.settings import (
    Benchmark,
    Fit,
    Generate,
    Index,
    Inspect,
    Lora,
    Measured,
    Normalise,
    Score,
    Train,
    Weights,
)

LEAST = {"run": "a", "model": {"base": "model"}, "data": {"path": "rows.jsonl"}, "prompts": {"items": ["Who?"]}}


def test_values_out_of_bounds_are_refused_with_what_is_accepted():
    for wrong in ({"draws": 0}, {"method": "magic"}, {"until": 1.5}, {"examples": "some"}, {"modules": 3}):
        with pytest.raises(UsageError, match=rf"{next(iter(wrong))} can't be "):
            Fit(**wrong)
    with pytest.raises(UsageError, match=r"accepted +greater than or equal to 1 or 'all'"):
        Fit(examples=0)
    with pytest.raises(UsageError, match=r"accepted +greater than 0"):
        Inspect(clip_percentile=0.0)
    with pytest.raises(UsageError, match="computes whole scores again"):
        Score(rescore=3, per="token")


def test_values_are_kept_in_one_form():
    assert type(Train(epochs=2).epochs) is float and Score(norms=["cosine"]).norms == ("cosine",)  # type: ignore[arg-type]
    assert Train(max_grad_norm="auto").max_grad_norm == "auto" and Train(bf16=True).bf16 is True
    assert Train(lora={"r": 2}).lora.r == 2  # type: ignore[arg-type, union-attr]


def test_changes_may_be_a_precision_and_unknown_ones_are_named():
    changed = Fit(draws=2).changed(precision=Precision(statistics="float64", products="bfloat16"), seed=3)
    assert (changed.draws, changed.statistics, changed.products, changed.seed) == (2, "float64", "bfloat16", 3)
    assert changed.precision == Precision(statistics="float64", products="bfloat16")
    assert Index(operands="float16").precision == Precision(scores="float16")
    assert changed.deciding() | {"draws": 1} == changed.changed(draws=1).deciding() and "batch_tokens" not in changed.deciding()
    score = Score().changed(rank=None, aggregate="queries")
    assert (score.rank, score.aggregate) == ("full", ("queries",))
    with pytest.raises(UsageError, match="did you mean draws"):
        Fit().changed(drawz=1)


def test_what_a_run_says_once_is_no_setting_of_its_stages():
    assert "seed" not in checked(LEAST).fit.as_json() and "aggregate" not in checked(LEAST).score.as_json()
    with pytest.raises(ValueError, match="no setting of a file"):
        checked(LEAST | {"fit": {"seed": 1}})


def test_defaults_are_within_their_bounds():
    for section in (Benchmark, Fit, Generate, Index, Inspect, Lora, Measured, Normalise, Score, Train, Weights):
        assert section() == section().changed()


def test_settings_need_nothing_heavy():
    code = "import whence.settings, sys; assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
