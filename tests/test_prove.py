"""The checks on a run of a plain Trainer, killed, and what is committed of all kinds of runs."""

import json
import os
import runpy
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
from distributed import processes

from benchmarks import kills, prove


def forked(words, place, kill_after=None):
    """As `started`, but forked from a process that has everything imported, and timed by the clock."""
    began = time.monotonic()
    if words[0] == str(prove.SCRIPT):
        (failed,) = processes.run(script, words, place, world=1)
        code = int(failed is not None)
    else:
        process = kills.Started(tuple(words[2:]), place)
        if (code := process.wait(kill_after)) is None:
            assert not process.kill()
            code = -signal.SIGKILL
    wall = time.monotonic() - began
    return prove.Took(code, wall, processor=wall)


def script(words, place):
    """What `python FILE ...` does in the folder; what it says goes to the file beside it."""
    os.chdir(place)
    sys.argv = words
    with place.with_name(f"{place.name}.said").open("a") as said, redirect_stdout(said), redirect_stderr(said):
        runpy.run_path(words[0], run_name="__main__")


@pytest.mark.slow
def test_what_a_plain_trainer_made(shared_data, tmp_path, monkeypatch):
    monkeypatch.setattr(prove, "KINDS", {"plain": None})
    monkeypatch.setattr(prove, "started", forked)
    ended = prove.main(["--data", str(shared_data), "--out", str(tmp_path), "--tiny", "--kills", "1"])
    found = json.loads((tmp_path / "prove.json").read_text())
    (run,) = found["runs"]
    assert ended == bool(found["flags"]) and found["minutes"] > 0 and run["removal_processor_minutes"] > 0
    assert run["other_files"] == [] and run["drift"] < 1e-3 and run["own_gain"] > 0
    assert len(run["controls"]) == 8 and run["sentence"] in (tmp_path / "prove.md").read_text()


def test_a_command_is_timed_or_killed(tmp_path):
    (place := tmp_path / "work").mkdir()
    whole = prove.started(["-c", "sum(range(2_000_000))"], place)
    assert whole.code == 0 and 0 < whole.processor < 60
    cut = prove.started(["-c", "import time; time.sleep(60)"], place, 0.2)
    assert cut.code == -signal.SIGKILL and 0.2 <= cut.wall < 60


def test_targets_that_are_missed_are_said():
    run = {
        "run": "full",
        "removal_processor_minutes": 3.0,
        "mirror_processor_minutes": 2.0,
        "held_out_slope": 0.9,
        "other_files": [],
    }
    assert not prove.missed(run)
    slow = prove.missed({**run, "removal_processor_minutes": 10.5, "held_out_slope": 1.2, "other_files": ["other bytes: a"]})
    assert slow == [
        "full: removal took 10.5 minutes of the processor, not 10",
        "full: held-out slope 1.2, not 1 +- 0.15",
        "full: other bytes: a",
    ]


def test_committed_runs_meet_their_targets():
    found = json.loads((prove.ROOT / "benchmarks" / "results" / "prove.json").read_text())
    assert found["runs"] and not any(prove.missed(run) for run in found["runs"])
    for run in found["runs"]:
        assert all(run["stands_out"].values()) == ("does not stand out" not in run["sentence"])
