"""Fitted curvature against dense matrices made by definition: every tiny model, every method, both kinds of labels."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import CASES, HUGE, named, overflowing, small_memory
from oracle import agree, likelihoods, matrices_of, traced, traces
from oracle import curvature as oracle_curvature

from whence.engine.stream import encode
from whence.errors import CoverageError, NumericalError, OutOfMemory, UsageError
from whence.fitting import METHODS, fit
from whence.precision import Precision
from whence.progress import Silent, report_to
from whence.settings import Fit
from whence.store.manifest import Folder
from whence.tasks import Classification

fitting = importlib.import_module("whence.fitting.fit")


def passes(case, labels):
    """What the two passes see: with drawn labels not the same."""
    return [traced(case, labels, purpose if labels == "model" else "") for purpose in ("covariance", "eigenvalues")]


def dense(case, method, labels, largest=None):
    return oracle_curvature(method, *passes(case, labels), largest)


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_operator_is_the_dense_matrix(case, method, labels):
    curvature = fit(case.model(), case.task(), case.train(), method=method, modules=case.modules, labels=labels)
    expected = dense(case, method, labels)
    found = matrices_of(curvature)
    assert set(found) == set(expected)
    for name in expected:
        agree(found[name], expected[name], case.tolerance)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo"])
@pytest.mark.parametrize("case", named("llama", "mlp", "attention", "llama-embedding"), ids=lambda case: case.name)
def test_wide_factors_are_split_into_diagonal_blocks(case, method):
    curvature = fit(case.model(), case.task(), case.train(), method=method, modules=case.modules, largest_factor=4)
    for name, expected in dense(case, method, "model", largest=4).items():
        agree(matrices_of(curvature)[name], expected, case.tolerance)


@pytest.mark.parametrize("method", ["ekfac", "shampoo"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama", "conv", "repeated"])
def test_fewer_positions_than_columns(name, rows, method):
    """Directions that no position had are alike, whichever rounding chose: batches and formats don't move what is fitted."""
    case = replace(CASES[name], rows=rows)
    given = {"method": method, "modules": case.modules}
    found = matrices_of(fit(case.model(), case.task(), case.train(), **given))
    for each, expected in dense(case, method, "model").items():
        agree(found[each], expected, 1e-7)
    for each, again in matrices_of(fit(case.model(), case.task(), case.train(), batch_tokens=1, **given)).items():
        agree(again, found[each], 1e-9)
    if case.text:
        for each, short in matrices_of(fit(case.model().float(), case.task(), case.train(), **given)).items():
            # float32 hardly tells eigenvalues near 1e-6 of the largest apart, as two rows of shampoo's have them
            agree(short, found[each], 1e-2 if method == "shampoo" else 1e-3)


def test_another_seed_draws_other_labels():
    case = CASES["mlp"]
    curvature = fit(case.model(), case.task(), case.train(), method="diagonal", modules="all", seed=5)
    expected = traced(case, "model", "eigenvalues", seed=5)
    for name, block in curvature.blocks.items():
        agree(block.lam_OI, torch.stack([example[name].w_OI.square() for example in expected]).mean(0))


@pytest.mark.parametrize("method", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("case", named("llama", "mlp"), ids=lambda case: case.name)
def test_more_draws_are_the_mean_over_labels(case, method):
    curvature = fit(case.model(), case.task(), case.train(), method=method, modules=case.modules, draws=3)
    task = case.task()
    examples = encode(task, case.train())
    ids = [f"{name}{again}" for again in ("", "@2", "@3") for name in examples.ids]
    names = list(curvature.about["modules"])
    both = [
        traces(case.model(), names, likelihoods(task, [*examples.items] * 3, ids, "model", purpose))
        for purpose in ("covariance", "eigenvalues")
    ]
    for name, expected in oracle_curvature(method, *both).items():
        agree(matrices_of(curvature)[name], expected, case.tolerance)
    assert curvature.about["draws"] == 3 and curvature.about["examples"] == len(examples)


def test_the_datas_own_labels_are_drawn_once():
    case = CASES["mlp"]
    for settings in ({"draws": 2, "labels": "data"}, {"draws": 0}):
        with pytest.raises(UsageError, match="draws"):
            fit(case.model(), case.task(), case.train(), modules="all", **settings)


class Recording(Classification):
    """Remembers which inputs it saw, in order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def collate(self, items):
        self.seen += [item[0] for item in items]
        return super().collate(items)


def test_disjoint_samples():
    case, task = CASES["mlp"], Recording()
    train = case.train(60)
    curvature = fit(case.model(), task, train, modules="all", labels="data", disjoint=True, examples=40, check=False)
    passes = task.seen[-60:]  # before them the task looks at what the model gives for a row
    where = [next(n for n, row in enumerate(train) if row[0] is seen) for seen in passes]
    first, second = where[:40], where[40:]
    assert sorted(first + second) == list(range(60))
    assert curvature.about["examples"] == 40 and curvature.about["eigenvalue_examples"] == 20

    found = traces(case.model(), ["0", "2", "4"], likelihoods(task, train, [""] * 60, "data", ""))
    expected = oracle_curvature("ekfac", [found[n] for n in first], [found[n] for n in second])
    for name in expected:
        agree(matrices_of(curvature)[name], expected[name])


def test_samples_are_large_enough_and_apart_where_there_is_enough_data(monkeypatch):
    case = CASES["mlp"]
    examples = encode(case.task(), case.train(60))
    monkeypatch.setattr(fitting, "ENOUGH_ROWS", 6)
    monkeypatch.setattr(fitting, "ENOUGH_POSITIONS", 10)
    for widest, enough in ((1, 10), (20, 20), (100, 60)):  # a position each; one per column of the widest
        monkeypatch.setattr(fitting, "ENOUGH_PER_COLUMN", 1)
        first, second = fitting.draw_samples(examples, Fit(), widest)
        assert len(first) == len(second) == enough
        assert set(first).isdisjoint(second) == (2 * enough <= 60)
    everything = fitting.draw_samples(examples, Fit(examples="all"), 1)
    assert everything == (list(range(60)), list(range(60)))
    apart = fitting.draw_samples(examples, Fit(disjoint=True), 100)
    assert [len(part) for part in apart] == [30, 30] and set(apart[0]).isdisjoint(apart[1])


def test_a_sample_grows_until_scores_stop_moving(tmp_path, notes, monkeypatch):
    monkeypatch.setattr(fitting, "SMALLEST", 3)
    case = CASES["llama"]
    train = case.train(40)
    asked = {"modules": "all", "labels": "data", "seed": 3}
    grown = fit(case.model(), case.task(), train, until=0.9, out=tmp_path / "factors", **asked)
    history = {int(size): value for size, value in grown.about["correlation"].items()}
    *tried, last = history
    assert last == grown.about["examples"] and all(history[size] < 0.9 for size in tried)
    assert history[last] >= 0.9 or last == 40
    assert any(f"{last} examples: scores of" in text for text in notes)
    plain = fit(case.model(), case.task(), train, examples=last, out=tmp_path / "plain", **asked)
    for name, block in plain.blocks.items():
        assert torch.equal(block.lam_OI, grown.blocks[name].lam_OI)
    assert not list((tmp_path / "factors").glob("sample-*")), "the smaller samples' factors are still there"
    again = fit(case.model(), case.task(), train, until=0.9, out=tmp_path / "factors", **asked)
    assert again.about == grown.about
    everything = fit(case.model(), case.task(), train, until=1.0, **asked)
    assert everything.about["examples"] == 40


@pytest.mark.parametrize("killed_in", ["covariance", "eigenvalues"])
def test_a_killed_search_for_the_sample_goes_on(tmp_path, monkeypatch, killed_in):
    monkeypatch.setattr(fitting, "SMALLEST", 3)
    case = CASES["llama"]
    asked = {"modules": "all", "until": 1.0, "chunks": 2, "save_every": 0.0}
    whole = fit(case.model(), case.task(), case.train(20), out=tmp_path / "whole", **asked)

    class Stopping(Silent):
        left = 5

        def advance(self, stage):
            self.left -= stage.name == killed_in
            if not self.left:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), report_to(Stopping()):
        fit(case.model(), case.task(), case.train(20), out=tmp_path / "again", **asked)
    assert (tmp_path / "again" / "probe-3.safetensors").exists()
    again = fit(case.model(), case.task(), case.train(20), out=tmp_path / "again", **asked)
    assert again.about == whole.about
    for name, block in whole.blocks.items():
        assert torch.equal(block.lam_OI, again.blocks[name].lam_OI)


@pytest.mark.parametrize("killed_in", ["promote", "discard", "finish"])
def test_a_search_that_was_killed_with_its_sample_found_goes_on(tmp_path, monkeypatch, killed_in):
    monkeypatch.setattr(fitting, "SMALLEST", 3)
    case = CASES["mlp"]
    given = {"modules": "all", "until": 1.0, "out": tmp_path / "factors"}
    replace, kept = Path.replace, []

    def stopping(*args):
        raise KeyboardInterrupt

    def moving(file, target):  # a few files, not all
        kept.extend([file] if "sample-" in str(file.parent) and not file.name.endswith(".tmp") else [])
        return stopping() if len(kept) == 3 else replace(file, target)

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "replace", moving) if killed_in == "promote" else (Folder, killed_in, stopping)))
        with pytest.raises(KeyboardInterrupt):
            fit(case.model(), case.task(), case.train(20), **given)
    again = fit(case.model(), case.task(), case.train(20), **given)
    whole = fit(case.model(), case.task(), case.train(20), **given | {"out": tmp_path / "whole"})
    assert not list((tmp_path / "factors").glob("sample-*"))
    for name, block in whole.blocks.items():
        assert torch.equal(block.lam_OI, again.blocks[name].lam_OI)


def test_chunks_that_were_not_saved_are_done_again_when_memory_runs_out(tmp_path):
    case = CASES["llama"]
    train = case.train(12)
    whole = fit(case.model(), case.task(), train, modules="all")
    parts = fit(
        case.model(),
        small_memory(case.task(), 8, after=3),
        train,
        modules="all",
        out=tmp_path / "factors",
        chunks=4,
        batch_tokens=16,
        save_every=1e9,
    )
    for name, expected in matrices_of(whole).items():
        agree(matrices_of(parts)[name], expected, 1e-10)


def test_disjoint_samples_need_two_parts():
    case = CASES["mlp"]
    with pytest.raises(UsageError, match="disjoint"):
        fit(case.model(), case.task(), case.train(), disjoint=True, examples=case.rows)


@pytest.mark.parametrize("groups", [2, 3, 5, 20])
def test_groups_of_modules_give_the_same_factors(groups):
    case = CASES["llama"]
    whole = fit(case.model(), case.task(), case.train(), modules="all")
    parts = fit(case.model(), case.task(), case.train(), modules="all", groups=groups)
    assert list(parts.blocks) == list(whole.blocks)
    for name, block in whole.blocks.items():
        assert torch.equal(parts.blocks[name].lam_OI, block.lam_OI)
        assert torch.equal(parts.blocks[name].q_I.dense(), block.q_I.dense())


@pytest.mark.parametrize("case", named("gpt2", "conv"), ids=lambda case: case.name)
def test_chunks_of_data_give_the_same_factors(case, tmp_path):
    whole = fit(case.model(), case.task(), case.train(), modules="all")
    parts = fit(case.model(), case.task(), case.train(), modules="all", out=tmp_path / "factors", chunks=4)
    for name, expected in matrices_of(whole).items():
        agree(matrices_of(parts)[name], expected, 1e-10)


@pytest.mark.parametrize("method", ["diagonal", "kfac", "ekfac"])
def test_low_precision_operands_stay_close(method):
    case = CASES["llama"]
    model = case.model().float()
    exact = fit(model, case.task(), case.train(), method=method, modules="all")
    rough = fit(model, case.task(), case.train(), method=method, modules="all", precision=Precision(statistics="bfloat16"))
    for name, expected in matrices_of(exact).items():
        assert rough.blocks[name].lam_OI.dtype == torch.float32
        error = (matrices_of(rough)[name] - expected).norm() / expected.norm()
        assert 0 < error < 0.02, (name, error)


def test_a_float64_model_is_never_lowered():
    case = CASES["mlp"]
    exact, lowered = (
        fit(case.model(), case.task(), case.train(), precision=Precision(statistics=format))
        for format in ("float32", "bfloat16")
    )
    for name, block in exact.blocks.items():
        assert torch.equal(block.lam_OI, lowered.blocks[name].lam_OI)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("kfac", "covariance of the output gradients of 0 is not finite"),
        ("ekfac", "covariance of the output gradients of 0 is not finite"),
        ("shampoo", "covariance of the output gradients of 0 is not finite"),
        ("diagonal", "gradients of 0 are not finite"),
    ],
)
def test_what_is_not_finite_is_named(method, message):
    with pytest.raises(NumericalError, match=f"{message}  .WHENCE-14"):
        fit(overflowing(), Classification(), [*CASES["mlp"].train(), HUGE], method=method, labels="data")


def test_a_row_without_a_finite_loss_is_named():
    broken = (torch.full((5,), torch.nan, dtype=torch.float64), 0)
    with pytest.raises(NumericalError, match=r"1 of 15 examples is not finite  .WHENCE-14.\s+given +row 14"):
        fit(CASES["mlp"].model(), Classification(), [*CASES["mlp"].train(), broken])


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(("name", "room"), [("llama", 8), ("mlp", 5)])
def test_batches_are_halved_until_they_fit(name, room, after):
    case = CASES[name]
    task = small_memory(case.task(), room, after)
    whole = fit(case.model(), case.task(), case.train(), modules="all")
    halved = fit(case.model(), task, case.train(), modules="all", batch_tokens=2 * room)
    for name, expected in matrices_of(whole).items():
        agree(matrices_of(halved)[name], expected, 1e-10)


@pytest.mark.parametrize("room", [3, 0])
def test_a_row_that_does_not_fit_is_an_error(room):
    case = CASES["llama"]
    with pytest.raises(OutOfMemory, match="WHENCE-10") as raised:
        fit(case.model(), small_memory(case.task(), room), case.train())
    assert raised.value.exit_code == 3 and "tried to allocate" in str(raised.value)


def test_another_error_of_the_task_is_not_taken_for_lack_of_memory():
    class Broken(Classification):
        def losses(self, model, batch, noise=None):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        fit(CASES["mlp"].model(), Broken(), CASES["mlp"].train())


def test_no_module_matches():
    with pytest.raises(CoverageError, match="WHENCE-17") as raised:
        fit(CASES["mlp"].model(), Classification(), CASES["mlp"].train(), modules="attention")
    assert "3 x Linear" in str(raised.value)


class Unused(torch.nn.Module):
    """Has a layer that the output does not depend on, called or not."""

    def __init__(self, called):
        super().__init__()
        self.used, self.unused, self.called = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4), called

    def forward(self, x):
        if self.called:
            self.unused(x)
        return self.used(x)


@pytest.mark.parametrize("called", [True, False])
def test_the_loss_does_not_depend_on_the_module(called):
    with pytest.raises(CoverageError, match="WHENCE-16"):
        fit(Unused(called).double(), Classification(), CASES["mlp"].train(), modules="unused")


@pytest.mark.parametrize("method", ["ekfac", "kfac", "diagonal", "shampoo"])
@pytest.mark.parametrize("called", [True, False])
def test_a_module_without_gradient_is_left_out(called, method):
    curvature = fit(Unused(called).double(), Classification(), CASES["mlp"].train(), method=method, modules="all")
    assert set(curvature.blocks) == {"used"}
    assert curvature.about["without_gradient"] == ["unused"]


def test_an_unknown_method_is_refused():
    with pytest.raises(UsageError, match="accepted .*ekfac"):
        fit(CASES["mlp"].model(), Classification(), CASES["mlp"].train(), method="magic")
