"""Leading eigenpairs of a symmetric matrix that is known by its products: from a Krylov space, or from one random sketch.

`P` entries of a vector, `B` vectors of a block, `N` vectors of a basis, `K` eigenpairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]
"""The matrix times each of the vectors `[B, P]`."""


def block_lanczos(
    multiply: Multiply,
    start_BP: Tensor,
    vectors: int,
    *,
    state: Mapping[str, Tensor] | None = None,
    after: Callable[[dict[str, Tensor], None], None] = lambda state, told: None,
) -> tuple[Tensor, Tensor]:
    """Ritz values `[N]` and vectors `[N, P]` of the Krylov space that begins with `start`, of `vectors` vectors at most.

    Block Lanczos (Golub & Underwood 1977) with full re-orthogonalisation, twice, without which converged directions come back
    in rounded arithmetic (Parlett 1998, section 6.9). With one vector it is Arnoldi's iteration of a symmetric matrix. A step
    takes one product with `B` vectors. It ends early where the space is invariant. `after` gets the state after each step;
    given that `state`, the iteration resumes to the same bits.
    """
    vectors = min(vectors, start_BP.shape[1])
    if state is None:
        basis_NP, t_NN = start_BP.new_zeros(vectors, start_BP.shape[1]), torch.zeros(vectors, vectors, dtype=torch.float64)
        next_BP, count, steps = _orthonormal(start_BP)[0], 0, 0
    else:
        basis_NP, t_NN, next_BP = (state[name].to(start_BP.device) for name in ("basis", "projected", "next"))
        t_NN, count, steps = t_NN.cpu(), int(state["count"]), int(state["steps"])
    while count < vectors and len(next_BP):
        block = slice(count, min(vectors, count + len(next_BP)))
        basis_NP[block], count = next_BP[: block.stop - count], block.stop
        moved_BP = multiply(basis_NP[block])
        coupling_NB = (basis_NP[:count] @ moved_BP.T).double().cpu()
        t_NN[:count, block], t_NN[block, :count] = coupling_NB, coupling_NB.T
        least = 10 * torch.finfo(moved_BP.dtype).eps * moved_BP.norm(dim=1).max()
        next_BP, size_B = _orthonormal(_beyond(basis_NP[:count], moved_BP))
        next_BP, _ = _orthonormal(_beyond(basis_NP[:count], next_BP[size_B > least]))
        steps += 1
        numbers = {"count": torch.tensor(count), "steps": torch.tensor(steps)}
        after({"basis": basis_NP, "projected": t_NN, "next": next_BP, **numbers}, None)
    values_N, turn_NN = torch.linalg.eigh((t_NN[:count, :count] + t_NN[:count, :count].T) / 2)
    return values_N.to(basis_NP), turn_NN.T.to(basis_NP) @ basis_NP[:count]


def largest_pairs(values_N: Tensor, vectors_NP: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Those `count` pairs whose eigenvalues are largest by their absolute value, the largest first."""
    order = values_N.abs().argsort(descending=True)[:count]
    return values_N[order], vectors_NP[order]


def nystroem(omega_KP: Tensor, product_KP: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[K]`, the largest first, and eigenvectors `[K, P]` of `(A W) (W^T A W)^-1 (A W)^T`, `W` being `omega^T`.

    `A` is positive semi-definite, `omega` orthonormal and `product` is `A W`. All of it is shifted by what rounding may amount
    to, and back (Frangella, Tropp & Udell 2023, algorithm 2.1).
    """
    shift = torch.finfo(product_KP.dtype).eps * float(torch.linalg.matrix_norm(product_KP))
    shifted_KP = (product_KP + shift * omega_KP).double()
    core_KK = omega_KP.double() @ shifted_KP.T
    values_K, turn_KK = torch.linalg.eigh((core_KK + core_KK.T) / 2)
    root_KP = turn_KK.T @ shifted_KP / values_K.clamp(min=shift).sqrt()[:, None]
    vectors_PK, sizes_K, _ = torch.linalg.svd(root_KP.T, full_matrices=False)
    return (sizes_K.square() - shift).clamp(min=0).to(product_KP), vectors_PK.T.to(product_KP)


def random_vectors(count: int, like_P: Tensor, seed: int = 0) -> Tensor:
    """Orthonormal random vectors `[K, P]`, the same on every device."""
    size, generator = len(like_P), torch.Generator().manual_seed(seed)
    draw_PK = torch.randn(size, min(count, size), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(draw_PK)[0].T.to(like_P).contiguous()


def _beyond(basis_NP: Tensor, v_BP: Tensor) -> Tensor:
    """What of the vectors is orthogonal to the basis."""
    return v_BP - (v_BP @ basis_NP.T) @ basis_NP


def _orthonormal(v_BP: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors made orthonormal, and how far each reached beyond those before it."""
    q_PB, r_BB = torch.linalg.qr(v_BP.T)
    return q_PB.T.contiguous(), r_BB.diag().abs()
