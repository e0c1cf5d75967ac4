"""The model is borrowed: after any call, also one that raised, it is as it was. And what capture refuses to guess."""

import pytest
import torch
import torch.utils.checkpoint
from models import CASES, Attention, named, randomised, texts
from oracle import agree, log_likelihood, traces
from torch import nn

from whence.capture import Capture
from whence.coverage import cover
from whence.errors import CoverageError
from whence.fitting import fit
from whence.scoring.score import score, self_influence
from whence.tasks import CausalLM, Classification


def unusual(model):
    """The model as users have it: partly frozen, partly in training mode, with gradients and hooks of their own."""
    for number, (parameter, module) in enumerate(zip(model.parameters(), model.modules(), strict=False)):
        parameter.requires_grad_(number % 3 != 0)
        parameter.grad = torch.ones_like(parameter) if number % 4 == 1 else None
        module.training = number % 2 == 0
    next(model.children()).register_forward_hook(lambda *_: None)
    return model


def state(model):
    """All there is to see of a model."""
    modules = {}
    for name, module in model.named_modules():
        hidden = {key: list(value) for key, value in vars(module).items() if key.endswith("hooks") or "hooks_" in key}
        modules[name] = {"training": module.training, "attributes": sorted(vars(module)), **hidden}
    parameters = {
        name: (id(p), p.requires_grad, p._version, id(p.grad), None if p.grad is None else p.grad.tolist(), p._backward_hooks)
        for name, p in model.named_parameters()
    }
    tensors = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return modules, parameters, tensors, torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()


@pytest.mark.parametrize("case", named("llama", "gpt2", "conv", "repeated", "attention"), ids=lambda case: case.name)
def test_the_model_is_as_it_was(case):
    model = unusual(case.model())
    before = state(model)
    operator = fit(model, case.task(), case.train(), modules="all").inverse()
    assert state(model) == before
    score(model, case.task(), case.queries(), case.train(), operator, per="module", norms=("cosine",))
    assert state(model) == before
    self_influence(model, case.task(), case.train(), operator)
    assert state(model) == before


class Failure(BaseException):
    """Not even an Exception: as an interrupt from the keyboard."""


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise ValueError("in the middle of going back")


def failing(when):
    """A task that fails on the second batch."""

    class Failing(Classification):
        batches = 0

        def losses(self, model, batch, noise=None):
            self.batches += 1
            losses = super().losses(model, batch, noise)
            if self.batches == 2:
                if when == "forward":
                    raise Failure
                if when == "shape":
                    return losses.sum()
                return FailingBackward.apply(losses)
            return losses

    return Failing()


@pytest.mark.parametrize("when", ["forward", "backward", "shape"])
def test_the_model_is_as_it_was_after_an_exception(when):
    case = CASES["attention"]
    model = unusual(case.model())
    operator = fit(model, case.task(), case.train(), modules="all").inverse()
    before = state(model)
    for call in (
        lambda task: fit(model, task, case.train(), modules="all", batch_tokens=4),
        lambda task: score(model, task, case.queries(), case.train(), operator, batch_tokens=2),
        lambda task: self_influence(model, task, case.train(), operator, batch_tokens=4),
    ):
        with pytest.raises((Failure, ValueError), match={"shape": "one number per example"}.get(when)):
            call(failing(when))
        assert state(model) == before


@pytest.mark.parametrize("fastpath", [True, False])
def test_the_switch_of_the_fused_attention_is_put_back(fastpath):
    case = CASES["attention"]
    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        fit(case.model(), case.task(), case.train())
        assert torch.backends.mha.get_fastpath_enabled() is fastpath
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_scores_are_the_same_in_training_mode_and_under_no_grad():
    case = CASES["llama"]
    model = case.model()
    operator = fit(model, case.task(), case.train()).inverse()
    expected = score(model, case.task(), case.queries(), case.train(), operator).raw
    with torch.no_grad():
        agree(score(model.train(), case.task(), case.queries(), case.train(), operator).raw, expected, 1e-12)


class Encoder(nn.Module):
    """PyTorch's own encoder: in evaluation mode its fused path packs what is not masked into nested tensors."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(6, 4)

    def forward(self, x):
        masked = torch.arange(5) >= 3 + (x[:, :1, 0] > 0).long()  # three or four positions of five
        y = self.encoder(x, src_key_padding_mask=masked)
        return self.head(y.masked_fill(masked[..., None], 0).sum(1))


def gradients(model, task, rows, modules):
    """Every tracked module's gradients of the log-likelihoods, formed."""
    sites, found = cover(model, modules).sites, {}
    batch = task.collate(task.encode(rows))
    with Capture(model, sites) as capture:
        capture.begin(len(rows), frozenset([len(rows)]))
        total = -task.losses(model, batch).sum()
        capture.backward(total, lambda name, gradient, readers: found.update({name: gradient.dense().w_BOI}))
    return found


def test_an_encoder_with_a_fused_path():
    case = CASES["attention"]
    model = randomised(Encoder().double().eval())
    found = gradients(model, Classification(), case.train(), "all")
    assert set(found) == {*(f"encoder.layers.0.{part}" for part in ("self_attn", "linear1", "linear2")), "head"}
    for number, row in enumerate(case.train()):
        for name, expected in traces(model, list(found), [log_likelihood(row)])[0].items():
            agree(found[name][number], expected.w_OI)


def test_weights_get_no_gradient_and_the_graph_starts_at_the_first_tracked_module():
    case, seen = CASES["mlp"], []
    model = case.model()
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    model[3].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    gradients(model, Classification(), case.train(), "2")
    assert seen == [False, True]
    assert all(p.grad is None for p in model.parameters())


def test_positions_that_all_examples_share_are_refused():
    """GPT-2 looks positions up once for the whole batch, so their gradient can't be told apart by example."""
    case = CASES["gpt2"]
    with pytest.raises(CoverageError, match=r"transformer.wpe.*can't be told apart by example"):
        fit(case.model(), case.task(), case.train(), modules="transformer.wpe")


def test_sequence_first_layers_are_refused():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.layer(x.transpose(0, 1)).tanh().mean(0))

    case = CASES["attention"]
    with pytest.raises(CoverageError, match="layer.*told apart"):
        fit(SequenceFirst().double(), Classification(), case.train(), modules="layer")


def test_examples_are_rows_that_models_flatten():
    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20, bias=False)

        def forward(self, input_ids):
            from transformers.modeling_outputs import CausalLMOutput

            x = self.layer(self.embed(input_ids).flatten(0, 1)).tanh()
            return CausalLMOutput(logits=self.head(x).unflatten(0, input_ids.shape))

    case, model = CASES["llama"], randomised(Flattening().double())
    task, rows = case.task(), texts(5, seed=4)
    operator = fit(model, task, rows, modules="layer").inverse()
    found = score(model, task, case.queries(), rows, operator, per="token")
    agree(found.raw, score(model, task, case.queries(), rows, operator, batch_tokens=1).raw, 1e-10)


def test_an_input_overwritten_in_place_is_an_error_and_no_wrong_number():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x):
            x = self.first(x)
            y = self.second(x)
            x.mul_(2)
            return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fit(Overwriting().double(), Classification(), CASES["mlp"].train())


def test_a_model_that_overwrites_its_output_in_place():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x):
            return self.second(self.first(x).tanh_())

    case, model = CASES["mlp"], randomised(Overwriting().double())
    found = gradients(model, Classification(), case.train(), "all")
    expected = traces(model, ["first", "second"], [log_likelihood(row) for row in case.train()])
    for name in found:
        agree(found[name], torch.stack([example[name].w_OI for example in expected]))


def test_shared_inputs_are_recognised():
    case = CASES["llama"]
    model, task = case.model(), CausalLM(case.task().tokenizer)
    readers = {}
    with Capture(model, cover(model, "all").sites) as capture:
        batch = task.collate(task.encode(case.train()))
        capture.begin(len(case.train()), frozenset([len(case.train())]))
        capture.backward(task.losses(model, batch).sum(), lambda name, gradient, group: readers.update({name: set(group)}))
    layer = "model.layers.0."
    qkv = {f"{layer}self_attn.{part}_proj" for part in "qkv"}
    assert all(readers[name] == qkv for name in qkv)
    assert readers[f"{layer}mlp.gate_proj"] == {f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj"}
    assert readers[f"{layer}mlp.down_proj"] == {f"{layer}mlp.down_proj"}


def test_an_attention_that_computes_with_other_arguments():
    """Masks and separate keys reach the second look at the attention."""

    class Masked(Attention):
        def forward(self, x):
            mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
            y, _ = self.attention(x, key=x, value=x.sin(), attn_mask=mask, is_causal=True, need_weights=False)
            return self.head(y.tanh().mean(1))

    case, model = CASES["attention"], randomised(Masked(True).double().eval())
    found = gradients(model, Classification(), case.train(), "attention")["attention"]
    expected = []
    for row in case.train():
        total = log_likelihood(row)(model)
        weight, bias = torch.autograd.grad(total, [model.attention.out_proj.weight, model.attention.out_proj.bias])
        expected.append(torch.cat([weight, bias[:, None]], dim=1))
    agree(found, torch.stack(expected))


class Recomputed(nn.Module):
    """Its biased layer is run without a graph, and again on the way back."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.first(x)
        return self.head(torch.utils.checkpoint.checkpoint(lambda h: self.layer(h).tanh(), hidden, use_reentrant=True))


def test_a_bias_counts_where_a_layer_runs_again_on_the_way_back():
    torch.manual_seed(0)
    model, x = Recomputed().double(), torch.randn(6, 3, dtype=torch.float64)
    parameters, found = [model.layer.weight, model.layer.bias], {}
    plain = nn.Sequential(model.first, model.layer, nn.Tanh(), model.head)
    expected = [torch.autograd.grad(plain(row).square().sum(), parameters) for row in x]
    with Capture(model, cover(model, ["first", "layer"]).sites) as capture:
        capture.begin(len(x), frozenset([len(x)]))
        capture.backward(model(x).square().sum(), lambda name, gradient, readers: found.update({name: gradient.dense().w_BOI}))
    agree(found["layer"], torch.stack([torch.cat([weight, bias[:, None]], 1) for weight, bias in expected]))


class Overwriting(nn.Module):
    """Two layers of one parent read the same tensor, which the first one's output is added to in between."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.embed(x).clone()
        hidden += self.first(hidden)
        return self.second(hidden)


def test_a_projected_input_that_is_overwritten_is_projected_again():
    torch.manual_seed(0)
    model, x = Overwriting().double(), torch.randn(6, 3, dtype=torch.float64)
    matrix, found = torch.randn(5, 2, dtype=torch.float64), {}
    with torch.no_grad():
        hidden = model.embed(x)
        expected = {"first": hidden, "second": hidden + model.first(hidden)}
    with Capture(model, cover(model, ["first", "second"]).sites, dict.fromkeys(expected, matrix)) as capture:
        capture.begin(len(x), frozenset([len(x)]))
        capture.backward(model(x).square().sum(), lambda name, gradient, readers: found.update({name: gradient.a_BRI}))
    for name, read in expected.items():
        agree(found[name][:, 0], torch.cat([read, torch.ones(6, 1)], 1) @ matrix)
