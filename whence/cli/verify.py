"""`whence verify`: whether files are still what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence.cli.from_settings import Only
from whence.cli.options import Session
from whence.show.numbers import many


def verify(
    *,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A run, or any folder in it: factors, scores, an index, a trained model.")
    ],
    session: Annotated[Session, Only("as_json", "quiet")],
) -> None:
    """Compare every file of a folder with the digest (BLAKE3) that was kept of it when it was written.

    A run checks what it reads by itself; this is for all of it at once, as after a copy or a failing disk. Records are
    whence.lock of a run, manifest.json of a finished folder, checkpoint.json of a checkpoint, and .digests of a folder that is
    not finished. The exit code is 4 where anything is damaged or gone, and 0 otherwise.

    \b
    Examples
      whence verify runs/a
      whence verify runs/a/index --json
      whence verify runs/a/train/model
    """
    from whence.cli.console import print_json, print_table, reporting, say
    from whence.store.intact import refuse_faults, verified

    with reporting(quiet=session.quiet or session.as_json):
        found = verified(folder)
    by_size = [path for path, known in found.files.items() if not known]
    if session.as_json:
        paths = {"by_size_only": by_size, "unlisted": found.unlisted, "records": [each.record for each in found.records]}
        said = {name: [str(path) for path in listed] for name, listed in paths.items()}
        print_json({"folder": str(folder), "files": len(found.files), "damaged": found.faults, **said})
    else:
        rows = [
            [str(each.record), f"{len(each.files):,}", f"{each.size / 1e6:,.1f}", f"{len(each.faults):,}"]
            for each in found.records
        ]
        print_table(("record", "files", "MB", "damaged"), rows)
        for what, paths in (
            ("not listed in any record", found.unlisted),
            ("without a digest (an older version wrote none), compared by size only", by_size),
        ):
            if paths:
                say(f"{many(len(paths), 'file')} {what}: {', '.join(map(str, paths[:3]))}{' ...' if len(paths) > 3 else ''}")
    refuse_faults(folder, found.faults)
    if not session.as_json:
        say(f"{many(len(found.files), 'file')} unchanged since written")
