"""Linear maps from gradients to gradients, applied and composed with `@`, added and scaled."""

from whence.operators.base import Operator, Product, Scaled, Streaming, Sum
from whence.operators.eigen import BlockDiagonal, EigenBlock
from whence.operators.identity import Identity
from whence.operators.projection import Projection
from whence.operators.renamed import Renamed
from whence.operators.sketch import Masks, SparseProjection
from whence.operators.spectral import Spectral

__all__ = [
    "BlockDiagonal",
    "EigenBlock",
    "Identity",
    "Masks",
    "Operator",
    "Product",
    "Projection",
    "Renamed",
    "Scaled",
    "SparseProjection",
    "Spectral",
    "Streaming",
    "Sum",
]
