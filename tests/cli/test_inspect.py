"""`whence inspect`, as a user calls it."""

import json

import pytest
from pictures import undrawn
from safetensors.torch import load_file, save_file

from whence.store.intact import file_digest, read_json, sealed

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def quick(monkeypatch):
    """Files without the drawing, which tests/plots and tests/report are for."""
    undrawn(monkeypatch)


@pytest.mark.usefixtures("quick")
def test_pictures_of_a_layer(run, fitted, tmp_path):
    done = run("inspect", fitted, "--layer", "0", "--out", tmp_path / "seen", "--clip", "90", "--cmap", "magma")
    assert "3 modules drawn" in done.stdout and "health.md" in done.stdout
    assert len(list((tmp_path / "seen").glob("model.layers.0.*/lambda.png"))) == 3
    config = json.loads((tmp_path / "seen" / "config.json").read_text())["provenance"]["settings"]
    assert config == {"layer": 0, "modules": [], "clip_percentile": 90.0, "cmap": "magma", "damping": 0.1}
    assert "settings.clip_percentile 90.0 -> 80.0" in (
        run("inspect", fitted, "--layer", "0", "--out", tmp_path / "seen", "--clip", "80", "--cmap", "magma", code=4).stderr
    )


@pytest.mark.usefixtures("quick")
def test_which_modules_are_drawn(run, fitted, tmp_path):
    def drawn(*options):
        number = len(list(tmp_path.iterdir()))
        return json.loads(run("inspect", fitted, "--out", tmp_path / f"seen-{number}", "--json", *options).stdout)

    assert drawn()["modules"] == [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert drawn("--module", "*.0.mlp.up_*", "--module", "*.down_proj")["modules"] == [
        UP,
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    everything = drawn("--all")
    assert len(everything["modules"]) == 6 and "health.json" in everything["files"]
    assert f"{UP}/lambda.png" in everything["files"]


def test_the_table_of_a_layer_and_the_details_of_a_module(run, fitted):
    table = run("inspect", fitted, "--layer", "1").stdout
    assert "model.layers.1.mlp.up_proj" in table and "model.layers.0" not in table
    one = run("inspect", fitted, "--module", UP).stdout
    assert "90% of the sum" in one and "A, of inputs" in one and "samples per column" in one
    two = json.loads(run("inspect", fitted, "--module", "*.up_proj", "--json").stdout)
    assert [entry["module"] for entry in two["modules"]] == [UP, "model.layers.1.mlp.up_proj"]
    assert all(entry["inputs"]["samples"] > 0 and entry["outputs"]["width"] == 24 for entry in two["modules"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layer", "7"), "layers 0, 1"),
        (("--layer", "1", "--all"), "one of them"),
        (("--module", UP, "--all"), "one of them"),
        (("--module", "nonsense"), UP),
        (("--clip", "0"), "--clip can't be 0"),
        (("--clip", "101"), "--clip"),
        (("--cmap", "virdis"), "no colormap"),
    ],
)
def test_mistakes_are_named(run, fitted, tmp_path, options, said):
    assert said in run("inspect", fitted, "--out", tmp_path / "seen", *options, code=2).stderr
    assert not (tmp_path / "seen").exists()


@pytest.mark.usefixtures("quick")
def test_factors_that_are_not_finite_fail(run, fitted, tmp_path):
    shard = fitted / "eigenvalues-00.safetensors"
    tensors = load_file(shard)
    tensors[UP][:] = 255  # three bytes of ones are NaN
    save_file(tensors, shard)
    manifest = read_json(fitted / "manifest.json")
    manifest["digests"][shard.name] = file_digest(shard)  # as if they had been fitted so
    (fitted / "manifest.json").write_text(json.dumps(sealed(manifest)))
    failed = run("inspect", fitted, "--all", "--out", tmp_path / "seen", code=1).stderr
    assert f"eigenvalues of {UP} are not finite" in failed and "[WHENCE-14]" in failed and "1 of 6 modules" in failed
    assert "not finite" in run("inspect", fitted).stdout and "not finite" in run("inspect", fitted, "--module", UP).stdout
    listed = json.loads(run("inspect", fitted, "--json").stdout)["modules"]
    assert [entry["module"] for entry in listed if not entry["sound"]] == [UP]
