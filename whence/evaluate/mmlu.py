"""MMLU from a folder of its csv files, asked in just the form that lm-eval asks it in.

The files are those of Hendrycks et al. 2021: `dev/SUBJECT_dev.csv` (the examples of a prompt) and `test/SUBJECT_test.csv` (the
questions), without a header: question, A, B, C, D, letter of the answer. The form (description, prompt, few-shot examples,
metric) is read from the task files of the lm-eval that is installed.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from whence.errors import UsageError
from whence.store.digest import digest

LETTERS = ("A", "B", "C", "D")
PREFIX = "mmlu_"
TEMPLATE = "_default_template_yaml"
GROUPS = ("stem", "other", "social_sciences", "humanities")
"""Of subjects; lm-eval marks theirs with a tag."""


def subjects(folder: Path) -> list[str]:
    """Names of the subjects that have questions in a folder."""
    return sorted(file.name.removesuffix("_test.csv") for file in (folder / "test").glob("*_test.csv"))


def select(folder: Path, names: Sequence[str]) -> list[str]:
    """Subjects that tasks are about: "mmlu_virology" or "virology", a group like "mmlu_stem", or "mmlu" for all there are.

    Raises UsageError for a folder without questions, and for a name that is none, with the nearest that is.
    """
    there = subjects(folder)
    if not there:
        raise UsageError(
            f"There are no MMLU questions in {folder}.",
            accepted="a folder with dev/SUBJECT_dev.csv and test/SUBJECT_test.csv",
            fix="omit --data to load them from the hub",
        )
    chosen: dict[str, None] = {}
    for name in names:
        subject = name.removeprefix(PREFIX)
        if subject == "mmlu":
            chosen |= dict.fromkeys(there)
        elif subject in GROUPS:
            chosen |= dict.fromkeys(one for one in there if _form(one).get("tag") == f"{PREFIX}{subject}_tasks")
        elif subject in there:
            chosen[subject] = None
        else:
            raise unknown_task(name, [PREFIX + one for one in there], f"the files in {folder / 'test'}")
    return list(chosen)


def unknown_task(name: str, known: Iterable[str], where: str) -> UsageError:
    """Say that there is no such task, and which one may have been meant."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return UsageError(
        f"There is no task {name!r}.",
        accepted=f"names of {where}",
        fix=f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists all (lm_eval --tasks list)",
    )


def local_task(folder: Path, subject: str) -> Any:
    """An lm-eval task that asks the questions of a file in the form of lm-eval's own task on the subject."""
    from lm_eval.api.task import ConfigurableTask

    splits = {split: read_questions(folder, subject, split) for split in ("test", "dev")}
    elsewhere = ("dataset_path", "dataset_name", "tag", "include")
    form = {key: value for key, value in _form(subject).items() if key not in elsewhere}

    def as_datasets(**_: Any) -> dict[str, Any]:
        import datasets

        return {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}

    return ConfigurableTask(config={**form, "custom_dataset": as_datasets})


def fingerprint_subject(folder: Path, subject: str) -> str:
    """Hash the bytes of a subject's two files."""
    return digest(*(_file(folder, subject, split).read_bytes() for split in ("dev", "test")))


def read_questions(folder: Path, subject: str, split: str) -> list[dict[str, Any]]:
    """Read a csv file as rows `{"question", "subject", "choices": [4], "answer": 0..3}`, as the hub has them.

    Raises UsageError for a file that is missing or has a line of another form.
    """
    file = _file(folder, subject, split)
    with file.open(encoding="utf-8", newline="") as lines:
        table = list(csv.reader(lines))
    for number, line in enumerate(table, start=1):
        if len(line) != 6 or line[5].strip() not in LETTERS:
            raise UsageError(
                f"Row {number} of {file} is not an MMLU question.",
                given=f"{len(line)} columns: {', '.join(line)[:120]}",
                accepted="question, A, B, C, D, letter of the answer; no header line",
            )
    return [
        {"question": line[0], "subject": subject, "choices": line[1:5], "answer": LETTERS.index(line[5].strip())}
        for line in table
    ]


def _file(folder: Path, subject: str, split: str) -> Path:
    file = folder / split / f"{subject}_{split}.csv"
    if not file.is_file():
        raise UsageError(f"{file} is missing.", accepted=f"{split}/SUBJECT_{split}.csv for every subject")
    return file


def _form(subject: str) -> dict[str, Any]:
    """Read lm-eval's task file on a subject together with the template that all of them include.

    A subject that lm-eval has no file for gets the description that its name gives, as all others have it.
    """
    import lm_eval.tasks
    import yaml

    home = Path(str(lm_eval.tasks.__file__)).parent / "mmlu" / "default"
    template = yaml.safe_load((home / TEMPLATE).read_text(encoding="utf-8"))
    own = home / f"{PREFIX}{subject}.yaml"
    if own.is_file():
        return {**template, **yaml.safe_load(own.read_text(encoding="utf-8"))}
    topic = subject.replace("_", " ")
    described = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
    return {**template, "task": PREFIX + subject, "task_alias": subject, "description": described}
