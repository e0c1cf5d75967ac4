"""Figures, each in two parts: the numbers that it shows, and the drawing of them."""
