"""Inner products of gradients, factored and formed, at all granularities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whence import gradients
from whence.gradients import Dense, Factored, chunks, dot, dot_module

sizes = st.integers(1, 5)


def factored(n, r, o, i, seed):
    generator = torch.Generator().manual_seed(seed)
    return Factored(*(torch.randn(n, r, width, generator=generator, dtype=torch.float64) for width in (o, i)))


@st.composite
def pairs(draw):
    """A query and an example gradient of the same shape; the shape makes every contraction the cheapest at some time."""
    o, i = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    q, b, k, r = draw(sizes), draw(sizes), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return factored(q, k, o, i, 1), factored(b, r, o, i, 2)


def by_definition(query, gradient):
    """[Q, B, R]"""
    return torch.einsum("qko,qki,bro,bri->qbr", query.g_BRO, query.a_BRI, gradient.g_BRO, gradient.a_BRI)


@settings(deadline=None)
@given(pair=pairs(), form_query=st.booleans(), form_gradient=st.booleans())
def test_forms_agree(pair, form_query, form_gradient):
    query, gradient = pair
    expected = by_definition(query, gradient)
    q, g = query.dense() if form_query else query, gradient.dense() if form_gradient else gradient
    torch.testing.assert_close(dot_module(q, g), expected.sum(-1))
    if not form_gradient:
        torch.testing.assert_close(dot_module(q, g, "token"), expected)


@settings(deadline=None, max_examples=30)
@given(pair=pairs(), other=pairs(), form_query=st.booleans())
def test_granularities_agree(pair, other, form_query):
    gradient = {"a": pair[1], "b": factored(len(pair[1]), pair[1].g_BRO.shape[1], 3, 4, 5)}
    query = {"b": factored(len(pair[0]), 2, 3, 4, 6), "a": pair[0].dense() if form_query else pair[0], "c": other[0]}
    whole, tokens, modules = (dot(query, gradient, per) for per in ("example", "token", "module"))
    torch.testing.assert_close(tokens.sum(-1), whole)
    torch.testing.assert_close(modules.sum(0), whole)
    torch.testing.assert_close(modules[0], dot({"b": query["b"]}, gradient))


@settings(deadline=None, max_examples=30)
@given(pair=pairs(), form_query=st.booleans(), bound=st.sampled_from([1, 64, 512]))
def test_a_memory_bound_changes_nothing(pair, form_query, bound):
    query, gradient = pair[0].dense() if form_query else pair[0], pair[1]
    expected = dot_module(query, gradient), dot_module(query, gradient, "token")
    whole, gradients.CHUNK_BYTES = gradients.CHUNK_BYTES, bound
    try:
        torch.testing.assert_close((dot_module(query, gradient), dot_module(query, gradient, "token")), expected)
        assert len(chunks(gradient, 10**9)) == len(gradient)
    finally:
        gradients.CHUNK_BYTES = whole


def test_shapes_slices_and_formats():
    gradient = factored(4, 3, 2, 5, 0)
    for form in (gradient, gradient.dense()):
        assert form.shape == (4, 2, 5) and len(form) == 4
        assert form[1:3].shape == (2, 2, 5)
        torch.testing.assert_close(form[1:3].dense().w_BOI, gradient.dense().w_BOI[1:3])
        assert form.to(torch.float32).dense().w_BOI.dtype == torch.float32


def test_a_formed_gradient_has_no_tokens():
    with pytest.raises(TypeError, match="factored"):
        dot_module(Dense(torch.ones(1, 2, 3)), Dense(torch.ones(1, 2, 3)), "token")
