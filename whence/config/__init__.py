"""The settings of a run: what a `whence.yaml` may say, and how it is read."""
