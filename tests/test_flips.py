"""One flipped bit anywhere in a finished run is noticed, or changes nothing (`benchmarks.flips`, in small)."""

import collections
import json
import shutil

import numpy as np
import pytest
from pictures import blank

from benchmarks import flips
from whence.config import read_config
from whence.errors import StaleArtifact
from whence.pipeline import plan_run, run_pipeline
from whence.store.scores import open_scores


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = flips.write_run(tmp_path_factory.mktemp("run"))
    with blank():
        flips.make(path)
    return path


def states(path):
    return {step.stage.name: step.state for step in plan_run(read_config(path, environment={}))}


@pytest.mark.slow
def test_a_flip_in_every_kind_of_file_is_noticed_or_harmless(finished):
    out = flips.out_of(finished)
    kinds = {flips.kind_of(file.relative_to(out)) for file in out.rglob("*")}
    found = flips.flips(finished, len(kinds), seed=0)
    assert len({each["kind"] for each in found}) > 50
    outcomes = collections.Counter(each["outcome"] for each in found)
    assert not outcomes["wrong"] + outcomes["traceback"], [each for each in found if each["outcome"] in ("wrong", "traceback")]
    assert {each["kind"].rpartition("/")[2] for each in found if each["outcome"] == "harmless"} <= {".lock"}


@pytest.mark.slow
def test_the_judge_sees_wrong_results_and_tracebacks(finished, monkeypatch):
    out = flips.out_of(finished)
    readers = flips.readers(finished)
    before = {name: read() for name, read in readers.items()}
    assert flips.judged(readers, out / "x", before) == ("harmless", "")
    assert flips.judged(readers, out / "x", before | {"scores": "other"})[0] == "wrong"
    monkeypatch.setattr("whence.store.intact.Listed.fault", lambda *_: "")  # as if there were no digests
    shard = out / "scores" / "scores.safetensors"
    flips.flip(shard, 8 * shard.stat().st_size - 3)
    assert flips.judged(readers, shard, before) == ("wrong", "scores gives another result")
    flips.flip(shard, 8 * shard.stat().st_size - 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("scores/scores.safetensors", {"score", "evaluate", "report"}),
        ("generate/generated.json", {"generate", "score", "evaluate", "report"}),
        ("exports/scores.npz", {"score", "evaluate", "report"}),
        ("report/report.html", {"report"}),
        ("train/training.png", {"train", "generate", "fit", "inspect", "score", "evaluate", "report"}),
    ],
)
def test_a_damaged_stage_is_stale_and_so_is_what_was_made_of_it(finished, name, again):
    file = flips.out_of(finished) / name
    flips.flip(file, 2001)
    found = states(finished)
    flips.flip(file, 2001)
    assert {stage for stage, state in found.items() if state != "unchanged"} == again
    assert set(states(finished).values()) == {"unchanged"}


@pytest.mark.slow
def test_a_run_makes_damaged_files_again(finished, notes, blank_pictures):
    out = flips.out_of(finished)
    before = open_scores(out / "scores")
    raw = before.raw.copy()  # it is a view of the file that is damaged next
    for name in ("scores/scores.safetensors", "whence.yaml"):
        flips.flip(out / name, 2001)
    run_pipeline(read_config(finished, environment={}))
    assert any("scores/scores.safetensors has changed since it was written" in note for note in notes)
    again = open_scores(out / "scores")
    assert np.array_equal(again.raw, raw) and again.queries.equals(before.queries)
    shutil.rmtree(out / "scores.1")  # what was damaged stays, aside
    assert flips.verify(out)
    flips.flip(out / "whence.yaml", 2001)
    assert set(states(finished).values()) == {"unchanged"}
    with pytest.raises(StaleArtifact, match="whence.yaml is damaged"):
        flips.report(out)
    run_pipeline(read_config(finished, environment={}))
    assert flips.report(out)


@pytest.mark.slow
def test_a_damaged_lock_is_refused_and_made_again_from_what_there_is(finished, notes, blank_pictures):
    lock = flips.out_of(finished) / "whence.lock"
    flips.flip(lock, 8 * lock.read_text().index('"seconds": ') + 100)
    with pytest.raises(StaleArtifact, match="whence.lock is damaged") as raised:
        states(finished)
    assert raised.value.fix.startswith(f"rm {lock}, ")
    lock.unlink()
    run_pipeline(read_config(finished, environment={}))
    assert sum("finished and unchanged" in note for note in notes) >= 3  # nothing is trained, fitted or scored again
    assert set(states(finished).values()) == {"unchanged"}


@pytest.mark.slow
def test_a_lock_of_before_says_that_sizes_were_compared(finished, notes):
    lock = flips.out_of(finished) / "whence.lock"
    content = json.loads(lock.read_text())
    for stage in content["stages"].values():
        del stage["digests"]
    lock.write_text(json.dumps({"stages": content["stages"], "hashes": content["hashes"]}))
    assert set(states(finished).values()) == {"unchanged"}
    run_pipeline(read_config(finished, environment={}))
    assert any("only their sizes are compared" in note for note in notes)
