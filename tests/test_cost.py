"""The cost function's choices are the cheapest of all orders, and no slower than what they reject."""

import itertools
import random
import statistics
import time

import pytest
import torch

from whence import cost
from whence.cost import Choice

WIDTHS = (1, 3, 16, 64, 255, 256, 704, 1024, 4096, 11008)
TOKENS = (1, 7, 64, 128, 256, 700, 1024, 5000)


def shapes(count: int = 400) -> list[tuple[int, int, int]]:
    """Some of all (tokens, n_out, n_in), ties among them."""
    every = list(itertools.product(TOKENS, WIDTHS, WIDTHS))
    return random.Random(0).sample(every, count)


def product_flops(*dims: int) -> int:
    """FLOPs of a chain of matrix products from left to right: dims m, k, n, p, ..."""
    rows, inner, *rest = dims
    total = 0
    for columns in rest:
        total, inner = total + 2 * rows * inner * columns, columns
    return total


@pytest.mark.parametrize("has_out", [True, False])
@pytest.mark.parametrize("has_in", [True, False])
@pytest.mark.parametrize("shared", [1, 3])
def test_rotation_is_the_cheapest_of_the_orders(has_out, has_in, shared):
    for tokens, n_out, n_in in shapes():
        orders = []
        for out_first, in_first in itertools.product([True, False], repeat=2):
            flops = product_flops(n_out, tokens, n_in)
            if has_out:
                flops += product_flops(tokens, n_out, n_out) if out_first else product_flops(n_out, n_out, n_in)
            if has_in:
                flops += product_flops(tokens, n_in, n_in) / shared if in_first else product_flops(n_out, n_in, n_in)
            orders.append(flops)
        choice = cost.rotation(tokens, n_out, n_in, has_out, has_in, shared)
        assert choice.flops == pytest.approx(min(orders))
        assert sorted([choice.flops, *(way.flops for way in choice.rejected)]) == pytest.approx(
            sorted(set_of(orders, has_out, has_in))
        )
        assert all(choice.flops <= way.flops for way in choice.rejected)


def set_of(orders, has_out, has_in):
    """The orders that differ: a side without a basis has none."""
    out_first, in_first = (0, 2)[: 1 + has_out], (0, 1)[: 1 + has_in]
    return [orders[out + into] for out in out_first for into in in_first]


@pytest.mark.parametrize(
    ("tokens", "n_out", "n_in", "name"),
    [
        (128, 704, 256, "out first, in first"),
        (512, 704, 256, "out last, in first"),
        (512, 256, 704, "out first, in last"),
        (2048, 704, 256, "out last, in last"),
    ],
)
def test_rotation_names_the_order(tokens, n_out, n_in, name):
    assert cost.rotation(tokens, n_out, n_in).name == name


def test_a_shared_input_is_rotated_first_for_longer():
    assert "in last" in cost.rotation(300, 256, 256).name
    assert "in first" in cost.rotation(300, 256, 256, shared=3).name


@pytest.mark.parametrize("queries", [1, 2, 16, 300])
@pytest.mark.parametrize("rank", [None, 1, 8, 64])
def test_product_is_the_cheapest_way(queries, rank):
    for tokens, n_out, n_in in shapes():
        if rank is None:
            forming = product_flops(n_out, tokens, n_in) + product_flops(queries, n_out * n_in, 1)
            through = queries * (product_flops(tokens, n_in, n_out) + 2 * tokens * n_out + tokens)
            outward = queries * (product_flops(tokens, n_out, n_in) + 2 * tokens * n_in + tokens)
            cheapest = min(forming, through, outward)
        else:
            forming = product_flops(n_out, tokens, n_in) + queries * (product_flops(rank, n_in, n_out) + 2 * rank * n_out)
            pairs = queries * rank
            through = (
                product_flops(tokens, n_out, pairs) + product_flops(tokens, n_in, pairs) + 2 * tokens * pairs + queries * tokens
            )
            cheapest = min(forming, through)
        choice = cost.product(queries, rank, tokens, n_out, n_in)
        assert choice.flops == cheapest <= choice.rejected[0].flops


def test_low_rank_pays_below_the_known_bound():
    """Q r (O + I) < O I (1 + Q/T): the inequality that decides between formed and low-rank queries."""
    for queries, tokens, n_out, n_in in [(1, 128, 256, 704), (16, 512, 4096, 11008), (4, 2048, 1024, 1024)]:
        bound = n_out * n_in * (1 + queries / tokens) / (queries * (n_out + n_in))
        below, above = max(1, int(bound * 0.9)), int(bound * 1.1) + 1
        assert cost.query_storage(queries, below, tokens, n_out, n_in).name == "low rank"
        assert cost.query_storage(queries, above, tokens, n_out, n_in).name == "formed"


def test_query_storage_counts_the_numbers_kept():
    choice = cost.query_storage(16, 8, 128, 700, 300)
    kept = {choice.name: choice.floats} | {way.name: way.floats for way in choice.rejected}
    assert kept == {"formed": 16 * 700 * 300, "low rank": 16 * 8 * 1000}


@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 300, 704, 705, 4097])
@pytest.mark.parametrize("count", range(1, 9))
def test_panels_cover_the_lower_triangle(width, count):
    cut = cost.panels(width, count)
    assert [row for start, stop in cut for row in range(start, stop)] == list(range(width))
    flops = sum(2 * 100 * stop * (stop - start) for start, stop in cut)
    assert cost.covariance(100, width, count).flops == flops <= 2 * 100 * width**2


def test_wide_covariances_take_about_half_the_flops():
    assert cost.covariance(1000, 64).name == "full"
    choice = cost.covariance(1000, 4096)
    assert choice.flops / choice.rejected[0].flops == pytest.approx((1 + 1 / choice.parts) / 2, rel=0.01)
    assert choice.parts > 8


def test_choices_are_made_once():
    assert cost.rotation(10, 20, 30) is cost.rotation(10, 20, 30)


def test_a_choice_says_why():
    assert str(Choice("form", 2e9, 1, rejected=(Choice("tokens", 3.5e12, 1),))) == "form (2 GFLOP, not tokens (3.5 T))"


def seconds(*ways) -> list[float]:
    """Median processor time of each way, taken in turn."""
    took = [[] for _ in ways]
    for _ in range(7):
        for way, times in zip(ways, took, strict=True):
            began = time.process_time()
            way()
            times.append(time.process_time() - began)
    return [statistics.median(times[1:]) for times in took]


def sooner_or_later(holds) -> bool:
    """Whether it holds in one of five tries: on a busy machine single measurements are off by more than what they show."""
    return any(holds() for _ in range(5))


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "n_out", "n_in"), [(32, 256, 704), (32, 704, 256), (1024, 128, 192), (512, 64, 512)])
def test_the_chosen_rotation_is_no_slower(tokens, n_out, n_in):
    g, a = torch.randn(8, tokens, n_out), torch.randn(8, tokens, n_in)
    q_out, q_in = torch.randn(n_out, n_out), torch.randn(n_in, n_in)
    ways = {
        "out first, in first": lambda: (g @ q_out).mT @ (a @ q_in),
        "out first, in last": lambda: ((g @ q_out).mT @ a) @ q_in,
        "out last, in first": lambda: ((g.mT @ (a @ q_in)).mT @ q_out).mT,
        "out last, in last": lambda: (((g.mT @ a) @ q_in).mT @ q_out).mT,
    }
    choice = cost.rotation(tokens, n_out, n_in)
    worse = [way.name for way in choice.rejected if way.flops > 2 * choice.flops]
    assert worse

    def no_slower():
        chosen, *others = seconds(ways[choice.name], *(ways[name] for name in worse))
        return all(chosen <= other for other in others)

    assert sooner_or_later(no_slower), choice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queries", "rank", "tokens", "n_out", "n_in"),
    [(16, None, 64, 256, 256), (4, 4, 64, 512, 512), (64, 32, 1024, 64, 64)],
)
def test_the_chosen_product_is_no_slower(queries, rank, tokens, n_out, n_in):
    g, a = torch.randn(8, tokens, n_out), torch.randn(8, tokens, n_in)
    if rank is None:
        flat = torch.randn(queries, n_out * n_in)
        w = flat.unflatten(1, (n_out, n_in))
        ways = {
            "form": lambda: (g.mT @ a).flatten(1) @ flat.T,
            "tokens": lambda: ((torch.einsum("bri,qoi->qbro", a, w)) * g).sum((-2, -1)),
        }
    else:
        q, k = torch.randn(queries * rank, n_out), torch.randn(queries * rank, n_in)
        ways = {
            "form": lambda: torch.einsum("boq,qo->bq", (g.mT @ a) @ k.T, q),
            "tokens": lambda: ((g @ q.T) * (a @ k.T)).sum(1),
        }
    choice = cost.product(queries, rank, tokens, n_out, n_in)
    (other,) = choice.rejected
    assert other.flops > 2 * choice.flops

    def no_slower():
        chosen, rejected = seconds(ways[choice.name], ways[other.name])
        return chosen <= rejected

    assert sooner_or_later(no_slower), choice


@pytest.mark.slow
def test_panels_are_faster_where_they_are_chosen():
    x, total = torch.randn(2048, 1536), torch.zeros(1536, 1536)
    cut = cost.panels(1536, cost.covariance(2048, 1536).parts)
    assert len(cut) > 1

    def lower():
        for start, stop in cut:
            total[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])

    def no_slower():
        chosen, full = seconds(lower, lambda: total.addmm_(x.T, x))
        return chosen <= 1.1 * full  # a third fewer FLOPs

    assert sooner_or_later(no_slower)
