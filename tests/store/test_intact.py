"""Files that are no longer what was written are refused by name, wherever they are read."""

import json
import os
import shutil
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from blake3 import blake3

from benchmarks.flips import flip
from whence.errors import StaleArtifact, UsageError
from whence.store.intact import CHUNK, file_digest, intact, read_json, reading, sealed, verified
from whence.store.manifest import Folder, load_tensors
from whence.store.scores import Scores, open_scores

PROVENANCE = {"stage": "fit", "settings": {"damping": 0.1}}
TABLE = pd.DataFrame({"id": ["a", "b"], "tokens": [3, 4]})


def finished(path, seed=0):
    with Folder.claim(path, PROVENANCE) as folder:
        folder.save("eigen/0000", {"q": torch.eye(4).roll(seed, 0)})
        folder.write_json("inputs.json", {"up": f"up {seed}"})
        folder.save_table("examples.parquet", TABLE.assign(tokens=[3 + seed, 9]))
        folder.finish({"about": {"n": 7}})
    return path


def read_all(path):
    folder = Folder.open(path)
    about = folder.manifest["about"]
    return folder.load("eigen/0000")["q"], folder.read_json("inputs.json"), folder.read_table("examples.parquet"), about


FILES = ["eigen/0000.safetensors", "inputs.json", "examples.parquet", "manifest.json", "config.json"]


@pytest.mark.parametrize("size", [0, 5, CHUNK + 1])
def test_digests_are_those_of_b3sum(tmp_path, size):
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == blake3(content).hexdigest()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused_where_it_is_read(tmp_path, name):
    file = finished(tmp_path / "f") / name
    before = read_all(tmp_path / "f")
    for bit in range(3, 8 * file.stat().st_size, max(1, 8 * file.stat().st_size // 40) | 1):
        flip(file, bit)
        try:
            found = read_all(tmp_path / "f")
        except StaleArtifact as error:
            assert name in str(error) and error.fix
        else:  # in the name of the digest itself, or a blank: the same content all the same
            assert name == "manifest.json" and torch.equal(found[0], before[0]) and found[3] == before[3]
        flip(file, bit)
    assert torch.equal(read_all(tmp_path / "f")[0], torch.eye(4))


@pytest.mark.parametrize("name", FILES)
def test_a_finished_folder_with_a_flipped_bit_is_not_unchanged(tmp_path, name):
    finished(tmp_path / "f")
    flip(tmp_path / "f" / name, 83)
    with pytest.raises(StaleArtifact, match=name):
        Folder.claim(tmp_path / "f", PROVENANCE)
    with Folder.claim(tmp_path / "f", PROVENANCE, rerun=True) as folder:
        assert not folder.finished and (tmp_path / "f.1" / name).exists()


@pytest.mark.parametrize("damage", ["cut", "longer", "swapped", "gone", "folder"])
@pytest.mark.parametrize("name", ["eigen/0000.safetensors", "inputs.json", "examples.parquet"])
def test_other_damage_is_refused_too(tmp_path, name, damage):
    file = finished(tmp_path / "f") / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:-7])
    elif damage == "longer":
        file.write_bytes(content + b"\0")
    elif damage == "swapped":  # with a whole file of another run, of the same size
        shutil.copy(finished(tmp_path / "g", seed=1) / name, file)
        assert file.stat().st_size == len(content) and file.read_bytes() != content
    elif damage == "folder":
        file.mkdir()
    with pytest.raises(StaleArtifact, match=name):
        read_all(tmp_path / "f")


@pytest.mark.parametrize(
    "name", ["eigen/0000.safetensors", "inputs.json", "batch.jsonl", "config.json", "inner/part.safetensors"]
)
def test_an_unfinished_folder_with_a_flipped_bit_does_not_go_on(tmp_path, name):
    def begin():
        with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
            if not folder.has_json("inputs.json"):
                folder.save("eigen/0000", {"q": torch.eye(4)})
                folder.write_json("inputs.json", {"up": "up"})
                folder.child("inner").save("part", {"q": torch.eye(3)})
                with folder.writing("batch.jsonl") as file:
                    file.write_text("1\n")
            return folder

    begin()
    begin()
    flip(tmp_path / "f" / name, 8)
    with pytest.raises(StaleArtifact) as raised:
        begin()
    assert str(tmp_path / "f" / name) in str(raised.value)
    assert raised.value.fix.startswith("restore it" if name == "config.json" else f"rm {tmp_path / 'f' / name}")
    flip(tmp_path / "f" / name, 8)
    begin()  # the refusal holds no lock


def test_a_flipped_bit_in_the_record_of_an_unfinished_folder_is_noticed(tmp_path):
    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        folder.save("one", {"q": torch.eye(4)})
    record = tmp_path / "f" / ".digests"
    for bit in range(8 * record.stat().st_size):
        flip(record, bit)
        try:
            with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
                assert torch.equal(folder.load("one")["q"], torch.eye(4))
        except StaleArtifact as error:
            assert str(tmp_path / "f") in str(error)
        flip(record, bit)


def test_a_kill_between_a_digest_and_its_file_leaves_the_old_file_right(tmp_path, monkeypatch):
    folder = Folder.claim(tmp_path / "f", PROVENANCE)
    folder.save("work", {"sum": torch.ones(1)})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        folder.save("work", {"sum": torch.zeros(1)})
    folder.close()
    with (tmp_path / "f" / ".digests").open("ab") as record:
        record.write(b"0123 cut sh")  # a line that a kill cut short
    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        assert folder.load("work")["sum"] == 1
        folder.save("work", {"sum": torch.full((1,), 2.0)})
        assert folder.load("work")["sum"] == 2
        folder.finish()
    assert Folder.open(tmp_path / "f").load("work")["sum"] == 2
    assert not (tmp_path / "f" / ".digests").exists()


def test_what_a_child_wrote_is_known_where_it_is_adopted(tmp_path):
    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        folder.child("part").save("one", {"q": torch.eye(4)})
        flip(tmp_path / "f" / "part" / "one.safetensors", 900)
        folder.adopt("part")
        with pytest.raises(StaleArtifact, match="one.safetensors"):
            folder.load("one")
        flip(tmp_path / "f" / "one.safetensors", 900)
        folder.finish()
    assert torch.equal(Folder.open(tmp_path / "f").load("one")["q"], torch.eye(4))


def test_a_child_that_was_half_deleted_is_no_damaged_one(tmp_path, monkeypatch):
    def stopping(path, **_):
        next(path.glob("*.safetensors")).unlink()
        raise KeyboardInterrupt

    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        with folder.child("finished") as child:
            child.save("one", {"q": torch.eye(4)})
            child.finish()
        folder.child("begun").save("two", {"q": torch.eye(4)})
        for name in ("finished", "begun"):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr("whence.store.manifest.shutil.rmtree", stopping)
                folder.discard(name)
    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        assert not (tmp_path / "f" / "finished").exists()
        assert not verified(tmp_path / "f").faults
        folder.finish()
    assert Folder.open(tmp_path / "f").manifest["files"].keys() == {"config.json"}


def test_a_flip_between_writing_and_finishing_is_not_taken_for_right(tmp_path):
    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        folder.save("one", {"q": torch.eye(4)})
        flip(tmp_path / "f" / "one.safetensors", 900)
        folder.finish()
    with pytest.raises(StaleArtifact, match="one.safetensors"):
        Folder.open(tmp_path / "f").load("one")


def without_digests(path):
    """Make a finished folder one of before digests were kept."""
    config, manifest = read_json(path / "config.json"), read_json(path / "manifest.json")
    (path / "config.json").write_text(json.dumps(config | {"whence": 1}, indent=2))
    del manifest["digests"]
    manifest["files"]["config.json"] = (path / "config.json").stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_folders_of_before_open_and_say_what_can_not_be_checked(tmp_path, notes):
    without_digests(finished(tmp_path / "f"))
    assert torch.equal(read_all(tmp_path / "f")[0], torch.eye(4))
    assert Folder.claim(tmp_path / "f", PROVENANCE).finished
    assert any("only the sizes of its files are checked" in note for note in notes)
    found = verified(tmp_path / "f")
    assert found.faults == {} and not any(found.files.values())


@pytest.mark.parametrize("name", ["eigen/0000.safetensors", "inputs.json", "examples.parquet", "manifest.json", "config.json"])
def test_damage_that_only_reading_can_notice_is_refused_by_name(tmp_path, name):
    without_digests(finished(tmp_path / "f"))
    file = tmp_path / "f" / name
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:-8] + b"\xff" * 8)
    with pytest.raises(StaleArtifact, match=name):
        read_all(tmp_path / "f")


@pytest.mark.parametrize("format", [0, 3, 99, "2", None, [2]])
@pytest.mark.parametrize("end", [True, False])
def test_an_unknown_format_is_refused(tmp_path, format, end):
    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        if end:
            folder.finish({"about": {}})
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    (tmp_path / "f" / "config.json").write_text(json.dumps(config | {"whence": format}))
    with pytest.raises(StaleArtifact, match="format that this version of whence does not know") as raised:
        Folder.claim(tmp_path / "f", PROVENANCE)
    assert json.dumps(format) in str(raised.value) and "1 to 2" in str(raised.value)


def test_scores_do_not_open_with_a_flipped_bit_anywhere(tmp_path):
    tables = {"examples": pd.DataFrame({"id": ["a", "b"], "tokens": [1, 2]}), "queries": pd.DataFrame({"id": ["q"]})}
    scores = Scores(np.array([[1.0, 2.0]], np.float32), 2, **tables, norms={"gradient": np.ones(2, np.float32)})
    with Folder.claim(tmp_path / "s", PROVENANCE) as folder:
        scores.save(folder)
    for file in sorted(file for file in (tmp_path / "s").iterdir() if file.name != ".lock"):
        for bit in (8 * file.stat().st_size // 2, 8 * file.stat().st_size - 20):
            flip(file, bit)
            with pytest.raises(StaleArtifact, match=file.name):
                open_scores(tmp_path / "s")
            flip(file, bit)
    assert np.array_equal(open_scores(tmp_path / "s").raw, scores.raw)


# files that stand alone, and folders within folders


def test_the_nearest_record_that_lists_a_file_counts(tmp_path):
    outer = finished(tmp_path / "f")
    assert intact(outer / "eigen") == outer / "eigen"
    flip(outer / "eigen" / "0000.safetensors", 700)
    for path in (outer, outer / "eigen", outer / "eigen" / "0000.safetensors"):
        with pytest.raises(StaleArtifact, match="0000.safetensors"):
            intact(path)
    intact(outer / "inputs.json")
    intact(tmp_path)
    (tmp_path / "link").symlink_to(outer)
    with pytest.raises(StaleArtifact, match="0000.safetensors"):
        intact(tmp_path / "link" / "eigen")
    assert intact(tmp_path / "gpt2") == tmp_path / "gpt2", "a name of the hub"


@pytest.mark.parametrize("name", ["manifest.json", "checkpoint.json", "whence.lock"])
def test_records_of_others_say_nothing(tmp_path, name):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w")
    (tmp_path / name).write_text(json.dumps({"files": {"model/weights": 99}}))
    intact(tmp_path / "model")
    with pytest.raises(UsageError, match="no digests"):
        verified(tmp_path)


def test_a_document_holds_the_digest_of_its_content(tmp_path):
    document = {"data": [{"prompt": "a", "logprob": -0.1}], "unit": "nats", "mean": float("nan")}
    (tmp_path / "x.json").write_text(json.dumps(sealed(document)))
    assert str(read_json(tmp_path / "x.json")) == str(document)
    (tmp_path / "x.json").write_text((tmp_path / "x.json").read_text().replace("-0.1", "-0.3"))
    with pytest.raises(StaleArtifact, match=r'x.json is damaged(.|\n)*if you changed it yourself, remove its "blake3"'):
        read_json(tmp_path / "x.json")


# hostile files


def lying_header(size=10**15, shape=(4,), dtype="F32", offsets=(0, 16)):
    header = json.dumps({"q": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return (len(header) if size is None else size).to_bytes(8, "little") + header + bytes(16)


HOSTILE = {
    "a header without end": lying_header(),
    "a header larger than the file": lying_header(1000),
    "shapes that are not there": lying_header(None, shape=(2**40, 2**20)),
    "shapes whose product overflows": lying_header(None, shape=(2**62, 2**62)),
    "offsets behind the end": lying_header(None, shape=(8,), offsets=(0, 32)),
    "offsets that turn back": lying_header(None, offsets=(16, 0)),
    "a type that is none": lying_header(None, dtype="F31"),
    "nothing": b"",
    "a header nested deeply": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "a pointer of git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_tensors_that_lie_about_themselves_are_refused_by_name(tmp_path, content):
    (tmp_path / "q.safetensors").write_bytes(content)
    with pytest.raises(StaleArtifact, match="q.safetensors is damaged"):
        load_tensors(tmp_path / "q.safetensors")


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "1" * 10**5, "\ud800", "{", '"\udcff"'])
def test_json_that_is_none_is_refused_by_name(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(StaleArtifact, match="x.json is damaged"):
        read_json(tmp_path / "x.json")


def test_a_config_that_is_nested_deeply_is_no_run_folder_and_no_traceback(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "config.json").write_text('{"whence":' + "[" * 10**5)
    with pytest.raises(StaleArtifact, match="not a whence run folder"):
        Folder.open(tmp_path / "f")
    finished(tmp_path / "g")
    shutil.copy(tmp_path / "f" / "config.json", tmp_path / "g" / "config.json")
    with pytest.raises(StaleArtifact, match="config.json is damaged"):
        Folder.open(tmp_path / "g")


def test_links_that_turn_in_circles_end(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "factors"):
        with pytest.raises(UsageError, match="loop is a dangling or circular link"):
            Folder.claim(path, PROVENANCE)
    with pytest.raises(StaleArtifact, match="not a whence run folder"):
        Folder.open(tmp_path / "loop")
    with pytest.raises(UsageError, match="no folder"):
        verified(tmp_path / "loop")
    with Folder.claim(tmp_path / "f", PROVENANCE) as folder:
        folder.save("one", {"q": torch.eye(4)})
        (tmp_path / "f" / "round").symlink_to(tmp_path / "f")
        (tmp_path / "f" / "itself").symlink_to("itself")
        folder.finish()
    assert torch.equal(Folder.open(tmp_path / "f").load("one")["q"], torch.eye(4))
    assert len(verified(tmp_path / "f").files) == 2
    intact(tmp_path / "loop")


def test_errors_of_the_machine_are_not_taken_for_damage(tmp_path):
    with pytest.raises(MemoryError), reading(tmp_path / "x"):
        raise MemoryError
    with pytest.raises(StaleArtifact, match="x is damaged(.|\n)*it is missing"), reading(tmp_path / "x"):
        (tmp_path / "x").read_bytes()


def test_several_threads_hash_one_file(tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(3 * CHUNK))
    found = []
    threads = [threading.Thread(target=lambda: found.append(file_digest(tmp_path / "file"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 3
