"""How models and their wrappers are called, and what of their outputs are logits."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from models import CASES, texts, tokenizer
from torch import nn

import whence
from whence.coverage import cover
from whence.engine.point import Point
from whence.errors import CoverageError, UsageError
from whence.operators import Identity
from whence.tasks import CausalLM, Classification, Regression
from whence.tasks.forward import accepted, unwrapped


class Anything(nn.Module):
    """Hands on whatever it is given."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Named(Anything):
    """Names its first argument only."""

    def forward(self, input_ids, **kwargs):
        return self.model(input_ids, **kwargs)


class Beside(Anything):
    """Has something beside the model."""

    def __init__(self, model):
        super().__init__(model)
        self.probe = nn.Linear(2, 2).double()


class Logits(Anything):
    """Gives the logits alone."""

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs).logits


class Deep(nn.Module):
    """Has the model in a list, as members of an ensemble are kept."""

    def __init__(self, model):
        super().__init__()
        self.parts = nn.ModuleDict({"list": nn.ModuleList([nn.Dropout(), model])})

    def forward(self, *args, **kwargs):
        return self.parts["list"][1](*args, **kwargs)


class Dropping(Anything):
    """Takes what it names, and no positions."""

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask=attention_mask)


WRAPPERS = {
    "deep": Deep,
    "anything": Anything,
    "named": Named,
    "beside": Beside,
    "twice": lambda model: Anything(Anything(model)),
    "logits": Logits,
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled wrapper": lambda model: torch.compile(Anything(model), backend="eager"),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_changes_no_score(wrap, side):
    model, rows = CASES["llama"].model(), texts(6, seed=1)
    task = CausalLM(tokenizer(), padding_side=side)
    names = list(cover(model, "all").sites)
    expected = whence.score(model, CausalLM(tokenizer()), rows[::2], rows, Identity(names)).raw
    wrapped = wrap(model)
    assert unwrapped(wrapped) is model and {"attention_mask", "position_ids"} <= accepted(wrapped)
    found = [name for name in Point(wrapped, task).cover("all").sites if "probe" not in name]
    assert not any("lm_head" in name for name in found) and len(found) == len(names)
    again = whence.score(wrapped, task, rows[::2], rows, Identity(found))
    torch.testing.assert_close(torch.from_numpy(again.raw), torch.from_numpy(expected), rtol=1e-5, atol=1e-7)


def test_a_wrapper_that_drops_positions_is_refused_where_they_matter():
    model, rows = CASES["llama"].model(), texts(6, seed=1)
    left, right = CausalLM(tokenizer(), padding_side="left"), CausalLM(tokenizer())
    with pytest.raises(UsageError, match=r"Dropping does not hand on position_ids(.|\n)*padding_side=\"right\""):
        left.losses(Dropping(model), left.collate(left.encode(rows)))
    batch = right.collate(right.encode(rows))
    torch.testing.assert_close(right.losses(Dropping(model), batch), right.losses(model, batch))


def test_names_are_those_of_the_model_that_was_compiled():
    model, task = CASES["llama"].model(), CausalLM(tokenizer())
    names = list(whence.fit(model, task, texts(4, seed=1), modules="mlp", method="identity").blocks)
    for wrap in ("compiled", "data parallel"):
        wrapped = WRAPPERS[wrap](model)
        assert list(whence.fit(wrapped, task, texts(4, seed=1), modules="mlp", method="identity").blocks) == names


def test_layers_that_are_compiled_run_as_they_are():
    model, task, rows = CASES["llama"].model(), CausalLM(tokenizer()), texts(6, seed=1)
    expected = whence.score(model, task, rows[::2], rows, Identity(list(cover(model, "mlp").sites))).raw
    model.model.layers[0].compile(backend="eager")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    found = whence.score(model, task, rows[::2], rows, Identity(list(cover(model, "mlp").sites))).raw
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected), rtol=1e-6, atol=1e-8)
    assert model.model.layers[0]._compiled_call_impl is not None


@dataclass
class Prediction:
    """An output that has no logits."""

    scores: torch.Tensor


OUTPUTS = {
    "tensor": lambda logits: logits,
    "tuple": lambda logits: (logits, None),
    "with a loss": lambda logits: (logits.sum(), logits),
    "dict": lambda logits: {"loss": None, "logits": logits},
    "object": lambda logits: SimpleNamespace(logits=logits),
}


class Giving(nn.Module):
    """A classifier with an output of its own."""

    def __init__(self, give):
        super().__init__()
        self.inner, self.give = CASES["mlp"].model(), give

    def forward(self, x):
        return self.give(self.inner(x))


@pytest.mark.parametrize("give", OUTPUTS.values(), ids=OUTPUTS)
def test_logits_are_found_in_what_a_model_gives(give):
    task, rows = Classification(), CASES["mlp"].train(5)
    batch = task.collate(rows)
    torch.testing.assert_close(task.losses(Giving(give), batch), task.losses(CASES["mlp"].model(), batch))


@pytest.mark.parametrize("give", OUTPUTS.values(), ids=OUTPUTS)
def test_logits_are_found_in_what_a_language_model_gives(give):
    class Own(Anything):
        def forward(self, *args, **kwargs):
            return give(self.model(*args, **kwargs).logits)

    model, task = CASES["llama"].model(), CausalLM(tokenizer(), padding_side="left")
    batch = task.collate(task.encode(texts(5, seed=1)))
    torch.testing.assert_close(task.losses(Own(model), batch), task.losses(model, batch))


def test_a_model_that_returns_tuples_is_scored_as_others_are():
    model, task = CASES["llama"].model(), CausalLM(tokenizer())
    batch = task.collate(task.encode(texts(5, seed=1)))
    expected = task.losses(model, batch)
    model.config.return_dict = False
    torch.testing.assert_close(task.losses(model, batch), expected)


@pytest.mark.parametrize(
    ("give", "given"),
    [
        (lambda logits: {"scores": logits}, "a dict with scores"),
        (lambda logits: Prediction(logits), "a Prediction with scores"),
        (lambda logits: (None, logits.argmax(-1, keepdim=True)), "a tuple"),
        (lambda logits: SimpleNamespace(logits=None), "SimpleNamespace"),
        (lambda logits: None, "a NoneType"),
    ],
)
def test_what_gives_no_logits_is_refused(give, given):
    with pytest.raises(UsageError, match=f"Giving gives no logits(.|\n)*given +{given}"):
        whence.fit(Giving(give), Classification(), CASES["mlp"].train(5))


def test_hidden_states_are_not_taken_for_logits():
    with pytest.raises(UsageError, match="LlamaModel gives no logits(.|\n)*last_hidden_state(.|\n)*AutoModelForCausalLM"):
        whence.fit(CASES["llama"].model().model, CausalLM(tokenizer()), texts(5, seed=1))


@pytest.mark.parametrize("task", [Classification(), Classification(measurement="margin")])
def test_probabilities_are_not_taken_for_logits(task):
    rows = CASES["mlp"].train(5)
    with pytest.raises(UsageError, match=r"Sequential gives probabilities(.|\n)*add up to 1"):
        whence.fit(nn.Sequential(CASES["mlp"].model(), nn.Softmax(-1)), task, rows)
    whence.fit(nn.Sequential(CASES["mlp"].model(), nn.LogSoftmax(-1)), task, rows)
    targets = [(x, torch.tensor([0.1, 0.2, 0.3, 0.4]).double()) for x, _ in rows]
    whence.fit(nn.Sequential(CASES["mlp"].model(), nn.Softmax(-1)), Regression(), targets)


def test_probabilities_of_a_language_model_are_refused():
    class Own(Anything):
        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs).logits.softmax(-1)

    with pytest.raises(UsageError, match="Own gives probabilities"):
        whence.fit(Own(CASES["llama"].model()), CausalLM(tokenizer()), texts(5, seed=1))


def test_one_class_is_no_choice():
    model = nn.Sequential(CASES["mlp"].model(), nn.Linear(4, 1)).double()
    with pytest.raises(UsageError, match=r"not one number per class(.|\n)*two classes or more"):
        whence.fit(model, Classification(), [(x, 0) for x, _ in CASES["mlp"].train(5)])


def test_inference_mode_is_refused():
    model, task, rows = CASES["mlp"].model(), Classification(), CASES["mlp"].train(5)
    with torch.inference_mode(), pytest.raises(CoverageError, match="outside of torch.inference_mode"):
        whence.fit(model, task, rows)
    with torch.no_grad():
        whence.fit(model, task, rows)
    with torch.inference_mode():
        made = CASES["mlp"].model()
    with pytest.raises(CoverageError, match="0.weight was made under torch.inference_mode"):
        whence.fit(made, task, rows)


@pytest.mark.filterwarnings("ignore")
def test_scripted_models_are_refused():
    model, rows = CASES["mlp"].model(), CASES["mlp"].train(5)
    with pytest.raises(CoverageError, match="The model is scripted"):
        whence.fit(torch.jit.script(model), Classification(), rows)
    with pytest.raises(CoverageError, match="0 is scripted"):
        whence.fit(nn.Sequential(torch.jit.script(model), nn.Linear(4, 4).double()), Classification(), rows)


def test_lazy_layers_are_refused_until_they_ran():
    model, rows = nn.Sequential(nn.LazyLinear(4)).double(), CASES["mlp"].train(5)
    with pytest.raises(CoverageError, match="0.weight has no shape yet"):
        whence.fit(model, Classification(), rows)
    model(rows[0][0][None])
    assert list(whence.fit(model, Classification(), rows).blocks) == ["0"]


@pytest.mark.parametrize("part", [slice(None), slice(2, 3)])
def test_weights_that_are_not_there_are_refused(tmp_path, part):
    model = CASES["mlp"].model()
    for layer in model[part]:
        layer.to("meta")
    name = "0.weight" if part == slice(None) else "2.weight"
    for out in (None, tmp_path / "factors"):
        with pytest.raises(CoverageError, match=rf"{name} has no numbers(.|\n)*meta"):
            whence.fit(model, Classification(), CASES["mlp"].train(5), out=out)


def test_tokens_without_an_embedding_are_refused_by_row():
    words = copy.deepcopy(tokenizer())
    words.add_tokens(["<new>"])
    rows = [*texts(4, seed=1), {"text": "w1 w2 <new> w3"}]
    task, model = CausalLM(words), CASES["llama"].model()
    with pytest.raises(UsageError, match=r"has the token '<new>'(.|\n)*knows 20(.|\n)*resize_token_embeddings"):
        whence.fit(model, task, rows)
    curvature = whence.fit(model, task, rows[:4])
    with pytest.raises(UsageError, match=r"query .* has the token '<new>'"):
        whence.score(model, task, [{"prompt": "w1", "completion": " <new>"}], rows[:4], curvature.inverse())
    padding = copy.deepcopy(tokenizer())
    padding.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(UsageError, match=r"The tokenizer pads with the token '<pad>'(.|\n)*tokenizer.eos_token"):
        whence.fit(model, CausalLM(padding), texts(4, seed=1))
