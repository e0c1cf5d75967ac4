"""The algebra of operators, by hypothesis: for every kind of basis, every form of gradient, against dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import matrix_of

from whence.errors import NumericalError
from whence.gradients import Dense, Factored, dot
from whence.linalg.rotation import Rotation, split_sizes
from whence.operators import BlockDiagonal, EigenBlock, Identity, Operator, Product
from whence.store.fingerprint import fingerprint_operator

close = torch.testing.assert_close
quickly = settings(deadline=None, max_examples=40)


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@st.composite
def blocks(draw, shape=None):
    """An EigenBlock with or without bases, whole or split, some eigenvalues zero."""
    n_out, n_in = shape or (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def basis(width):
        if draw(st.booleans()):
            return None
        largest = draw(st.none() | st.integers(1, 4))
        return Rotation(tuple(torch.linalg.qr(randn(generator, n, n)).Q for n in split_sizes(width, largest)))

    lam_OI = randn(generator, n_out, n_in).square()
    if draw(st.booleans()):
        lam_OI[0] = 0
    lam_OI[-1, -1] = 1
    return EigenBlock(basis(n_out), basis(n_in), lam_OI)


@st.composite
def operators(draw, shapes):
    return BlockDiagonal({name: draw(blocks(shape)) for name, shape in shapes.items()}, "an operator")


SHAPES = {"a": (3, 5), "b": (4, 1)}


@st.composite
def gradients(draw, shapes=SHAPES, count=3):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    found = {}
    for name, (o, i) in shapes.items():
        r = draw(st.integers(1, 8))  # fewer and more than either side is wide
        factored = Factored(randn(generator, count, r, o), randn(generator, count, r, i))
        found[name] = factored if draw(st.booleans()) else factored.dense()
    return found


def flat(gradients):
    """One vector per example and module."""
    return {name: g.dense().w_BOI.flatten(1) for name, g in gradients.items()}


@quickly
@given(operator=operators(SHAPES), g=gradients())
def test_applying_is_multiplying_with_the_dense_matrix(operator, g):
    applied, dense = flat(operator @ g), operator.dense()
    for name, w in flat(g).items():
        close(dense[name], dense[name].T)
        close(applied[name], w @ dense[name])


@quickly
@given(operator=operators(SHAPES), g=gradients())
def test_rotations_keep_lengths_and_come_back(operator, g):
    for name, block in operator.blocks.items():
        rotated = block.rotate(g[name])
        w = g[name].dense().w_BOI
        close(rotated.w_BOI.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1))
        close(block.unrotate(rotated.w_BOI), w)


@quickly
@given(operator=operators(SHAPES), g=gradients())
def test_the_quadratic_form_is_the_product_with_itself(operator, g):
    expected = dot(g, operator @ g).diagonal()
    close(operator.quadratic(g), expected)
    assert (operator.quadratic(g) >= 0).all()


@quickly
@given(operator=operators(SHAPES), g=gradients(), damping=st.floats(1e-3, 10))
def test_the_inverse_undoes_the_damped_operator(operator, g, damping):
    relative, absolute = operator.inverse(damping), operator.inverse(absolute=damping)
    for name, matrix in operator.dense().items():
        eye = torch.eye(len(matrix), dtype=torch.float64)
        close(absolute.dense()[name] @ (matrix + damping * eye), eye)
        close(relative.dense()[name] @ (matrix + damping * matrix.diag().mean() * eye), eye)


@quickly
@given(operator=operators(SHAPES), g=gradients())
def test_without_damping_the_inverse_is_the_inverse(operator, g):
    positive = operator.apply(lambda lam_OI: lam_OI + 0.5)
    back = flat(positive.inverse(0.0) @ (positive @ g))
    for name, w in flat(g).items():
        close(back[name], w)


@quickly
@given(left=operators(SHAPES), right=operators(SHAPES), g=gradients())
def test_composition_applies_one_after_the_other(left, right, g):
    product = left @ right
    assert isinstance(product, Product) and product.names == ("a", "b")
    together, one_by_one = flat(product @ g), flat(left @ (right @ g))
    for name in g:
        close(together[name], one_by_one[name])
        matrix = matrix_of(product, name, SHAPES[name])
        close(matrix, left.dense()[name] @ right.dense()[name])
        close(together[name], flat(g)[name] @ matrix.T)
    three, other = (left @ right) @ left, left @ (right @ left)
    close(matrix_of(three, "a", SHAPES["a"]), matrix_of(other, "a", SHAPES["a"]))


@quickly
@given(left=operators(SHAPES), right=operators(SHAPES), g=gradients(), factor=st.floats(-3, 3))
def test_operators_add_up_and_scale(left, right, g, factor):
    for operator, matrices in (
        (left + right, {name: left.dense()[name] + right.dense()[name] for name in SHAPES}),
        (factor * left, {name: factor * left.dense()[name] for name in SHAPES}),
        (left + factor * Identity(), {name: left.dense()[name] + factor * eye(name) for name in SHAPES}),
        ((left + right) @ (0.5 * right), {n: (left.dense()[n] + right.dense()[n]) @ right.dense()[n] / 2 for n in SHAPES}),
        (left @ Identity(["b"]), {"b": left.dense()["b"]}),
    ):
        assert set(operator @ g) == set(matrices)
        for name, w in flat(operator @ g).items():
            close(w, flat(g)[name] @ matrices[name].T)


@quickly
@given(left=operators(SHAPES), right=operators(SHAPES), g=gradients())
def test_what_is_made_of_blockwise_operators_can_be_applied_as_gradients_arise(left, right, g):
    for operator in (left, left @ right, left + right, 2.0 * left, Identity(), left.apply(torch.sqrt) + Identity()):
        assert operator.blockwise
        streaming = operator.streaming(torch.empty(0, dtype=torch.float64))
        expected = operator @ g
        for name, gradient in g.items():
            close(streaming.apply(name, gradient, (name,)).dense().w_BOI, expected[name].dense().w_BOI)
            close(streaming.quadratic(name, gradient, (name,)), dot({name: g[name]}, {name: expected[name]}).diagonal())
    assert not (left @ Whole()).blockwise and not (Whole() + left).blockwise and not (2 * Whole()).blockwise
    with pytest.raises(TypeError, match="apply it to all gradients at once"):
        Whole().streaming()


class Whole(Operator):
    """One that wants all gradients at once."""

    label, names = "mixed", ()

    def apply_to(self, gradients):
        return gradients

    def identity(self):
        return "mixed"


def eye(name):
    return torch.eye(SHAPES[name][0] * SHAPES[name][1], dtype=torch.float64)


def test_the_identity_holds_nothing_and_knows_its_functions():
    g = {"a": Factored(torch.randn(2, 3, 4), torch.randn(2, 3, 5)), "b": Dense(torch.randn(2, 1, 1))}
    assert (Identity() @ g)["a"] is g["a"] and set(Identity(["b"]) @ g) == {"b"}
    inverse = Identity().inverse(0.1)
    assert inverse.label == "identity, inverse with damping 0.1 x mean eigenvalue"
    close((inverse @ g)["a"].dense().w_BOI, g["a"].dense().w_BOI / 1.1)
    close((Identity().inverse(absolute=3.0) @ g)["b"].w_BOI, g["b"].w_BOI / 4)


def test_identities_tell_operators_apart():
    one, other = operator_of(torch.ones(1, 2)), operator_of(torch.zeros(1, 2))
    made = [one, other, one @ other, other @ one, one + other, 2 * one, 3 * one, Identity(), Identity(["layer.3"])]
    assert len({fingerprint_operator(operator)["identity"] for operator in made}) == len(made)
    assert fingerprint_operator(one) == fingerprint_operator(operator_of(torch.ones(1, 2)))


@quickly
@given(operator=operators(SHAPES), g=gradients())
def test_a_function_of_the_operator_is_one_of_its_eigenvalues(operator, g):
    root = operator.apply(torch.sqrt, "root")
    for name in SHAPES:
        close(matrix_of(root @ root, name, SHAPES[name]), operator.dense()[name])
        exponential = operator.apply(lambda lam_OI: (-lam_OI).exp()).dense()[name]
        close(exponential, torch.linalg.matrix_exp(-operator.dense()[name]))
    assert root.label == "an operator, root"


@quickly
@given(operator=operators(SHAPES), queries=gradients(), g=gradients(count=2))
def test_it_does_not_matter_which_side_is_multiplied(operator, queries, g):
    close(dot(operator @ queries, g), dot(queries, operator @ g))
    root = operator.apply(torch.sqrt)
    close(dot(operator @ queries, g), dot(root @ queries, root @ g))


@given(operator=operators(SHAPES))
def test_the_identity_basis_with_ones_changes_nothing(operator):
    identity = BlockDiagonal(
        {name: EigenBlock(None, None, torch.ones(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    )
    for name in SHAPES:
        close(matrix_of(identity @ operator, name, SHAPES[name]), operator.dense()[name])
        close(identity.inverse(0.1).dense()[name], torch.eye(len(identity.dense()[name]), dtype=torch.float64) / 1.1)


def operator_of(lam_OI):
    return BlockDiagonal({"layer.3": EigenBlock(None, None, lam_OI)}, "diagonal")


@pytest.mark.parametrize("settings", [{"damping": 0.0}, {"absolute": 0.0}])
def test_what_cannot_be_inverted_is_named(settings):
    with pytest.raises(NumericalError, match="layer.3"):
        operator_of(torch.tensor([[0.0, 1.0]])).inverse(**settings)


def test_a_module_without_curvature_needs_absolute_damping():
    operator = operator_of(torch.zeros(1, 2))
    with pytest.raises(NumericalError, match="layer.3"):
        operator.inverse(0.1)
    close(operator.inverse(absolute=0.5).dense()["layer.3"], 2 * torch.eye(2))


def test_modules_that_are_missing_are_left_out():
    operator = operator_of(torch.ones(1, 2))
    g = {"other": Dense(torch.ones(1, 1, 2)), "layer.3": Dense(torch.ones(1, 1, 2))}
    assert set(operator @ g) == {"layer.3"} == set(operator.names)
    assert (operator @ operator_of(torch.ones(1, 2))).names == ("layer.3",)


def test_labels_formats_and_tensors():
    operator = operator_of(torch.ones(1, 2))
    assert operator.inverse(0.1).label == "diagonal, inverse with damping 0.1 x mean eigenvalue"
    assert operator.inverse(absolute=1e-3).label == "diagonal, inverse with damping 0.001"
    product = operator @ operator.inverse()
    assert product.label.startswith("(diagonal) after (diagonal, inverse")
    lowered = product.streaming(torch.empty(0, dtype=torch.bfloat16))
    assert lowered.apply("layer.3", Dense(torch.ones(1, 1, 2)), ("layer.3",)).dtype == torch.bfloat16


def reading_the_same(count=3, tokens=6, n_in=9, outs=(4, 5), seed=0):
    """Blocks with one input basis, and gradients with one input."""
    generator = torch.Generator().manual_seed(seed)
    q_I = Rotation((torch.linalg.qr(randn(generator, n_in, n_in)).Q,))
    found = {}
    a_BRI = randn(generator, count, tokens, n_in)
    for name, n_out in zip("ab", outs, strict=True):
        q_O = Rotation((torch.linalg.qr(randn(generator, n_out, n_out)).Q,))
        block = EigenBlock(q_O, q_I, randn(generator, n_out, n_in).square())
        found[name] = block, Factored(randn(generator, count, tokens, n_out), a_BRI)
    return BlockDiagonal({name: block for name, (block, _) in found.items()}), {name: g for name, (_, g) in found.items()}


def test_an_input_that_two_sites_read_is_rotated_once():
    from torch.utils.flop_counter import FlopCounterMode

    operator, gradients = reading_the_same(tokens=3)
    streaming, readers = operator.streaming(), ("a", "b")
    with FlopCounterMode(display=False) as shared:
        parts = [streaming.quadratic(name, gradient, readers) for name, gradient in gradients.items()]
    with FlopCounterMode(display=False) as separate:
        expected = operator.quadratic(gradients)
    close(torch.stack(parts).sum(0), expected)
    assert separate.get_total_flops() - shared.get_total_flops() == 2 * 3 * 3 * 9**2
    for name, gradient in gradients.items():
        close(streaming.apply(name, gradient, readers).w_BOI, (operator @ gradients)[name].dense().w_BOI)


def test_blocks_that_a_gpu_has_no_room_for_visit_it_one_after_the_other(monkeypatch, notes):
    operator, gradients = reading_the_same(tokens=3)
    like = torch.empty(0, dtype=torch.float32)
    whole = operator.streaming(like)
    monkeypatch.setattr("whence.operators.eigen.free_bytes", lambda device: -1)
    moved = []
    monkeypatch.setattr(
        Rotation, "to", lambda self, like: moved.append(self) or Rotation(tuple(x.to(like) for x in self.blocks))
    )
    visiting, readers = operator.streaming(like), ("a", "b")
    for name, gradient in [*gradients.items()] * 2:
        assert visiting.apply(name, gradient, readers).w_BOI.equal(whole.apply(name, gradient, readers).w_BOI)
        assert visiting.quadratic(name, gradient, readers).equal(whole.quadratic(name, gradient, readers))
    assert len(moved) == 3  # two outputs' sides and the input's, which stays though both modules asked for it
    assert "visit it module by module" in notes[0]
    many = {str(number): EigenBlock(Rotation((torch.eye(2),)), None, torch.ones(2, 3)) for number in range(9)}
    one = BlockDiagonal(many).streaming(like)
    for name in many:
        one.apply(name, Dense(torch.ones(1, 2, 3)), (name,))
    assert len(one.blocks._here) == 3 and list(one.blocks) == list(many) and len(one.blocks) == 9


def test_an_input_is_not_taken_for_the_next_batch():
    operator, first = reading_the_same(tokens=3)
    second = {name: Factored(g.g_BRO, g.a_BRI + 1) for name, g in first.items()}
    streaming, readers = operator.streaming(), ("a", "b")
    streaming.apply("a", first["a"], readers)  # "b" has no gradient in the first batch
    for name, gradient in second.items():
        close(streaming.apply(name, gradient, readers).w_BOI, (operator @ second)[name].dense().w_BOI)


def test_bases_that_blocks_share_stay_shared_in_another_format():
    operator, _ = reading_the_same()
    moved = operator.to(torch.empty(0, dtype=torch.float32))
    basis = moved.blocks["a"].q_I
    assert basis is not None and basis is moved.blocks["b"].q_I
    assert basis.blocks[0].dtype == torch.float32
