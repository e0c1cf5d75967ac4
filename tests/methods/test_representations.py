"""Hidden states and embeddings: the same as text by text, with the model given back as it was."""

import numpy as np
import pytest
import torch
from distributed import work
from distributed.processes import run
from killing import killed_and_resumed
from models import CASES, llama, named, randomised, texts, tokenizer
from oracle import agree
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5Model

from benchmarks.oracles.base import Case
from benchmarks.oracles.representations import ORACLES
from whence.data import as_rows
from whence.errors import ModelNotFound, NumericalError, StaleArtifact, UsageError
from whence.filter.embeddings import embedding_scores
from whence.methods.base import attribute
from whence.models import load_encoder
from whence.settings import Score
from whence.tasks import CausalLM

ROWS, QUERIES = as_rows(texts(8, seed=1)), as_rows(texts(6, seed=2)[::2])


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_it_is_its_oracle(method, kind):
    model = CASES[kind].model().train()
    case = Case(model, CausalLM(tokenizer(), padding_side="left" if kind == "neox" else "right"), ROWS, QUERIES)
    found = attribute(method, model, case.task, QUERIES, ROWS)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    agree(found.values, ORACLES[method](Case(model.eval(), case.task, ROWS, QUERIES)), 1e-5)
    assert found.unit == ("CKA" if method == "cka" else "cosine") and np.abs(found.values).max() <= 1 + 1e-6


@pytest.mark.parametrize("case", named("mlp", "conv", "attention"), ids=lambda case: case.name)
def test_classifiers_are_compared_by_what_their_head_reads(case):
    model = case.model()
    found = attribute("representation-similarity", model, case.task(), case.queries(), case.train())
    read = []
    head = next(module for module in reversed(list(model.modules())) if isinstance(module, torch.nn.Linear))
    handle = head.register_forward_hook(lambda module, args, output: read.append(args[0][0]))
    for x, _ in [*case.queries(), *case.train()]:
        model(x[None])
    handle.remove()
    unit = torch.nn.functional.normalize(torch.stack(read).detach(), dim=1)
    agree(found.values, unit[:3] @ unit[3:].T, 1e-12)


def test_a_killed_pass_resumes_to_the_same_bits(tmp_path):
    given = (randomised(llama()), CausalLM(tokenizer()), QUERIES, ROWS, Score(batch_tokens=8))
    seen = killed_and_resumed(lambda out: attribute("cka", *given, out=out), tmp_path, "representations", 5)
    assert seen.resumed["representations"][-1] > 0 and not (tmp_path / "killed" / "representations").exists()


def test_several_processes_give_the_same():
    model = randomised(llama()).double().eval()
    for method in ("representation-similarity", "embedding-knn"):
        expected = attribute(method, model, CausalLM(tokenizer()), QUERIES, ROWS).values
        for found in run(work.by_method, method, ROWS, QUERIES):
            agree(found, expected, 1e-12)


def test_rows_that_are_not_finite_are_named():
    model = CASES["mlp"].model()
    rows = CASES["mlp"].train()
    rows[4] = (torch.full((5,), torch.nan).double(), 0)
    with pytest.raises(NumericalError, match="1 of 14"):
        attribute("representation-similarity", model, CASES["mlp"].task(), CASES["mlp"].queries(), rows)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def text_of(row):
    return row.get("text", row.get("prompt", "") + row.get("completion", ""))


def test_an_encoder_of_your_own(encoder, tmp_path):
    given = (llama(), CausalLM(tokenizer()), QUERIES, ROWS)
    found = attribute("embedding-knn", *given, encoder=str(encoder), out=tmp_path / "scores")
    model, words = load_encoder(encoder)

    def embed(sentences):
        with torch.no_grad():
            each = [model(**words(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in sentences]
        return torch.stack(each).numpy()

    agree(found.values, embedding_scores(QUERIES, ROWS, embed).raw, 1e-5)
    sides = {"queries": embed(map(text_of, QUERIES)), "rows": embed(map(text_of, ROWS))}
    order = np.random.default_rng(0).permutation(len(ROWS))
    np.save(tmp_path / "queries.npy", sides["queries"])
    np.savez(tmp_path / "rows.npz", ids=np.array(ROWS.ids)[order], embeddings=sides["rows"][order])
    files = {"queries_file": str(tmp_path / "queries.npy"), "rows_file": str(tmp_path / "rows.npz")}
    near = attribute("embedding-knn", *given, distance="euclidean", out=tmp_path / "near", **files)
    apart = np.linalg.norm(sides["queries"][:, None] - sides["rows"], axis=-1)
    agree(near.values, -apart, 1e-5)
    assert near.unit == "minus the distance"
    np.save(tmp_path / "queries.npy", sides["queries"] + 1)
    with pytest.raises(StaleArtifact, match="read"):
        attribute("embedding-knn", *given, distance="euclidean", out=tmp_path / "near", **files)


def test_files_that_are_no_embeddings_are_refused(tmp_path):
    given = (llama(), CausalLM(tokenizer()), QUERIES, ROWS)
    np.save(tmp_path / "few.npy", np.ones((3, 4)))
    np.save(tmp_path / "words.npy", np.full((8, 4), "1"))
    np.savez(tmp_path / "twice.npz", ids=np.array([*ROWS.ids, ROWS.ids[0]]), embeddings=np.ones((9, 4)))
    np.savez(tmp_path / "others.npz", ids=np.array(["a"]), embeddings=np.ones((1, 4)))
    (tmp_path / "text.npy").write_text("no array")
    refused = {
        "few.npy": "one embedding for each",
        "others.npz": "none for",
        "text.npy": "can't be read",
        "gone.npy": "no file",
    }
    refused |= {"words.npy": "of <U1", "twice.npz": "1 ids stand there twice"}
    for name, said in refused.items():
        with pytest.raises(UsageError, match=said):
            attribute("embedding-knn", *given, rows_file=str(tmp_path / name))
    with pytest.raises(UsageError, match="can't be compared"):
        np.save(tmp_path / "rows.npy", np.ones((8, 4)))
        attribute("embedding-knn", *given, rows_file=str(tmp_path / "rows.npy"))


SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def saved(model, folder, change=lambda weights: weights):
    """A folder with the model, its weights changed in the file."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return str(folder)


def knn(encoder):
    return attribute("embedding-knn", llama(), CausalLM(tokenizer()), QUERIES, ROWS, encoder=encoder).values


def test_encoders_are_whole_or_refused(tmp_path):
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=20, **SIZES))
    lost = "encoder.layer.0.output.dense.weight"
    with pytest.raises(ModelNotFound, match=f"1 weights of the model are not there: {lost}"):
        knn(saved(model, tmp_path / "a", lambda weights: {name: each for name, each in weights.items() if name != lost}))
    wrapped = saved(model, tmp_path / "b", lambda weights: {f"module.{name}": each for name, each in weights.items()})
    agree(knn(wrapped), knn(saved(model, tmp_path / "c")), 1e-6)
    few = BertModel(BertConfig(vocab_size=5, **SIZES))
    with pytest.raises(UsageError, match="which the model has no embedding for"):
        knn(saved(few, tmp_path / "d"))


def test_encoders_of_other_kinds(tmp_path):
    torch.manual_seed(0)
    assert np.isfinite(knn(saved(BertForMaskedLM(BertConfig(vocab_size=20, **SIZES)), tmp_path / "a"))).all()
    short = BertModel(BertConfig(vocab_size=20, max_position_embeddings=4, **SIZES))
    assert np.isfinite(knn(saved(short, tmp_path / "b"))).all()  # texts are cut where it has no positions
    t5 = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5Model(t5).save_pretrained(tmp_path / "c")
    tokenizer().save_pretrained(tmp_path / "c")
    assert np.isfinite(knn(str(tmp_path / "c"))).all()
