"""whence verify: everything of a folder at once."""

import json

import pytest
import torch

from benchmarks.flips import flip
from whence.opened import OPENED, remember
from whence.store.manifest import Folder


@pytest.fixture
def folder(tmp_path):
    with Folder.claim(tmp_path / "f", {"stage": "fit"}) as folder:
        folder.save("eigen/0000", {"q": torch.eye(4)})
        folder.write_json("inputs.json", {"up": "up"})
        folder.finish({"about": {}})
    return tmp_path / "f"


def test_a_whole_folder_is_said_to_be_whole(run, folder):
    said = run("verify", folder).stdout
    assert "3 files unchanged since written" in said and f"{folder}/manifest.json" in said
    found = json.loads(run("verify", folder, "--json").stdout)
    assert found["files"] == 3 and found["damaged"] == {} and found["by_size_only"] == [] == found["unlisted"]
    (folder / "notes.txt").write_text("mine")
    assert "1 file not listed in any record" in run("verify", folder).stdout


def test_damage_is_named_with_exit_code_4(run, folder):
    flip(folder / "eigen" / "0000.safetensors", 900)
    failed = run("verify", folder, code=4)
    assert f"{folder}/eigen/0000.safetensors is damaged" in failed.stderr and "are unchanged" not in failed.stdout
    assert f"mv {folder} {folder}.damaged" in failed.stderr
    (folder / "inputs.json").unlink()
    failed = run("verify", folder, "--json", code=4)
    assert json.loads(failed.stdout)["damaged"] == {
        "eigen/0000.safetensors": "has changed since it was written",
        "inputs.json": "is missing",
    }
    assert f"2 files of {folder} are damaged" in failed.stderr
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").write_text("{")
    assert json.loads(run("verify", folder, "--json", code=4).stdout)["damaged"].keys() == {"config.json"}
    (folder / "config.json").write_bytes(config)
    (folder / "manifest.json").write_text("{")
    failed = run("verify", folder, code=4)
    assert f"{folder}/manifest.json is damaged" in failed.stderr


def test_how_a_run_was_opened_has_a_digest_of_its_own(run, folder):
    remember(folder.parent, {"model": "gpt2", "data": "train"})
    found = json.loads(run("verify", folder.parent, "--json").stdout)
    assert found["files"] == 4 and found["unlisted"] == [] == found["by_size_only"]
    file = folder.parent / OPENED
    file.write_text(file.read_text().replace("gpt2", "gpt3"))
    assert f"{file} is damaged" in run("verify", folder.parent, code=4).stderr


def test_a_folder_below_is_compared_with_the_record_above(run, folder):
    assert "1 file unchanged since written" in run("verify", folder / "eigen").stdout
    flip(folder / "eigen" / "0000.safetensors", 900)
    assert "0000.safetensors is damaged" in run("verify", folder / "eigen", code=4).stderr


def test_an_unfinished_folder_is_compared_too(run, tmp_path):
    with Folder.claim(tmp_path / "f", {"stage": "fit"}) as folder:
        folder.save("one", {"q": torch.eye(4)})
    assert "2 files unchanged since written" in run("verify", tmp_path / "f").stdout
    flip(tmp_path / "f" / "one.safetensors", 900)
    assert "one.safetensors is damaged" in run("verify", tmp_path / "f", code=4).stderr


def test_what_can_not_be_verified_is_said(run, tmp_path):
    assert "no digests" in run("verify", tmp_path, code=2).stderr
    assert "no folder" in run("verify", tmp_path / "none", code=2).stderr
    (tmp_path / "file").write_text("x")
    assert "no folder" in run("verify", tmp_path / "file", code=2).stderr
