"""Scoring training examples against queries."""

from whence.scoring.score import score, self_influence

__all__ = ["score", "self_influence"]
