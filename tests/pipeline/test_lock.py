import os

import pytest

from whence.config import resolve
from whence.errors import UsageError
from whence.pipeline import STAGES, plan_run
from whence.pipeline.lock import Lock, Record, changes

VALUES = {
    "run": "a",
    "model": {"base": "model"},
    "data": {"path": "rows.jsonl"},
    "prompts": {"items": ["Who?"]},
    "train": {"epochs": 1},
}
NAMES = [stage.name for stage in STAGES if stage.name != "benchmark"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def read(folder, *settings, **changed):
    return resolve(VALUES | changed, folder, "whence.yaml", settings)


def pretend_all_is_done(folder, *settings, **changed):
    """Write a lock as if every stage had run, each with one file."""
    resolved = read(folder, *settings, **changed)
    lock = Lock.read(resolved.out)
    for step in plan_run(resolved):
        for place in step.stage.folders:
            (resolved.out / place).mkdir(parents=True, exist_ok=True)
            (resolved.out / place / "file").write_text(step.stage.name)
        lock.records[step.stage.name] = Record.of(step.made_from, resolved.out, step.stage.folders)
    lock.write()


def states(resolved, wanted=()):
    return {step.stage.name: step.state for step in plan_run(resolved, wanted)}


def rerun(folder, *settings, **changed):
    return {name for name, state in states(read(folder, *settings, **changed)).items() if state != "unchanged"}


def test_everything_is_new_at_first_and_nothing_afterwards(folder):
    assert states(read(folder)) == dict.fromkeys(NAMES, "new")
    pretend_all_is_done(folder)
    assert rerun(folder) == set()


@pytest.mark.parametrize(
    ("setting", "again"),
    [
        ("report.top=3", {"evaluate", "report"}),
        ("evaluate.compare=false", {"evaluate", "report"}),
        ("inspect.cmap=magma", {"inspect", "report"}),
        ("score.rank=8", {"score", "evaluate", "report"}),
        ("score.damping=0.2", {"inspect", "score", "evaluate", "report"}),
        ("fit.method=kfac", {"fit", "inspect", "score", "evaluate", "report"}),
        ("generate.max_new_tokens=3", {"generate", "score", "evaluate", "report"}),
        ("train.epochs=2", set(NAMES)),
        ("seed=1", set(NAMES) - {"inspect"} | {"inspect"}),
        ("data.max_length=99", set(NAMES)),
        ("model.device=cpu", {"report"}),
    ],
)
def test_a_setting_reruns_what_depends_on_it_and_no_more(folder, setting, again):
    pretend_all_is_done(folder)
    assert rerun(folder, setting) == again


def test_reasons_are_told(folder):
    pretend_all_is_done(folder)
    steps = {step.stage.name: step for step in plan_run(read(folder, "score.damping=0.2"))}
    assert "settings.score.damping 0.1 -> 0.2" in steps["score"].reasons
    assert steps["evaluate"].reasons == ("score runs again",)


def test_changed_data_and_weights_are_noticed_even_at_the_same_size_and_touched_ones_are_not(folder):
    pretend_all_is_done(folder)
    os.utime(folder / "rows.jsonl", (1, 1))
    assert rerun(folder) == set()
    (folder / "rows.jsonl").write_text('{"text": "b"}\n')
    assert rerun(folder) == set(NAMES)
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "model" / "config.json").write_text("[]")
    assert rerun(folder) == set(NAMES)


def test_lost_files_are_made_again(folder):
    pretend_all_is_done(folder)
    (read(folder).out / "exports" / "file").write_text("")
    assert states(read(folder))["score"] == "stale"


def test_an_interrupted_stage_goes_on(folder):
    pretend_all_is_done(folder)
    lock = Lock.read(read(folder).out)
    lock.records["fit"] = Record(lock.records["fit"].made_from)
    lock.write()
    assert states(read(folder))["fit"] == "resumed"


def test_stages_are_chosen_with_what_they_need(folder):
    assert list(states(read(folder), ["fit"])) == ["train", "fit"]
    assert list(states(read(folder), ["report"])) == ["train", "generate", "fit", "score", "report"]
    assert "train" not in states(read(folder, "train=null"))
    with pytest.raises(UsageError, match="no stage 'evaluat'"):
        plan_run(read(folder), ["evaluat"])
    with pytest.raises(UsageError, match="switched off"):
        plan_run(read(folder, "evaluate=null"), ["evaluate"])


def test_changes_are_one_line_each():
    assert changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}, "d": None}) == ["a.b 1 -> 3"]


def test_hashes_of_hub_names_stand_for_themselves(tmp_path):
    assert Lock(tmp_path).hash_of("owner/name") == "owner/name"


def test_asking_what_has_to_run_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, whence.pipeline, whence.config, whence.cli.run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
