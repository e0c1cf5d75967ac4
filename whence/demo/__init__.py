"""The offline demo: an invented world, a small model that learns it, and a tour."""
