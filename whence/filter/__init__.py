"""Filters and baselines that need no model."""
