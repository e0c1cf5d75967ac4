"""What a page asks for that doesn't exist: at all, or not yet."""

from __future__ import annotations

from whence.errors import StaleArtifact, UsageError


class NotThere(UsageError):
    """Nothing has that name."""


class Lacking(StaleArtifact):
    """Something has to be made first, by a job."""

    def __init__(self, what: str, *, job: str | None = None, given: str = "", accepted: str = "", fix: str = ""):
        self.job = job
        super().__init__(what, given=given, accepted=accepted, fix=fix)
