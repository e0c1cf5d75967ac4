"""Which modules a selector picks, and what share of the parameters that is."""

import pytest
import torch
from models import CASES, Attention, Repeated
from torch import nn

from whence.coverage import cover
from whence.errors import CoverageError

MLP = {f"model.layers.{n}.mlp.{part}_proj" for n in (0, 1) for part in ("gate", "up", "down")}
ATTENTION = {f"model.layers.{n}.self_attn.{part}_proj" for n in (0, 1) for part in "qkvo"}
NORMS = {f"model.layers.{n}.{part}_layernorm" for n in (0, 1) for part in ("input", "post_attention")}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("mlp", MLP),
        ("attention", ATTENTION),
        ("all", MLP | ATTENTION),
        ("mlp,attention", MLP | ATTENTION),
        (["attention", "mlp"], MLP | ATTENTION),
        ("last-1", {name for name in MLP if ".1." in name}),
        ("all, last-1", {name for name in MLP | ATTENTION if ".1." in name}),
        ("last-5", MLP),
        ("*.down_proj", {name for name in MLP if "down" in name}),
        ("lm_head", {"lm_head"}),
        ("mlp,lm_head", MLP | {"lm_head"}),
        ("*norm", NORMS | {"model.norm"}),
        ("model.embed_tokens", {"model.embed_tokens"}),
        ("*", MLP | ATTENTION | NORMS | {"model.norm", "lm_head", "model.embed_tokens"}),
    ],
)
def test_selectors(selector, expected):
    assert set(cover(CASES["llama"].model(), selector).sites) == expected


def test_sites_are_in_the_order_of_the_model():
    names = list(cover(CASES["llama"].model(), "attention,mlp").sites)
    assert names[0] == "model.layers.0.self_attn.q_proj" and names[-1] == "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_shapes_and_shares_are_those_of_the_parameters(case):
    model = case.model()
    coverage = cover(model, case.modules)
    tracked = {id(p): p for site in coverage.sites.values() for p in site.uses[0][0].parameters()}
    if "attention" in case.name:  # only the output projection of these
        tracked = {
            key: p
            for key, p in tracked.items()
            if key not in map(id, (model.attention.in_proj_weight, model.attention.in_proj_bias))
        }
    total = sum(p.numel() for p in model.parameters())
    assert coverage.parameters == total
    assert coverage.share == pytest.approx(sum(p.numel() for p in tracked.values()) / total)
    assert sum(coverage.left_out.values()) == total - sum(p.numel() for p in tracked.values())
    for site in coverage.sites.values():
        assert site.shape[0] * site.shape[1] == site.parameters


def test_everything_is_covered_where_everything_is_tracked():
    assert cover(CASES["mlp"].model(), "all").share == 1.0
    assert "100.0%" in str(cover(CASES["llama"].model(), "*"))


def test_a_tied_weight_is_one_site_with_two_uses():
    sites = cover(CASES["llama-tied"].model(), "model.embed_tokens,lm_head").sites
    assert list(sites) == ["model.embed_tokens"]
    assert [layer.kind for _, layer in sites["model.embed_tokens"].uses] == ["embedding", "linear"]


def test_a_repeated_module_is_one_site():
    assert list(cover(Repeated(), "all").sites) == ["inner", "head"]


def test_attention_stands_for_its_output_projection():
    assert list(cover(Attention(True), "all").sites) == ["attention", "head"]


def test_nothing_to_track_says_what_there_is():
    with pytest.raises(CoverageError, match="WHENCE-17") as raised:
        cover(nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU()), "all")
    text = str(raised.value)
    assert "1 x Conv1d" in text and "attention, all" in text and "whence inspect" in text


@pytest.mark.parametrize("selector", ["last-x", "last-"])
def test_layers_are_numbers(selector):
    with pytest.raises(CoverageError, match="does not select layers"):
        cover(CASES["llama"].model(), f"all,{selector}")
    with pytest.raises(CoverageError, match="does not select layers"):
        cover(Repeated(), "all,last-2")


def test_bilinear_is_no_linear_layer():
    with pytest.raises(CoverageError):
        cover(nn.Sequential(nn.Bilinear(2, 2, 2)), "*")


def test_what_a_quantised_linear_looks_like():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features, self.bias = 6, 4, None
            self.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)

    coverage = cover(nn.Sequential(Packed(), nn.LayerNorm(4)), "all")
    assert coverage.sites["0"].shape == (4, 6) and coverage.parameters == 24 + 8
