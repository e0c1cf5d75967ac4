"""The folder that inspecting factors leaves behind."""

import json
import math
import re
from dataclasses import replace
from urllib.parse import unquote

import pytest
import torch
from models import CASES
from pictures import undrawn

from whence.errors import NumericalError, StaleArtifact, UsageError
from whence.fitting import fit
from whence.fitting.health import health
from whence.operators.eigen import BlockDiagonal
from whence.progress import Silent, report_to
from whence.report.factors import inspect_factors, inspect_module
from whence.settings import Inspect

PICTURES = {"lambda.png", "spectrum.png", "sides.png", "distribution.png", "cumulative.png"}
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def quick(monkeypatch):
    """Files without the drawing: what is in the pictures is for tests/plots/test_factors.py."""
    undrawn(monkeypatch)


def fitted(method="ekfac", **settings):
    case = CASES["llama"]
    return fit(case.model(), case.task(), case.train(), method=method, modules="mlp", **settings)


@pytest.fixture(scope="module")
def curvature():
    return fitted()


def changed(curvature, name, lam_OI):
    """The same with other eigenvalues for one module."""
    blocks = dict(curvature.blocks)
    blocks[name] = replace(blocks[name], lam_OI=lam_OI)
    return replace(curvature, operator=BlockDiagonal(blocks))


def files(folder):
    return {file.name for file in folder.iterdir()}


def png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_a_module_really_drawn(curvature, tmp_path):
    from matplotlib.image import imread

    inspect_factors(curvature, tmp_path, Inspect(modules=(DOWN,)))
    for name in PICTURES:
        pixels = imread(tmp_path / DOWN / name)
        assert min(pixels.shape[:2]) >= 600 and pixels[..., :3].std() > 0.02, f"{name} is blank"


@pytest.mark.usefixtures("quick")
def test_a_layer_has_a_folder_per_module(curvature, tmp_path):
    written = inspect_factors(curvature, tmp_path / "seen", Inspect(layer=1))
    folders = {file.name for file in (tmp_path / "seen").iterdir() if file.is_dir()}
    assert folders == {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    for folder in folders:
        assert files(tmp_path / "seen" / folder) == PICTURES | {"summary.md", "summary.txt"}
        assert all(png(tmp_path / "seen" / folder / name) for name in PICTURES)
    assert len(written) == len(set(written)) == 3 + 3 * 7 and all(file.exists() for file in written)
    page = (tmp_path / "seen" / "index.html").read_text()
    shown = re.findall(r'<img src="([^"]+)"', page)
    assert len(shown) == 3 * 5 and all((tmp_path / "seen" / unquote(name)).is_file() for name in shown)
    assert page.count("<tr>") == 1 + len(curvature.blocks) and all(f'href="#{name}"' in page for name in folders)
    assert "script" not in page and "http" not in page.replace("http-equiv", "")


@pytest.mark.usefixtures("quick")
def test_the_health_of_all_modules_whichever_are_drawn(curvature, tmp_path):
    inspect_factors(curvature, tmp_path, Inspect(modules=(DOWN,)), damping=0.5)
    made = json.loads((tmp_path / "health.json").read_text())
    assert made["damping"] == 0.5 and [entry["module"] for entry in made["modules"]] == list(curvature.blocks)
    for entry, found in zip(made["modules"], health(curvature, 0.5), strict=True):
        assert entry["effective_rank"] == found.effective_rank and entry["inputs"]["samples"] == found.inputs.samples
        assert 0 < entry["relative_rank"] < 1 and entry["sound"] and not entry["not_finite"]
    table = (tmp_path / "health.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| model.")]
    assert len(rows) == len(curvature.blocks) and "All numbers are finite" in table and "0.5 times" in table
    assert len({row.count("|") for row in table.splitlines() if row.startswith("|")}) == 1
    assert f"{health(curvature, 0.5)[0].effective_rank:,.1f}" in rows[0]


@pytest.mark.usefixtures("quick")
def test_the_summary_says_what_was_measured(curvature, tmp_path):
    inspect_factors(curvature, tmp_path, Inspect(modules=(DOWN,)))
    (found,) = [entry for entry in health(curvature) if entry.module == DOWN]
    for name in ("summary.md", "summary.txt"):
        text = (tmp_path / DOWN / name).read_text()
        for said in (
            f"{found.effective_rank:,.1f} of 80 ({found.relative_rank:.1%})",
            "90% of the sum",
            "99% of the sum",
            "10 rows",
            f"{found.inputs.samples:,} positions ({found.inputs.samples / 10:.1f} per column)",
            "none negative",
            *(name for name in PICTURES),
        ):
            assert said in text, (said, text)
    gate = "model.layers.1.mlp.up_proj"
    inspect_factors(curvature, tmp_path / "up", Inspect(modules=(gate,)))
    assert f"that of {curvature.sides[gate].group}" in (tmp_path / "up" / gate / "summary.md").read_text()


@pytest.mark.usefixtures("quick")
def test_too_small_a_sample_is_said(tmp_path):
    curvature = fitted(examples=1)
    inspect_factors(curvature, tmp_path, Inspect(modules=(DOWN,)))
    positions = curvature.sides[DOWN].in_count
    assert positions < 10
    expected = f"fewer positions ({positions}) than columns (10): rank-deficient input covariance"
    assert expected in (tmp_path / DOWN / "summary.md").read_text() and expected in (tmp_path / "health.md").read_text()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("method", "said"), [("diagonal", "none with this method"), ("ekfac", "not kept")])
def test_without_sides_there_is_no_picture_of_them(tmp_path, method, said):
    curvature = replace(fitted(method), sides={})
    inspect_factors(curvature, tmp_path, Inspect(modules=(DOWN,)))
    assert files(tmp_path / DOWN) == PICTURES - {"sides.png"} | {"summary.md", "summary.txt"}
    assert said in (tmp_path / DOWN / "summary.md").read_text() and said in (tmp_path / "health.md").read_text()
    assert "sides.png" not in (tmp_path / DOWN / "summary.md").read_text()


@pytest.mark.usefixtures("quick")
def test_what_is_not_finite_is_flagged_and_never_drawn(curvature, tmp_path):
    lam = curvature.blocks[DOWN].lam_OI.clone()
    lam[2, 3] = math.nan
    broken = changed(curvature, DOWN, lam)
    for _ in range(2):  # nor is it taken for finished
        with pytest.raises(NumericalError, match=r"eigenvalues of .*down_proj are not finite[\s\S]*1 of 6 modules"):
            inspect_factors(broken, tmp_path, Inspect(layer=1))
    assert files(tmp_path / DOWN) == {"summary.md", "summary.txt"}
    assert "1 NaN or infinite" in (tmp_path / DOWN / "summary.md").read_text()
    assert png(tmp_path / "model.layers.1.mlp.up_proj" / "lambda.png"), "sound modules are drawn"
    assert "1 of 6 modules can't be used" in (tmp_path / "health.md").read_text()
    made = {entry["module"]: entry for entry in json.loads((tmp_path / "health.json").read_text())["modules"]}
    assert made[DOWN]["mean"] is None and made[DOWN]["not_finite"] == 1 and not made[DOWN]["sound"]


@pytest.mark.usefixtures("quick")
def test_negative_eigenvalues_are_counted_and_drawn(curvature, tmp_path):
    lam = curvature.blocks[DOWN].lam_OI.clone()
    lam[0, 0] = -lam.mean() / 100
    inspect_factors(changed(curvature, DOWN, lam), tmp_path, Inspect(modules=(DOWN,)))
    assert "1 eigenvalues are negative" in (tmp_path / DOWN / "summary.md").read_text()
    assert files(tmp_path / DOWN) > PICTURES and "1 of 6 modules can't be used" in (tmp_path / "health.md").read_text()


@pytest.mark.usefixtures("quick")
def test_the_same_again_draws_nothing_and_anything_else_is_refused(curvature, tmp_path, notes):
    first = inspect_factors(curvature, tmp_path / "seen", Inspect(layer=1))
    before = {file: file.stat().st_mtime_ns for file in first}
    again = inspect_factors(curvature, tmp_path / "seen", Inspect(layer=1))
    assert set(again) == set(first) and {file: file.stat().st_mtime_ns for file in again} == before
    assert "nothing to draw" in notes[-1]
    with pytest.raises(StaleArtifact, match=r"settings.layer 1 -> 0"):
        inspect_factors(curvature, tmp_path / "seen", Inspect(layer=0))
    other = changed(curvature, DOWN, curvature.blocks[DOWN].lam_OI * 2)
    with pytest.raises(StaleArtifact, match=r"factors "):
        inspect_factors(other, tmp_path / "seen", Inspect(layer=1))
    inspect_factors(curvature, tmp_path / "seen", Inspect(layer=0), rerun=True)
    assert (tmp_path / "seen.1" / DOWN / "lambda.png").exists() and not (tmp_path / "seen" / DOWN).exists()


class Stopping(Silent):
    """Presses Ctrl-C after the first module."""

    def advance(self, stage):
        raise KeyboardInterrupt


@pytest.mark.usefixtures("quick")
def test_an_interrupted_inspection_goes_on(curvature, tmp_path):
    with pytest.raises(KeyboardInterrupt), report_to(Stopping()):
        inspect_factors(curvature, tmp_path, Inspect(layer=1))
    (drawn,) = tmp_path.glob("*/lambda.png")
    before = drawn.stat().st_mtime_ns
    inspect_factors(curvature, tmp_path, Inspect(layer=1))
    assert drawn.stat().st_mtime_ns == before and len(list(tmp_path.glob("*/lambda.png"))) == 3
    inspect_factors(curvature, tmp_path, Inspect(layer=1))


def test_settings_reach_the_drawing(curvature, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("whence.report.factors.save", lambda drawing, path: drawn.append(drawing) or path)
    (found,) = [entry for entry in health(curvature) if entry.module == DOWN]
    for settings in (Inspect(), Inspect(cmap="magma"), Inspect(clip_percentile=80)):
        inspect_module(curvature, found, tmp_path, settings)
    plain, magma, clipped = (drawing.axes[0].images[0] for drawing in drawn[::5])
    assert (plain.cmap.name, magma.cmap.name, clipped.cmap.name) == ("viridis", "magma", "viridis")
    assert plain.norm.vmax == magma.norm.vmax > clipped.norm.vmax > clipped.norm.vmin > plain.norm.vmin


def test_unknown_colours_are_refused_before_anything_is_written(curvature, tmp_path):
    with pytest.raises(UsageError, match="no colormap 'virdis'"):
        inspect_factors(curvature, tmp_path / "seen", Inspect(cmap="virdis"))
    assert not (tmp_path / "seen").exists()


@pytest.mark.usefixtures("quick")
def test_factors_in_float64_or_on_the_way_to_it(tmp_path):
    curvature = fitted(largest_factor=4)
    block = curvature.blocks[DOWN]
    assert block.lam_OI.dtype == torch.float64
    assert DOWN in str(inspect_factors(curvature, tmp_path, Inspect(modules=("*.down_proj",)))[-1])
