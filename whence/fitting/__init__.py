"""Fitting the curvature: covariances, eigenbases, corrected eigenvalues."""

from whence.fitting.curvature import Curvature, open_factors
from whence.fitting.fit import fit, fit_at
from whence.fitting.methods import METHODS

__all__ = ["METHODS", "Curvature", "fit", "fit_at", "open_factors"]
