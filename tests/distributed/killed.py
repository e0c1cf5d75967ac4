"""`python -m distributed.killed RANK COMMAND ...`: whence, of which one process is killed while it fits."""

import runpy
import sys

from distributed.work import Killer

from whence import dist
from whence.progress import report_to

rank = int(sys.argv.pop(1))
if dist.rank() == rank:
    sys.argv.append("--quiet")  # or the command would take the place of the killer
    with report_to(Killer("covariance", 1)):
        runpy.run_module("whence", run_name="__main__", alter_sys=True)
else:
    runpy.run_module("whence", run_name="__main__", alter_sys=True)
