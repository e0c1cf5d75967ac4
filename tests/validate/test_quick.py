import dataclasses
import json

import numpy as np
import pytest
import torch
from models import CASES

from whence import open_scores, score
from whence.errors import UsageError
from whence.fitting import fit
from whence.report import build_report, gather
from whence.store.scores import part_of
from whence.tasks import Classification
from whence.validate.quick import FILE, quick, quick_result, read_quick

ASKED = [{"prompt": "w1 w2 w3", "completion": " w4 w5 w6"}, {"prompt": "w7 w9", "completion": " w8 w10 w11 w1"}]


@dataclasses.dataclass
class Made:
    model: torch.nn.Module
    task: object
    rows: list
    curvature: object
    scores: object

    def check(self, scores=None, **settings):
        return quick(scores or self.scores, self.model, self.task, self.rows, self.curvature, **settings)


@pytest.fixture(scope="module")
def made():
    case = CASES["llama"]
    model, task, rows = case.model(), case.task(), case.train(40)
    curvature = fit(model, task, rows, modules="all", examples="all")
    return Made(model, task, rows, curvature, score(model, task, ASKED, rows, curvature.inverse(0.1)))


def spoilt(scores, raw):
    return dataclasses.replace(scores, raw=raw)


def test_sound_scores_pass(made):
    found = made.check().about
    assert found["ranks"] == [1, 1] and found["signs"] == [True, True]
    assert found["damping"] == 0.1 and not found["absolute"] and found["rows"] == found["of_rows"] == 40
    assert found["batch"] < 1e-8 and found["precision"] < 1e-5 and found["precision_correlation"] == pytest.approx(1)
    assert [check["what"] for check in found["dampings"]] == ["0.1x damping", "10x damping"]
    assert all(0.3 < check["correlation"] < 1 for check in found["dampings"])
    assert 0.3 < found["seeds"]["correlation"] < 1 and "with seed 1" in found["seeds_note"]
    assert found["badge"].startswith("trust  self-retrieval 2/2, damping rho .")
    assert found["badge"].endswith("LDS not measured") and "batch" in found["badge"] and "Update" not in found["checks"]
    moved = made.check(sample=2, update=0.0312)
    assert moved.about["checks"]["Update"].startswith("training moved the weights by 0.031 of their length")


def test_dampings_are_those_that_the_scores_say(made):
    whole = score(made.model, made.task, ASKED, made.rows, made.curvature.inverse(absolute=0.02))
    found = made.check(whole).about
    assert (found["damping"], found["absolute"]) == (0.02, True) and found["precision"] < 1e-5
    plain = score(made.model, made.task, ASKED, made.rows, made.curvature.operator)
    found = made.check(plain).about
    assert found["dampings"] == [] and "damping not measured" in found["badge"]


@pytest.mark.parametrize("spoil", ["shuffled", "negated", "another damping"])
def test_spoilt_scores_are_noticed(made, spoil):
    raw = made.scores.raw
    if spoil == "another damping":
        found = made.check(damping=10.0)
    else:
        found = made.check(spoilt(made.scores, -raw if spoil == "negated" else np.random.default_rng(0).permuted(raw, axis=1)))
    assert found.about["precision"] > 0.05 and found.about["precision_correlation"] < 0.98
    assert any("the stored scores differ" in flag for flag in found.flags)
    assert not any("the stored scores differ" in flag for flag in made.check().flags)


def test_a_copy_that_is_outranked_is_noticed(made):
    raw = made.scores.raw.copy()
    raw[0, :3] = 1e6
    found = made.check(spoilt(made.scores, raw))
    assert found.about["ranks"] == [4, 1] and "1 of 2 copies of a question rank first (ranks 4, 1)" in found.says[1]
    assert any("does not come first" in flag for flag in found.flags)


def test_of_one_question_it_is_said_where_its_copy_ranks(made):
    one = part_of(made.scores, queries=[0])
    assert "a copy of the question ranks first and has the right sign" in made.check(one).says[1]
    raw = one.raw.copy()
    raw[0, :3] = 1e6
    assert "a copy of the question ranks 4 and has the right sign" in made.check(spoilt(one, raw)).says[1]


def test_the_loss_has_the_other_sign(made):
    task = CASES["llama"].task(measurement="loss")
    scores = score(made.model, task, ASKED, made.rows, made.curvature.inverse(0.1))
    found = quick(scores, made.model, task, made.rows, made.curvature).about
    assert found["signs"] == [True, True] and found["ranks"] == [1, 1]


def test_instability_is_said_in_words(made):
    low = {"what": "0.1x damping", "correlation": 0.4, "lowest": 0.3, "overlap": 0.15, "top": 20}
    flags = quick_result(made.check().about | {"dampings": [low], "signs": [True, False], "batch": 0.1}).flags
    assert any(
        "top-20 overlap 0.15 between 0.1x damping and the scores: do not trust the order [WHENCE-19]" in it for it in flags
    )
    assert any("wrong sign" in it for it in flags) and any("batched with" in it for it in flags)


def test_a_sample_says_that_it_is_one(made):
    found = made.check(sample=12, asked=1).about
    assert found["queries"] == 1 and 12 <= found["rows"] < 40
    assert f"{found['rows']} of 40 rows checked" in found["checks"]["damping"]


def test_what_does_not_belong_to_the_scores_is_refused(made):
    with pytest.raises(UsageError, match="not the rows"):
        quick(made.scores, made.model, made.task, made.rows[1:], made.curvature)
    other = CASES["llama"].model()
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    with pytest.raises(UsageError, match="not those that were scored"):
        quick(made.scores, other, made.task, made.rows, made.curvature)
    with pytest.raises(UsageError, match="not the queries"):
        made.check(queries=ASKED[:1])
    scores = dataclasses.replace(made.scores, queries=made.scores.queries.assign(text="user: w1"))
    with pytest.raises(UsageError, match="whole text"):
        made.check(scores)
    assert made.check(scores, queries=ASKED).about["ranks"] == [1, 1]


def test_tensors_are_asked_about_again():
    case = CASES["mlp"]
    model, task, rows = case.model(), Classification(), case.train(24)
    curvature = fit(model, task, rows, modules="all", examples="all")
    scores = score(model, task, case.queries(), rows, curvature.inverse(0.1))
    with pytest.raises(UsageError, match="queries"):
        quick(scores, model, task, rows, curvature)
    found = quick(scores, model, task, rows, curvature, queries=case.queries()).about
    assert found["signs"] == [True] * 3 and found["precision"] < 1e-5


def test_it_is_kept_beside_the_scores_and_goes_into_the_report(made, tmp_path):
    folder = tmp_path / "run" / "scores"
    score(made.model, made.task, ASKED, made.rows, made.curvature.inverse(0.1), out=folder)
    assert read_quick(folder) is None
    found = quick(open_scores(folder), made.model, made.task, made.rows, made.curvature, out=folder, lds="LDS .41 (.38 to .44)")
    assert read_quick(folder) == found
    badge, own = found.about["badge"], found.about["checks"]
    assert json.loads((folder / FILE).read_text())["badge"] == badge
    checks = {check.name: check.result for check in build_report(made.scores, checks=own).checks}
    assert checks["Another damping"] == own["damping"] and checks["LDS"] == "LDS .41 (.38 to .44)"
    assert "rank first" in checks["Self-retrieval"] and "Batches" in checks
    assert found.says[0] == badge and len(found.tables[""]) == len(own)
    (folder / FILE).write_text(json.dumps(quick_result(found.about | {"batch": 0.1}).as_json()))
    shown = {check.name: check.result for check in build_report(**gather(folder)).checks}
    (warning,) = quick_result(found.about | {"batch": 0.1, "dampings": []}).flags
    assert warning in shown.values() and "Warning 1" in shown, "a warning is in the report too"
