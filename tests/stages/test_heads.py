"""What a trunk does through a head that was fitted to it, against two trainings that are repeated to their optima."""

import functools
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from engine.test_products import language_model, wide
from models import texts, tokenizer
from oracle import agree
from transformers import LlamaConfig, LlamaForSequenceClassification
from two_stages import CHANGED, DECAY, SIZES, TRUNK, TwoStages, log_p, net, pairs

from whence.attention import plain_attention
from whence.coverage import cover
from whence.engine.matrices import GaussNewton
from whence.engine.point import Point
from whence.engine.products import with_weights
from whence.engine.queries import encode_queries, precondition
from whence.errors import UsageError
from whence.fitting import fit
from whence.linalg.descent import Optimizer
from whence.methods.course import Course
from whence.methods.damping import Damping
from whence.operators import BlockDiagonal, EigenBlock, Identity, Renamed
from whence.operators.flat import Flat
from whence.stages.heads import CrossTerm, Held, estimated_mean_eigenvalue
from whence.stages.multistage import form, multistage
from whence.stages.names import match
from whence.stages.stage import Stage
from whence.tasks import CausalLM, Classification
from whence.train.replay import Descent, Recorded, Replay

NAMES = [*TRUNK, "score"]
DAMPED = Damping(DECAY["after"], ("score",))


@functools.cache
def trainings(alpha=None):
    return TwoStages(alpha)


def tuned(stages):
    """The point at the end of the second training."""
    return Point(net("score", stages.after), stages.task, pairs(stages.rows["after"]))


def reached(stages, operator, point=None):
    """The queries' gradients of the trunk, `[Q, P]`."""
    point = point or tuned(stages)
    sites = point.cover(NAMES).sites
    found = precondition(point, encode_queries(point.task, pairs(stages.queries)), sites, operator)
    return Flat(TRUNK).vectors(found.gradients)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def crossed(stages, **settings):
    """The cross term of the net, and what it makes of the queries' gradients."""
    operator = CrossTerm(tuned(stages), [*TRUNK], ["score"], DAMPED, **settings)
    return reached(stages, operator), operator


def test_under_a_frozen_trunk_the_cross_term_is_the_whole_effect():
    stages = trainings()
    found, without = (stages.predicted(part) for part in (crossed(stages)[0], reached(stages, Identity(TRUNK))))
    agree(found, stages.truth, 1e-4)
    assert correlation(found, stages.truth) > 0.99999 > 0.9 > correlation(without, stages.truth)


def whole(stages, alpha):
    """The Hessian of the second training's mean loss over trunk and head, and how far it went."""
    hessian = form(Stage("tuned", tuned(stages), modules=NAMES), "hessian")
    return hessian, Course(1 / alpha, weight_decay=DECAY["after"])


def test_a_trunk_that_is_held_where_it_was():
    """Cross term and Schur complement in one solution, of which neither the one nor nothing is near."""
    stages = trainings(alpha=0.05)
    hessian, course = whole(stages, 0.05)
    agree(stages.predicted(reached(stages, Held(hessian, [*TRUNK], course, ""))), stages.truth, 1e-4)
    for part in (crossed(stages)[0], reached(stages, Identity(TRUNK))):
        assert correlation(stages.predicted(part), stages.truth) < 0.99


def test_the_solution_in_one_is_the_schur_complements_after_the_cross_term():
    """`alpha (S + alpha)^-1 (w - H_WH H_HH^-1 h)`, with dense matrices; also where Adam's metric stretches each weight."""
    stages, n, alpha = trainings(), SIZES["trunk"], 5.0
    hessian, course = whole(stages, alpha)
    g_QP = torch.func.jacrev(lambda theta: log_p(theta, stages.queries))(stages.after)
    metric = {
        name: torch.rand(shape, generator=torch.Generator().manual_seed(7)).double() + 0.5
        for name, shape in hessian.flat.shapes.items()
    }
    for d_P in (torch.ones(n + SIZES["after"]).double(), torch.cat([part.flatten() for part in metric.values()])):
        h = torch.func.hessian(lambda theta: -log_p(theta, stages.rows["after"]).mean())(stages.after)
        h = h + DECAY["after"] * d_P.diag()
        schur = h[:n, :n] - h[:n, n:] @ torch.linalg.solve(h[n:, n:], h[n:, :n])
        w_QP = g_QP[:, :n] - torch.linalg.solve(h[n:, n:], g_QP[:, n:].T).T @ h[n:, :n]
        expected = alpha * d_P[:n] * torch.linalg.solve(schur + alpha * d_P[:n].diag(), w_QP.T).T
        agree(reached(stages, Held(hessian, [*TRUNK], course, "")), expected, 1e-9)
        blocks = {name: EigenBlock(None, None, lam_OI) for name, lam_OI in metric.items()}
        course = replace(course, metric=BlockDiagonal(blocks))


def test_a_large_head_is_solved_for_by_conjugate_gradients_whose_residual_is_told(notes):
    stages = trainings()
    (expected, formed), (found, solved) = crossed(stages), crossed(stages, dense=0, tolerance=1e-12)
    agree(found, expected, 1e-9)
    assert formed.about == {} and solved.about["head residual"] < 1e-11 and solved.about["head steps"] >= 1
    assert any("conjugate gradients" in note and "residual at most" in note for note in notes)
    assert formed.identity() != solved.identity()
    assert (2.0 * Renamed(Identity(TRUNK) @ solved, {name: name for name in NAMES})).about == solved.about


def test_relative_damping_is_in_units_of_the_heads_mean_eigenvalue():
    stages = trainings()
    matrix = GaussNewton(tuned(stages), ["score"])
    exact = torch.func.hessian(lambda head: -log_p(torch.cat([stages.after[:27], head]), stages.rows["after"]).mean())(
        stages.after[27:]
    )
    mean = float(exact.trace()) / len(exact)
    agree(estimated_mean_eigenvalue(matrix, probes=4096), mean, 0.05)
    relative = CrossTerm(tuned(stages), [*TRUNK], ["score"], Damping(0.1, ("score",), relative=True))
    absolute = CrossTerm(tuned(stages), [*TRUNK], ["score"], Damping(0.1 * mean, ("score",)))
    agree(reached(stages, relative), reached(stages, absolute), 1e-9)


def test_a_head_without_a_trunk_is_refused():
    with pytest.raises(UsageError, match="There is no trunk"):
        CrossTerm(tuned(trainings()), [], ["score"], DAMPED)


def adapted():
    """A point whose model has adapters of random weights in a base that is frozen."""
    model = peft.get_peft_model(language_model("llama"), peft.LoraConfig(r=1, target_modules=["down_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return Point(model.double().eval(), CausalLM(tokenizer()), texts(6, seed=1))


def loss_of(point, sites):
    """The losses of items `[B]` as a function of the sites' weights in one vector, and that vector."""
    sizes = [site.shape[0] * site.shape[1] for site in sites.values()]

    def losses(theta, items):
        parts = zip(sites.items(), theta.split(sizes), strict=True)
        weights = {f"{name}.weight": part.view(site.shape) for (name, site), part in parts}
        with plain_attention():
            return with_weights(point.model, weights, point.task.losses, point.task.collate(items))

    return losses, torch.cat([point.model.get_parameter(f"{name}.weight").flatten() for name in sites]).detach()


def columns_of_hessian(point, trunk, head):
    """The Hessian of the mean loss, `[P, P_head]`, trunk first, by autograd on one vector of weights."""
    losses, theta = loss_of(point, trunk | head)
    theta.requires_grad_()
    (slopes,) = torch.autograd.grad(losses(theta, point.examples.items).mean(), theta, create_graph=True)
    of_head = slopes[Flat({name: site.shape for name, site in trunk.items()}).size :]
    return torch.stack([torch.autograd.grad(slope, theta, retain_graph=True)[0] for slope in of_head], 1)


def gradients(point, sites, items):
    """Of the log-likelihood of each item, `[N, P]`, one at a time."""
    losses, theta = loss_of(point, sites)
    theta.requires_grad_()
    return torch.stack([torch.autograd.grad(-losses(theta, [item]).sum(), theta)[0] for item in items])


def test_adapters_in_a_frozen_base():
    """Gradients of the base's weights under LoRA: with the Hessian of the adapters, or what is never negative of it."""
    point = adapted()
    head, trunk = point.cover("lora").sites, point.cover(["*.1.mlp.down_proj.base_layer", "*.1.mlp.gate_proj"]).sites
    assert len(head) == 8 and len(trunk) == 2
    of = {key: Flat({name: site.shape for name, site in sites.items()}) for key, sites in (("trunk", trunk), ("head", head))}
    columns, n, eye = columns_of_hessian(point, trunk, head), of["trunk"].size, torch.eye(of["head"].size).double()
    matrices = {
        "hessian": columns[n:],
        "gauss-newton": of["head"].vectors(GaussNewton(point, [*head]) @ of["head"].gradients(eye)),
    }
    lowest = {name: float(torch.linalg.eigvalsh(matrix)[0]) for name, matrix in matrices.items()}
    assert lowest["gauss-newton"] > -1e-9 > -1e-3 > lowest["hessian"]
    g_QP = torch.randn(3, len(columns), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    given = {**of["trunk"].gradients(g_QP[:, :n]), **of["head"].gradients(g_QP[:, n:])}
    for name, matrix in matrices.items():
        operator = CrossTerm(point, [*trunk], [*head], Damping(0.7, tuple(head)), matrix=name)
        expected = g_QP[:, :n] - torch.linalg.solve(matrix + 0.7 * eye, g_QP[:, n:].T).T @ columns[:n].T
        agree(of["trunk"].vectors(operator @ given), expected, 1e-6)


def staged(stages, first="hessian", **second):
    """Scores of the first training's rows, `[Q, N]`: the slope by the weight of a row beside the mean of all."""
    before = Point(net("before", stages.before), stages.task, pairs(stages.rows["before"]))
    one = Stage("first", before, curvature=first, modules=[*TRUNK, "before"], absolute_damping=DECAY["before"])
    two = Stage("second", tuned(stages), **{"absolute_damping": DECAY["after"], **second})
    found = multistage([one, two], pairs(stages.queries))
    return found, torch.from_numpy(found.stages["first"].raw[:, :CHANGED])


def test_a_frozen_trunk_below_a_new_head_is_seen_by_itself(notes):
    """Stages of the net: the first's exact curvature, the head's damping its weight decay; nothing is said of rates."""
    stages = trainings()
    found, values = staged(stages)
    agree(values, stages.truth, 1e-4)
    statuses = dict(zip(found.table["module"].fillna(found.table["before"]), found.table["status"], strict=True))
    assert statuses == {"trunk.0": "frozen", "trunk.2": "frozen", "score": "new", "before": "gone"}
    assert not any("moved nothing" in text or "training between" in text for text in notes)


def test_a_trunk_that_was_frozen_elsewhere_is_remarked_on(notes):
    stages = trainings()
    before, point = Point(net("before", stages.before), stages.task, pairs(stages.rows["before"])), tuned(stages)
    point.model.trunk.requires_grad_(False)
    point.model.trunk[0].weight.data *= 1.1
    modules = match([Stage("first", before), Stage("second", point, modules=[*TRUNK, "score"])])
    assert {each.name for each in modules if each.status == "frozen"} == {*TRUNK}
    assert [text for text in notes if "second kept 1 of its modules" in text and "training between them missing" in text]


def test_without_the_cross_term_only_what_is_shared_counts():
    stages = trainings()
    agree(staged(stages, head="none")[1], stages.predicted(reached(stages, Identity(TRUNK))), 1e-6)


def test_trunk_and_head_that_moved_together_are_exact_where_their_hessian_is_formed():
    stages, alpha, how = trainings(alpha=0.05), 0.05, Descent(Optimizer("sgd"), DECAY["after"])
    replay = Replay({}, [], np.array([1 / alpha]), how, "row")
    moved = {"training": Recorded(replay, []), "transport": "proximal", "proximal": alpha, "modules": NAMES}
    agree(staged(stages, curvature="hessian", **{**moved, "absolute_damping": 0.3})[1], stages.truth, 1e-4)
    factors, without = (correlation(staged(stages, **moved, head=head)[1], stages.truth) for head in ("cross", "none"))
    assert factors > 0.7 > 0.4 > without


def test_adapters_are_known_by_what_they_adapt(notes):
    """Stages of a language model and of LoRA in it: nobody says which module is which, nor that the base was frozen."""
    tuned, base = adapted(), Point(language_model("llama"), CausalLM(tokenizer()), texts(5, seed=2))
    queries, there = texts(4, seed=3)[::2], "model.layers.1.mlp.down_proj"
    here, head = (cover(tuned.model, names).sites for names in (f"base_model.model.{there}.base_layer", "lora"))
    found = multistage([Stage("base", base, modules=[there]), Stage("lora", tuned, absolute_damping=0.7)], queries, check=False)
    agree(found.stages["base"].values, through_head(base, there, tuned, here, head, 0.7, queries, "gauss-newton"), 1e-6)
    rows = found.table[found.table["status"] == "frozen"].to_dict("records")
    assert [(row["module"], row["before"]) for row in rows] == [(*here, there)]
    assert (found.table["status"] == "new").sum() == len(head) and not any("moved nothing" in text for text in notes)
    assert found.stages["lora"].shape == (2, 6)


def test_a_classifier_on_a_language_model(notes):
    """Its trunk is that of the language model, and frozen; what is tracked by default did not move, so that the head is."""
    base = Point(language_model("llama"), CausalLM(tokenizer()), texts(5, seed=2))
    config = {name: value for name, value in base.model.config.to_dict().items() if "label" not in name}
    model = LlamaForSequenceClassification(LlamaConfig(**{**config, "num_labels": 3, "pad_token_id": 1}))
    model = wide(model.double().eval())
    model.model.load_state_dict(base.model.model.state_dict())
    rows = [{"text": row.get("text") or row["prompt"] + row["completion"], "label": n % 3} for n, row in enumerate(texts(8, 1))]
    tuned, there = Point(model, Classification(tokenizer()), rows[:6]), "model.layers.1.mlp.down_proj"
    here, head = (cover(tuned.model, names).sites for names in (there, "score"))
    found = multistage([Stage("base", base, modules=[there]), Stage("tuned", tuned, absolute_damping=0.1)], rows[6:])
    agree(found.stages["base"].values, through_head(base, there, tuned, here, head, 0.1, rows[6:]), 1e-6)
    assert "tuned: tracking 1 modules that moved (score the first), of 15" in notes
    assert dict(found.table[["module", "status"]].itertuples(index=False)) == {there: "frozen", "score": "new"}


def through_head(base, there, tuned, here, head, damping, queries, matrix="hessian"):
    """Scores of the base's rows by the gradients of one of its modules, with dense matrices, `[Q, N]`."""
    asked = encode_queries(tuned.task, queries)
    columns, g_QP = columns_of_hessian(tuned, here, head), gradients(tuned, here | head, asked.items)
    n, of_head = g_QP.shape[1] - columns.shape[1], Flat({name: site.shape for name, site in head.items()})
    eye = torch.eye(of_head.size).double()
    of_heads = columns[n:] if matrix == "hessian" else of_head.vectors(GaussNewton(tuned, [*head]) @ of_head.gradients(eye))
    w_QP = g_QP[:, :n] - torch.linalg.solve(of_heads + damping * eye, g_QP[:, n:].T).T @ columns[:n].T
    curvature = fit(base.model, base.task, base.rows, modules=[there]).inverse(0.1)
    rows = gradients(base, base.cover([there]).sites, base.examples.items)
    return w_QP @ curvature.dense()[there] @ rows.T / len(rows)
