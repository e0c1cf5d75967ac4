"""`whence validate RUN --removal`, on a whole run of the tiny model."""

import json

import numpy as np
import pytest
from distributed.processes import run
from distributed.work import command

from whence.config import read_config
from whence.errors import UsageError
from whence.pipeline import run_pipeline
from whence.pipeline.retraining import check_run
from whence.report import gather
from whence.validate.bank import open_bank
from whence.validate.without import Removals


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
    assert np.isfinite(result.arrays["rises"]).all(), "the rows kept out are at hand"
    checks = gather(resolved.out)["checks"]
    assert checks["removal"] == result.says[0] and checks["size"] == result.about["calibration"]["says"]
    again, _ = check_run(resolved, Removals(rows=1, queries=2, draws=1))
    np.testing.assert_array_equal(again.arrays["falls"], result.arrays["falls"])

    patched, files = check_run(resolved, Removals(rows=1, queries=2, draws=1), patch=1)
    assert patched.check == "tail-patch" and files[0].parent == resolved.out / "validation" / "tail-patch"
    assert np.isfinite(patched.arrays["rises"]).all() and "rises by" in patched.says[0]

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
        (code, said, wrong), (other, silent, _) = run(command, *words, *more, "--out", out)
        assert (code, other, silent) == (0, 0, ""), wrong
        kept, one = json.loads((out / "result.json").read_text()), command(*words, *more, "--json")[1]
        assert kept["sentence"] in said
        for mine, theirs in zip(json.loads(one)[0]["tables"].values(), kept["tables"].values(), strict=True):
            assert [row.keys() for row in mine] == [row.keys() for row in theirs]
            numbers = [[value for value in row.values() if isinstance(value, float)] for row in mine]
            others = [[value for value in row.values() if isinstance(value, float)] for row in theirs]
            np.testing.assert_allclose(np.concatenate(numbers), np.concatenate(others), rtol=1e-2, atol=1e-4)
    refused = run(command, "validate", resolved.out, "--quick")
    assert all(code == 2 for code, *_ in refused) and "runs in one process" in refused[0][2]
