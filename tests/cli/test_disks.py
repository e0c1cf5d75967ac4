"""Every command on a real disk that is full, or that takes no writing: it says so, and goes on once there is room."""

import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from facts import facts, write_jsonl

from whence.demo import model as demo

MIB = 2**20


@pytest.fixture
def disk(tmp_path):
    """A disk of its own in memory, of 16 MiB; skipped where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("no disk can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, left: int) -> Path:
    """Leave N bytes free; deleting the file makes room again."""
    filler = disk / "filler"
    filler.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - left))
    return filler


@pytest.fixture
def commands(tiny_model_folder, data, queries, fitted, tmp_path, tmp_path_factory, run, monkeypatch):
    """Commands, and what each writes below a folder; the demo's model is hardly trained."""
    training = replace(demo.SETTINGS.training, epochs=1)
    monkeypatch.setattr(demo, "SETTINGS", replace(demo.SETTINGS, training=training))
    model = tiny_model_folder
    scores = tmp_path_factory.getbasetemp() / "scores-of-facts"  # the same in every test, and only read
    if not scores.exists():
        run("score", model, "-d", data, "-f", fitted, "--queries", queries, "-o", scores, "-q")
    rows = write_jsonl(tmp_path / "rows.jsonl", facts())
    config = tmp_path / "whence.yaml"
    sizes = "{max_steps: 4, batch_size: 4, save_steps: 2}"
    config.write_text(
        f"run: small\nmodel: {{base: {model}}}\ndata: {{path: {rows}}}\nprompts: {{path: {queries}}}\ntrain: {sizes}\n"
        "generate: {max_new_tokens: 4}\ninspect: {modules: ['*.1.mlp.up_proj']}\nevaluate: {compare: true}\n"
    )

    def of(name: str, out: Path) -> list[object]:
        return {
            "fit": ["fit", model, "-d", data, "-o", out / "a", "-q"],
            "score": ["score", model, "-d", data, "-f", fitted, "--queries", queries, "-o", out / "a", "-q"],
            "index": ["index", "build", model, "-d", data, "-o", out / "a", "-q"],
            "generate": ["generate", model, "--prompts", queries, "-o", out / "a.json", "-q"],
            "train": ["train", model, "-d", data, "--max-steps", 4, "--save-steps", 2, "-o", out / "a", "-q"],
            "report": ["report", scores, "-o", out / "a", "-q"],
            "inspect": ["inspect", fitted, "--module", "*.1.mlp.up_proj", "-o", out / "a", "-q"],
            "export": ["export", scores, "-o", out / "a.parquet"],
            "run": ["run", config, "--set", f"out={out / 'a'}", "-q"],
            "recipes": ["recipes", "cp", "demo", out / "a"],
            "init": ["init", out / "a" / "whence.yaml"],
        }[name]

    return of


LEFT = {
    "fit": 40,
    "score": 24,
    "index": 24,
    "generate": 4,
    "train": 300,
    "report": 60,
    "inspect": 24,
    "export": 4,
    "run": 780,
    "recipes": 24,
    "init": 0,
}
"""KiB that are free: some of what each command writes."""


@pytest.mark.slow
@pytest.mark.parametrize("name", LEFT)
def test_a_full_disk_says_so_and_the_same_command_goes_on(name, commands, disk, run):
    filler, words = fill(disk, LEFT[name] * 1024), commands(name, disk)
    said = run(*words, code=3).stderr
    assert "could not be written.  [WHENCE-13]" in said and "0.0 GB free" in said and "it resumes" in said
    filler.unlink()
    run(*words)
    assert not list(disk.rglob("*.tmp")) and not list(disk.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("name", LEFT)
def test_a_read_only_disk_says_so(name, commands, disk, run):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    said = run(*commands(name, disk), code=3).stderr
    assert "The disk is read-only: " in said and "[WHENCE-13]" in said and "a different --out" in said


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_output_that_nobody_takes(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", facts())
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "whence", "config", "schema"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=rows.parent,
        )
    assert done.returncode == 3 and "The disk is full: a file, or the output, could not be written.  [WHENCE-13]" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_small_disk_is_told_before_the_work_begins(run, tiny_model_folder, data, queries, fitted, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 100))
    given, out = (tiny_model_folder, "-d", data), ("-o", tmp_path / "a")
    fit = run("fit", *given, *out).stderr
    score = run("score", *given, "-f", fitted, "--queries", queries, "-o", tmp_path / "b").stderr
    index = run("index", "build", *given, "-o", tmp_path / "c").stderr
    trace = run("trace", *given, "-q", "Where was Ada Velt born?", "-a", " In Turin.", "-o", tmp_path / "d").stderr
    for said, stages in ((fit, ["fit"]), (score, ["score"]), (index, ["index"]), (trace, ["fit", "score"])):
        assert re.findall(r"warning: (\w+) may write up to \d+ kB to .*, where 0 kB are free: it stops", said) == stages
