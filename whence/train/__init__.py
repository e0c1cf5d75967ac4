"""Training of small models, and what it leaves behind."""
