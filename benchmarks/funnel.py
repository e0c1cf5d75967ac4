"""Retrieve, then score: how many of the best rows candidates hold, at what price, and whether the audit's bound holds.

    python -m benchmarks.funnel                      # 20,000 rows, 16 questions, beside a peer: ten minutes of one processor
    python -m benchmarks.funnel --rows 2000 --peers ''

Half of the rows are cut from stories, half from articles and plays; the model is stories260K; questions are how held-out
stories begin, with the model's own continuation. The truth is the scan: EK-FAC scores of all rows. Every ranking may have 2 %
of the rows, for all questions together. One thread; seconds are processor time, since the machine may be shared, and wall time
stands beside them. Audits are drawn `--audits` times: their exact scores are those of the scan. Writes results/funnel.json and
.md; exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import peer_class
from benchmarks.worker import ONE_THREAD
from benchmarks.workloads import Workload

RESULTS = Path(__file__).parent / "results"
MODEL = "models/stories260K/hf"
DEFAULT = "index32:2%"
"""What recalls most, see the table."""
SHARE = "2%"
AT_MOST = 0.02
DIMS = (32,)
TOKENS, CHARACTERS = 96, 115
"""Rows are cut at this number of tokens, and their text at about as many characters."""
HELD_OUT = 300
"""Stories, the last ones, that give questions and no rows."""
FASTER, AUDITS_RIGHT = 8.0, 0.95

CANDIDATES = (
    "bm25:2%",
    "tfidf:2%",
    "norm:2%",
    "index32:2%",
    "landmarks:2%",
    "index32:1%+bm25:1%",
    "landmarks:1%+bm25:1%",
    "landmarks:1%+index32:1%",
    "landmarks:2%+index32:1%+bm25:1%",
)

Row = dict[str, Any]


def main(given: list[str] | None = None) -> int:
    """Measure, print and write; 0 where all targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with models, tinystories, wikitext2")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--landmarks", type=int, default=256, help="other questions, whose scores are an index")
    parser.add_argument("--audits", type=int, default=100, help="seeds of the audit")
    parser.add_argument("--audit", default="10%", help="size of the audit, such as 10%% of the rows")
    parser.add_argument("--peers", default="kronfluence", help="joined by commas; those of .venv-bench")
    parser.add_argument("--python", type=Path, default=Path(".venv-bench/bin/python"), help="of the peers (make bench)")
    parser.add_argument("--work", type=Path, help="folder to keep scans and indices in; a killed run resumes there")
    parser.add_argument(
        "--only", choices=("exact", "landmarks", "indices", "peers"), help="do this part, and keep it in --work"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "funnel.json")
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.peer:
        return run_peer(*options.peer)
    with tempfile.TemporaryDirectory(prefix="whence-funnel-") as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        found = Bench(options, work).run()
    if options.only:
        return 0
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))
    return int(not all(target["met"] for target in found["targets"]))


# the corpus


def stories(data: Path) -> list[str]:
    """All stories, in the order of their file."""
    lines = (data / "tinystories/train_2316.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def articles(data: Path) -> list[str]:
    """Encyclopaedia, web pages, a few plays."""
    names = ("wikitext2/wiki.valid.tokens", "wikitext2/wiki.test.tokens", "webtext/wiki_demo.txt", "tinyshakespeare/input.txt")
    pages = [json.loads(line)["text"] for line in (data / "webtext/c4_demo.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(data / name).read_text(encoding="utf-8") for name in names] + pages


def pieces(texts: Sequence[str]) -> Iterator[str]:
    """Stretches of about `CHARACTERS`, cut between words; what is left at the end of a text is none."""
    for text in texts:
        piece = ""
        for word in re.sub(r"\s+", " ", text).split():
            if piece and len(piece) + 1 + len(word) > CHARACTERS:
                yield piece
                piece = ""
            piece = f"{piece} {word}".strip()


def corpus(data: Path, rows: int) -> list[Row]:
    """So many rows, one half from stories, in random order."""
    draw = random.Random(0)
    found = []
    for source, texts in (("stories", stories(data)[:-HELD_OUT]), ("articles", articles(data))):
        half = sorted(set(pieces(texts)))
        draw.shuffle(half)
        found += [{"text": text, "source": source} for text in half[: (rows + 1) // 2]]
    draw.shuffle(found)
    return found[:rows]


def begun(texts: Sequence[str], count: int) -> list[Row]:
    """Pieces of text as prompt and completion."""
    words = [text.split() for text in random.Random(1).sample(sorted(pieces(texts)), count)]
    return [{"prompt": " ".join(each[:10]), "completion": " " + " ".join(each[10:])} for each in words if len(each) > 12]


# the work


@dataclass
class Clock:
    """Processor and wall seconds of what is done within."""

    cpu: float = 0.0
    wall: float = 0.0

    def __enter__(self) -> Clock:
        self._began = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.cpu, self.wall = time.process_time() - self._began[0], time.perf_counter() - self._began[1]


class Bench:
    """The model, its rows and questions, and what was found about them."""

    def __init__(self, options: argparse.Namespace, work: Path):
        os.environ |= ONE_THREAD
        import torch

        import whence
        from whence.data import as_rows
        from whence.generation import answered

        torch.set_num_threads(1)
        self.options, self.work = options, work
        self.seconds: dict[str, Clock] = {}
        self.model, tokenizer = whence.load_model(str(options.data / MODEL), device="cpu")
        self.task = whence.CausalLM(tokenizer, TOKENS)
        self.rows = as_rows(corpus(options.data, options.rows))
        held_out = stories(options.data)[-HELD_OUT:]
        prompts = [{"prompt": " ".join(text.split()[:10])} for text in held_out[: options.queries]]
        self.queries = answered(self.model, self.task, as_rows(prompts), 24)
        self.others = as_rows(begun(held_out[options.queries :], options.landmarks))

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note under this name what is done within takes; of what an earlier run has done, what it took then."""
        file = self.work / "seconds.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        if self.kept(name) and name not in known:  # what a killed run has done of it would be missing in the time
            shutil.rmtree(self.work / name, ignore_errors=True)
        print(f"{time.strftime('%H:%M:%S')} {name} ...", file=sys.stderr, flush=True)
        with Clock() as clock:
            yield
        known = json.loads(file.read_text()) if file.exists() else {}  # several steps may run side by side
        if name not in known or not self.kept(name):
            known[name] = {"cpu": clock.cpu, "wall": clock.wall}
            file.write_text(json.dumps(known, indent=1))
        self.seconds[name] = Clock(**known[name])

    def kept(self, name: str) -> bool:
        """Whether a step leaves something that a later run reads."""
        return name in ("factors", "scan", "landmarks") or name.startswith("index")

    @functools.cached_property
    def curvature(self) -> Any:
        import whence

        with self.timed("factors"):
            return whence.fit(self.model, self.task, self.rows, modules="mlp", out=self.work / "factors")

    @functools.cached_property
    def operator(self) -> Any:
        return self.curvature.inverse(damping=0.1)

    @functools.cached_property
    def exact(self) -> Any:
        """The scores of all rows."""
        return self.scored("scan", self.queries)

    @functools.cached_property
    def landmarks(self) -> Any:
        """Scores of other questions."""
        from whence.indexing.landmarks import Landmarks

        found = Landmarks(self.scored("landmarks", self.others))
        with self.timed("landmarks with one another"):
            found.search(self.model, self.task, self.others[:1], self.operator)
        return found

    def scored(self, name: str, queries: Any) -> Any:
        import whence

        given: Any = (self.model, self.task, queries, self.rows, self.operator)
        with self.timed(name):
            return whence.score(*given, out=self.work / name)

    @functools.cached_property
    def indices(self) -> dict[str, Any]:
        """By name."""
        import whence

        given: Any = (self.model, self.task, self.rows)
        found = {}
        for dim in DIMS:
            curvature, out = self.curvature, self.work / f"index{dim}"
            with self.timed(f"index{dim}"):
                found[f"index{dim}"] = whence.build_index(*given, curvature=curvature, dim=dim, out=out)
        return found

    @functools.cached_property
    def peers(self) -> list[Row]:
        """The scan of each peer; kept."""
        file = self.work / "peers.json"
        if not file.exists():
            file.write_text(json.dumps(self.peers_anew()))
        return json.loads(file.read_text())

    def run(self) -> dict[str, Any]:
        """All of it, or what an earlier run has left."""
        if self.options.only:
            getattr(self, self.options.only)
            return {}
        exact, landmarks, _ = self.exact, self.landmarks, self.indices
        assert len(landmarks.scores.examples) == exact.shape[1]
        rankings = self.rankings()
        default = self.through(DEFAULT)
        return self.summary(self.table(rankings), default, self.audited(rankings), self.peers)

    def rankings(self) -> dict[str, np.ndarray]:
        """What each ranking says of all rows, `[Q, N]`; its seconds are for all questions."""
        from whence.filter.bm25 import bm25_scores
        from whence.filter.tfidf import tfidf_scores

        given: Any = (self.model, self.task, self.queries, self.operator)
        found = {}
        for name, of in (("bm25", bm25_scores), ("tfidf", tfidf_scores)):
            with self.timed(f"rank by {name}"):
                raw = of(self.queries, self.rows).raw
                found[name] = np.where(raw > 0, raw, -np.inf)
        for name, index in self.indices.items():
            index.check(self.model, self.task)
            with self.timed(f"rank by {name}"):
                searched = index.search(*given)
                found[name], found["norm"] = searched.raw, searched.norms["gradient"][None]
        with self.timed("rank by landmarks"):
            found["landmarks"] = self.landmarks.search(*given).raw
        return found

    def table(self, rankings: dict[str, np.ndarray]) -> list[Row]:
        """What each choice of candidates holds of the best 10 and 100, at 2 % for all questions and at 2 % for each."""
        from whence.filter.candidates import Amount, choose, read_candidates

        found = []
        for text in CANDIDATES:
            wanted = read_candidates(text, list(rankings))
            together, each = (choose(rankings, wanted, most) for most in (Amount(SHARE), None))
            ranked = [name for name in rankings if name in (want.retriever for want in wanted)]
            found.append(
                {
                    "candidates": text,
                    "rows": len(together.rows),
                    **{f"recall@{k}": float(recall(self.exact.raw, together.rows, k).mean()) for k in (10, 100)},
                    "rows at 2 % for each": len(each.rows),
                    **{f"recall@{k} at 2 % for each": float(recall(self.exact.raw, each.rows, k).mean()) for k in (10, 100)},
                    "seconds to rank": sum(self.seconds.get(f"rank by {name}", Clock()).cpu for name in ranked),
                    "bytes per row": sum(self.bytes_per_row(name) for name in ranked),
                }
            )
        best = np.bincount(np.argsort(-self.exact.raw, axis=1, kind="stable")[:, :100].ravel(), minlength=len(self.rows))
        most = Amount(SHARE).of(len(self.rows))
        found.append(
            {
                "candidates": "the best choice that there is",
                "rows": most,
                "recall@100": float(np.sort(best)[-most:].sum() / best.sum()),
            }
        )
        return found

    def bytes_per_row(self, name: str) -> float:
        """What a ranking keeps; words keep the text."""
        if name in self.indices:
            files = (self.work / name).glob("rows-*")
            return sum(file.stat().st_size for file in files) / len(self.rows)
        return 4.0 * len(self.others) if name == "landmarks" else 0.0

    def through(self, candidates: str) -> Row:
        """The funnel from end to end: from rows, questions and what was built before to each question's top 100."""
        from whence.funnel import score_candidates

        index = self.indices["index32"]
        text = candidates.replace("index32", "index")
        given: Any = (self.model, self.task, self.queries, self.rows, self.operator, text)
        with self.timed("funnel"):
            found = score_candidates(
                *given, at_most=SHARE, landmarks=self.landmarks, index=index, products=self.exact.about["products"]
            )
            tops = [found.top(query, 100) for query in range(len(self.queries))]
        places = [self.exact.example_ids.index(name) for name in found.example_ids]
        worst = np.abs(found.raw - self.exact.raw[:, places]).max() / np.abs(self.exact.raw).max()
        assert len(tops) == len(self.queries)
        return {
            "candidates": candidates,
            "rows": found.shape[1],
            "products, as the scan's": found.about["products"],
            "largest difference from the scan, of the largest score": float(worst),
            **{f"recall@{k}": float(recall(self.exact.raw, np.array(places), k).mean()) for k in (10, 100)},
        }

    def audited(self, rankings: dict[str, np.ndarray]) -> Row:
        """Bounds of audits drawn with one seed after the other, beside the truth."""
        from whence.filter.candidates import Amount, choose, read_candidates
        from whence.funnel import draw_audit
        from whence.linalg.audit import best_bound, recall_bound

        wanted = read_candidates(DEFAULT, list(rankings))
        found: Row = {"audit": self.options.audit, "seeds": self.options.audits, "candidates": []}
        for share in (SHARE, "10%"):
            chosen = choose(
                rankings,
                wanted if share == SHARE else read_candidates(DEFAULT.replace(SHARE, "10%"), list(rankings)),
                Amount(share),
            )
            size, raw = Amount(self.options.audit).of(len(self.rows)), self.exact.raw
            bounds: dict[int, list[list[float]]] = {10: [], 100: []}
            strata: list[Any] = []
            with self.timed(f"{self.options.audits} audits of {share}"):
                for seed in range(self.options.audits):
                    drawn = draw_audit(chosen, size, seed)
                    strata = [stratum for stratum, _ in drawn]
                    for k, each in bounds.items():
                        samples = [[raw[query, rows] for _, rows in drawn] for query in range(len(raw))]
                        each.append([recall_bound(raw[q, chosen.rows], samples[q], strata, k) for q in range(len(raw))])
            for k, each in bounds.items():
                truth, found_SQ = recall(raw, chosen.rows, k), np.array(each)
                found["candidates"].append(
                    {
                        "scored": share,
                        "k": k,
                        "truth": float(truth.mean()),
                        "bound, mean": float(found_SQ.mean()),
                        "of a perfect choice": best_bound(strata, k),
                        "audited rows": sum(stratum.drawn for stratum in strata),
                        "below the truth": float((found_SQ <= truth).mean()),
                        "below it, worst question": float((found_SQ <= truth).mean(0).min()),
                        "mean below the truth's": float((found_SQ.mean(1) <= truth.mean()).mean()),
                    }
                )
        return found

    def peers_anew(self) -> list[Row]:
        """The scan of each peer, factors fitted on a few rows beforehand; a row without seconds says why there are none."""
        from whence.engine.point import Point

        items = {"train": Point(self.model, self.task, self.rows).examples.items}
        items["queries"] = Point(self.model, self.task, self.queries).examples.items
        arrays = {}
        for part, each in items.items():
            ids = [np.asarray(item.ids) for item in each]
            arrays |= {part: np.concatenate(ids), f"{part} sizes": np.array([len(row) for row in ids])}
        np.savez(self.work / "rows.npz", **arrays)
        found = []
        for name in filter(None, self.options.peers.split(",")):
            if not self.options.python.exists():
                found.append({"peer": name, "why not": f"there is no {self.options.python}: make bench makes it"})
                continue
            print(f"{time.strftime('%H:%M:%S')} scan of {name} ...", file=sys.stderr, flush=True)
            paths = (self.options.data / MODEL, self.work / "rows.npz", self.work / name)
            command = [self.options.python, "-W", "ignore", "-m", "benchmarks.funnel", "--peer", name, *paths]
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=os.environ | ONE_THREAD)
            if done.returncode:
                found.append({"peer": name, "why not": (done.stderr.strip().splitlines() or ["it died"])[-1]})
            else:
                found.append({"peer": name, **json.loads(done.stdout.strip().splitlines()[-1])})
        return found

    def summary(self, table: list[Row], default: Row, audits: Row, peers: list[Row]) -> dict[str, Any]:
        """Everything with the targets."""
        funnel, scan = self.seconds["funnel"], self.seconds["scan"]
        scans = {"whence": scan.cpu, **{peer["peer"]: peer["cpu"] for peer in peers if "cpu" in peer}}
        targets = [
            {
                "name": f"rows scored exactly <= {SHARE}",
                "value": default["rows"] / len(self.rows),
                "met": default["rows"] <= AT_MOST * len(self.rows),
            },
            *(
                {
                    "name": f"times faster than the scan of {name} >= {FASTER:g}",
                    "value": cpu / funnel.cpu,
                    "met": cpu / funnel.cpu >= FASTER,
                }
                for name, cpu in scans.items()
            ),
            *(
                {
                    "name": f"bounds on recall@{each['k']} ({each['scored']} scored) below the truth >= {AUDITS_RIGHT:.0%}",
                    "value": each["below the truth"],
                    "met": min(each["below the truth"], each["mean below the truth's"]) >= AUDITS_RIGHT,
                }
                for each in audits["candidates"]
            ),
        ]
        return {
            "rows": len(self.rows),
            "queries": len(self.queries),
            "landmarks": len(self.others),
            "seconds": {name: {"cpu": clock.cpu, "wall": clock.wall} for name, clock in self.seconds.items()},
            "table": table,
            "default": default,
            "audits": audits,
            "peers": peers,
            "targets": targets,
        }


def recall(raw_QN: np.ndarray, chosen: np.ndarray, k: int) -> np.ndarray:
    """Share of each question's best `k` rows that are chosen."""
    return np.isin(np.argsort(-raw_QN, axis=1, kind="stable")[:, :k], chosen).mean(1)


# the peer


@dataclass(frozen=True)
class Sequences(Workload):
    """Token ids from a file, the first `train` rows of them."""

    file: str = ""

    def sequences(self, part: Any) -> list[np.ndarray]:
        with np.load(self.file) as arrays:
            rows = np.split(arrays[part], np.cumsum(arrays[f"{part} sizes"])[:-1])
        return rows[: self.train] if part == "train" else rows


def run_peer(name: str, folder: str, file: str, out: str) -> int:
    """Fit on a few rows, then time the scan of all: pairs of every row with every question."""
    import torch

    torch.set_num_threads(1)
    shutil.rmtree(out, ignore_errors=True)
    Path(out).mkdir(parents=True)
    shape: Any = {"family": "llama", "size": "tiny", "modules": "mlp", "queries": 16, "length": TOKENS, "file": file}
    peer_class(name)(Sequences("fit", train=512, **shape), Path(folder), Path(out)).run("fit")
    peer = peer_class(name)(Sequences("scan", train=10**9, **shape), Path(folder), Path(out))
    with Clock() as clock:
        scores = peer.run("score")
    print(json.dumps({"cpu": clock.cpu, "wall": clock.wall, "pairs": 0 if scores is None else int(scores.size)}))
    return 0


# the page


def markdown(found: dict[str, Any]) -> str:
    """The page of results."""
    lines = [
        "# Retrieve, then score",
        "",
        f"{found['rows']:,} rows, {found['queries']} questions, {found['landmarks']} landmarks; `python -m benchmarks.funnel`. "
        "Recall is against the scores of all rows by EK-FAC, damping 0.1. Seconds are of one processor.",
        "",
    ]
    columns = list(found["table"][0])
    lines += table(columns, [[shown(row.get(name, "")) for name in columns] for row in found["table"]])
    lines += ["", "## Price", ""]
    seconds = [[name, f"{each['cpu']:.1f}", f"{each['wall']:.1f}"] for name, each in found["seconds"].items()]
    seconds += [
        [f"scan of {p['peer']}", *((f"{p['cpu']:.1f}", f"{p['wall']:.1f}") if "cpu" in p else (p["why not"], ""))]
        for p in found["peers"]
    ]
    lines += table(["what", "processor seconds", "wall seconds"], seconds)
    lines += [
        "",
        f"The funnel ({found['default']['candidates']}, 2 % for all questions together): "
        + ", ".join(f"{key} {shown(value)}" for key, value in found["default"].items() if key != "candidates")
        + ".",
    ]
    audits = found["audits"]
    lines += ["", f"## {audits['seeds']} audits of {audits['audit']} of the rows", ""]
    columns = list(audits["candidates"][0])
    lines += table(columns, [[shown(row[name]) for name in columns] for row in audits["candidates"]])
    lines += ["", "## Targets", ""]
    lines += [f"- {'met   ' if each['met'] else 'MISSED'} {each['name']}: {each['value']:.3g}" for each in found["targets"]]
    return "\n".join(lines) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def shown(value: Any) -> str:
    """A cell."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
