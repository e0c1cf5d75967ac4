"""The one place where contractions are costed and chosen.

A choice is a pure function of the shapes, made once and kept: floating-point operations decide, and where ways tie, the
numbers held. Each way's FLOPs and floats are *per example* (a multiplication with its addition is two FLOPs), lower-order
terms left in where they can decide. The choices are the optimum of the ways listed, not of all there are.

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
