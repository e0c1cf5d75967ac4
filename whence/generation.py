"""Completions of prompts, greedy or drawn with a seed, with their log-probability."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whence import dist
from whence.data.rows import Rows, with_contents
from whence.errors import StaleArtifact, UsageError
from whence.progress import note, stage
from whence.settings import Generate, valid
from whence.store.digest import canonical_json, digest, fingerprint_code, fingerprint_settings
from whence.store.files import locked, write_json
from whence.store.fingerprint import fingerprint, fingerprint_tokenizer
from whence.store.intact import read_json
from whence.store.manifest import Folder, differences
from whence.tasks.causal_lm import CausalLM
from whence.tasks.chat import write
from whence.tasks.context import context_of
from whence.tasks.forward import in_mode
from whence.tasks.questions import has_answer, with_answer
from whence.tasks.tokens import pad, without_doubles

OWN_QUESTIONS, ANSWER_TOKENS = 520, 24
"""Prompts like those of the rows that a model answers for the landmarks of its index, and tokens of an answer at most."""

REPLACEMENT = "\ufffd"
"""What the first bytes of an unfinished character are decoded to."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    special_tokens: bool = True,
) -> list[dict[str, Any]]:
    """Complete each prompt: `{"prompt", "completion", "logprob"}`, `logprob` = log p(completion | prompt) in nats.

    Temperature 0 takes the likeliest token; above it, tokens are drawn from softmax(logits / temperature), all of them, and the
    same seed and batch size give the same text. `logprob` is at temperature 1 in any case, without the end of text,
    which is not part of the completion. Text is cut so that `prompt + completion` is what the model wrote. Without
    `special_tokens` the tokenizer adds none of its own to the prompts: a chat template has written them already.

    Raises UsageError for a prompt without tokens.
    """
    chosen = Generate(max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size)
    if other := [prompt for prompt in [prompts] if isinstance(prompt, str)] or [p for p in prompts if not isinstance(p, str)]:
        raise UsageError(
            f"The prompts can't be {'one text' if isinstance(prompts, str) else f'a {type(other[0]).__name__}'}.",
            given=repr(other[0])[:200],
            accepted="a list of texts",
            fix="[prompt]" if isinstance(prompts, str) else '[row["prompt"] for row in rows]',
        )
    complete = _completer(model, tokenizer, chosen.max_new_tokens, chosen.temperature, valid(int, seed, "seed"), special_tokens)
    return [
        answer
        for start in range(0, len(prompts), batch_size)
        for answer in complete(start, prompts[start : start + batch_size])
    ]


def generate_pairs(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    settings: Generate,
    *,
    out: Path,
    base: tuple[Any, Any] | Callable[[], tuple[Any, Any]] | None = None,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Complete the prompt of every row and keep the pairs in `out`, a .json file; returns what is in it.

    A pair is `{"prompt", "completion", "logprob"}`, with `base_completion` and `base_logprob` where a `base` is given (model
    and tokenizer, or a function that loads them once the first model is done), and with `reference` where the row had a
    completion of its own. `about` is written beside the settings, for people.

    Every batch is saved as it comes, in a folder beside `out` that goes away at the end: after a kill the same call resumes,
    and gives what one call would have. A finished `out` of the same models, rows and settings is read, nothing is computed.

    Raises UsageError for a row without a prompt, StaleArtifact where `out`, or what is left of it, was made from something
    else.
    """
    prompts = [_prompt_of(row, number) for number, row in enumerate(rows)]
    references = [row.get("completion") for row in rows]
    chosen = {key: value for key, value in settings.as_json().items() if key != "base"}
    made = {"prompts": digest(*prompts), "settings": {**chosen, "seed": seed}}
    origin = {**made, "references": fingerprint_settings(references), "tuned": _origin(model, tokenizer)}
    parts = out.with_name(f"{out.stem}.parts")
    if out.exists():
        other = base() if callable(base) else base
        document = _read_same(out, {**origin, "base": _origin(*other)} if other else origin)
        shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed at its end
        note(f"{out} is finished and unchanged: nothing to compute")
        return document
    with locked(parts):
        said = _resumable("generate", model, tokenizer, prompts, settings, seed, parts / "tuned", made)
        pairs = [dict(answer) for answer in said]
        if base is not None:
            other, words = base() if callable(base) else base
            origin["base"] = _origin(other, words)
            said = _resumable("generate base", other, words, prompts, settings, seed, parts / "base", made)
            for pair, answer in zip(pairs, said, strict=True):
                pair |= {"base_completion": answer["completion"], "base_logprob": answer["logprob"]}
        for pair, reference in zip(pairs, references, strict=True):
            if isinstance(reference, str):
                pair["reference"] = reference
        described = {**(about or {}), **made["settings"]}
        document = {"unit": "logprob in nats", "settings": described, "provenance": origin, "data": pairs}
        save_pairs(out, document)
        shutil.rmtree(parts, ignore_errors=True)
    return document


def answered(model: Any, task: Any, queries: Rows, max_new_tokens: int = 64) -> Rows:
    """The queries, prompts without a completion with the model's greedy one; ids stay, and `source` says who wrote it.

    `task` is the model's CausalLM or Seq2Seq. With several processes the first asks the model.
    Raises UsageError where the model has nothing to say.
    """
    return dist.on_first(_answered, model, task, queries, max_new_tokens)


def _answered(model: Any, task: Any, queries: Rows, max_new_tokens: int) -> Rows:
    contents = [dict(row) for row in queries]
    prompts = [row for row in contents if not has_answer(row)]
    if getattr(task, "chat_template", None) and any("prompt" in row for row in prompts):
        note("prompts are completed as bare text, although the model has a chat template")
    source = f"generated greedily, at most {max_new_tokens} tokens"
    for row in prompts:
        chat, template = "messages" in row, getattr(task, "chat_template", None)
        prompt = write(task.tokenizer, template, row["messages"], add_generation_prompt=True) if chat else row["prompt"]
        (answer,) = generate(model, task.tokenizer, [prompt], max_new_tokens, special_tokens=not chat)
        if not answer["completion"]:
            raise UsageError(
                "The model has no answer to a query.", given=repr(prompt[-200:]), fix="write a completion", code=22
            )
        row |= {**with_answer(row, answer["completion"]), "source": source}
    if prompts:
        which = "the query" if len(queries) == 1 else f"{len(prompts)} of {len(queries)} queries"
        note(f"{which} had no completion: {source} [WHENCE-22]")
    return with_contents(queries, contents)


def own_questions(
    model: Any,
    task: Any,
    rows: Sequence[Mapping[str, Any]],
    count: int,
    seed: int = 0,
    max_new_tokens: int = ANSWER_TOKENS,
) -> list[dict[str, Any]]:
    """At most `count` prompts like those of the rows, drawn with the seed, with the model's greedy completions.

    The prompt of a text is how it begins, `BEGINNING` words or half of it. Prompts to which the model says nothing, and those
    that don't fit its context with an answer, are left out. Of several processes the first asks the model.
    """
    return dist.on_first(_own_questions, model, task, rows, count, seed, max_new_tokens)


BEGINNING = 10
"""Words of a text that are a prompt."""


def _own_questions(
    model: Any, task: Any, rows: Sequence[Mapping[str, Any]], count: int, seed: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    asked, template, size = prompts_like(rows, count, seed), getattr(task, "chat_template", None), Generate().batch_size
    found = []
    with stage("questions", len(asked), "prompts") as advance:
        for start in range(0, len(asked), size):
            some = asked[start : start + size]
            texts = [
                write(task.tokenizer, template, row["messages"], add_generation_prompt=True)
                if "messages" in row
                else row["prompt"]
                for row in some
            ]
            with contextlib.suppress(UsageError):  # a prompt that fills the context
                answers = generate(
                    model, task.tokenizer, texts, max_new_tokens, batch_size=size, special_tokens="messages" not in some[0]
                )
                pairs = zip(some, answers, strict=True)
                found += [with_answer(row, answer["completion"]) for row, answer in pairs if answer["completion"]]
            advance(len(some))
    return found


def can_answer(model: Any, task: Any) -> bool:
    """Whether the model writes text that the task reads."""
    return isinstance(task, CausalLM) and getattr(task, "tokenizer", None) is not None and hasattr(model, "generate")


def prompts_like(rows: Sequence[Mapping[str, Any]], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """At most `count` different prompts like those of the rows, drawn with the seed."""
    drawn = random.Random(seed).sample(range(len(rows)), len(rows))
    prompts = dict.fromkeys(canonical_json(prompt) for place in drawn if (prompt := _prompt_like(rows[place])))
    return [json.loads(prompt) for prompt in itertools.islice(prompts, count)]


def _prompt_like(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a row asks, or how it begins; None where it has too few words."""
    if "messages" in row:
        turns = row["messages"]
        last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        return {"messages": turns[:last]} if last else None
    if "prompt" in row:
        return {"prompt": row["prompt"]} if row["prompt"].strip() else None
    words = row["text"].split()
    return {"prompt": " ".join(words[: min(BEGINNING, len(words) // 2)])} if len(words) > 1 else None


def save_pairs(path: Path, document: dict[str, Any]) -> None:
    """Write pairs with how they were made and a digest of all, whole or not at all, as a file that `load_data` reads."""
    write_json(path, document, ensure_ascii=False)


def check_vacant(path: Path) -> None:
    """Raise UsageError unless `path` is a new .json file, or one of pairs."""
    if path.suffix != ".json":
        raise UsageError(f"{path} does not end in .json.", accepted="a .json file")
    if path.exists() and not (isinstance(found := read_json(path), dict) and "provenance" in found):
        raise UsageError(
            f"{path} exists and holds no pairs; nothing is overwritten.",
            fix="a different --out (Python: out=...), or remove it first",
        )


def _prompt_of(row: Mapping[str, Any], number: int) -> str:
    prompt = row.get("prompt", row.get("text"))
    if not isinstance(prompt, str):
        raise UsageError(
            f"Row {number} has no prompt to complete.",
            given=f"a row with {', '.join(row)}",
            accepted='{"prompt": "..."}, with a completion (it is kept as the reference) or without',
            fix="whence score answers conversations by itself" if "messages" in row else "--columns prompt=COLUMN",
        )
    return prompt


def _origin(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Which model and code gave the answers."""
    return {**fingerprint(model), "tokenizer": fingerprint_tokenizer(tokenizer), "code": fingerprint_code()}


def _read_same(out: Path, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Read finished pairs; raises StaleArtifact unless they were made from just this."""
    found = read_json(out)
    if changes := differences(found.get("provenance", {}) if isinstance(found, dict) else {}, origin):
        raise StaleArtifact(
            f"{out} holds pairs made from something else.",
            given=("\n" + " " * 11).join(changes[:5]),
            accepted="what it was made from; nothing was overwritten",
            fix="a different --out (Python: out=...)",
        )
    return found


def _resumable(
    name: str,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: Generate,
    seed: int,
    place: Path,
    made: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Complete the prompts, each batch a file in a folder of its own; batches that are there are read."""
    size = settings.batch_size
    complete = _completer(model, tokenizer, settings.max_new_tokens, settings.temperature, seed)
    files = {start: f"batch-{start:08d}.json" for start in range(0, len(prompts), size)}
    try:
        claimed = Folder.claim(place, {"stage": name, **made, "model": _origin(model, tokenizer)})
    except StaleArtifact as error:
        if "made from something else" not in error.what:  # damaged
            raise
        raise StaleArtifact(
            f"{place} holds the beginning of pairs made from something else.",
            given=error.given,
            accepted="what it was made from; nothing was overwritten",
            fix=f"a different --out (Python: out=...), or remove {place.parent}",
        ) from error
    with claimed as folder:
        done = sum(len(prompts[start : start + size]) for start, file in files.items() if folder.has_json(file))
        with stage(name, total=len(prompts), unit="prompts", done=done) as advance:
            for start, file in files.items():
                if not folder.has_json(file):
                    batch = prompts[start : start + size]
                    folder.write_json(file, complete(start, batch))
                    advance(len(batch))
        return [answer for file in files.values() for answer in folder.read_json(file)]


def _completer(
    model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, seed: int, special_tokens: bool = True
) -> Callable[[int, Sequence[str]], list[dict[str, Any]]]:
    """Prepare to complete a batch of prompts, given the number of its first; what is drawn depends on that and the seed."""
    settings = _settings(model, tokenizer, max_new_tokens, temperature)

    def encode(prompt: str) -> list[int]:
        encoded = tokenizer(prompt, add_special_tokens=special_tokens, return_special_tokens_mask=True)
        ids = encoded["input_ids"]
        return [ids[i] for i in without_doubles(tokenizer, ids, encoded["special_tokens_mask"])]

    @torch.no_grad()
    def complete(start: int, batch: Sequence[str]) -> list[dict[str, Any]]:
        with in_mode(model, training=False), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(int(fingerprint_settings([seed, start]), 16) % 2**63)
            return _complete(model, tokenizer, batch, [encode(prompt) for prompt in batch], settings)

    return complete


def _complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], encoded: list[list[int]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    if empty := [prompt for prompt, ids in zip(prompts, encoded, strict=True) if not ids]:
        raise UsageError(f"The prompt {empty[0]!r} has no tokens.", accepted="a prompt of at least one token")
    settings = _within_positions(model, prompts, encoded, settings)
    heads = [[] for _ in encoded] if model.config.is_encoder_decoder else encoded
    # on the left, so that all prompts end together
    ids_BT = pad([np.array(ids) for ids in encoded], settings["pad_token_id"], "left").to(model.device)
    mask_BT = pad([np.ones(len(ids), int) for ids in encoded], 0, "left").to(model.device)
    output = model.generate(
        input_ids=ids_BT, attention_mask=mask_BT, output_logits=True, return_dict_in_generate=True, **settings
    )
    new_BT = output.sequences[:, -len(output.logits) :]
    steps = zip(output.logits, new_BT.T, strict=True)
    logp_BT = torch.stack([logits.float().log_softmax(-1).gather(1, new[:, None])[:, 0] for logits, new in steps], dim=1)
    answers = []
    for prompt, head, new, logp in zip(prompts, heads, new_BT.tolist(), logp_BT.tolist(), strict=True):
        end = next((at for at, token in enumerate(new) if token in settings["eos_token_id"]), len(new))
        text, length = _written(tokenizer, head, new[:end])
        answers.append({"prompt": prompt, "completion": text, "logprob": sum(logp[:length])})
    return answers


def _within_positions(
    model: Any, prompts: Sequence[str], encoded: Sequence[Sequence[int]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Let answers end where the model's positions do; raises UsageError for a prompt that is longer than that."""
    limit, firm = context_of(model)
    lengths = [len(ids) for ids in encoded]
    if limit is None or not firm:
        return settings
    room = limit - (0 if model.config.is_encoder_decoder else max(lengths))
    if max(lengths) > limit or room < 1:
        raise UsageError(
            f"A prompt has {max(lengths):,} tokens, and the model has positions for {limit:,}.",
            given=repr(prompts[lengths.index(max(lengths))][:200]),
            accepted=f"prompts of at most {limit - 1:,} tokens",
            fix="a shorter prompt",
        )
    if room >= settings["max_new_tokens"]:
        return settings
    note(f"answers end after {room:,} tokens at the latest, where the model's {limit:,} positions do")
    return {**settings, "max_new_tokens": room}


def _settings(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Spell out all that shapes the text, so that the model's own generation defaults (top-k, penalties) stay out of it."""
    if not model.can_generate():
        raise UsageError(
            f"{type(model).__name__} answers with no text.",
            accepted="a model of the next token, or an encoder and decoder, for whence run and whence generate",
            fix="of a classifier: whence fit and whence score MODEL, after other trainings whence score --through stages.yaml, "
            "with --queries FILE of rows with labels",
        )
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)  # what rows end with in training; decoding drops it, and what follows would stay
    drawing = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
    )
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    plain = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "max_new_tokens": max_new_tokens}
    return {**plain, **drawing, "eos_token_id": ends, "pad_token_id": padding}


def _written(tokenizer: Any, prompt_ids: list[int], new_ids: list[int]) -> tuple[str, int]:
    """Decode what follows the prompt, and count its tokens.

    It is decoded together with the prompt, because many tokenizers drop the space before the first word; tokens that
    begin a character and were cut off before they ended it are left out.
    """
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    head = decode(prompt_ids)
    for length in range(len(new_ids), 0, -1):
        text = decode([*prompt_ids, *new_ids[:length]])[len(head) :]
        if not text.endswith(REPLACEMENT):
            return text, length
    return "", 0
