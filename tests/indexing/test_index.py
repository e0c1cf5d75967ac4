"""Indices: what a search finds, that storage costs only rounding, kills, and what is refused."""

import numpy as np
import pytest
import torch
from distributed.processes import killed
from models import CASES, HUGE, Routed, named, overflowing, randomised, small_memory

import whence
from benchmarks.flips import flip
from whence.errors import NumericalError, OutOfMemory, StaleArtifact, UsageError
from whence.fitting import fit
from whence.indexing.rows import compress, expand
from whence.operators import BlockDiagonal, EigenBlock
from whence.precision import are_short
from whence.store import fingerprint
from whence.store.intact import file_digest
from whence.tasks import CausalLM, Classification

WHOLE = 64
"""A dimension that no side of the test models exceeds: nothing is lost."""


def built(case, **settings):
    return whence.build_index(case.model(), case.task(), case.train(), modules=case.modules, **settings)


def diagonal(index, number=1.0):
    """The operator that multiplies gradients with a number: by default it leaves them as they are."""
    shapes = index.about["modules"]
    return BlockDiagonal(
        {n: EigenBlock(None, None, torch.full(tuple(shape), number)) for n, shape in shapes.items()}, "diagonal"
    )


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


cases = pytest.mark.parametrize(
    "case", named("llama", "llama-tied", "neox", "conv", "norms", "repeated"), ids=lambda case: case.name
)


@cases
def test_without_loss_of_dimensions_a_search_gives_the_gradient_dot_product(case):
    index = built(case, dim=WHOLE, kept="float32")
    found = index.search(case.model(), case.task(), case.queries())
    expected = whence.score(case.model(), case.task(), case.queries(), case.train(), diagonal(index))
    close(found.raw, expected.raw, 1e-5)
    assert found.n_train == expected.n_train and found.unit == expected.unit
    assert found.query_ids == expected.query_ids and found.example_ids == expected.example_ids
    np.testing.assert_allclose(found.queries["measured"], expected.queries["measured"])


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("case", named("llama", "conv", "norms"), ids=lambda case: case.name)
def test_without_loss_of_dimensions_a_search_with_an_operator_gives_influence(case, based):
    curvature = fit(case.model(), case.task(), case.train(), modules=case.modules)
    operator = curvature.inverse(damping=0.3)
    index = built(case, dim=WHOLE, kept="float32", curvature=curvature if based else None)
    found = index.search(case.model(), case.task(), case.queries(), operator)
    expected = whence.score(case.model(), case.task(), case.queries(), case.train(), operator)
    close(found.raw, expected.raw, 1e-4)
    assert found.about["operator"] == operator.label


@pytest.mark.parametrize("kept", ["float16", "int8"])
@cases
def test_fewer_bits_cost_only_rounding(case, kept):
    rounded, whole = (built(case, dim=4, kept=format) for format in (kept, "float32"))
    like = torch.empty(0, dtype=torch.float64)
    for (indices, found, norm), (_, expected, _) in zip(rounded.blocks(like), whole.blocks(like), strict=True):
        assert len(indices) == len(found) and norm.dtype == torch.float32
        widths = [min(4, n_out) * min(4, n_in) for n_out, n_in in whole.about["modules"].values()]
        for part, exact in zip(found.split(widths, 1), expected.split(widths, 1), strict=True):
            step = exact.abs().amax(1, keepdim=True) / 127 if kept == "int8" else 2.0**-10 * exact.abs() + 1e-12
            assert ((part - exact).abs() <= 0.501 * step).all()
    asked = (case.model(), case.task(), case.queries())
    found, expected = rounded.search(*asked), whole.search(*asked)
    norms = np.outer(expected.queries["norm"], expected.norms["gradient"])
    assert (np.abs(found.raw - expected.raw) <= {"float16": 2.0**-11, "int8": 0.02}[kept] * norms).all()


@pytest.mark.parametrize("size", [1e-20, 1e-5, 1.0, 1e5, 1e15])
def test_rows_of_any_size_are_kept(size):
    rows = size * torch.randn(6, 50, dtype=torch.float64) * torch.logspace(-6, 0, 50, dtype=torch.float64)
    rows[3] = 0
    kept = compress(rows, "float16", [20, 30])
    assert kept["codes"].dtype == torch.float16
    torch.testing.assert_close(expand(kept["codes"], kept["scale"], [20, 30], rows), rows, rtol=2.0**-11, atol=0)
    torch.testing.assert_close(kept["norm"].double(), rows.norm(dim=1), rtol=1e-6, atol=0)
    kept = compress(rows, "int8", [20, 30])
    found = expand(kept["codes"], kept["scale"], [20, 30], rows)
    for place in (slice(0, 20), slice(20, 50)):
        step = rows[:, place].abs().amax(1, keepdim=True) / 127
        assert ((found - rows)[:, place].abs() <= 0.501 * step).all()


def test_fewer_bytes(tmp_path):
    case = CASES["llama"]
    shards = {}
    for kept in ("int8", "float16", "float32"):
        built(case, dim=4, kept=kept, out=tmp_path / kept, chunks=1)
        shards[kept] = (tmp_path / kept / "rows-0000.safetensors").stat().st_size
    numbers = case.rows * 14 * 4 * 4
    assert shards["float32"] - shards["float16"] == pytest.approx(2 * numbers, abs=16)
    scales = case.rows * 13 * 4
    assert shards["float16"] - shards["int8"] == pytest.approx(numbers - scales, abs=16)


def test_a_planted_duplicate_is_found_first():
    case = CASES["llama"]
    train = case.train(40)
    rows = [*train[:20], *[{"prompt": "w1 w2", "completion": " w3 w4 w5"}], *train[20:]]
    index = whence.build_index(case.model(), case.task(), rows, modules="all", dim=8)
    found = index.search(case.model(), case.task(), [rows[20]]).normalised("cosine")
    assert found.top(0, 1)["text"].item() == "w1 w2 w3 w4 w5"
    assert found.raw[0, 20] == pytest.approx(1, abs=1e-3)
    assert np.sort(found.raw[0])[-2] < 0.9


def test_a_contrast_is_a_difference():
    case = CASES["llama"]
    index = built(case, dim=4)
    ask = {"prompt": "w1 w2 w3", "completion": " w4 w5", "contrast": " w6"}
    sides = [{"prompt": "w1 w2 w3", "completion": ask[key]} for key in ("completion", "contrast")]
    asked = index.search(case.model(), case.task(), [ask, *sides])
    close(asked.raw[0], asked.raw[1] - asked.raw[2], 1e-5)
    assert asked.queries["measured"][0] == pytest.approx(asked.queries["measured"][1] - asked.queries["measured"][2])


def test_the_seed_decides():
    case = CASES["llama"]
    rows = [next(built(case, dim=2, seed=seed).blocks(torch.empty(0)))[1] for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_batches_change_only_rounding():
    case = CASES["llama"]
    asked = (case.model(), case.task(), case.queries())
    one, many = built(case, dim=4, batch_tokens=1), built(case, dim=4)
    close(one.search(*asked).raw, many.search(*asked, batch_tokens=1).raw, 1e-3)


def test_a_batch_that_does_not_fit_is_halved(notes):
    case = CASES["llama"]
    task = small_memory(case.task(), 24)
    index = whence.build_index(case.model(), task, case.train(), modules="all", dim=4)
    assert any("halved" in note for note in notes)
    close(
        index.search(case.model(), case.task(), case.queries()).raw,
        built(case, dim=4).search(case.model(), case.task(), case.queries()).raw,
        1e-3,
    )
    with pytest.raises(OutOfMemory):
        whence.build_index(case.model(), small_memory(case.task(), 2), case.train(), modules="all")


def test_examples_without_loss_score_zero():
    case = CASES["llama"]
    train = [*case.train(4), {"text": "w1"}]
    index = whence.build_index(case.model(), case.task(), train, modules="all", dim=4)
    found = index.search(case.model(), case.task(), case.queries())
    assert found.n_train == 4 and len(index) == 5
    assert (found.raw[:, 4] == 0).all() and (found.raw[:, :4] != 0).all()


def test_a_module_that_a_batch_does_not_reach_leaves_zeros():
    model = randomised(Routed().double())
    x = torch.randn(6, 5, dtype=torch.float64)
    x[:3, 0], x[3:, 0] = 1, -1
    data = [(row, number % 4) for number, row in enumerate(x)]
    settings = {"modules": "all", "dim": WHOLE, "kept": "float32"}
    found = [whence.build_index(model, Classification(), data, batch_tokens=size, **settings) for size in (1, 6)]
    raws = [index.search(model, Classification(), data).raw for index in found]
    close(raws[0], raws[1], 1e-5)


def test_a_gradient_that_is_not_finite_is_named():
    case = CASES["mlp"]
    with pytest.raises(NumericalError, match="row 2"):
        whence.build_index(overflowing(), case.task(), [*case.train(2), HUGE, *case.train(3)], modules="0", dim=4)


def test_what_is_refused(tmp_path):
    case = CASES["llama"]
    with pytest.raises(UsageError, match="dim can't be 0"):
        built(case, dim=0)
    index = built(case, dim=2, out=tmp_path / "index")
    curvature = fit(case.model(), case.task(), case.train(), modules="mlp")
    with pytest.raises(UsageError, match="does not act on all modules"):
        index.search(case.model(), case.task(), case.queries(), curvature.inverse())
    with pytest.raises(UsageError, match="not fitted on all modules"):
        built(case, curvature=curvature)
    with pytest.raises(UsageError, match="no queries"):
        index.search(case.model(), case.task(), [])
    other = randomised(case.model(), scale=0.3)
    with pytest.raises(StaleArtifact, match="another model"):
        index.search(other, case.task(), case.queries())
    for changed in ({"dim": 3}, {"seed": 1}, {"kept": "float32"}, {"chunks": 3}):
        with pytest.raises(StaleArtifact, match=next(iter(changed))):
            built(case, **{"dim": 2, "out": tmp_path / "index", **changed})
    with pytest.raises(StaleArtifact, match="model"):
        whence.build_index(other, case.task(), case.train(), modules=case.modules, dim=2, out=tmp_path / "index")
    with pytest.raises(StaleArtifact, match="data"):
        whence.build_index(case.model(), case.task(), case.train(4), modules=case.modules, dim=2, out=tmp_path / "index")
    with pytest.raises(StaleArtifact, match="task"):
        whence.build_index(
            case.model(), CausalLM(case.task().tokenizer, 5), case.train(), modules=case.modules, dim=2, out=tmp_path / "index"
        )


@pytest.mark.parametrize("based", [True, False])
def test_a_folder_holds_everything(tmp_path, based):
    case = CASES["llama"]
    curvature = fit(case.model(), case.task(), case.train(), modules=case.modules) if based else None
    index = built(case, dim=4, out=tmp_path / "index", curvature=curvature)
    in_memory = built(case, dim=4, curvature=curvature)
    opened = whence.open_index(tmp_path / "index")
    asked = (case.model(), case.task(), case.queries())
    results = [each.search(*asked) for each in (index, opened, in_memory)]
    assert np.array_equal(results[0].raw, results[1].raw)
    close(results[2].raw, results[0].raw, 1e-3)  # other batches
    assert results[1].top(0, 3)["text"].tolist() == results[0].top(0, 3)["text"].tolist()
    assert "dim=4" in repr(opened)


def test_a_model_is_hashed_once_and_again_where_it_has_changed(tmp_path, monkeypatch):
    case, hashed = CASES["llama"], []
    digest = fingerprint._digest_tensor
    built(case, dim=4, out=tmp_path / "index")
    monkeypatch.setattr(fingerprint, "_digest_tensor", lambda *given: hashed.append(given[0]) or digest(*given))
    index, model, task = whence.open_index(tmp_path / "index"), case.model(), case.task()
    first = index.search(model, task, case.queries())
    assert hashed
    hashed.clear()
    assert np.array_equal(index.search(model, task, case.queries()).raw, first.raw) and not hashed
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(StaleArtifact, match="another model"):
        index.search(model, task, case.queries())
    assert hashed


def cut_up(out):
    """An index in four chunks."""
    return built(CASES["llama"], out=out, dim=4, chunks=4, batch_tokens=20)


def test_a_killed_build_goes_on_to_the_same_bits(tmp_path):
    killed("index", 3, cut_up, tmp_path / "killed")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("rows-*")}
    assert 0 < len(before) < 4
    for name in ("killed", "whole"):
        cut_up(tmp_path / name)
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == time for name, time in before.items())
    shards = sorted(file.name for file in (tmp_path / "whole").glob("*.safetensors"))
    assert len(shards) == 4
    for name in shards:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_products_are_taken_as_the_precision_says(tmp_path, monkeypatch):
    case, seen = CASES["llama"], []
    task = case.task()
    losses = task.losses
    monkeypatch.setattr(task, "losses", lambda *given: seen.append(are_short()) or losses(*given))
    found = []
    for products in ("bfloat16", "float32"):
        settings = {"modules": "all", "dim": 4, "chunks": 1, "check": False, "precision": whence.Precision(products=products)}
        found.append(whence.build_index(case.model().float(), task, case.train(), out=tmp_path / products, **settings))
    assert seen == [True, False] and not are_short()
    assert [index.about["products"] for index in found] == ["bfloat16", "float32"]


@pytest.mark.parametrize("name", ["rows-0000.safetensors", "query-projection.safetensors", "examples.parquet", "manifest.json"])
def test_an_index_with_a_flipped_bit_is_not_searched(tmp_path, name):
    case = CASES["llama"]
    curvature = fit(case.model(), case.task(), case.train(), modules=case.modules)
    built(case, dim=4, out=tmp_path / "index", curvature=curvature)
    asked = (case.model(), case.task(), case.queries())
    before = whence.open_index(tmp_path / "index").search(*asked)
    file = tmp_path / "index" / name
    for bit in (8 * file.stat().st_size // 2, 8 * file.stat().st_size - 99):
        flip(file, bit)
        with pytest.raises(StaleArtifact, match=name):
            whence.open_index(tmp_path / "index").search(*asked)
        with pytest.raises(StaleArtifact, match=name):
            built(case, dim=4, out=tmp_path / "index", curvature=curvature)
        flip(file, bit)
    assert np.array_equal(whence.open_index(tmp_path / "index").search(*asked).raw, before.raw)


def test_rows_of_an_index_are_verified_when_they_are_opened_and_not_at_every_search(tmp_path, monkeypatch):
    case, hashed = CASES["llama"], []
    built(case, dim=4, out=tmp_path / "index")
    monkeypatch.setattr("whence.store.intact.file_digest", lambda path: hashed.append(path.name) or file_digest(path))
    index = whence.open_index(tmp_path / "index")
    for _ in range(3):
        index.search(case.model(), case.task(), case.queries())
    rows = [f"rows-{number:04d}.safetensors" for number in range(index.about["chunks"])]
    assert sorted(hashed) == ["config.json", "examples.parquet", *rows]


def test_a_killed_build_with_a_flipped_bit_does_not_go_on(tmp_path):
    killed("index", 3, cut_up, tmp_path / "index")
    shard = tmp_path / "index" / "rows-0000.safetensors"
    flip(shard, 8 * shard.stat().st_size - 99)
    with pytest.raises(StaleArtifact, match="rows-0000.safetensors is damaged") as raised:
        cut_up(tmp_path / "index")
    assert raised.value.fix.startswith(f"rm {shard}, ")
    shard.unlink()
    cut_up(tmp_path / "index")
    cut_up(tmp_path / "whole")
    assert shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()


def test_a_query_whose_gradient_is_not_finite_is_refused():
    case = CASES["llama"]
    index = built(case, dim=4)
    with pytest.raises(NumericalError, match="A query's gradient is not finite"):
        index.search(case.model(), case.task(), case.queries(), diagonal(index, torch.inf))
