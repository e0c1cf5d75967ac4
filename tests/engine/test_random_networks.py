"""Small networks drawn at random: every tracked gradient is autograd's to 1e-5, or the network is refused by name."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_autograd import MADE, Dropped, Masked, Rounded, Scaled
from torch import nn

from whence.capture import Capture
from whence.coverage import cover
from whence.engine.autograd import check_rows
from whence.engine.point import Point
from whence.engine.stream import Sink, stream
from whence.errors import WhenceError
from whence.store.memory import Memory
from whence.tasks import Classification

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
WIDTH, CLASSES, ROWS = 4, 3, 5

LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "masked": lambda: Masked(WIDTH, WIDTH),
    "scaled": lambda: Scaled(WIDTH, WIDTH),
    "rounded": lambda: Rounded(WIDTH, WIDTH),
    **{f"{name} linear": lambda make=make: make(nn.Linear(WIDTH, WIDTH)) for name, make in MADE.items()},
    "convolution": lambda: nn.Conv2d(1, 1, 3, padding=1),
    "weight norm convolution": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 3, padding=1)),
    "dropout": nn.Dropout,
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "statistics of the batch": lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
    "dropout that is always on": Dropped,
}
WAYS = ("as it is", "flat", "time first", "time first and flat", "reversed", "sorted", "centred", "twice")
SHARING = ("a new one", "called again", "weight tied", "weight and bias tied", "weight used without a call")


def is_plain(layer):
    return type(layer) is nn.Linear and "weight" in layer._parameters  # a pruned one keeps its class


class Network(nn.Module):
    """Layers in a row, each drawn with the way it is called and what it shares with an earlier one."""

    def __init__(self, drawn):
        super().__init__()
        self.drawn, self.layers, self.head = drawn, nn.ModuleList(), nn.Linear(WIDTH, CLASSES)
        for kind, _, sharing, earlier in drawn:
            linear = [layer for layer in self.layers if is_plain(layer)]
            layer = LAYERS[kind]()
            if linear and sharing != "a new one":
                other = linear[earlier % len(linear)]
                layer = other if sharing in ("called again", "weight used without a call") else nn.Linear(WIDTH, WIDTH)
                layer.weight = other.weight
                if sharing == "weight and bias tied" and other.bias is not None:
                    layer.bias = other.bias
            self.layers.append(layer)

    def forward(self, x):
        for layer, (_, way, sharing, _) in zip(self.layers, self.drawn, strict=True):
            x = x + self.apply_one(layer, x, way, sharing).tanh()
        return self.head(x.mean(1))

    def apply_one(self, layer, x, way, sharing):
        examples, positions = x.shape[:2]
        if sharing == "weight used without a call" and is_plain(layer):
            return F.linear(x, layer.weight, layer.bias)
        if isinstance(layer, nn.Conv2d):
            return layer(x.flatten(0, 1)[:, None, None])[:, 0, 0].unflatten(0, (examples, positions))
        if isinstance(layer, nn.BatchNorm1d):
            return layer(x.flatten(0, 1)).unflatten(0, (examples, positions))
        if way == "flat":
            return layer(x.flatten(0, 1)).unflatten(0, (examples, positions))
        if way == "time first":
            return layer(x.transpose(0, 1)).transpose(0, 1)
        if way == "time first and flat":
            return layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (positions, examples)).transpose(0, 1)
        if way == "reversed":
            return layer(x.flip(0)).flip(0)
        if way == "sorted":
            order = x[:, 0, 0].argsort()
            return layer(x[order])[order.argsort()]
        if way == "centred":
            return layer(x - x.mean(0))
        return layer(layer(x).tanh()) if way == "twice" else layer(x)


layer = st.tuples(
    st.sampled_from(sorted(LAYERS)),
    st.sampled_from(WAYS[:1] * 3 + WAYS),
    st.sampled_from(SHARING[:1] * 3 + SHARING),
    st.integers(0, 3),
)


class Kept(Sink):
    def __init__(self):
        self.gradients = {}

    def receive(self, name, gradient, readers):
        self.gradients[name] = gradient.dense().w_BOI.flatten(1)


def captured(point, sites):
    kept = Kept()
    with Capture(point.model, sites) as capture:
        stream(capture, point.task, point.examples.items, [range(ROWS)], point.likelihood, kept, lambda positions: None)
    return kept.gradients


def expected(point, site):
    """Each row's gradient at the parameters of all modules that a site stands for, by plain autograd."""
    held = list({id(p): p for module, _ in site.uses for p in module.parameters()}.values())
    rows = []
    for row in point.examples.items:
        value = -point.task.losses(point.model, point.task.collate([row])).sum()
        rows.append(
            torch.cat([part.flatten() for part in torch.autograd.grad(value, held, allow_unused=True, materialize_grads=True)])
        )
    return torch.stack(rows)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.lists(layer, min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 99))
def test_gradients_are_autograds_or_refused_by_name(drawn, positions, seed):
    torch.manual_seed(seed)
    model = Network(drawn).double().eval()
    rows = [(torch.randn(positions, WIDTH, dtype=torch.float64), number % CLASSES) for number in range(ROWS)]
    point, folder = Point(model, Classification(), rows), Memory()
    sites = cover(model, "*").sites
    try:
        check_rows(folder, point, sites)
        found = captured(point, sites)
    except WhenceError as error:
        assert any(name and name in str(error) for name, _ in model.named_modules()), error
        return
    assert set(sites) - set(found) == set(folder.read_json("check.json")["not_called"])
    for name, w_BP in found.items():
        reference = expected(point, sites[name])
        error = (w_BP @ w_BP.T - reference @ reference.T).norm()
        assert error <= 1e-5 * (reference @ reference.T).norm(), (name, float(error))
