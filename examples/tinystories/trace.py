"""Which stories taught a TinyStories model to go on like this? Real pretrained weights, real training stories.

    .venv/bin/python examples/tinystories/trace.py --model MODEL --data STORIES --markdown docs/tinystories.md

MODEL is a folder or a hub id (roneneldan/TinyStories-33M, for one), STORIES anything that `whence.load_data` reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import whence
from whence.cli.console import reporting
from whence.cli.serve import open_page
from whence.serve import Opening
from whence.store.scores import Scores

PROMPTS = (
    "Once upon a time, there was a little dragon who",
    "Tom and Lily went to the park. They saw a big dog",
    "The cat was hungry. She",
)


def main() -> None:
    """Generate, fit, score, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="roneneldan/TinyStories-33M", help="folder or hub id")
    parser.add_argument("--data", default="roneneldan/TinyStories", help="stories: file, folder or hub id")
    parser.add_argument("--limit", type=int, help="read so many stories")
    parser.add_argument(
        "--n-train", type=int, default=2_119_719, help="stories the model was trained on (TinyStories: all of these)"
    )
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/tinystories"), help="folder for factors and scores; resumes there"
    )
    parser.add_argument("--markdown", type=Path, help="write the result there too")
    parser.add_argument("--serve", action="store_true", help="then open a local page, to ask on")
    args = parser.parse_args()
    with reporting():
        text = trace(args)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    if args.serve:  # where it divides by the stories that were read, since that is all the page knows of
        open_page(Opening(args.model, args.data, str(args.run), {"limit": args.limit, "max_length": args.max_length}))


def trace(args: argparse.Namespace) -> str:
    """The whole run; returns its result as Markdown."""
    model, tokenizer = whence.load_model(args.model)
    task = whence.CausalLM(tokenizer, max_length=args.max_length)
    stories = whence.load_data(args.data, limit=args.limit)
    answers = whence.generate(model, tokenizer, args.prompts, max_new_tokens=args.max_new_tokens)
    queries = [{"prompt": answer["prompt"], "completion": answer["completion"]} for answer in answers]
    curvature = whence.fit(model, task, stories, examples="all", out=args.run / "factors")
    scores = whence.score(
        model,
        task,
        queries,
        stories,
        curvature.inverse(damping=0.1),
        per="token",
        norms=("cosine",),
        n_train=args.n_train,
        out=args.run / "scores",
    )
    lines = [
        f"`{Path(args.model).parent.name if Path(args.model).exists() else args.model}`, {len(stories)} stories, "
        f"{curvature.about['coverage']}.",
        f"Scores: {scores.about['operator']}. Unit: {scores.unit}; positive = copies of the story raise log p(completion | "
        f"prompt), by the slope at these weights, with {args.n_train:,} stories in the training data.",
        "",
    ]
    for number, query in enumerate(queries):
        lines += [f"## {query['prompt']}", "", f"> …**{query['completion'].strip()}**", ""]
        lines += [f"log p(completion | prompt) = {scores.queries['measured'][number]:.2f} nats", ""]
        lines += ["### Most influential", "", *rows(scores, number, lowest=False), ""]
        lines += ["### Lowering the most", "", *rows(scores, number, lowest=True), ""]
        lines += ["### Most influential by cosine (long and odd stories count no more than others)", ""]
        lines += [*rows(scores.normalised("cosine"), number, lowest=False, tokens=scores), ""]
    return "\n".join(lines).rstrip()


def rows(scores: Scores, query: int, *, lowest: bool, tokens: Scores | None = None, k: int = 3) -> list[str]:
    """A Markdown list of the top stories, each with the stretch whose tokens matter most, those in bold."""
    found = []
    for _, row in scores.top(query, k, lowest=lowest).iterrows():
        value = f"{1e6 * row['value']:+.1f} micronats" if scores.unit == "nats per copy" else f"{row['value']:+.4f}"
        found.append(f"{row['rank']}. **{value}** `{row['id']}` … {excerpt(tokens or scores, query, row['id'])} …")
    return [line.replace("-", "", 1) if lowest else line for line in found]


def excerpt(scores: Scores, query: int, story: str, width: int = 40, marked: int = 8) -> str:
    """The `width` tokens with the largest summed effect, the `marked` strongest of them in bold."""
    values = scores.token_scores(query, story)
    pieces = scores.examples.set_index("id").loc[story, "pieces"]
    sums = [abs(values[start : start + width].sum()) for start in range(max(1, len(values) - width + 1))]
    start = max(range(len(sums)), key=sums.__getitem__)
    window = range(start, min(start + width, len(values)))
    strong = set(sorted(window, key=lambda place: -abs(values[place]))[:marked])
    text = "".join(bold(pieces[place]) if place in strong and pieces[place].strip() else pieces[place] for place in window)
    return " ".join(text.replace("****", "").split())


def bold(piece: str) -> str:
    """The piece in bold, its leading space outside."""
    stripped = piece.lstrip()
    return f"{piece[: len(piece) - len(stripped)]}**{stripped}**" if stripped.isalnum() else piece


if __name__ == "__main__":
    main()
