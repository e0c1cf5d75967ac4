"""What most tests and their processes would each import and build for themselves; whoever forks them imports this before.

All of it stays: looking through it for garbage, which every Trainer does, takes longer than most tests.
"""

import gc

gc.disable()

import bm25s  # noqa: F401
import distributed.work  # noqa: F401
import matplotlib.figure  # noqa: F401
import pictures  # noqa: F401
import PIL.Image
import rouge_score.rouge_scorer  # noqa: F401
import scipy.stats  # noqa: F401
import torch._decomp.decompositions_for_jvp
import torch.distributed  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import whence.cli.fit
import whence.pipeline.work
import whence.report.write
import whence.show.bars
import whence.train.finetune
import whence.validate.quick  # noqa: F401
from whence.report import html, markdown

get_checkpoint_conversion_mapping("llama")  # of all architectures, half a second
PIL.Image.preinit()
html._compiled("questions.html.j2")
html._compiled("inspect.html.j2")
html._compiled("report.html.j2", short=html._short)
html._compiled("report.md.j2", text=markdown.escaped, snippet=markdown._snippet)
gc.collect()
gc.freeze()
gc.enable()
