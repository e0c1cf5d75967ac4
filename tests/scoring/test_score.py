"""Scores of every granularity against dense references, and what must not change them."""

import functools
import importlib

import numpy as np
import pytest
import torch
from models import CASES, HUGE, Routed, named, overflowing, randomised, small_memory, tokenizer
from oracle import agree, curvature, inverse, likelihoods, log_likelihood, scores, traced, traces

from whence.engine.queries import precondition
from whence.engine.stream import encode
from whence.errors import DegenerateScores, NumericalError, OutOfMemory, StaleArtifact, UsageError
from whence.fitting import METHODS, fit
from whence.operators import Identity
from whence.precision import Precision
from whence.scoring.score import score, self_influence
from whence.tasks import CausalLM, Classification

scoring = importlib.import_module("whence.scoring.score")


@functools.cache
def fitted(case, method="ekfac"):
    return fit(case.model(), case.task(), case.train(), method=method, modules=case.modules)


@functools.cache
def reference(case, method="ekfac"):
    """All scores of a case by definition: curvature with drawn labels, damping 0.1."""
    items = [item for query in case.task().encode_queries(case.queries()) for item, _ in query]
    train = traced(case, "data", "")
    matrices = curvature(method, traced(case, "model", "covariance"), traced(case, "model", "eigenvalues"))
    return scores(traces(case.model(), list(matrices), [log_likelihood(item) for item in items]), train, inverse(matrices))


def scored(case, method="ekfac", task=None, train=None, operator=None, **settings):
    operator = operator or fitted(case, method).inverse(damping=0.1)
    return score(
        case.model(), task or case.task(), case.queries(), case.train() if train is None else train, operator, **settings
    )


cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
texts = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.text and "*" not in case.modules], ids=lambda c: c.name
)


@cases
def test_pairwise_scores(case):
    found = scored(case)
    agree(found.raw, reference(case).total, case.tolerance)
    agree(found.values, reference(case).total / case.rows, case.tolerance)
    assert found.raw.dtype == np.float64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", named("llama", "gpt2", "conv"), ids=lambda case: case.name)
def test_every_method(case, method):
    agree(scored(case, method).raw, reference(case, method).total)


@cases
def test_scores_per_module(case):
    found = scored(case, per="module")
    expected = reference(case)
    assert set(found.modules) == set(expected.modules)
    for name, part in expected.modules.items():
        agree(found.modules[name], part, case.tolerance)
    agree(found.raw, expected.total, case.tolerance)
    agree(sum(found.modules.values()), found.raw, 1e-12)


@texts
def test_scores_per_token(case):
    found = scored(case, per="token")
    items = encode(case.task(), case.train()).items
    for query in range(len(found.raw)):
        for number, item in enumerate(items):
            length, size = len(item.ids), case.task().size(item)
            parts = [tokens[query][number].unflatten(0, (-1, length)) for tokens in reference(case).tokens.values()]
            by_position = torch.cat(parts).sum(0)  # modules, and uses of a tied weight
            assert torch.equal(by_position[size:], torch.zeros(length - size))
            positions = found.token_scores(query, number) * found.n_train
            agree(positions, by_position[:size])
            agree(positions.sum(), found.raw[query, number], 1e-10)


@cases
def test_self_influence(case):
    found = self_influence(case.model(), case.task(), case.train(), fitted(case).inverse(damping=0.1))
    known = self_influence(case.model(), case.task(), case.train(), fitted(case).inverse(damping=0.1), n_train=10 * case.rows)
    assert np.array_equal(known.raw, found.raw) and known.n_train == 10 * found.n_train
    agree(found.raw, reference(case).self_[None], case.tolerance)


@cases
def test_aggregated_scores(case):
    expected = reference(case).total
    agree(scored(case, aggregate="queries").raw, expected.sum(0, keepdim=True), case.tolerance)
    agree(scored(case, aggregate="examples").raw, expected.sum(1, keepdim=True), 10 * case.tolerance)
    agree(scored(case, aggregate=("queries", "examples")).raw, expected.sum().reshape(1, 1), 10 * case.tolerance)


def test_a_sum_of_queries_is_bounded_unless_one_is_a_contrast():
    case = CASES["llama"]
    plain = {"prompt": "w1 w2 w3", "completion": " w4 w5"}
    operator = fitted(case).inverse(damping=0.1)
    one, both, mixed = (
        score(case.model(), case.task(), queries, case.train(), operator, aggregate="queries")
        for queries in ([plain], [plain, plain], [plain, {**plain, "contrast": " w6"}])
    )
    assert one.about["likelihood"] == "probability" and both.room() == pytest.approx(2 * one.room())
    assert mixed.room() is None and not mixed.beyond().any() and both.beyond().shape == (case.rows,)


@pytest.mark.parametrize("case", named("neox", "conv", "llama-tied"), ids=lambda case: case.name)
def test_norms(case):
    found, expected = scored(case, norms=("cosine", "relatif")), reference(case)
    agree(found.norms["gradient"], expected.gradient_norms)
    agree(found.norms["self"], expected.self_)
    agree(found.queries["norm"].to_numpy(), expected.query_norms)
    cosine = expected.total / expected.query_norms[:, None] / expected.gradient_norms
    agree(found.normalised("cosine").raw, cosine)
    agree(found.normalised("relatif").raw, expected.total / expected.self_.sqrt())
    assert np.abs(found.normalised("cosine").raw).max() <= 1


def test_contrasts_and_spans():
    case = CASES["llama"]
    queries = [
        {"prompt": "w1 w2 w3", "completion": " w4 w5", "contrast": " w6"},
        {"prompt": "w1 w2", "completion": " w4 w5 w7", "span": "w5"},
    ]
    model, task, names = case.model(), case.task(), list(fitted(case).blocks)
    weighted = task.encode_queries(queries)
    assert [len(query) for query in weighted] == [2, 1]

    def total(query):
        return lambda model: sum(weight * log_likelihood(item)(model) for item, weight in query)

    examples = encode(task, case.train())
    train = traces(model, names, likelihoods(task, examples.items, examples.ids, "data", ""))
    asked = traces(model, names, [total(query) for query in weighted])
    operator = fitted(case).inverse(damping=0.1)
    expected = scores(asked, train, operator.dense())
    found = score(model, task, queries, case.train(), operator)
    agree(found.raw, expected.total)
    agree(found.queries["measured"].to_numpy(), torch.stack([total(query)(model).detach() for query in weighted]))


def test_a_measurement_of_ones_own():
    case = CASES["mlp"]
    task = Classification(measurement=lambda model, batch: model(batch["inputs"])[:, 2])
    found = scored(case, task=task)
    model, names = case.model(), list(fitted(case).blocks)
    asked = traces(model, names, [lambda model, row=row: model(row[0][None])[0, 2] for row in case.queries()])
    train = traces(model, names, [log_likelihood(row) for row in case.train()])
    agree(found.raw, scores(asked, train, fitted(case).inverse(damping=0.1).dense()).total)


# what must not matter


@pytest.mark.parametrize("batch_tokens", [1, 13, 30])
@pytest.mark.parametrize("case", named("llama", "gpt2", "conv", "llama-tied"), ids=lambda case: case.name)
def test_batch_size_does_not_matter(case, batch_tokens):
    curvature = fit(case.model(), case.task(), case.train(), modules=case.modules, batch_tokens=batch_tokens)
    again = scored(case, operator=curvature.inverse(damping=0.1), batch_tokens=batch_tokens)
    agree(again.raw, scored(case).raw, 1e-9)


class Padded(CausalLM):
    """Pads every batch by three more positions."""

    def collate(self, items):
        batch = dict(super().collate(items))
        for key, fill in (("input_ids", 1), ("attention_mask", 0), ("labels", -100)):
            batch[key] = torch.nn.functional.pad(batch[key], (0, 3), value=fill)
        return batch

    def collate_noise(self, items, noise):
        return torch.nn.functional.pad(super().collate_noise(items, noise), (0, 3))


PADDED = ("llama", "gpt2", "neox", "llama-embedding", "llama-tied")


@pytest.mark.parametrize("how", ["more", "left"])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("case", named(*PADDED), ids=lambda case: case.name)
def test_padding_does_not_matter(case, method, how):
    task = Padded(tokenizer()) if how == "more" else case.task(padding_side="left")
    per = "example" if "norm" in case.modules else "token"
    operator = fit(case.model(), task, case.train(), method=method, modules=case.modules).inverse(damping=0.1)
    again = scored(case, task=task, operator=operator, per=per)
    plain = scored(case, method, per=per)
    agree(again.raw, plain.raw, case.tolerance)
    if per == "token":
        agree(again.tokens, plain.tokens, case.tolerance)


@pytest.mark.parametrize("case", named("llama", "mlp"), ids=lambda case: case.name)
def test_order_of_the_data_does_not_matter(case):
    order = np.random.default_rng(0).permutation(case.rows)
    train = [case.train()[n] for n in order]
    operator = fit(case.model(), case.task(), train, modules=case.modules).inverse(damping=0.1)
    agree(scored(case, train=train, operator=operator).raw, scored(case).raw[:, order], 1e-9)


def test_order_of_the_queries_does_not_matter():
    case = CASES["llama"]
    operator = fitted(case).inverse()
    forth = score(case.model(), case.task(), case.queries(), case.train(), operator)
    back = score(case.model(), case.task(), case.queries()[::-1], case.train(), operator)
    agree(back.raw, forth.raw[::-1].copy(), 1e-12)


@pytest.mark.parametrize("per", ["example", "token", "module"])
def test_chunks_of_data_do_not_matter(per, tmp_path):
    case = CASES["llama"]
    whole, parts = scored(case, per=per), scored(case, per=per, out=tmp_path / "scores", chunks=4)
    agree(parts.raw, whole.raw, 1e-12)
    if per == "token":
        agree(parts.tokens, whole.tokens, 1e-12)


def test_gradient_checkpointing_does_not_matter():
    case = CASES["llama"]
    model, calls = case.model(), []
    model.activation_checkpointing_enable()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    operator = fit(model, case.task(), case.train(), modules="all", check=False).inverse(damping=0.1)
    recomputed = len(calls)
    found = score(model, case.task(), case.queries(), case.train(), operator)
    agree(found.raw, reference(case).total)
    assert recomputed == 4, "one batch in each of two passes, forward and again while going back"


@pytest.mark.parametrize("after", [0, 1])
def test_batches_are_halved_until_they_fit(after):
    case = CASES["llama"]
    found = scored(case, task=small_memory(case.task(), 9, after), batch_tokens=16, per="token")
    agree(found.raw, scored(case).raw, 1e-10)
    agree(found.tokens, scored(case, per="token").tokens, 1e-10)
    found = scored(case, task=small_memory(case.task(), 9, after), batch_tokens=16, aggregate="examples")
    agree(found.raw, scored(case).raw.sum(1, keepdims=True), 1e-9)
    with pytest.raises(OutOfMemory, match="WHENCE-10"):
        scored(case, task=small_memory(case.task(), 4))


@pytest.mark.parametrize("batch_tokens", [1, 100])
@pytest.mark.parametrize("reached", [True, False])
@pytest.mark.parametrize("per", ["example", "module"])
def test_a_module_that_only_some_examples_reach(batch_tokens, reached, per):
    case, model, task = CASES["mlp"], randomised(Routed().double()), Classification()
    queries = [row for row in case.train(30)[20:] if reached or row[0][0] <= 0]
    operator = fit(model, task, case.train(), batch_tokens=batch_tokens).inverse(damping=0.1)
    train, asked = (traces(model, operator.names, [log_likelihood(row) for row in rows]) for rows in (case.train(), queries))
    expected = scores(asked, train, operator.dense())
    found = score(model, task, queries, case.train(), operator, batch_tokens=batch_tokens, per=per, norms=("cosine", "relatif"))
    agree(found.raw, expected.total)
    agree(found.norms["gradient"], expected.gradient_norms)
    agree(found.norms["self"], expected.self_)
    for name, part in found.modules.items():
        assert np.abs(part - expected.modules[name].numpy()).max() < 1e-8


# low rank


def test_a_rank_that_saves_nothing_changes_nothing():
    case = CASES["llama"]
    assert np.array_equal(scored(case, rank=8).raw, scored(case, rank=None).raw)


@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_scores_are_those_of_the_best_approximation(rank):
    """These matrices are narrower than the sketch, so that the randomized decomposition is exact."""
    case, names = CASES["llama"], list(fitted(CASES["llama"]).blocks)
    operator = fitted(case).inverse(damping=0.1).dense()
    items = [item for query in case.task().encode_queries(case.queries()) for item, _ in query]
    expected, kept = [], []
    for query in traces(case.model(), names, [log_likelihood(item) for item in items]):
        total, energy, whole = 0.0, 0.0, 0.0
        for name, asked in query.items():
            u, s, vh = torch.linalg.svd((operator[name] @ asked.w_OI.flatten()).view_as(asked.w_OI), full_matrices=False)
            low = (u[:, :rank] * s[:rank]) @ vh[:rank]
            total = total + torch.stack([(low * example[name].w_OI).sum() for example in traced(case, "data", "")])
            energy, whole = energy + s[:rank].square().sum(), whole + s.square().sum()
        expected.append(total)
        kept.append(energy / whole)
    found = scored(case, rank=rank)
    agree(found.raw, torch.stack(expected))
    agree(found.queries["energy"].to_numpy(), torch.stack(kept), 1e-6)
    agree(scored(case).queries["energy"].to_numpy(), torch.ones(3))


@pytest.mark.parametrize("precision", [Precision(), Precision(scores="bfloat16")])
def test_rescored_entries_are_exact(precision):
    case = CASES["llama"]
    model, operator = case.model().float(), fitted(case).inverse(damping=0.1)
    train = [*case.train(20), {"text": "w0"}]
    arguments = (model, case.task(), case.queries(), train, operator)
    full = score(*arguments, rank=None).raw
    cheap = score(*arguments, rank=1, precision=precision)
    found = score(*arguments, rank=1, rescore=3, precision=precision)
    exact = found.exact
    assert (exact.sum(1) <= 6).all() and (exact.sum(1) >= 5).all()
    for row, chosen in enumerate(exact):
        assert set(np.argsort(cheap.raw[row])[-3:]) - {20} <= set(np.flatnonzero(chosen))
    agree(found.raw[exact], full[exact], 1e-5)
    assert np.array_equal(found.raw[~exact], cheap.raw[~exact])


def test_low_precision_scores_stay_close():
    case = CASES["llama"]
    model, operator = case.model().float(), fitted(case).inverse(damping=0.1)
    full = score(model, case.task(), case.queries(), case.train(), operator).raw
    rough = score(model, case.task(), case.queries(), case.train(), operator, precision=Precision(scores="bfloat16")).raw
    assert full.dtype == rough.dtype == np.float32
    error = np.abs(rough - full).max() / np.abs(full).max()
    assert 0 < error < 0.03
    agree(full, scored(case).raw, 1e-4)


def test_queries_are_kept_in_the_format_of_short_products(monkeypatch):
    case, kept = CASES["llama"], []
    model, operator = case.model().float(), fitted(case).inverse(damping=0.1)
    found = {}

    def seen(*given, **settings):
        prepared = precondition(*given, **settings)
        kept.append({gradient.dtype for gradient in prepared.gradients.values()})
        return prepared

    monkeypatch.setattr(scoring, "precondition", seen)
    for products in ("float32", "bfloat16"):
        precision = Precision(products=products)
        found[products] = score(model, case.task(), case.queries(), case.train(), operator, precision=precision).raw
    assert kept == [{torch.float32}, {torch.bfloat16}]
    assert found["bfloat16"].dtype == np.float32
    assert 0 < np.abs(found["bfloat16"] - found["float32"]).max() < 0.03 * np.abs(found["float32"]).max()


# rows that say nothing, and mistakes


def test_an_example_without_a_loss_scores_zero():
    case = CASES["llama"]
    train = [{"text": "w3"}, *case.train(), {"text": "w4"}]
    found = scored(case, train=train, per="token")
    assert not found.raw[:, [0, -1]].any()
    agree(found.raw[:, 1:-1], scored(case).raw, 1e-12)
    assert found.n_train == case.rows
    agree(found.token_scores(0, 1) * found.n_train, scored(case, per="token").token_scores(0, 0) * case.rows, 1e-12)


def test_identical_scores_are_refused():
    case = CASES["mlp"]
    task = Classification(measurement=lambda model, batch: 0 * model(batch["inputs"]).sum(1))
    with pytest.raises(DegenerateScores, match="WHENCE-15"):
        scored(case, task=task)


def test_queries_that_say_nothing_are_a_warning():
    case = CASES["mlp"]
    assert [label for _, label in case.queries()] == [0, 2, 0]
    task = Classification(measurement=lambda model, batch: (batch["targets"] > 0) * model(batch["inputs"]).sum(1))
    with pytest.warns(UserWarning, match="2 queries score every example the same .WHENCE-15"):
        scored(case, task=task)


BROKEN = (torch.full((5,), torch.inf, dtype=torch.float64), 1)


def test_a_broken_example_is_named():
    case = CASES["mlp"]
    with pytest.raises(NumericalError, match=r"1 of 15 examples is not finite  .WHENCE-14.\s+given +row 14"):
        scored(case, train=[*case.train(), BROKEN])


def test_a_broken_query_is_an_error():
    with pytest.raises(NumericalError, match="not finite"):
        score(CASES["mlp"].model(), Classification(), [BROKEN], CASES["mlp"].train(), fitted(CASES["mlp"]).inverse())


def test_broken_gradients_are_an_error():
    case = CASES["mlp"]
    arguments = {"operator": fitted(case).inverse(), "task": case.task(), "model": overflowing()}
    with pytest.raises(NumericalError, match="query's gradient is not finite"):
        score(queries=[HUGE], train=case.train(), **arguments)
    with pytest.raises(NumericalError, match="1 of 15 examples have a score that is not finite") as raised:
        score(queries=case.queries(), train=[*case.train(), HUGE], **arguments)
    assert encode(case.task(), [HUGE]).ids[0] in str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"per": "layer"},
        {"aggregate": "all"},
        {"aggregate": "examples", "per": "token"},
        {"aggregate": "queries", "rescore": 2},
        {"per": "module", "rescore": 2},
    ],
)
def test_choices_that_make_no_sense_are_refused(settings):
    with pytest.raises(UsageError):
        scored(CASES["mlp"], **settings)


@pytest.mark.parametrize("case", named("mlp", "llama-embedding"), ids=lambda case: case.name)
def test_tokens_need_sequences_and_sums_over_tokens(case):
    with pytest.raises(UsageError, match="per token"):
        scored(case, per="token")


# does it find what it should?


@functools.cache
def trained():
    """A small model that has learned its rows, some of them by heart."""
    from whence.train.small import Training, train

    case = CASES["llama"]
    rows = case.train(24)
    torch.manual_seed(0)
    model = case.build()
    losses = train(model, case.task(), rows, Training(epochs=30, batch_size=8, learning_rate=1e-2))
    assert losses[-1] < 0.7 * losses[0]
    return model.eval(), case.task(), rows


def test_a_copy_of_the_query_is_its_top_proponent():
    model, task, rows = trained()
    prompted = [n for n, row in enumerate(rows) if "prompt" in row]
    operator = fit(model, task, rows).inverse(damping=0.1)
    found = score(model, task, [rows[n] for n in prompted], rows, operator)
    for query, planted in enumerate(prompted):
        top = found.top(query, k=1)
        assert top["id"].item() == found.example_ids[planted]
        assert top["effect"].item() == "raises" and top["value"].item() > 0
        assert found.rank_of(found.example_ids[planted], query) == 1


def test_one_more_copy_raises_the_log_probability():
    """The sign: a step on the example's likelihood along the score's direction raises that of its proponents."""
    model, task, rows = trained()
    query = next(row for row in rows if "prompt" in row)
    operator = fit(model, task, rows, modules="all").inverse(damping=0.1)
    found = score(model, task, [query], rows, operator)
    before = task.measurements(model, task.collate([task.encode_queries([query])[0][0][0]])).item()
    assert found.queries["measured"].item() == pytest.approx(before, rel=1e-5)
    step = 1e-3
    for column in (int(found.raw[0].argmax()), int(found.raw[0].argmin())):
        moved = type(model)(model.config)
        moved.load_state_dict(model.state_dict())
        gradients = traces(model, operator.names, [log_likelihood(task.encode([rows[column]])[0])])[0]
        for name, dense in operator.dense().items():
            w_OI = gradients[name].w_OI
            moved.get_submodule(name).weight.data += step * (dense @ w_OI.flatten()).view_as(w_OI)
        after = task.measurements(moved.eval(), task.collate([task.encode_queries([query])[0][0][0]])).item()
        assert (after - before) / step == pytest.approx(found.raw[0, column], rel=0.1)


def test_other_queries_that_are_tensors_are_refused_in_a_finished_folder(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    rows = [(torch.randn(3), number % 2) for number in range(6)]
    task = Classification()
    operator = fit(model, task, rows).inverse()
    score(model, task, rows[:2], rows, operator, out=tmp_path / "scores")
    with pytest.raises(StaleArtifact, match="queries"):
        score(model, task, rows[2:4], rows, operator, out=tmp_path / "scores")


@pytest.mark.parametrize("per", ["example", "token"])
def test_a_row_takes_little_memory(per):
    """Python's and NumPy's memory per row of 100 tokens, at most while scoring and afterwards; texts are 300 bytes of it."""
    import tracemalloc

    case, draw = CASES["llama"], np.random.default_rng(0)
    rows = [{"text": " ".join(f"w{word}" for word in draw.integers(0, 9, 100))} for _ in range(800)]
    queries, operator = [{"prompt": "w1 w2", "completion": " w3"}], Identity()
    score(case.model(), case.task(), queries, rows[:40], operator, per=per)
    taken = []
    for count in (200, 800):
        tracemalloc.start()
        found = score(case.model(), case.task(), queries, rows[:count], operator, per=per)
        taken.append(tracemalloc.get_traced_memory())
        tracemalloc.stop()
        del found
    kept, most = (float(after - before) / 600 for before, after in zip(*taken, strict=True))
    assert most < 3000 and kept < (1500 if per == "token" else 600), (kept, most)
