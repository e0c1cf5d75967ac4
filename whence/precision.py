"""Number formats of one run, as one value, and how products are taken in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Format = Literal["float64", "float32", "bfloat16", "float16"]
Products = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Precision:
    """Formats of what is multiplied; sums always accumulate in float32 or better, eigenvectors are solved in float64.

    `statistics` are the operands of covariances and of corrected eigenvalues, `scores` those of inner products with
    the queries: lower ones take less memory; a float64 model is never lowered. `products` is what the hardware may
    round float32 operands to inside a matrix product, the model's own included: "bfloat16" (TensorFloat-32 on GPUs) is
    faster where there are units for it, and everything kept stays float32. "auto" takes it where the work is worth it
    and the inner products of a few of the rows' gradients hardly move (see `whence.probe`).
    """

    statistics: Format = "float32"
    scores: Format = "float32"
    products: Products = "auto"

    def operands(self, purpose: Literal["statistics", "scores"], model: torch.dtype) -> torch.dtype:
        """The format to multiply in for a model of the given format."""
        import torch

        return torch.float64 if model == torch.float64 else getattr(torch, getattr(self, purpose))

    def sums(self, model: torch.dtype) -> torch.dtype:
        """The format to accumulate in."""
        import torch

        return torch.promote_types(model, torch.float32)

    def settings(self) -> dict[str, str]:
        """For fingerprints."""
        return dict(asdict(self))


EXACT = Precision(products="float32")
"""float32 throughout."""


def has_units(device: torch.device) -> bool:
    """Whether the device has units that multiply float32 operands rounded to a shorter format: AMX, tensor cores."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


@contextlib.contextmanager
def multiplying(products: Products, device: torch.device) -> Iterator[None]:
    """Take the float32 products inside in this format; on a CPU but for those of fused attention, which get slower by it."""
    import torch

    from whence.attention import WholeAttention

    short = products == "bfloat16"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if short else "highest")
    try:
        with WholeAttention() if short and device.type == "cpu" else contextlib.nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
