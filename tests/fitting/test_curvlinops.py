"""A second oracle that knows nothing of whence: curvlinops' K-FAC and EK-FAC of a classifier with biases.

What can be compared: its operators are for the mean loss over examples, as ours; for one position per example its
"expand" K-FAC is ours, and with `separate_weight_and_bias=False` a bias is a column of ones, as ours. It takes the
empirical Fisher with the data's labels. Not comparable: labels drawn from the model (other random numbers), sequences
(its mean runs over tokens, ours over sequences, so that the eigenvalues differ by what K-FAC's independence of positions
leaves open), damping (its is per factor), and positions without any gradient, as behind a layer whose ReLUs are all off:
it counts their inputs, we don't. Hence tanh here.
"""

import pytest
import torch
from models import CASES, randomised
from oracle import agree, matrices_of
from torch import nn

from whence.fitting import fit

curvlinops = pytest.importorskip("curvlinops")


def classifier():
    return randomised(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double())


def as_matrix(module, name, dense, offset):
    """One layer's block, where weight and bias come one after the other, in our order (O, I) with the bias as last column."""
    n_out, n_in = module.weight.shape
    size = n_out * (n_in + 1)
    block = dense[offset : offset + size, offset : offset + size]
    weight = torch.arange(n_out * n_in).view(n_out, n_in)
    order = torch.cat([weight, n_out * n_in + torch.arange(n_out)[:, None]], dim=1).flatten()
    return block[order][:, order], offset + size


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_kfac_and_ekfac_of_a_classifier(method):
    case = CASES["mlp"]
    model, train = classifier(), case.train(40)
    operator = {"kfac": curvlinops.KFACLinearOperator, "ekfac": curvlinops.EKFACLinearOperator}[method](
        model,
        nn.CrossEntropyLoss(reduction="mean"),
        list(model.parameters()),
        [(torch.stack([x for x, _ in train]), torch.tensor([label for _, label in train]))],
        fisher_type=curvlinops.FisherType.EMPIRICAL,
        separate_weight_and_bias=False,
    )
    dense = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    curvature = fit(model, case.task(), train, method=method, modules="all", labels="data")
    found, offset = matrices_of(curvature), 0
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            expected, offset = as_matrix(module, name, dense, offset)
            agree(found[name], expected)
    assert offset == len(dense)


def test_the_exact_fisher_is_the_limit_of_drawn_labels():
    """Its "type-2" Fisher takes the expectation over labels exactly: our K-FAC with many draws comes close."""
    case = CASES["mlp"]
    model, rows = classifier(), case.train(8)
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="mean"),
        list(model.parameters()),
        [(torch.stack([x for x, _ in rows]), torch.tensor([label for _, label in rows]))],
        fisher_type=curvlinops.FisherType.TYPE2,
        separate_weight_and_bias=False,
    )
    dense = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    found, offset = matrices_of(fit(model, case.task(), rows * 2000, method="kfac", modules="all")), 0
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            expected, offset = as_matrix(module, name, dense, offset)
            assert (found[name] - expected).norm() < 0.05 * expected.norm()
