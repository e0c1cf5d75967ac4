"""A rehearsal counts the bytes that are alive and the FLOPs of the engine, which are those of the formulas."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import whence
from whence import cost
from whence.planning.machine import Machine, assumed, kernel_of
from whence.planning.planner import forward_and_back
from whence.planning.rehearsal import Rehearsal
from whence.planning.scoring import ask, score_rows
from whence.progress import stage

EXAMPLES, QUERIES, DIM = 3, 5, 4
WEIGHTS = [(16, 8, 3), (8, 8, 3), (8, 8, 3), (8, 16, 1), (20, 8, 2), (20, 8, 2), (8, 20, 1)]
"""Outputs, inputs, and how many read the same input: queries, keys, values, output; gate, up, down."""


@pytest.fixture
def rehearsed(tiny_tokenizer):
    """What counts the FLOPs of each stage of a run on a small Llama; its rows, queries, and the positions of each."""
    config = LlamaConfig(
        vocab_size=tiny_tokenizer.vocab_size,
        hidden_size=8,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    task = whence.CausalLM(tiny_tokenizer)
    row = "The old harbour of Lyon is quiet in the morning."
    rehearsal = Rehearsal(model, task, "cpu")

    def flops(work, last=""):
        seen, result = rehearsal.run(work, last=last)
        return {name: each.flops for name, each in seen.items()}, result

    return (
        flops,
        [{"text": row}] * EXAMPLES,
        [{"prompt": "", "completion": row}] * QUERIES,
        task.size(task.encode([{"text": row}])[0]),
    )


def test_flops_are_those_of_the_formulas(rehearsed, tiny_tokenizer):
    flops, rows, queries, tokens = rehearsed
    to = {"precision": whence.Precision(products="float32")}
    counted, operator = flops(
        lambda model, task: whence.fit(model, task, rows, modules="all", examples="all", disjoint=False, **to).inverse()
    )
    counted |= flops(lambda model, task: forward_and_back(model, task, ["all"], rows, "float32"))[0]
    counted |= flops(lambda model, task: whence.build_index(model, task, rows, modules="all", dim=DIM, **to))[0]
    counted["self"] = flops(lambda model, task: whence.self_influence(model, task, rows, operator, **to), "score")[0]["score"]
    counted |= flops(lambda model, task: whence.score(model, task, queries, rows, operator, **to), "score")[0]

    matrices = sum(n_out * n_in for n_out, n_in, _ in WEIGHTS) + tiny_tokenizer.vocab_size * 8
    first = sum(n_out * n_in for n_out, n_in, _ in WEIGHTS[:3])  # nothing before them asks for a gradient
    floor = 2 * tokens * (2 * matrices - first) + (4 + 10) * tokens**2 * 16
    sides = [8, 16, 8, 20, *(n_out for n_out, _, _ in WEIGHTS)]  # an input that several read counts once
    rotation = sum(cost.rotation(tokens, n_out, n_in, shared=shared).flops for n_out, n_in, shared in WEIGHTS)
    back = sum(2 * n_out * n_in * (n_out + n_in) for n_out, n_in, _ in WEIGHTS)
    products = sum(cost.product(QUERIES, None, tokens, n_out, n_in).flops for n_out, n_in, _ in WEIGHTS)
    expected = {
        "floor": EXAMPLES * floor,
        "covariance": EXAMPLES * (floor + sum(2 * tokens * side**2 for side in sides)),  # too narrow for panels
        "eigenvectors": 9 * sum(side**3 for side in sides),
        "eigenvalues": EXAMPLES * (floor + rotation),
        "queries": QUERIES * (floor + rotation + back),
        "score": EXAMPLES * (floor + products),
        "self": EXAMPLES * (floor + rotation),
        "index": EXAMPLES * (floor + 2 * tokens * DIM * (sum(sides) + len(WEIGHTS) * DIM)),
    }
    assert counted == pytest.approx(expected, rel=0.01)  # the angles of the positions, and norms, come on top


@pytest.mark.parametrize("rank", [None, 1])
def test_the_passes_of_score_apart_are_those_of_score(tiny_llama, tiny_tokenizer, rank):
    task = whence.CausalLM(tiny_tokenizer)
    rows = [{"text": "The old harbour of Lyon is quiet in the morning."}] * EXAMPLES
    queries = [{"prompt": "Where was Ada", "completion": " Velt born?"}] * QUERIES
    rehearsal, precision = Rehearsal(tiny_llama, task, "cpu"), whence.Precision(products="float32")
    given = {"rank": rank, "precision": precision, "batch_tokens": 64}
    _, operator = rehearsal.run(lambda model, task: whence.fit(model, task, rows, examples="all", disjoint=False).inverse(0.1))
    whole, _ = rehearsal.run(lambda model, task: whence.score(model, task, queries, rows, operator, **given), last="score")
    parts, asked = rehearsal.run(lambda model, task: ask(model, task, queries, operator, **given))
    parts |= rehearsal.run(lambda model, task: score_rows(model, task, rows, asked, precision, 64))[0]
    for name, held in whole.items():
        assert parts[name].seconds == pytest.approx(held.seconds) and parts[name].flops == held.flops
        assert parts[name].peak == pytest.approx(held.peak, rel=0.01) and parts[name].kept == pytest.approx(held.kept, rel=0.01)


def test_a_rehearsal_counts_what_is_alive_and_no_numbers(tiny_tokenizer):
    def work(model, task):
        with stage("work", 1):
            kept = torch.zeros(1000)
            passing = torch.zeros(500) + 1  # two at a time
            del passing
            return kept

    seen, kept = Rehearsal(torch.nn.Linear(3, 3), whence.CausalLM(tiny_tokenizer), "cpu").run(work)
    assert seen["work"].peak.all == 4 * (1000 + 500 + 500)
    assert seen["work"].kept.all == kept.nbytes == 4000
    assert seen["work"].seconds == pytest.approx(4 * (1000 + 500 + 1000) / assumed("cpu").move)


def test_kernels_are_weighed_by_their_narrowest_side_and_by_what_they_move():
    aten = torch.ops.aten
    a, b = torch.zeros(6, 100), torch.zeros(100, 50)
    product = kernel_of(aten.mm.default, (a, b), {}, a @ b)
    assert (product.flops, product.width, product.moved) == (2 * 6 * 100 * 50, 6, 4 * (600 + 5000 + 300))
    same = a[:1].expand(1000, 100)
    assert kernel_of(aten.neg.default, (same,), {}, -same).moved == 4 * (600 + 100_000)
    table, picked = torch.zeros(1000, 8), torch.arange(3)
    assert kernel_of(aten.embedding.default, (table, picked), {}, table[picked]).moved == 2 * 4 * 24
    x = torch.eye(7).expand(3, 7, 7)
    solved = kernel_of(aten._linalg_eigh.default, (x,), {}, torch.linalg.eigh(x))
    assert (solved.flops, solved.width) == (3 * 9 * 7**3, 7) and solved.decomposes

    machine = Machine({torch.float32: ((10, 1e9), (1000, 4e9))}, 1e6, ((10, 1e3),))
    assert machine.seconds(product) == product.moved / 1e6
    assert machine.seconds(solved) == pytest.approx(solved.flops / 1e3)
    wide = kernel_of(aten.mm.default, (torch.zeros(100, 100),) * 2, {}, torch.zeros(100, 100))
    assert Machine(machine.multiply, 1e12, ()).seconds(wide) == pytest.approx(2e6 / 2e9)  # half way in logarithms
