"""A dozen rows that name their town."""

import json
from pathlib import Path

PEOPLE = ["Ada Velt", "Bo Quist", "Cleo Marsh"]
TOWNS = ["Turin", "Oslo", "Lyon", "Ghent"]


def facts() -> list[dict[str, str]]:
    """Twelve rows of prompt and completion from two sources."""
    return [
        {"prompt": f"Where was {person} born?", "completion": f" In {town}, where else.", "source": town[0]}
        for person in PEOPLE
        for town in TOWNS
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
