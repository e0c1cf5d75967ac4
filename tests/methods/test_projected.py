"""Methods of projected gradients are their oracles, which write the projections out; resume, processes, and what is refused."""

import numpy as np
import pytest
import torch
from distributed import work
from distributed.processes import run
from killing import killed_and_resumed
from models import CASES, llama, randomised, texts, tokenizer
from oracle import agree

from benchmarks.oracles.base import Case
from benchmarks.oracles.projected import ORACLES, influence
from whence.config.schema import Train
from whence.data import as_rows
from whence.errors import NumericalError, StaleArtifact, UsageError
from whence.fitting import fit
from whence.methods.base import attribute
from whence.models import load_model
from whence.operators import Identity
from whence.settings import Score
from whence.tasks import CausalLM, Classification, Regression
from whence.train.finetune import finetune
from whence.train.record import read_training

ROWS, QUERIES = as_rows(texts(8, seed=1)), as_rows(texts(6, seed=2)[::2])
WHOLE = 64
"""More than any side of the test models has."""


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("projected") / "train"
    torch.manual_seed(0)
    settings = Train(learning_rate=1e-2, epochs=2, batch_size=2, save_steps=2, log_steps=1, keep=3)
    finetune(randomised(llama()).eval(), CausalLM(tokenizer()), ROWS, settings, out=folder, seed=0)
    return read_training(folder)


def found(name, training, settings=Score(), out=None, rerun=False, **own):
    given = (load_model(training.model)[0], CausalLM(tokenizer()), QUERIES, ROWS, settings)
    return attribute(name, *given, training=training, out=out, rerun=rerun, **own)


METHODS = [
    ("logra", {"dim": 3}),
    ("logra", {"dim": 3, "basis": "curvature", "damping": 0.01}),
    ("logra", {"dim": WHOLE}),
    ("logra", {"dim": 3, "labels": "model"}),
    ("factgrass", {"dim": 3, "mask": 5, "labels": "model"}),
    ("sjlt", {"dim": 4, "nonzeros": 2}),
    ("factgrass", {"dim": 3, "mask": 5}),
    ("trackstar", {"dim": 3, "mix": 0.9}),
    ("trackstar", {"dim": 3, "second_moment": True, "mix": 0.0}),
    ("trak", {"dim": 3}),
    ("trak", {"dim": 2, "gram": "joint", "over": "checkpoints"}),
    ("less", {"dim": 3}),
    ("less", {"dim": WHOLE, "epsilon": 1e-3}),
]


@pytest.mark.parametrize(
    ("name", "own"), METHODS, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value))
)
def test_it_is_its_oracle(training, name, own):
    case = Case(load_model(training.model)[0], CausalLM(tokenizer()), ROWS, QUERIES, training)
    agree(found(name, training, **own).values, ORACLES[name](case, **own), 1e-3)


@pytest.mark.parametrize("name", ["logra", "sjlt", "factgrass", "trackstar"])
@pytest.mark.parametrize("kind", ["conv", "gpt2", "llama-embedding", "norms"])
def test_layers_of_all_kinds(kind, name):
    """Convolutions (in groups, too), transposed layers, embeddings and norms."""
    case = CASES[kind]
    model, task, rows, queries = case.model(), case.task(), case.train(), case.queries()
    own = {"dim": 3, **({"mask": 4} if name == "factgrass" else {})}
    factors = fit(model, task, rows, method="identity", modules=case.modules)  # says what is tracked
    found = attribute(name, model, task, queries, rows, factors=factors, **own)
    agree(found.values, ORACLES[name](Case(model, task, rows, queries, modules=case.modules), **own), 1e-4)


def test_without_loss_of_dimensions_they_are_the_empirical_fisher_matrix_of_whole_gradients(training):
    case = Case(load_model(training.model)[0], CausalLM(tokenizer()), ROWS, QUERIES)
    expected = influence(case, Identity(), 0.1)
    for name, own in (("logra", {}), ("sjlt", {}), ("factgrass", {"mask": WHOLE})):
        agree(found(name, training, dim=WHOLE, **own).values, expected, 1e-3)
    agree(found("logra", training, dim=WHOLE, basis="curvature").values, expected, 1e-3)
    assert np.abs(found("logra", training, dim=3).values - expected).max() > 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("task", [Classification(), Regression()])
def test_trak_of_classes_and_numbers(task):
    """With all dimensions and one label, `(1 - p)` times the margin's gradient is that of the log-likelihood."""
    torch.manual_seed(0)
    outputs = 4 if isinstance(task, Classification) else 1
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, outputs)).double()
    inputs = torch.randn(12, 5, dtype=torch.float64)
    targets = [number % 4 if outputs == 4 else inputs[number, :1].sin() for number in range(12)]
    rows = list(zip(inputs, targets, strict=True))
    own = {"dim": WHOLE, "gram": "joint"}
    values = attribute("trak", model, task, rows[:3], rows[3:], **own)
    agree(values.values, ORACLES["trak"](Case(model, task, rows[3:], rows[:3]), **own), 1e-4)
    assert values.unit == "TRAK score"


def test_trak_over_models_notices_when_one_changes(training, tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        saved = randomised(llama(), scale=0.1 * seed).eval()
        saved.save_pretrained(tmp_path / f"model-{seed}")
        tokenizer().save_pretrained(tmp_path / f"model-{seed}")
    own = {"dim": 3, "models": f"{tmp_path / 'model-1'}, {tmp_path / 'model-2'}"}
    case = Case(load_model(training.model)[0], CausalLM(tokenizer()), ROWS, QUERIES)
    expected = ORACLES["trak"](case, dim=3, models=own["models"].replace(" ", ""))
    agree(found("trak", training, out=tmp_path / "scores", **own).values, expected, 1e-3)
    saved.lm_head.weight.data[0, 0] += 1
    saved.save_pretrained(tmp_path / "model-2")
    with pytest.raises(StaleArtifact, match="read"):
        found("trak", training, out=tmp_path / "scores", **own)


def test_trak_of_several_outputs_is_refused():
    rows = [(torch.randn(3), torch.randn(2)) for _ in range(4)]
    with pytest.raises(UsageError, match="margins of this task are not known"):
        attribute("trak", torch.nn.Sequential(torch.nn.Linear(3, 2)), Regression(), rows, rows)


def test_units_and_what_is_known(training):
    scores = {name: found(name, training) for name in ORACLES}
    units = {name: each.unit for name, each in scores.items()}
    assert units == {
        "logra": "nats per copy",
        "sjlt": "nats per copy",
        "factgrass": "nats per copy",
        "trackstar": "cosine",
        "trak": "TRAK score",
        "less": "learning rate x cosine",
    }
    assert np.abs(scores["trackstar"].values).max() <= 1 + 1e-6 and scores["trackstar"].n_train == 1
    assert scores["logra"].n_train == len(ROWS) and scores["logra"].queries["measured"].notna().all()
    assert scores["less"].queries["measured"].isna().all(), "it differs from checkpoint to checkpoint"
    assert all(each.about["method"] == name for name, each in scores.items())
    agree(found("logra", training, Score(n_train=100)).values, scores["logra"].values * len(ROWS) / 100)
    assert np.abs(found("logra", training, Score(seed=1), dim=3).raw - found("logra", training, dim=3).raw).max() > 0


@pytest.mark.parametrize(
    ("name", "own"), [("trak", {"over": "checkpoints"}), ("less", {}), ("trackstar", {}), ("sjlt", {"labels": "model"})]
)
def test_a_killed_run_resumes_to_the_same_bits_and_leaves_nothing_behind(training, tmp_path, name, own):
    settings = Score(chunks=3, batch_tokens=8)
    seen = killed_and_resumed(lambda out: found(name, training, settings, out, **own), tmp_path, "project", 4)
    assert seen.resumed["project"][0], "what was done is not done again"
    with pytest.raises(StaleArtifact, match="dim"):
        found(name, training, settings, tmp_path / "whole", **{**own, "dim": 5})


def test_several_processes_give_the_same(training, tmp_path):
    names = ("logra", "trackstar", "less", "trak")
    expected = [found(name, training, dim=3, **({"labels": "model"} if name == "logra" else {})).values for name in names]
    for each in run(work.projected, training.path, names, QUERIES, ROWS, tmp_path / "two"):
        for values, one in zip(each, expected, strict=True):
            agree(values, one, 1e-4)


def test_the_size_of_the_store_is_said(training, notes):
    found("logra", training, dim=3)
    assert any(text.startswith("projected gradients: 8 rows x 54 numbers, 0.0 MiB") for text in notes)


def test_what_is_refused(training, monkeypatch):
    with pytest.raises(UsageError, match="one number per query and row"):
        found("logra", training, Score(per="token"))
    with pytest.raises(UsageError, match="one number per query and row"):
        found("trak", training, Score(norms=("cosine",)))
    with pytest.raises(UsageError, match="dealt out evenly"):
        found("sjlt", training, dim=3, nonzeros=2)
    with pytest.raises(NumericalError, match="damping above zero"):
        found("trak", training, damping=0.0)
    with pytest.raises(UsageError, match="LESS needs training"):
        attribute("less", load_model(training.model)[0], CausalLM(tokenizer()), QUERIES, ROWS)
    with pytest.raises(UsageError, match="needs the training's checkpoints"):
        attribute("trackstar", load_model(training.model)[0], CausalLM(tokenizer()), QUERIES, ROWS, second_moment=True)
    monkeypatch.setattr("whence.train.checkpoints.Checkpoint.second_moments", lambda self: {})
    with pytest.raises(UsageError, match="no second moments of model.layers"):
        found("less", training)
    monkeypatch.setattr("whence.indexing.projected.WIDEST", 50)
    with pytest.raises(UsageError, match="a smaller dim, or a matrix for each module"):
        found("trak", training, dim=3, gram="joint")


def test_where_no_gradient_reaches_the_cosine_is_zero():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-10.0)
    rows = [(torch.tensor([1.0, 2.0]), 0), (torch.tensor([6.0, 5.0]), 1), (torch.tensor([7.0, 4.5]), 0)]
    for name in ("trackstar", "logra", "sjlt"):
        values = attribute(name, model, Classification(), rows[1:], rows).values
        assert (values[:, 0] == 0).all() and np.isfinite(values).all() and (values[:, 1:] != 0).all()
