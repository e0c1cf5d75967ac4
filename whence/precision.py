"""Number formats of one run, as one value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Format = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Precision:
    """Formats of what is multiplied; sums always accumulate in float32 or better, eigenvectors are solved in float64.

    `statistics` are the operands of covariances and of corrected eigenvalues, `scores` those of inner products with
    the queries. Lower formats are faster where the hardware has them (bfloat16 on recent CPUs and GPUs) and less
    exact; a float64 model is never lowered.
    """

    statistics: Format = "float32"
    scores: Format = "float32"

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
