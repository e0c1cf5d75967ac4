"""Attention multiplies in whole float32 while the other products are shorter."""

import pytest
import torch
import torch.nn.functional as F
from models import CASES
from torch.utils._python_dispatch import TorchDispatchMode

from whence import precision
from whence.precision import multiplying

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch):
    """As on a CPU with AMX, where products round their operands themselves."""
    monkeypatch.setattr(precision, "_rounds_before", lambda device: False)


class Seen(TorchDispatchMode):
    """Under which setting of float32 products each operator ran."""

    def __init__(self):
        super().__init__()
        self.settings = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.settings.setdefault(func.overloadpacket.__name__, set()).add(torch.get_float32_matmul_precision())
        return func(*args, **kwargs or {})


def tensors(heads=4):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 6, 8), (2, heads, 6, 8), (2, heads, 6, 8)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def attended(*given, **settings):
    """Output and gradients."""
    output = F.scaled_dot_product_attention(*given, **settings)
    return [output, *torch.autograd.grad(output.square().sum(), [tensor for tensor in given if tensor.requires_grad])]


@pytest.mark.parametrize(
    ("heads", "settings"),
    [
        (4, {}),
        (4, {"is_causal": True, "scale": 0.3}),
        (4, {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril()}),
        (2, {"is_causal": True, "enable_gqa": True}),
    ],
)
def test_attention_is_the_same_to_the_bit(heads, settings):
    query, key, value = tensors(heads)
    expected = attended(query, key, value, **settings)
    with multiplying("bfloat16", CPU):
        found = attended(query, key, value, **settings)
        fixed = attended(query, key.detach(), value=value.detach(), **settings)[:2] if "attn_mask" not in settings else []
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(fixed, expected, strict=False))


def test_attention_without_gradients():
    query, key, value = (tensor.detach() for tensor in tensors())
    with multiplying("bfloat16", CPU), torch.no_grad():
        found = F.scaled_dot_product_attention(query, key, value)
    assert not found.requires_grad and torch.equal(found, F.scaled_dot_product_attention(query, key, value))


def test_only_attention_is_whole():
    case = CASES["llama"]
    model = case.model().float()
    batch = case.task().collate(case.task().encode(case.train(3)))
    with multiplying("bfloat16", CPU), Seen() as seen:
        case.task().losses(model, batch).sum().backward()
    attention = {name for name in seen.settings if "attention" in name}
    assert any("backward" in name for name in attention) and any("backward" not in name for name in attention), seen.settings
    assert all(seen.settings[name] == {"highest"} for name in attention)
    assert seen.settings["mm"] == {"medium"}
