"""Numbers of fits, scores, indices and texts on any machine, and their bits on machines where they were frozen."""

import functools
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from distributed.processes import run

from guards import work

KINDS = [("fit", 1), ("fit", 2), ("score", 1), ("score", 2), ("index", 1), ("search", 1)]


def machine() -> str:
    """What bits depend on: the processor and the libraries that compute."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    processor = [said.get(key, platform.machine()) for key in ("vendor_id", "cpu family", "model")]
    libraries = [f"{library.__name__} {library.__version__}" for library in (torch, transformers, np)]
    return ", ".join([" ".join(processor), torch.backends.cpu.get_cpu_capability(), *libraries])


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """The results of a number of processes in a format, and the folder they lie in; computed once."""

    @functools.cache
    def compute(dtype: torch.dtype, world: int = 1):
        folder = tmp_path_factory.mktemp("guards")
        if world == 1:
            found = {**work.results(folder, dtype), "search": work.searches(folder / "index", dtype)}
            return {**found, "index": {}}, folder  # an index is what lies in its shards
        found, other = run(work.results, folder, dtype, world=world)
        for kind, ways in found.items():
            for way, arrays in ways.items():
                assert work.digest(arrays) == work.digest(other[kind][way]), f"the processes differ: {way}"
        return found, folder

    return compute


@pytest.mark.parametrize("kind", ["fit", "score", "index", "search"])  # test_dist.py compares several processes with one
def test_numbers(computed, frozen, kind):
    results, folder = computed(torch.float64)
    found = {f"{way}: {name}": work.checksum(array) for way, arrays in results[kind].items() for name, array in arrays.items()}
    if kind == "index":
        for name, tensors in work.shards(folder / kind).items():
            found |= {f"{name}: {part}": work.checksum(tensors[part]) for part in ("codes", "norm") if part in tensors}
    frozen.values(f"numbers of {kind}", found, functools.partial(work.close, kind))


@pytest.mark.parametrize(("kind", "world"), KINDS[:-1])
def test_shards(computed, frozen, kind, world):
    _, folder = computed(torch.float32, world)
    found = {name: work.layout(tensors) for name, tensors in work.shards(folder / kind).items()}
    frozen.values(f"shards of {kind}", found)  # the same of any number of processes


@pytest.mark.parametrize(("kind", "world"), KINDS)
def test_bits(computed, frozen, kind, world):
    section = f"bits of {kind}, {world} processes, {machine()}"
    if not frozen.has(section):
        pytest.skip(f"no bits of this processor are frozen: pytest tests/guards --freeze -k bits ({section})")
    results, folder = computed(torch.float32, world)
    found = {way: work.digest(arrays) for way, arrays in results[kind].items()}
    found |= {name: work.digest(tensors) for name, tensors in work.shards(folder / kind).items()}
    frozen.values(section, found)


def test_texts(frozen):
    def same(found, expected):
        return [text for text, _ in found] == [text for text, _ in expected] and np.allclose(
            [logprob for _, logprob in found], [logprob for _, logprob in expected], rtol=work.TOLERANCE["texts"], atol=0
        )

    frozen.values("texts", work.generated(torch.float64), same)
