"""A few kills at random moments; `python -m benchmarks.kills` does a hundred."""

import json
from dataclasses import replace

import pytest

from benchmarks.kills import CASES, Killing, differing, kill_all, total


@pytest.mark.slow
def test_commands_killed_at_random_end_with_the_same_files(tmp_path):
    cases = [replace(case, weight=1) for case in CASES if case.name in ("train", "score")]  # three kills of each
    told = []
    found = total(kill_all(Killing(tmp_path, seed=3), cases, kills=6, say=told.append))
    assert (found.kills, found.differing, found.left_over, found.orphans, found.failed) == (6, 0, 0, 0, 0), told
    assert all("as if nothing had happened" in line for line in told)


def test_what_is_different_is_told_and_clocks_are_not(tmp_path):
    for name, seconds in (("a", 1.5), ("b", 22.25)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, "seconds": seconds}) + "\n")
        files = {"files": {"metrics.jsonl": len(str(seconds)), "scores.safetensors": 8}, "finished": f"at {seconds}"}
        (tmp_path / name / "manifest.json").write_text(json.dumps(files))
        (tmp_path / name / "scores.safetensors").write_bytes(bytes(8))
        (tmp_path / name / "part").mkdir()
        (tmp_path / name / "part" / "config.json").write_text(json.dumps({"created": f"at {seconds}"}))
        (tmp_path / name / "part" / ".digests").write_text(f"{seconds}  config.json\n1  shard\n" + "1  shard\n" * (name == "b"))
    assert not differing(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "scores.safetensors").write_bytes(bytes(7) + b"\1")
    (tmp_path / "b" / ".scores.png.17.tmp").touch()
    (tmp_path / "a" / "report.md").touch()
    (tmp_path / "b" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.25, "seconds": 3}) + "\n")
    assert differing(tmp_path / "a", tmp_path / "b") == [
        "left over: .scores.png.17.tmp",
        "missing: report.md",
        "other bytes: metrics.jsonl",
        "other bytes: scores.safetensors",
    ]
