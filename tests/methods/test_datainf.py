"""DataInf is the mean of the rows' damped inverses, module by module, however it is computed."""

import peft
import pytest
import torch
from distributed import work
from distributed.processes import run
from killing import killed_and_resumed
from models import llama, randomised, texts, tokenizer
from oracle import agree

from benchmarks.oracles.base import Case
from benchmarks.oracles.gradients import ORACLES
from whence.data import as_rows
from whence.errors import NumericalError
from whence.methods.base import attribute
from whence.settings import Score
from whence.tasks import CausalLM

ROWS, QUERIES = as_rows(texts(8, seed=1)), as_rows(texts(6, seed=2)[::2])


def adapted():
    """A model with LoRA of rank 2, both of whose factors are random."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(llama(), config).double().eval()
    return randomised(model)


def datainf(case, settings=Score(), **own):
    return attribute("datainf", case.model, case.task, case.queries, case.rows, settings, **own)


@pytest.mark.parametrize("kind", ["lora", "mlp"])
def test_it_is_its_oracle(kind, notes):
    model = adapted() if kind == "lora" else randomised(llama()).double().eval()
    case = Case(model, CausalLM(tokenizer()), ROWS, QUERIES, modules="lora" if kind == "lora" else None)
    for damping in (0.1, 3.0):
        found = datainf(case, damping=damping)
        agree(found.values, ORACLES["datainf"](case, damping=damping), 1e-9)
    assert found.unit == "nats per copy" and found.about["operator"].startswith("DataInf of 8 examples, damping 3")
    assert any("small blocks of LoRA" in text for text in notes) == (kind == "mlp")


def test_much_damping_makes_it_the_gradient_dot_product():
    case = Case(randomised(llama()).double().eval(), CausalLM(tokenizer()), ROWS, QUERIES)
    agree(1e9 * datainf(case, absolute_damping=1e9).raw, ORACLES["gradient-dot"](case), 1e-5)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    case = Case(randomised(llama()).eval(), CausalLM(tokenizer()), ROWS, QUERIES)
    seen = killed_and_resumed(lambda out: datainf(case, out=out), tmp_path, "score", at="begin")
    positions = sum(case.task.size(item) for item in case.task.encode(ROWS))
    assert seen.resumed["squares"] == seen.resumed["products"] == [positions], "both passes were complete"
    assert not (tmp_path / "killed" / "products").exists()


def test_several_processes_give_the_same():
    case = Case(randomised(llama()).double().eval(), CausalLM(tokenizer()), ROWS, QUERIES)
    for found in run(work.by_method, "datainf", ROWS, QUERIES):
        agree(found, datainf(case).values, 1e-9)


def test_a_module_without_gradients_is_named():
    model = adapted()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight.zero_()
    with pytest.raises(NumericalError, match="lora_B"):
        datainf(Case(model, CausalLM(tokenizer()), ROWS, QUERIES))
