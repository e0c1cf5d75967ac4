"""The fingerprint of our code covers every module that can change a number of fit, score, index or a method."""

from imports import MODULES, reached

from whence.store.digest import NUMERIC, PACKAGE

METHODS = [name for name in MODULES if name.split("/")[0] in ("methods", "stages")]
ROOTS = ["fitting/fit", "scoring/score", "indexing/build", "train/record", *METHODS]

OTHERS = {
    "errors",  # what is said when there is no number
    "escapes",  # how text is shown
    "models",  # loads weights, which the model's fingerprint covers
    "progress",  # says how far the work is
    "settings",  # what is chosen stands in the provenance itself, defaults too
    "show",  # how results are written for people
    "show/bars",
    "show/markup",
    "show/numbers",
    "show/tokens",
    "store/ranked",  # tables for people
    "store/shown",  # scores in words
    "shortage",  # tells what ran out from errors
    "store/digest",  # hashes what was chosen
    "store/files",  # puts files in their place
    "store/fingerprint",  # hashes models, data and operators
    "store/intact",  # refuses files that are not what was written
    "store/manifest",  # keeps tensors as they are, and compares provenances
    "store/memory",  # the same without a disk
    "train",  # an empty package
    "train/metrics",  # columns of a table for people
    "train/order",  # the order of a training that is over
    "train/reading",  # settings of the data, which stand in the provenance of what was made with them
    "train/record",  # which checkpoints and rates there are: TracIn's provenance has them
    "version",  # is part of the fingerprint by itself
}
"""Modules that are imported on the way and can't change a number."""


def covers(entry: str, module: str) -> bool:
    return module == entry or module.startswith(f"{entry}/")


def test_it_covers_every_module_that_is_reached():
    missed = {name for name in reached(*ROOTS) if not any(covers(entry, name) for entry in NUMERIC)}
    assert missed == OTHERS, (
        "in NUMERIC (whence/store/digest.py) if they can change a number, else in OTHERS: "
        f"{sorted(missed - OTHERS)}; no longer reached, or in NUMERIC too: {sorted(OTHERS - missed)}"
    )


def test_every_entry_is_reached():
    modules = reached(*ROOTS)
    assert list(NUMERIC) == sorted(set(NUMERIC))
    assert [entry for entry in NUMERIC if not any(covers(entry, name) for name in modules)] == []
    assert all((PACKAGE / entry).is_dir() or (PACKAGE / f"{entry}.py").is_file() for entry in NUMERIC)
