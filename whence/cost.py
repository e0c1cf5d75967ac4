"""The one place where contractions are costed and chosen.

A choice is a pure function of the shapes, made once and kept: floating-point operations decide, and where ways tie, the
numbers held. Each way's FLOPs and floats are *per example* (a multiplication with its addition is two FLOPs), lower-order
terms left in where they can decide. The choices are the optimum of the ways listed, not of all there are.

The second half adds them up to what a pass over a model costs.

Letters: `tokens` is R, the summands of a factored gradient `sum_r g_r a_r^T`; `n_out`, `n_in` are O and I.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

PANEL = 35
"""A panel of a symmetric product takes as long as one that is so much higher: narrow products run below the full rate."""

MOST_PANELS = 12

ROUNDING = 40
"""Operations of a float32 product that take as long as rounding an operand's number to a shorter format, or widening a
result's (measured on a CPU with AVX-512)."""


@dataclass(frozen=True)
class Choice:
    """The way chosen, with its FLOPs, the temporary numbers that it holds, and the ways rejected with theirs."""

    name: str
    flops: float
    floats: float
    parts: int = 1
    """Pieces that the work is done in."""
    rejected: tuple[Choice, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        others = "".join(f", not {other.name} ({_short(other.flops)})" for other in self.rejected)
        return f"{self.name} ({_short(self.flops)}FLOP{others})"


def _short(count: float) -> str:
    """A count with its SI prefix: 1.2 G."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if count < 1000 or prefix == "E":
            return f"{count:.3g} {prefix}"
        count /= 1000
    raise AssertionError


def _cheapest(ways: Iterable[Choice]) -> Choice:
    """The way of the fewest FLOPs, then of the fewest numbers held; the others are rejected in that order."""
    best, *others = sorted(ways, key=lambda way: (way.flops, way.floats))
    return Choice(best.name, best.flops, best.floats, best.parts, tuple(others))


@functools.cache
def rotation(tokens: int, n_out: int, n_in: int, has_out: bool = True, has_in: bool = True, shared: int = 1) -> Choice:
    """A factored gradient in the eigenbasis, formed: `(g Q_O)^T (a Q_I)`, or `Q_O^T (g^T a) Q_I`, or one side each way.

    "out first" rotates the output gradients before the sum over the tokens, "out last" the formed matrix; "in" likewise.
    A side without a basis is in no name. `shared` sites read the same input, and so share "in first".
    """
    form = 2 * tokens * n_out * n_in
    outs = {"out first": 2 * tokens * n_out**2, "out last": 2 * n_out**2 * n_in} if has_out else {"": 0}
    ins = {"in first": 2 * tokens * n_in**2 / shared, "in last": 2 * n_out * n_in**2} if has_in else {"": 0}
    ways = []
    for out, out_flops in outs.items():
        for into, in_flops in ins.items():
            early = tokens * (n_out * (out == "out first") + n_in * (into == "in first"))
            late = n_out * n_in * (out == "out last" or into == "in last")
            name = ", ".join(part for part in (out, into) if part) or "form"
            ways.append(Choice(name, form + out_flops + in_flops, n_out * n_in + early + late))
    return _cheapest(ways)


@functools.cache
def formed_rotation(n_out: int, n_in: int, has_out: bool = True, has_in: bool = True) -> Choice:
    """A formed gradient `[O, I]` into the eigenbasis, or back from it: there is one way."""
    return Choice("formed", 2 * n_out * n_in * (n_out * has_out + n_in * has_in), n_out * n_in * (has_out + has_in))


@functools.cache
def product(queries: int, query_rank: int | None, tokens: int, n_out: int, n_in: int) -> Choice:
    """Inner products of all queries with a factored gradient; `query_rank` None stands for formed queries.

    "form" forms the gradient first, "tokens" takes the products with every summand and adds these up.
    """
    size = n_out * n_in
    if query_rank is None:
        meet, held = 2 * queries * size, size
    else:
        summands = queries * query_rank
        meet, held = 2 * summands * (size + n_out), size + summands * n_out
    through = product_per_token(queries, query_rank, tokens, n_out, n_in)
    ways = [
        Choice("form", 2 * tokens * size + meet, held),
        Choice("tokens", through.flops + queries * tokens, through.floats),
    ]
    return _cheapest(ways)


@functools.cache
def product_per_token(queries: int, query_rank: int | None, tokens: int, n_out: int, n_in: int) -> Choice:
    """Inner products of all queries with every summand `g_r a_r^T`, which is never formed.

    A formed query meets one side first ("in": `w a_r`, then `g_r . w a_r`; or "out"), a factored one both sides ("both").
    """
    if query_rank is not None:
        pairs = queries * query_rank * tokens
        return Choice("both", 2 * pairs * (n_out + n_in + 1), 2 * pairs)
    first = 2 * queries * tokens * n_out * n_in
    ways = [
        Choice("in", first + 2 * queries * tokens * n_out, queries * tokens * n_out),
        Choice("out", first + 2 * queries * tokens * n_in, queries * tokens * n_in),
    ]
    return _cheapest(ways)


@functools.cache
def query_storage(queries: int, rank: int, tokens: int, n_out: int, n_in: int) -> Choice:
    """Queries kept "formed" or "low rank", by the FLOPs of their products with a training gradient.

    `floats` are the numbers kept, all queries together: times the bytes of a number, the memory that either takes.
    """
    ways = [
        Choice("formed", product(queries, None, tokens, n_out, n_in).flops, queries * n_out * n_in),
        Choice("low rank", product(queries, rank, tokens, n_out, n_in).flops, queries * rank * (n_out + n_in)),
    ]
    return _cheapest(ways)


def panels(width: int, count: int) -> list[tuple[int, int]]:
    """Rows `[start, stop)` of the panels of a symmetric matrix, about equal; they begin at multiples of 16."""
    edges = [min(width, -(-width * number // count // 16) * 16) for number in range(count)]
    return [(start, stop) for start, stop in zip(edges, [*edges[1:], width], strict=True) if stop > start]


@functools.cache
def covariance(tokens: int, width: int, blocks: int | None = None) -> Choice:
    """`x^T x` of `x [tokens, width]`: the lower triangle in `parts` panels of rows (see `panels`), or in full.

    The number of panels, if not given, weighs the FLOPs saved against narrow products running slower (`PANEL`; measured
    on a CPU with AVX-512). FLOPs and floats are of all `tokens`, not per example.
    """

    def way(count: int) -> Choice:
        cut = panels(width, count)
        flops = sum(2 * tokens * stop * (stop - start) for start, stop in cut)
        name = "full" if len(cut) == 1 else f"lower triangle in {len(cut)} panels"
        return Choice(name, flops, 0, len(cut))

    def slowed(count: int) -> float:
        return sum(stop * (stop - start + PANEL) for start, stop in panels(width, count))

    chosen = way(blocks or min(range(1, MOST_PANELS + 1), key=lambda count: (slowed(count), count)))
    rejected = () if chosen.parts == 1 else (way(1),)
    return Choice(chosen.name, chosen.flops, chosen.floats, chosen.parts, rejected)


@functools.cache
def worth_rounding(rows: int, inner: int, columns: int) -> bool:
    """Whether `[rows, inner] @ [inner, columns]` is faster with operands that are rounded to a format twice as fast."""
    return rows * inner * columns > ROUNDING * (rows * inner + inner * columns + rows * columns)


def chunk(floats_per_example: float, limit_bytes: int, itemsize: int = 4) -> int:
    """Examples per step so that their temporary numbers stay within the limit; one at least."""
    return max(1, int(limit_bytes // (itemsize * max(1, floats_per_example))))


# What a pass over a model costs


@dataclass(frozen=True)
class Work:
    """FLOPs, and the bytes that operands and results take when each is read or written once per product."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Weight:
    """`count` weights `[O, I]` that are alike; `shared` tracked ones read the same input."""

    n_out: int
    n_in: int
    count: int = 1
    tracked: bool = False
    shared: int = 1
    passes_back: bool = True
    """Whether the gradient of its input is taken: not before the first tracked weight, nor where that reads."""
    has_out: bool = True
    """Whether its output side has a basis: not an embedding's, whose rows are picked one by one."""
    share: float = 1.0
    """Share of the positions that it sees: those in the loss of a head, those routed to an expert."""

    def summands(self, tokens: int) -> int:
        """Positions of an example of `tokens` that it sees."""
        return max(1, round(tokens * self.share))


@dataclass(frozen=True)
class Network:
    """A model as matrix products: weights, attention (head widths added up over the layers), and all the rest."""

    weights: tuple[Weight, ...]
    attention: int = 0
    attention_back: int = 0
    """Of `attention`, the layers that the gradient passes."""
    elementwise: int = 0
    """Numbers that norms, activations, residuals and the like read and write per position, forward."""
    itemsize: int = 4

    @property
    def tracked(self) -> tuple[Weight, ...]:
        """The weights whose gradients are taken."""
        return tuple(weight for weight in self.weights if weight.tracked)


def forward(network: Network, examples: int, tokens: int) -> Work:
    """One pass forward over a batch of `examples` of `tokens` positions each."""
    work = _attention(network, network.attention, examples, tokens, products=2)
    for weight in network.weights:
        work += _gemm(network, examples * weight.summands(tokens), weight.n_in, weight.n_out) * weight.count
    return work + Work(0, network.itemsize * examples * tokens * network.elementwise)


def backward(network: Network, examples: int, tokens: int) -> Work:
    """The gradients of the activations, and of no weight, from the loss down to the first tracked one."""
    work = _attention(network, network.attention_back, examples, tokens, products=5)  # one of them again, not stored
    for weight in network.weights:
        if weight.passes_back:
            work += _gemm(network, examples * weight.summands(tokens), weight.n_out, weight.n_in) * weight.count
    passed = sum(weight.count for weight in network.weights if weight.passes_back)
    share = passed / max(1, sum(weight.count for weight in network.weights))
    return work + Work(0, 2 * share * network.itemsize * examples * tokens * network.elementwise)


def floor(network: Network, examples: int, tokens: int) -> Work:
    """What every pass pays that takes gradients of examples: `forward` and `backward`."""
    return forward(network, examples, tokens) + backward(network, examples, tokens)


def covariance_pass(network: Network, examples: int, tokens: int, itemsize: int = 4) -> Work:
    """`floor`, and the covariances of both sides of the tracked weights; of a shared input only one."""
    work = floor(network, examples, tokens)
    for weight in network.tracked:
        rows = examples * weight.summands(tokens)
        sides = [(weight.n_in, weight.count / weight.shared), (weight.n_out, weight.count * weight.has_out)]
        for width, count in sides:
            work += Work(covariance(rows, width).flops, itemsize * (rows * width + 1.5 * width**2)) * count
    return work


def eigendecompositions(network: Network) -> Work:
    """Eigenvectors of every covariance: nominally 9 n^3 FLOPs each (Golub & Van Loan 2013, section 8.3), in float64."""
    work = Work()
    for weight in network.tracked:
        sides = [(weight.n_in, weight.count / weight.shared), (weight.n_out, weight.count * weight.has_out)]
        work += sum((Work(9.0 * width**3, 16.0 * width**2) * count for width, count in sides), Work())
    return work


def eigenvalue_pass(network: Network, examples: int, tokens: int, itemsize: int = 4) -> Work:
    """`floor`, and each gradient in the eigenbasis, squared and added up."""
    return _rotated(network, examples, tokens, itemsize)


def self_influence_pass(network: Network, examples: int, tokens: int, itemsize: int = 4) -> Work:
    """`floor`, and each gradient in the eigenbasis, squared and weighted: `<g, operator g>` needs no rotation back."""
    return _rotated(network, examples, tokens, itemsize)


def query_pass(network: Network, examples: int, tokens: int, itemsize: int = 4) -> Work:
    """`floor`, and each query's gradient formed in the eigenbasis, scaled, and rotated back."""
    work = _rotated(network, examples, tokens, itemsize)
    for weight in network.tracked:
        back = formed_rotation(weight.n_out, weight.n_in, weight.has_out)
        moved = 3 * (back.floats + weight.n_out * weight.n_in)
        work += Work(back.flops, itemsize * moved) * (examples * weight.count)
    return work


def score_pass(
    network: Network, examples: int, tokens: int, queries: int, query_rank: int | None = None, itemsize: int = 4
) -> Work:
    """`floor`, and the inner products of all queries with each gradient."""
    work = floor(network, examples, tokens)
    for weight in network.tracked:
        size = weight.n_out * weight.n_in
        low = query_rank is not None and query_rank * (weight.n_out + weight.n_in) < size
        summands = weight.summands(tokens)
        chosen = product(queries, query_rank if low else None, summands, weight.n_out, weight.n_in)
        moved = examples * (summands * (weight.n_out + weight.n_in) + 2 * chosen.floats) + queries * size
        work += Work(chosen.flops * examples, itemsize * moved) * weight.count
    return work


def index_pass(network: Network, examples: int, tokens: int, dim: int, itemsize: int = 4) -> Work:
    """`floor`, and both sides of the tracked weights projected to `dim` numbers per position, then multiplied."""
    work = floor(network, examples, tokens)
    for weight in network.tracked:
        summands = weight.summands(tokens)
        widths = weight.n_out + weight.n_in / weight.shared
        flops, moved = 2 * summands * dim * (widths + dim), summands * (widths + 4 * dim)
        work += Work(flops, itemsize * moved) * (examples * weight.count)
    return work


def _rotated(network: Network, examples: int, tokens: int, itemsize: int) -> Work:
    work = floor(network, examples, tokens)
    for weight in network.tracked:
        summands, size = weight.summands(tokens), weight.n_out * weight.n_in
        chosen = rotation(summands, weight.n_out, weight.n_in, weight.has_out, True, weight.shared)
        moved = summands * (weight.n_out + weight.n_in) + 2 * chosen.floats + 2 * size
        work += Work(chosen.flops + 2 * size, itemsize * moved) * (examples * weight.count)
    return work


def _gemm(network: Network, rows: int, inner: int, columns: int) -> Work:
    """`[rows, inner] @ [inner, columns]` in the model's format."""
    moved = rows * inner + inner * columns + rows * columns
    return Work(2 * rows * inner * columns, network.itemsize * moved)


def _attention(network: Network, width: int, examples: int, tokens: int, products: int) -> Work:
    """Products of queries with keys and their kin: `products` of them, over all positions."""
    flops = products * 2 * examples * tokens**2 * width
    return Work(flops, network.itemsize * examples * tokens * width * 2 * products)
