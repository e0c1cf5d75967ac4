"""Linear maps from gradients to gradients, applied and composed with `@`."""

from whence.operators.base import Operator, Product
from whence.operators.eigen import BlockDiagonal, EigenBlock

__all__ = ["BlockDiagonal", "EigenBlock", "Operator", "Product"]
