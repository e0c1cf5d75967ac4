"""Everything that whence raises for a user's mistake, as one tree.

    WhenceError
    ├── UsageError             a setting or an input is wrong                     exit code 2
    │   ├── ModelNotFound          01  no model there
    │   ├── AdapterBaseMissing     02  an adapter whose base model is missing
    │   ├── ColumnError            04  the data has other columns
    │   ├── ChatTemplateError      05  no chat template, or one that rewrites the answer
    │   ├── EmptyLossError         06  no token is left in the loss
    │   ├── TruncatedQueryError    07  the query's answer was cut off
    │   ├── TokenizerMismatch      08  the data was made with another tokenizer
    │   └── CoverageError       16-18  no module to track, or (24) one whose gradient is not what was captured
    ├── OutOfMemory            10  too little memory, even for one example      exit code 3
    ├── DoesNotFit             11  no settings fit in the memory or disk          exit code 3
    ├── DiskFull               13  a disk is full, or can't be written to         exit code 3
    ├── NumericalError         14  NaN, infinity, or a failed decomposition       exit code 1
    ├── DegenerateScores       15  all scores identical                           exit code 1
    └── StaleArtifact          23  a folder was made from something else          exit code 4

An error says what happened (`what`), what was found or given (`given`), what would be accepted
(`accepted`) and the command or line that fixes it (`fix`).
"""

from __future__ import annotations

from whence.escapes import visible


class WhenceError(Exception):
    """Something the user can fix; `str()` of it is the whole message."""

    code: int | None = None
    exit_code = 1

    def __init__(self, what: str, *, given: str = "", accepted: str = "", fix: str = "", code: int | None = None):
        self.what, self.given, self.accepted, self.fix = map(visible, (what, given, accepted, fix))
        if code is not None:
            self.code = code
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.what}  [WHENCE-{self.code:02d}]" if self.code is not None else self.what
        rows = [("given", self.given), ("accepted", self.accepted), ("fix", self.fix)]
        return "\n".join([head, *(f"  {name:<9}{text}" for name, text in rows if text)])


class UsageError(WhenceError, ValueError):
    """A setting or an input is wrong."""

    exit_code = 2


class ModelNotFound(UsageError):
    """No model at the given place."""

    code = 1


class AdapterBaseMissing(UsageError):
    """The folder holds an adapter whose base model can't be loaded."""

    code = 2


class ColumnError(UsageError):
    """The data has no column of the given name."""

    code = 4


class ChatTemplateError(UsageError):
    """The chat template is missing, or it rewrites the answer."""

    code = 5


class EmptyLossError(UsageError):
    """Too many rows have no token in the loss."""

    code = 6


class TruncatedQueryError(UsageError):
    """A query's answer does not fit in the maximum length."""

    code = 7


class TokenizerMismatch(UsageError):
    """The tokenizer differs from the one the artefact was made with."""

    code = 8


class CoverageError(UsageError):
    """No module to track, or a module that can't be tracked."""

    code = 17


class OutOfMemory(WhenceError):
    """A batch does not fit, even after halving it, or there is no memory for something else."""

    code = 10
    exit_code = 3


class DoesNotFit(WhenceError):
    """No settings fit in the available memory or disk."""

    code = 11
    exit_code = 3


class DiskFull(WhenceError):
    """A file can't be written: the disk is full or read-only, or the place is not ours to write to."""

    code = 13
    exit_code = 3


class NumericalError(WhenceError):
    """NaN or infinity, or a decomposition that failed."""

    code = 14


class DegenerateScores(WhenceError):
    """All scores are identical."""

    code = 15


class StaleArtifact(WhenceError):
    """A folder was made from another model, other data or other settings."""

    code = 23
    exit_code = 4


class WhenceWarning(UserWarning):
    """Something the user should know, and that does not stop the work."""

    def __init__(self, text: str):
        super().__init__(visible(text))
