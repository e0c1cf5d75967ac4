"""`whence validate RUN --removal`, on a whole run of the tiny model."""

import json
from dataclasses import replace

import numpy as np
import pytest
from commands import assembled
from distributed import processes
from distributed.work import command
from typer.testing import CliRunner

import whence
from whence.config import read_config
from whence.errors import UsageError
from whence.pipeline import run_pipeline
from whence.pipeline.retraining import check_run
from whence.report import build_report, gather
from whence.report.html import render
from whence.report.markdown import as_markdown
from whence.serve.asking import Asking
from whence.serve.requests import WhatIf
from whence.serve.warm import _trust
from whence.store.scores import open_scores
from whence.validate.bank import open_bank
from whence.validate.without import Removals, keep_beside


def run(*arguments):
    """What a command prints."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(assembled(), [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def shown_everywhere(home, gain, said):
    """In the terminal, JSON, report and page: values are `gain` times the slopes, which stay, in the same order."""
    scores = open_scores(home / "scores")
    slopes = scores.raw[0] / scores.n_train
    printed = json.loads(run("show", home / "scores", "--json"))
    rows = {row["id"]: row for row in printed["queries"][0]["rows"]}
    plain = {row["id"]: row for row in scores.top(0, 10).to_dict("records")}
    assert list(rows) == list(plain) and printed["gain"] == gain and printed["size"] == said and said in printed["notes"]
    for name, row in rows.items():
        assert row["raw"] == plain[name]["raw"]
        np.testing.assert_allclose([row["value"], row["slope"]], [gain * plain[name]["value"], plain[name]["value"]], rtol=1e-5)
    text = run("show", home / "scores")
    assert said in text and ("x the slope" in text) == (gain != 1)
    report = build_report(**gather(home))
    first = report.queries[0].raises[0]
    np.testing.assert_allclose([first.value, first.slope], [gain * slopes.max(), slopes.max()], rtol=1e-5)
    page = render(report) + as_markdown(report)
    assert report.gain == gain and page.count(said) >= 2 and ("Effects are calibrated" in page) == (gain != 1)
    asking = Asking(whence.open(home))
    document = asking.document(asking.saved("scores", 0))
    assert document["query"]["raises"][0]["value"] == first.value and said in document["notes"] and document["gain"] == gain


def test_a_run_is_retrained(settings):
    train = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "save_steps": 9, "log_steps": 1, "evaluation": 0.2}
    resolved = read_config(
        settings(evaluate=None, train=train, score={"self_influence": False, "check": False, "queries": "prompts"}),
        environment={},
    )
    with pytest.raises(UsageError, match="has no factors yet"):
        check_run(resolved, Removals(rows=1))
    run_pipeline(resolved, ["score"])
    result, files = check_run(resolved, Removals(rows=1, queries=2, draws=1))
    assert {file.name for file in files} >= {"result.json", "result.md"}
    kept = json.loads(files[0].read_text())
    assert kept["sentence"] == result.says[0] and np.isfinite(kept["tables"]["Query by query"][0]["log_p"])
    assert np.isfinite(result.arrays["rises"]).all(), "the held-out rows are at hand"
    checks = gather(resolved.out)["checks"]
    assert checks["removal"] == result.says[0]
    again, _ = check_run(resolved, Removals(rows=1, queries=2, draws=1))
    np.testing.assert_array_equal(again.arrays["falls"], result.arrays["falls"])

    patched, files = check_run(resolved, Removals(rows=1, queries=2, draws=1), patch=1)
    assert patched.check == "tail-patch" and files[0].parent == resolved.out / "validation" / "tail-patch"
    assert np.isfinite(patched.arrays["rises"]).all() and "rises by" in patched.says[0]
    printed = json.loads(run("show", resolved.out, "--json"))
    assert printed["tail_patch"]["sentence"] == patched.says[0] and printed["retraining"]["sentence"] == result.says[0]
    report = build_report(**gather(resolved.out))
    for text in (run("show", resolved.out), render(report), as_markdown(report)):
        assert patched.says[0].partition(" [")[0] in text

    found = result.about["calibration"]
    assert found["operator"] == open_scores(resolved.out / "scores").about["operator"]
    for gain, low, high, applied in ((0.25, 0.2, 0.3, True), (0.25, -0.1, 0.6, False)):
        known = {**found, "gain": gain, "low": low, "high": high, "certain": applied, "says": f"{applied}: said"}
        keep_beside(replace(result, about={**result.about, "calibration": known}), resolved.out / "scores")
        shown_everywhere(resolved.out, gain if applied else 1.0, f"{applied}: said")
    predicted = {}
    for gain in (1e-3, 1e6):
        known = {**found, "gain": gain, "low": gain, "high": gain, "certain": True, "says": "calibrated on 9 retrainings: more"}
        keep_beside(replace(result, about={**result.about, "calibration": known}), resolved.out / "scores")
        opened = whence.open(resolved.out)
        assert opened.curvature, "a page has loaded the factors before anybody asks what if"
        asking = Asking(opened)
        asked = asking.saved("scores", 0)
        row = asked.scores.top(0, 1)["text"][0]
        predicted[gain] = asking.what_if(asked, WhatIf(key=asked.key, prompt="", completion=row))["words"]
    assert "nats higher, calibrated on 9 retrainings; nothing was trained" in predicted[1e-3]
    assert ", which is beyond first order: at most +" in predicted[1e6] and ", from p = " in predicted[1e6]

    moved = whence.open(resolved.out).check().about
    assert 0 < moved["update"] < 1 and "training moved the weights by" in moved["checks"]["Update"]
    trusted = _trust(resolved.out / "scores")["checks"]
    assert (
        trusted["Removal"] == result.says[0]
        and trusted["Tail-patch"] == patched.says[0]
        and trusted["Size"] == known["says"]
        and trusted["Update"]
    )

    lds, _ = check_run(resolved, Removals(fraction=0.2), subsets=("removals", 4))
    bank = open_bank(resolved.out / "bank-removals.npz")
    assert lds.check == "lds" and bank.kept.shape == (4, 16) and (bank.kept.sum(1) == 13).all()


@pytest.mark.slow
def test_two_processes_share_a_check(settings):
    train = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "save_steps": 9, "evaluation": 0.2}
    asked = {"self_influence": False, "check": False, "queries": "prompts"}
    resolved = read_config(settings(evaluate=None, train=train, score=asked), environment={})
    run_pipeline(resolved, ["score"])
    words = ("validate", resolved.out, "--removal", "--rows", "1", "--queries", "2", "--draws", "1", "--quiet")
    for more in ((), ("--tail-patch",)):
        out = resolved.out.parent / f"two{len(more)}"
        (code, said, wrong), (other, silent, _) = processes.run(command, *words, *more, "--out", out)
        assert (code, other, silent) == (0, 0, ""), wrong
        kept, one = json.loads((out / "result.json").read_text()), command(*words, *more, "--json")[1]
        assert kept["sentence"] in said
        for mine, theirs in zip(json.loads(one)[0]["tables"].values(), kept["tables"].values(), strict=True):
            assert [row.keys() for row in mine] == [row.keys() for row in theirs]
            numbers = [[value for value in row.values() if isinstance(value, float)] for row in mine]
            others = [[value for value in row.values() if isinstance(value, float)] for row in theirs]
            np.testing.assert_allclose(np.concatenate(numbers), np.concatenate(others), rtol=1e-2, atol=1e-4)
    refused = processes.run(command, "validate", resolved.out, "--quick")
    assert all(code == 2 for code, *_ in refused) and "runs in one process" in refused[0][2]
