"""What training moved is what is tracked: frozen weights, adapters of every kind, copies of modules that were trained."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from models import CASES, randomised, texts, tokenizer
from test_architectures import captured
from torch import Tensor, nn

import whence
from whence.attention import plain_attention
from whence.coverage import Coverage, cover
from whence.engine.matrices import GaussNewton
from whence.engine.point import Point, cover_default
from whence.engine.products import Weights
from whence.engine.stream import encode
from whence.errors import CoverageError
from whence.gradients import Dense
from whence.operators import Identity
from whence.tasks import CausalLM, Classification, Task

TARGETS = ["q_proj", "v_proj", "down_proj"]
LAYERS = "base_model.model.model.layers"


def adapted(config: peft.PeftConfig, case: str = "llama") -> nn.Module:
    """A tiny model with an adapter of random weights, as after training it."""
    model = peft.get_peft_model(CASES[case].model(), config).double().eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def gradients(model: nn.Module, task: Task, rows: Any) -> dict[str, Tensor]:
    """Of each row's log-likelihood for each trained parameter, `[B, ...]`, by plain autograd, one row at a time."""
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    each = [
        torch.autograd.grad(-task.losses(model, task.collate([item])).sum(), list(weights.values()), allow_unused=True)
        for item in encode(task, rows).items
    ]
    return {
        name: torch.stack([torch.zeros_like(weight) if row[number] is None else row[number] for row in each])
        for number, (name, weight) in enumerate(weights.items())
    }


def assert_all_tracked(model: nn.Module, coverage: Coverage, task: Task, rows: Any, tolerance: float = 1e-9) -> None:
    """All that training moved is tracked, and each row's gradient is autograd's."""
    expected, found = gradients(model, task, rows), captured(model, task, rows, coverage)
    assert coverage.share == 1.0 and coverage.left_out == {}
    assert coverage.parameters == sum(gradient[0].numel() for gradient in expected.values())
    gram = sum(gradient.flatten(1) @ gradient.flatten(1).T for gradient in expected.values())
    tracked = sum(gradient.flatten(1) @ gradient.flatten(1).T for gradient in found.values())
    torch.testing.assert_close(tracked, gram, rtol=tolerance, atol=tolerance * float(gram.abs().max()))


KINDS = {
    "lora": peft.LoraConfig(r=2, target_modules=TARGETS),
    "lora with biases": peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], bias="all", fan_in_fan_out=True),
    "rslora": peft.LoraConfig(r=2, target_modules=TARGETS, use_rslora=True),
    "dora": peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "embedding": peft.LoraConfig(r=2, target_modules=["embed_tokens", "up_proj"]),
    "dora on embeddings": peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True),
    "all-linear": peft.LoraConfig(r=2, target_modules="all-linear"),
    "head": peft.LoraConfig(r=2, target_modules=["lm_head"]),
    "modules to save": peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head", "embed_tokens", "norm"]),
    "trainable tokens": peft.LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices=[1, 4, 7]),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=2, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=2, target_modules=TARGETS),
    "vera": peft.VeraConfig(r=2, target_modules=["up_proj"]),
    "adalora": peft.AdaLoraConfig(init_r=3, target_modules=TARGETS, total_step=10),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "oft": peft.OFTConfig(oft_block_size=2, r=0, target_modules=["up_proj"]),
    "hra": peft.HRAConfig(r=2, target_modules=["up_proj"]),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=2, topk=2, target_modules=["up_proj"]),
    "tiny lora": peft.TinyLoraConfig(r=2, weight_tying=1.0, target_modules=["up_proj"]),
    "fourier": peft.FourierFTConfig(n_frequency=5, target_modules=["up_proj"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_all_that_an_adapter_trained_is_tracked(kind):
    model, task = adapted(KINDS[kind], "gpt2" if "biases" in kind else "llama"), CausalLM(tokenizer())
    coverage = cover_default(model, task, None)
    norms = kind in ("norms", "modules to save", "lora with biases")  # which some models compute in float32
    assert_all_tracked(model, coverage, task, texts(6, seed=1), 1e-5 if norms else 1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["up_proj"], trainable_token_indices=[1, 4, 7]),
        peft.LoraConfig(r=2, target_modules=["embed_tokens", "up_proj"]),
        peft.LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["embed_tokens"]),
    ],
    ids=["tokens", "embedding", "copies"],
)
def test_all_that_was_trained_beside_a_tied_head_is_tracked(config):
    model, task = adapted(config, "llama-tied"), CausalLM(tokenizer())
    assert_all_tracked(model, cover_default(model, task, None), task, texts(6, seed=1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_of_convolutions_are_tracked(use_dora):
    model = adapted(peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["8"], use_dora=use_dora), "conv")
    case = CASES["conv"]
    assert_all_tracked(model, cover_default(model, case.task(), None), case.task(), case.train(6))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_two_adapters_in_use_are_tracked_both(kind):
    model, task = adapted(KINDS[kind]), CausalLM(tokenizer())
    model.add_adapter("second", KINDS[kind])
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "second" in name:
            torch.nn.init.normal_(parameter)
    coverage = cover_default(model.double(), task, None)
    assert {name.split(".")[-1] for name in coverage.sites} == {"default", "second"}
    assert_all_tracked(model, coverage, task, texts(6, seed=1))


@pytest.mark.filterwarnings("ignore")
def test_the_head_of_a_sequence_classifier_is_tracked():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=20, num_labels=3, pad_token_id=1, max_position_embeddings=32, **sizes)
    model = randomised(LlamaForSequenceClassification(config)).double().eval()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="SEQ_CLS")).double().eval()
    task = Classification(tokenizer())
    rows = [{"text": " ".join(row.values()), "label": number % 3} for number, row in enumerate(texts(5, seed=3))]
    coverage = cover_default(model, task, None)
    assert "base_model.model.score.modules_to_save.default" in coverage.sites
    assert_all_tracked(model, coverage, task, rows)


@pytest.mark.parametrize("conversion", [{"bias": True}, {"weight": True}])
@pytest.mark.parametrize("case", ["mlp", "conv", "norms"])
def test_of_a_layer_only_what_was_trained_is_tracked(case, conversion):
    model, task, rows = CASES[case].model(), CASES[case].task(), CASES[case].train(6)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] in conversion)
    coverage = cover_default(model, task, "trained")
    assert_all_tracked(model, coverage, task, rows)
    if case == "mlp":
        assert [site.shape for site in coverage.sites.values()] == (
            [(7, 1), (6, 1), (4, 1)] if "bias" in conversion else [(7, 5), (6, 7), (4, 6)]
        )
        curvature = whence.fit(model, task, rows)
        assert set(curvature.blocks) == set(coverage.sites)
        assert whence.score(model, task, rows[:2], rows, curvature.inverse()).raw.shape == (2, 6)


def test_frozen_layers_are_not_tracked(notes):
    model, task, rows = CASES["llama"].model(), CASES["llama"].task(), texts(6, seed=1)
    model.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    coverage = cover_default(model, task, None)
    assert set(coverage.sites) == {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert_all_tracked(model, coverage, task, rows)
    assert str(coverage) == "3 modules tracked, 100.0% of 240 parameters that training moved, 984 are frozen"


def test_a_default_that_would_miss_most_is_all_that_was_trained():
    model, task, rows = CASES["llama"].model(), CASES["llama"].task(), texts(6, seed=1)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    coverage = cover_default(model, task, None)
    assert list(coverage.sites) == ["lm_head"]
    assert_all_tracked(model, coverage, task, rows)


def test_a_selector_takes_what_was_trained_and_a_name_what_it_names(notes):
    case = CASES["llama"]
    model = case.model()
    model.model.layers[0].requires_grad_(False)
    assert {name.split(".")[2] for name in cover(model, "all").sites} == {"1"}
    assert {name.split(".")[2] for name in cover(model, "*.mlp.*").sites} == {"1"}
    named = Point(model, case.task(), texts(4, seed=1)).cover("model.layers.0.mlp.up_proj,model.layers.1.mlp.up_proj")
    assert list(named.sites) == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert named.frozen_sites == ("model.layers.0.mlp.up_proj",)
    assert notes == [
        "warning: training left 1 of 2 tracked modules as they were (model.layers.0.mlp.up_proj the first): what is found "
        "there moved nothing"
    ]
    with pytest.raises(CoverageError, match=r"that training moved matches 'attention'") as raised:
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        cover(model, "attention")
    assert "Linear 160" in str(raised.value) and "modules='model.layers.0.self_attn.k_proj'" in str(raised.value)


def test_a_model_that_is_frozen_to_be_used_counts_as_trained():
    model = CASES["llama"].model()
    before = cover(model, "mlp")
    assert cover(model.requires_grad_(False), "mlp") == before


@pytest.mark.filterwarnings("ignore")
def test_of_adapters_those_in_use_count():
    model, task = adapted(KINDS["lora"]), CausalLM(tokenizer())
    alone = cover_default(model, task, None)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["up_proj"]))
    assert cover_default(model, task, None).sites.keys() == alone.sites.keys()
    model.requires_grad_(False)  # as PeftModel.from_pretrained leaves it
    again = cover_default(model, task, None)
    assert again.sites.keys() == alone.sites.keys() and again.share == 1.0
    model.set_adapter("second")
    assert all(".second" in name and "up_proj" in name for name in cover_default(model, task, None).sites)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_were_loaded_to_be_used_count_beside_copies(tmp_path):
    made, task = adapted(KINDS["modules to save"]), CausalLM(tokenizer())
    made.save_pretrained(tmp_path / "adapter")
    expected = {name.removeprefix("base_model.model.") for name in cover_default(made, task, None).sites}
    model = CASES["llama"].model()
    model.load_adapter(str(tmp_path / "adapter"))  # transformers' own way freezes LoRA, not the copies
    flags = {
        "lora" in name: weight.requires_grad
        for name, weight in model.named_parameters()
        if "modules_to" in name or "lora" in name
    }
    assert flags == {True: False, False: True}
    found = cover_default(model, task, None)
    assert set(found.sites) == expected and found.share == 1.0


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_are_merged_or_off_are_refused():
    model, task = adapted(KINDS["lora"]), CausalLM(tokenizer())
    model.merge_adapter()
    with pytest.raises(CoverageError, match=r"q_proj are merged into its weight(.|\n)*model.unmerge_adapter\(\)"):
        cover_default(model, task, None)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(CoverageError, match=r"are switched off(.|\n)*model.enable_adapter_layers\(\)"):
        cover_default(model, task, None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "prompt tuning"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "prefix tuning"),
        (peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "p tuning"),
    ],
)
def test_learned_prompts_are_refused_by_name(config, kind):
    model = peft.get_peft_model(CASES["llama"].model(), config)
    with pytest.raises(CoverageError, match=rf"default is learned prompts \({kind}\)"):
        whence.fit(model, CausalLM(tokenizer()), texts(4, seed=1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "case", "match"),
    [
        (
            peft.LoraConfig(r=2, target_modules=["wte", "wpe"]),
            "gpt2",
            "wpe.lora_embedding_A.default computes can't be told",
        ),
        (peft.ShadowConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "llama", "gives a ShadowCarrier, where"),
    ],
)
def test_layers_of_adapters_without_a_tensor_for_each_row_are_refused_with_a_selector(config, case, match):
    model, task, rows = adapted(config, case), CausalLM(tokenizer()), texts(4, seed=1)
    with pytest.raises(CoverageError, match=match) as raised:
        whence.fit(model, task, rows)
    rest = raised.value.fix.partition("--modules '")[2].partition("'")[0]
    assert "wpe" not in rest
    whence.fit(model, task, rows, modules=rest) if case == "gpt2" else None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "match"),
    [
        (peft.PolyConfig(task_type="CAUSAL_LM", n_tasks=1, target_modules=["q_proj"]), "needs the number of a task"),
        (peft.LoraConfig(target_modules=[], target_parameters=["mlp.up_proj.weight"]), "target_parameters: mlp.up_proj.weight"),
    ],
    ids=["poly", "parameters"],
)
def test_adapters_by_task_or_of_parameters_are_refused_by_name(config, match):
    model = peft.get_peft_model(CASES["llama"].model(), config)
    with pytest.raises(CoverageError, match=match):
        whence.fit(model, CausalLM(tokenizer()), texts(4, seed=1))


@pytest.mark.filterwarnings("ignore")
def test_adapters_in_no_layer_are_refused_by_name():
    config = peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(CASES["llama"].model(), config)
    with pytest.raises(CoverageError, match=r"(.|\n)*AdaptedAttention"):
        whence.fit(model, CausalLM(tokenizer()), texts(4, seed=1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["modules to save", "dora", "embedding", "ia3", "lokr"])
def test_scores_of_an_adapter_are_products_of_all_its_gradients(kind):
    model, task, rows = adapted(KINDS[kind]), CausalLM(tokenizer()), texts(6, seed=1)
    expected = gradients(model, task, rows)
    gram = sum(gradient.flatten(1) @ gradient.flatten(1).T for gradient in expected.values())
    asked = [number for number, row in enumerate(rows) if "completion" in row]
    queries = [rows[number] for number in asked]
    names = list(cover_default(model, task, None).sites)
    found = torch.from_numpy(whence.score(model, task, queries, rows, Identity(names)).raw).double()
    torch.testing.assert_close(found, gram[asked], rtol=1e-4, atol=1e-5 * float(gram.abs().max()))
    curvature = whence.fit(model, task, rows, labels="data")
    assert sorted(curvature.blocks) == sorted(names) and curvature.about["share"] == 1.0
    assert bool((whence.score(model, task, queries, rows, curvature.inverse()).raw != 0).all())


def test_weights_too_wide_for_a_covariance_are_left_out_and_named(monkeypatch, notes):
    monkeypatch.setattr("whence.engine.point.WIDE", 15)
    model = adapted(peft.LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["lm_head"]))
    coverage = cover_default(model, CausalLM(tokenizer()), None)
    assert all(".lora_" in name for name in coverage.sites) and coverage.share < 0.5
    assert notes[0].startswith("base_model.model.lm_head.modules_to_save.default left out, which training moved, too: 20 wide")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["embedding", "ia3", "dora"])
def test_products_with_the_gauss_newton_matrix_are_those_of_all_that_was_trained(kind):
    model, task, rows = adapted(KINDS[kind]), CausalLM(tokenizer()), texts(5, seed=1)
    names = list(cover_default(model, task, None).sites)
    point = Point(model, task, rows)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {name: torch.randn_like(parameter) for name, parameter in weights.items()}
    product = GaussNewton(point, names)
    sites = product.sites
    vectors = Weights(model, sites)
    blocks = vectors.gather({name: moved[name].unsqueeze(0) for name in vectors.values})
    found = product @ {name: Dense(w_KOI) for name, w_KOI in blocks.items()}
    along = sum(float((found[name].dense().w_BOI * blocks[name]).sum()) for name in names)
    expected = 0.0
    for item in encode(task, rows).items:
        batch = task.collate([item])

        def logits(values, batch=batch):
            with plain_attention():
                return torch.func.functional_call(model, values, (), {"input_ids": batch["input_ids"]}).logits[0]

        detached = {name: parameter.detach() for name, parameter in weights.items()}
        out, tangent = torch.func.jvp(logits, (detached,), (moved,))
        counted = batch["labels"][0] != -100
        p_TV, u_TV = out.softmax(-1), tangent
        u_TV = u_TV - (p_TV * u_TV).sum(-1, keepdim=True)
        expected += float((p_TV * u_TV.square()).sum(-1)[counted].sum()) / len(rows)
    assert along == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_a_plan_knows_adapters(kind):
    model, task = adapted(KINDS[kind]).float(), CausalLM(tokenizer())
    layers = model.get_base_model().model
    layers.layers = layers.layers[:1]  # as much is asked of one, and rehearsed twice as quickly
    planned = whence.plan(model, task, texts(6, seed=1), queries=2, calibrate=False)
    assert {stage.name for stage in planned.stages} >= {"eigenvalues", "score"}
