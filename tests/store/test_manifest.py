import os
import signal
import subprocess
import sys

import pytest
import torch

from whence.errors import StaleArtifact, UsageError, WhenceError
from whence.store.files import atomic
from whence.store.manifest import Folder, differences

PROVENANCE = {
    "stage": "fit",
    "model": {"weights": "aa11"},
    "data": {"fingerprint": "ab12", "rows": 600},
    "settings": {"damping": 0.1, "modules": ["up", "down"]},
    "code": "0.1.0 cafe",
}


def finished(path, provenance=PROVENANCE):
    with Folder.claim(path, provenance) as folder:
        folder.save("eigen/0000", {"q": torch.eye(2)})
        folder.finish({"examples": 7})
    return path


def test_config_first_manifest_last(tmp_path):
    with Folder.claim(tmp_path / "a" / "factors", PROVENANCE) as folder:
        assert not folder.finished
        assert [file.name for file in folder.path.iterdir() if not file.name.startswith(".")] == ["config.json"]
        folder.save("covariance", {"a": torch.ones(2, 3, dtype=torch.bfloat16)})
        folder.finish({"examples": 7})
        assert folder.finished
    found = Folder.open(tmp_path / "a" / "factors")
    assert found.provenance == PROVENANCE
    assert found.config["versions"]["torch"] == torch.__version__
    assert found.manifest["examples"] == 7
    assert set(found.manifest["files"]) == {"config.json", "covariance.safetensors"}
    assert found.shards() == ["covariance"]
    assert torch.equal(found.load("covariance")["a"], torch.ones(2, 3, dtype=torch.bfloat16))


def test_identical_and_finished_is_given_back(tmp_path):
    folder = Folder.claim(finished(tmp_path / "f"), PROVENANCE)
    assert folder.finished and folder.has("eigen/0000")


def test_unfinished_is_resumed(tmp_path):
    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        folder.save("one", {"x": torch.zeros(1)})
    (tmp_path / "f" / ".two.safetensors.99.tmp").write_bytes(b"half")
    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        assert not folder.finished
        assert folder.has("one") and not folder.has("two")
    assert not list((tmp_path / "f").glob(".*.tmp"))


def test_changes_are_refused_with_a_diff(tmp_path):
    finished(tmp_path / "f")
    other = PROVENANCE | {
        "settings": {"damping": 0.2, "modules": ["up", "down"]},
        "data": {"fingerprint": "cd34", "rows": 601},
    }
    with pytest.raises(StaleArtifact) as raised:
        Folder.claim(tmp_path / "f", other)
    text = str(raised.value)
    assert raised.value.exit_code == 4 and "[WHENCE-23]" in text
    for line in ("settings.damping 0.1 -> 0.2", "data.fingerprint ab12 -> cd34", "data.rows 600 -> 601"):
        assert line in text
    assert "modules" not in text
    assert "a finished fit" in text and "--out" in text and "--rerun" in text and "f.1" in text
    assert Folder.claim(tmp_path / "f", PROVENANCE).finished


@pytest.mark.parametrize("finish", [False, True])
def test_other_code_of_the_same_version_is_refused(tmp_path, finish):
    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        if finish:
            folder.finish()
    with pytest.raises(StaleArtifact, match="code 0.1.0 cafe -> 0.1.0 beef"):
        Folder.claim(tmp_path / "f", PROVENANCE | {"code": "0.1.0 beef"})
    with Folder.claim(tmp_path / "f", PROVENANCE):
        pass  # the refusal holds no lock


def test_other_libraries_do_not_resume_and_do_read(tmp_path):
    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        folder.write_json("config.json", folder.config | {"versions": {"torch": "1.0", "transformers": "5.0"}})
    with pytest.raises(StaleArtifact, match="versions.torch 1.0 ->"):
        Folder.claim(tmp_path / "f", PROVENANCE)
    with Folder.claim(tmp_path / "g", PROVENANCE) as folder:
        folder.write_json("config.json", folder.config | {"versions": {"torch": "1.0", "transformers": "5.0"}})
        folder.finish()
    assert Folder.claim(tmp_path / "g", PROVENANCE).finished


def test_many_changes_are_cut_to_five_lines(tmp_path):
    with Folder.claim(tmp_path / "f", {str(number): number for number in range(9)}):
        pass
    with pytest.raises(StaleArtifact, match="and 5 more"):
        Folder.claim(tmp_path / "f", {str(number): -1 for number in range(9)})


def test_rerun_moves_aside_and_deletes_nothing(tmp_path):
    for seed in range(3):
        with Folder.claim(tmp_path / "f", PROVENANCE | {"seed": seed}, rerun=True) as folder:
            folder.finish()
    assert [Folder.open(tmp_path / name).provenance["seed"] for name in ("f.1", "f.2", "f")] == [0, 1, 2]


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_folders_of_others_are_refused(tmp_path, name):
    (tmp_path / name).write_text('{"model_type": "llama"}')
    for rerun in (False, True):
        with pytest.raises(StaleArtifact, match="not a whence run folder"):
            Folder.claim(tmp_path, PROVENANCE, rerun=rerun)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_no_folder_is_made_below_a_file(tmp_path):
    (tmp_path / "rows.csv").write_text("text")
    with pytest.raises(UsageError, match="No folder can be made at") as raised:
        Folder.claim(tmp_path / "rows.csv" / "runs" / "factors", PROVENANCE)
    assert raised.value.given == f"{tmp_path / 'rows.csv'} is a file" and "--out" in raised.value.fix


def test_open_wants_a_finished_folder(tmp_path):
    with pytest.raises(StaleArtifact, match="There is no .*missing"):
        Folder.open(tmp_path / "missing")
    with pytest.raises(StaleArtifact, match="not a whence run folder"):
        Folder.open(tmp_path)
    with Folder.claim(tmp_path / "f", PROVENANCE):
        pass
    with pytest.raises(StaleArtifact, match="unfinished"):
        Folder.open(tmp_path / "f")


def test_damage_is_noticed(tmp_path):
    shard = finished(tmp_path / "f") / "eigen" / "0000.safetensors"
    os.truncate(shard, 10)
    with pytest.raises(StaleArtifact, match="eigen/0000.safetensors"):
        Folder.claim(tmp_path / "f", PROVENANCE)


def test_identity_follows_the_provenance(tmp_path):
    one = Folder.open(finished(tmp_path / "a"))
    same = Folder.open(finished(tmp_path / "b"))
    other = Folder.open(finished(tmp_path / "c", PROVENANCE | {"code": "0.2.0 cafe"}))
    assert one.identity == same.identity != other.identity
    assert one.manifest["identity"] == one.identity


HOLD = """
import sys, time
from whence.store.manifest import Folder
folder = Folder.claim(sys.argv[1], {"stage": "fit"})
print("claimed", flush=True)
time.sleep(60)
"""


def test_one_writer_at_a_time_and_a_kill_lets_go(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "f")], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "claimed\n"
            with pytest.raises(WhenceError, match=f"process {holder.pid}"):
                Folder.claim(tmp_path / "f", {"stage": "fit"})
        finally:
            holder.send_signal(signal.SIGKILL)
    with Folder.claim(tmp_path / "f", {"stage": "fit"}) as folder:
        assert not folder.finished


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("old")
    with pytest.raises(RuntimeError), atomic(file) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_slices_and_transposes_are_saved_by_value(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        folder.save("x", {"top": x[:1], "bottom": x[1:], "turned": x.T})
        loaded = folder.load("x")
    assert torch.equal(loaded["bottom"], x[1:]) and torch.equal(loaded["turned"], x.T)


def test_differences_name_what_came_and_went():
    assert differences({"a": {"b": 1}, "gone": True}, {"a": {"b": 1.5}, "came": "x"}) == [
        "a.b 1 -> 1.5",
        "gone true -> nothing",
        "came nothing -> x",
    ]
    (line,) = differences({"modules": ["m" * 99]}, {"modules": ["m" * 98 + "n"]})
    was, now = line.removeprefix("modules ").split(" -> ")
    assert was != now and len(line) < 128
