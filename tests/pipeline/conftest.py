import json
from pathlib import Path

import pytest
import yaml

PEOPLE = ["Ada Velt", "Bo Quist", "Cleo Marsh", "Dag Holm"]
TOWNS = ["Turin", "Oslo", "Lyon", "Ghent", "Basel"]


@pytest.fixture
def settings(tmp_path, tiny_model_folder):
    """Write a whole run of the tiny model, with changes: gives the path of its whence.yaml."""
    rows = [
        {"Ask": f"Where was {person} born in {number}?", "Say": f"In {town}.", "source": town[0]}
        for number, person in enumerate(PEOPLE)
        for town in TOWNS
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": row["Ask"], "completion": row["Say"]} for row in rows[::7]]))

    def write(name: str = "whence.yaml", **changes) -> Path:
        config = {
            "run": name.removesuffix(".yaml"),
            "model": {"base": tiny_model_folder.name},
            "data": {
                "path": "rows.jsonl",
                "columns": {"prompt": "Ask", "completion": "Say", "source": "source"},
                "format": "qa",
                "max_length": 64,
            },
            "prompts": {"path": "prompts.json"},
            "train": {"max_steps": 6, "batch_size": 4, "learning_rate": 0.01, "save_steps": 2, "log_steps": 1},
            "generate": {"max_new_tokens": 4, "batch_size": 1},
            "inspect": {"modules": ["*.1.mlp.up_proj"]},
            "fit": {"batch_tokens": 64, "chunks": 4, "examples": "all", "products": "float32"},
            "score": {"chunks": 4, "batch_tokens": 64, "self_influence": True, "products": "float32"},
            "report": {"top": 3},
        }
        for section, values in changes.items():
            config[section] = config[section] | values if isinstance(values, dict) and section in config else values
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return path

    return write


@pytest.fixture(autouse=True)
def undrawn(blank_pictures):
    """Nobody looks at the pictures of these runs."""
