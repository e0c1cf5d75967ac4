"""whence beside its peers: `make bench`, `make bench-full`."""
