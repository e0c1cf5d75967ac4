import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from whence.tasks import CausalLM, head
from whence.tasks.head import worth_chunks

ROWS = [
    {"text": "Ada Velt was born in Turin."},
    {"prompt": "Where was Bo Quist?", "completion": " In Oslo, he plays."},
    {"text": "The old harbour"},
]


class Widest(TorchDispatchMode):
    """The most numbers that any tensor had."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        self.numbers = max([self.numbers, *(part.numel() for part in (found,) if isinstance(part, torch.Tensor))])
        return found


def gradients(model, task, batch, noise=None, asked=False):
    """Losses (or measurements) with the gradient of their weighted sum."""
    model.zero_grad()
    found = task.measurements(model, batch) if asked else task.losses(model, batch, noise)
    (found * torch.arange(1, len(found) + 1)).sum().backward()
    return found.detach(), [weight.grad.clone() for name, weight in model.named_parameters() if "mlp" in name]


@pytest.mark.parametrize("measurement", ["logprob", "loss", "margin"])
@pytest.mark.parametrize("drawn", [False, True])
def test_chunks_give_the_same_losses_and_gradients(tiny_llama, tiny_tokenizer, monkeypatch, measurement, drawn):
    task = CausalLM(tiny_tokenizer, measurement=measurement)
    tiny_llama.lm_head.requires_grad_(False)
    items = task.encode(ROWS)
    batch, noise = task.collate(items), task.collate_noise(items, [torch.rand(task.size(item)) for item in items])
    for asked in (False, True):
        whole = gradients(tiny_llama, task, batch, noise if drawn else None, asked)
        with monkeypatch.context() as patch:
            patch.setattr(head, "LOGITS", 300 * len(ROWS) * 4)
            assert worth_chunks(tiny_llama, batch["labels"].numel())
            parts = gradients(tiny_llama, task, batch, noise if drawn else None, asked)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_margins_come_with_the_mean_of_one_minus_p(tiny_llama, tiny_tokenizer, monkeypatch):
    """In chunks, too."""
    task = CausalLM(tiny_tokenizer)
    tiny_llama.lm_head.requires_grad_(False)
    batch = task.collate(task.encode(ROWS))
    outputs = task.outputs(tiny_llama, batch)
    p_BT = outputs.h_BTV.softmax(-1).gather(-1, outputs.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = ((1 - p_BT) * outputs.counted_BT).sum(1) / outputs.counted_BT.sum(1)
    for logits in (head.LOGITS, 300 * len(ROWS) * 4):
        monkeypatch.setattr(head, "LOGITS", logits)
        margins, slopes = task.margins(tiny_llama, batch)
        torch.testing.assert_close(margins, CausalLM(tiny_tokenizer, measurement="margin").measurements(tiny_llama, batch))
        torch.testing.assert_close(slopes, expected)
        assert not slopes.requires_grad


def test_all_logits_are_never_there_at_once(tiny_llama, tiny_tokenizer, monkeypatch):
    task = CausalLM(tiny_tokenizer)
    tiny_llama.lm_head.requires_grad_(False)
    batch = task.collate(task.encode(ROWS))
    monkeypatch.setattr(head, "LOGITS", 300 * len(ROWS) * 2)
    with Widest() as seen:
        gradients(tiny_llama, task, batch)
    assert seen.numbers < 300 * batch["labels"].numel()


def test_heads_with_a_cap_are_left_whole(monkeypatch):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.1,
    )
    monkeypatch.setattr(head, "LOGITS", 1)
    assert not worth_chunks(Gemma2ForCausalLM(config).eval(), 10)


def test_small_vocabularies_are_left_whole(tiny_llama):
    assert not worth_chunks(tiny_llama, 1000)
