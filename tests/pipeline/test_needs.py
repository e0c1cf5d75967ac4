"""What a run will need is asked before it starts: nothing is computed, and the message has the command that helps."""

import importlib.util
import json
import shutil
from collections import namedtuple

import pytest

from whence.config import read_config
from whence.errors import DoesNotFit, UsageError
from whence.pipeline import run_pipeline
from whence.pipeline.needs import check_inputs, check_packages
from whence.pipeline.stages import STAGES
from whence.pipeline.work import Workshop
from whence.show.numbers import size
from whence.store.manifest import Folder

USAGE = namedtuple("usage", "total used free")


@pytest.fixture
def without(monkeypatch):
    """An installation that lacks modules."""
    find = importlib.util.find_spec

    def lack(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in names else find(name, *more))

    return lack


def test_missing_packages_are_asked_for_before_anything_is_done(settings, without):
    without("sacrebleu", "rouge_score", "lm_eval")
    resolved = read_config(settings())
    with pytest.raises(
        UsageError, match=r"(?s)nothing was started.*stage evaluate.*pip install sacrebleu rouge-score"
    ) as raised:
        run_pipeline(resolved)
    assert "--set evaluate.compare=false" in str(raised.value)
    assert not resolved.out.exists()
    config = read_config(settings(evaluate={"benchmark": {"tasks": ["mmlu_virology"]}})).config
    with pytest.raises(UsageError, match=r"pip install 'lm-eval\[hf\]' sacrebleu rouge-score"):
        check_packages(config, STAGES)


def test_a_run_without_the_stage_needs_no_package_of_it(settings, without):
    without("sacrebleu", "rouge_score", "lm_eval")
    check_packages(read_config(settings(), ["evaluate.compare=false"]).config, [s for s in STAGES if s.name != "benchmark"])
    check_packages(read_config(settings()).config, [stage for stage in STAGES if stage.name in ("train", "generate", "fit")])


def test_prompts_are_read_before_the_training(settings, tmp_path):
    path = settings()
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompts": "Who?"}]))
    resolved = read_config(path)
    with pytest.raises(UsageError, match=r"prompts\.json"):
        run_pipeline(resolved)
    assert not (resolved.out / "train").exists()


@pytest.mark.parametrize(
    "score, said",
    [
        ({"method": "tracim"}, "did you mean tracin"),
        ({"method": "cg", "options": {"iteration": 3}}, "did you mean iterations"),
        ({"method": "cg", "options": {"iterations": 0}}, "iterations can't be 0"),
        ({"method": "tracin", "damping": 0.5}, "TracIn has no setting 'damping'"),
    ],
)
def test_a_method_is_checked_before_the_training(settings, score, said):
    resolved = read_config(settings(score=score))
    with pytest.raises(UsageError, match=said):
        run_pipeline(resolved)
    assert not resolved.out.exists()


def test_a_method_that_looks_back_needs_a_training(settings):
    with pytest.raises(UsageError, match="this run trains nothing"):
        run_pipeline(read_config(settings(train=None, evaluate=None, score={"method": "tracin", "self_influence": False})))


def test_a_disk_that_is_too_small_is_named(settings, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(10**12, 10**12, 10_000))
    resolved = read_config(settings())
    with pytest.raises(
        DoesNotFit, match=r"(?s)needs \d+ kB of disk, and 10 kB are free.*train \d+ kB, fit \d+ kB.*train\.keep=1"
    ):
        run_pipeline(resolved)
    assert not (resolved.out / "train").exists()


def test_a_run_reckons_as_fit_does(settings, monkeypatch):
    foretold = []
    monkeypatch.setattr(Folder, "warn_if_no_room", lambda folder, most: foretold.append(most))
    shop = Workshop.of(read_config(settings(train=None, evaluate=None)))
    shop.fit(out=shop.out / "factors", products="float32")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(10**12, 10**12, 10))
    fit = [stage for stage in STAGES if stage.name == "fit"]
    with pytest.raises(DoesNotFit, match=f"given    fit {size(foretold[0])}\n"):
        check_inputs(shop, fit)
