"""The probe: what a few rows say about the whole."""

import pytest
import torch
from models import CASES
from oracle import agree

from whence import casting
from whence.engine import probe as probing
from whence.engine.point import Point
from whence.engine.probe import agreement, probe, probe_rows, settle_products
from whence.fitting import fit
from whence.precision import EXACT, Precision, are_short, has_units, multiplying
from whence.scoring import score, self_influence
from whence.store.memory import Memory

CPU = torch.device("cpu")


def setting(name="llama", rows=12):
    """A point, and the sites tracked."""
    case = CASES[name]
    point = Point(case.model(), case.task(), case.train(rows))
    return point, point.cover("all").sites


def in_float32(point):
    """The same point with shorter weights."""
    return Point(point.model.float(), point.task, point.rows)


def test_agreement_of_scores():
    exact = torch.randn(4, 6)
    same = agreement(exact, exact)
    assert same.error == 0 and same.pearson == pytest.approx(1.0)
    assert agreement(2 * exact, exact).error == pytest.approx(1.0)
    worst = exact.clone()
    worst[2] = -exact[2]
    assert agreement(worst, exact).pearson == pytest.approx(-1.0)


def test_what_an_example_does_to_itself_is_no_evidence():
    exact = torch.eye(5) * 100 + torch.randn(5, 5)
    assert agreement(torch.eye(5) * 100 + torch.randn(5, 5), exact).pearson < 0.9


def test_the_probe_is_the_rows_scores_for_each_other():
    point, sites = setting()
    rows, case, model, task = [0, 3, 5], CASES["llama"], point.model, point.task
    operator = fit(model, task, case.train(12), modules="all").inverse()
    found = probe(point, sites, rows, operator)
    chosen = [case.train(12)[row] for row in rows]
    agree(found.diag(), self_influence(model, task, chosen, operator).raw[0])
    agree(found, score(model, task, chosen, chosen, operator).raw)
    assert not torch.allclose(probe(point, sites, rows, None), found)


def test_few_rows_spread_over_all():
    point, sites = setting(rows=60)
    examples = point.examples
    rows = probe_rows(examples, sites, examples.usable)
    assert len(rows) == probing.ROWS and max(rows) - min(rows) > 40
    assert probe_rows(examples, sites, [7]) == [7]


def lowered(monkeypatch, error):
    """Let float32 work be worth lowering, whatever the machine and the size, and products drift by `error`."""
    monkeypatch.setattr(probing, "has_units", lambda device: True)
    monkeypatch.setattr(probing, "WORTH", 0)
    monkeypatch.setattr(probing, "FLOPS", 0)
    exact, seen = probing.probe, []

    def drifting(*args):
        found = exact(*args)
        seen.append(are_short())
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
        return found * (1 + error * noise) if seen[-1] else found

    monkeypatch.setattr(probing, "probe", drifting)
    return seen


@pytest.mark.parametrize(("error", "expected"), [(1e-3, "bfloat16"), (0.3, "float32")])
def test_products_are_shortened_where_the_scores_hardly_move(monkeypatch, notes, error, expected):
    point, sites = setting()
    seen, folder = lowered(monkeypatch, error), Memory()
    given = (folder, Precision(), in_float32(point), sites, point.examples.usable)
    assert settle_products(*given) == expected
    assert sorted(seen) == [False, True]
    assert f"multiplying in {expected}" in notes[0] and "rows by" in notes[0]
    assert settle_products(*given) == expected
    assert len(seen) == 2, "the folder remembers"
    assert settle_products(Memory(), EXACT, *given[2:]) == "float32" and len(seen) == 2


def test_a_float64_model_and_little_work_are_not_probed(monkeypatch):
    point, sites = setting()
    seen, usable = lowered(monkeypatch, 0.0), point.examples.usable
    assert settle_products(Memory(), Precision(), point, sites, usable) == "float32"
    monkeypatch.setattr(probing, "FLOPS", 1e15)
    assert settle_products(Memory(), Precision(), in_float32(point), sites, usable) == "float32"
    assert not seen


def test_products_are_as_before_afterwards():
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), multiplying("bfloat16", CPU):
            assert are_short()
            raise KeyError
        assert not are_short() and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not has_units(CPU), reason="no units for short products on this CPU")
def test_short_products_are_close_and_not_exact(monkeypatch):
    monkeypatch.setattr(casting, "worth_rounding", lambda *shape: True)
    case = CASES["llama"]
    model = case.model().float()
    train = case.train(12)

    def found(products):
        precision = Precision(products=products)
        curvature = fit(model, case.task(), train, modules="all", labels="data", precision=precision)
        scores = score(model, case.task(), case.queries(), train, curvature.inverse(), precision=precision)
        assert curvature.about["products"] == scores.about["products"] == products
        return torch.from_numpy(scores.raw)

    seen = agreement(found("bfloat16"), found("float32"))
    assert 0 < seen.error < 0.1 and seen.pearson > 0.99


def test_sites_of_one_module_add_up():
    point, sites = setting("mlp")
    whole = probe(point, sites, [0, 1], None)
    parts = [probe(point, {name: site}, [0, 1], None) for name, site in sites.items()]
    agree(sum(parts), whole)
