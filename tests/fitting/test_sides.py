"""The eigenvalues of both covariances are kept with the factors, in the order of the basis."""

import json

import pytest
import torch
from models import CASES, named
from oracle import _by_example, _by_position, agree, traced

from whence.fitting import fit, open_factors
from whence.store.manifest import Folder


@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo"])
@pytest.mark.parametrize("case", named("llama", "mlp", "norms"), ids=lambda case: case.name)
def test_they_are_those_of_the_covariances_by_definition(case, method):
    curvature = fit(case.model(), case.task(), case.train(), method=method, modules=case.modules, labels="data")
    examples = traced(case, "data", "")
    assert set(curvature.sides) == set(curvature.blocks)
    for name, sides in curvature.sides.items():
        by_example = method == "shampoo" or examples[0][name].g_RO is None
        out, into, _ = (_by_example if by_example else _by_position)(name, examples)
        agree(sides.out_O, torch.linalg.eigvalsh(out).clamp(min=0), 1e-7)
        agree(sides.in_I, torch.linalg.eigvalsh(into).clamp(min=0), 1e-7)
        assert sides.by_example == by_example and (sides.out_count == len(examples)) == (by_example or case.name == "mlp")


def test_they_belong_to_the_directions_of_the_basis():
    case = CASES["llama"]
    curvature = fit(case.model(), case.task(), case.train(), modules="all", labels="data", largest_factor=4)
    examples = traced(case, "data", "")
    for name, block in curvature.blocks.items():
        out, into, _ = _by_position(name, examples)
        for values, basis, matrix in (
            (curvature.sides[name].out_O, block.q_O, out),
            (curvature.sides[name].in_I, block.q_I, into),
        ):
            start = 0
            for q in basis.blocks:  # of a split covariance: sorted within each of its blocks
                width = len(q)
                inside = matrix[start : start + width, start : start + width]
                agree((q.T @ inside @ q).diagonal(), values[start : start + width], 1e-7)
                start += width


def test_counts_are_the_positions_in_the_loss():
    case = CASES["llama"]
    curvature = fit(case.model(), case.task(), case.train(), modules="all", labels="data")
    examples = traced(case, "data", "")
    last = "model.layers.1.mlp.down_proj"
    positions = sum(int(example[last].active_R.sum()) for example in examples)
    assert curvature.sides[last].out_count == curvature.sides[last].in_count == positions > len(examples)


def test_modules_with_one_input_share_its_eigenvalues():
    case = CASES["llama"]
    sides = fit(case.model(), case.task(), case.train(), modules="all").sides
    gate, up, down = (sides[f"model.layers.0.mlp.{part}_proj"] for part in ("gate", "up", "down"))
    assert gate.in_I is up.in_I and gate.group == up.group != down.group
    assert gate.in_I is not down.in_I and not torch.equal(gate.out_O, up.out_O)


@pytest.mark.parametrize("method", ["identity", "diagonal"])
def test_methods_without_covariances_have_none(method):
    case = CASES["mlp"]
    assert fit(case.model(), case.task(), case.train(), method=method).sides == {}


@pytest.mark.parametrize("groups", [1, 3])
def test_a_folder_keeps_them(tmp_path, groups):
    case = CASES["llama"]
    made = fit(case.model(), case.task(), case.train(), modules="all", out=tmp_path / "factors", groups=groups)
    opened = open_factors(tmp_path / "factors")
    assert set(opened.sides) == set(made.sides) == set(made.blocks)
    for name, sides in made.sides.items():
        assert torch.equal(opened.sides[name].out_O, sides.out_O) and torch.equal(opened.sides[name].in_I, sides.in_I)
        assert opened.sides[name].out_count == sides.out_count


def without_sides(path):
    """What a folder is that kept no eigenvalues of covariances."""
    folder = Folder.open(path)
    for name in folder.shards():
        if name.startswith("basis-"):
            folder.save(name, {key: tensor for key, tensor in folder.load(name).items() if "_values/" not in key})
    manifest = {key: value for key, value in folder.manifest.items() if key != "digests"}  # nor digests of its files
    manifest["files"] = {name: (path / name).stat().st_size for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_a_folder_without_them_opens_as_before(tmp_path):
    case = CASES["mlp"]
    made = fit(case.model(), case.task(), case.train(), out=tmp_path / "factors")
    opened = open_factors(without_sides(tmp_path / "factors"))
    assert opened.sides == {} and set(opened.blocks) == set(made.blocks)
    for name, block in made.blocks.items():
        assert torch.equal(opened.blocks[name].lam_OI, block.lam_OI)
        assert torch.equal(opened.blocks[name].q_I.dense(), block.q_I.dense())
