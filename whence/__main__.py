"""`python -m whence`, the same as `whence`."""

from whence import dist
from whence.cli import main

if dist.world() > 1:
    dist.end(main)
main()
