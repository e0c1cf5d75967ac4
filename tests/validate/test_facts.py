import json
from dataclasses import replace

import numpy as np
import pytest

from whence.data import as_rows
from whence.demo.model import Settings
from whence.errors import UsageError
from whence.store.manifest import Folder
from whence.train.small import Training
from whence.validate import facts as module
from whence.validate.facts import KS, METHODS, Corpus, demo_corpus, real_corpus, recall_at, trace_facts, traced

SMALL = Settings(width=32, inner=64, training=Training(epochs=40, batch_size=8, learning_rate=1e-2, weight_decay=0.1))
NAMES = [a + b for a in ("Ba", "Do", "Ki", "Lu", "Me") for b in ("nor", "sil", "tak", "vem")]
TOWNS = ("Arden", "Birk", "Corm", "Dale", "Esk")


def towns(seed=0):
    """Where twenty people live; a question is the beginning of a row."""
    rows = as_rows([{"text": f"{name} lives in {TOWNS[n % 5]}."} for n, name in enumerate(NAMES)])
    asked = tuple({"prompt": f"{name} lives in", "completion": f" {TOWNS[n % 5]}."} for n, name in enumerate(NAMES[:12]))
    return Corpus(rows, asked, tuple((n,) for n in range(12)), seed, SMALL)


def test_a_model_that_learnt_facts_leads_to_their_rows():
    found = trace_facts([towns()], "towns", 1)
    best, about = found.row(method=METHODS[0]), found.about
    assert about["questions"] >= 10 and about["rows"] == 20 and about["questions"] + about["unanswered"] == 12
    assert best["mrr"] > 0.7 and best["recall@5"] > 0.9
    assert found.row(method="BM25")["mrr"] > 0.9 and found.row(method="random")["mrr"] < 0.4
    assert not any("random" in flag for flag in found.flags)
    assert [row["method"] for row in found.tables[""]] == list(METHODS)
    assert "recall@5" in found.says[1] and found.as_json()["ks"] == list(KS)


def known(corpus, damping):
    """Scores that know the sources, as every method's but that of chance."""
    draw = np.random.default_rng(corpus.seed)
    raw = draw.random((12, 20))
    for row, (source,) in zip(raw, corpus.sources, strict=True):
        row[source] = 2
    return {method: draw.random((12, 20)) if method == "random" else raw for method in METHODS}, list(range(12))


@pytest.mark.parametrize("spoil", [lambda raw: -raw, lambda raw: np.random.default_rng(3).permuted(raw, axis=1)])
def test_shuffled_or_negated_scores_are_flagged(monkeypatch, spoil):
    corpora = [towns(0), towns(1)]
    monkeypatch.setattr(module, "traced", known)
    assert trace_facts(corpora, "towns", 2).row(method=METHODS[0])["mrr"] == 1

    def spoilt(corpus, damping):
        matrices, asked = known(corpus, damping)
        return matrices | {METHODS[0]: spoil(matrices[METHODS[0]])}, asked

    monkeypatch.setattr(module, "traced", spoilt)
    found = trace_facts(corpora, "towns", 2)
    assert found.row(method=METHODS[0])["mrr"] < 0.4
    assert {"BM25", "TF-IDF"} <= {flag.split("better than ")[1].split(":")[0] for flag in found.flags}


def test_corpora_that_were_traced_are_not_traced_again(monkeypatch, tmp_path):
    seen = []

    def counted(corpus, damping):
        seen.append(corpus.seed)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return known(corpus, damping)

    monkeypatch.setattr(module, "traced", counted)
    with Folder.claim(tmp_path / "kept", {"stage": "facts"}) as folder, pytest.raises(KeyboardInterrupt):
        trace_facts([towns(3), towns(4)], "towns", 2, folder=folder)
    with Folder.claim(tmp_path / "kept", {"stage": "facts"}) as folder:
        found = trace_facts([towns(3), towns(4)], "towns", 2, folder=folder)
    assert seen == [3, 4, 4]
    fresh = trace_facts([towns(3), towns(4)], "towns", 2)
    assert (found.tables, found.says, found.flags) == (fresh.tables, fresh.says, fresh.flags)
    assert found.about | {"seconds": 0} == fresh.about | {"seconds": 0}


def test_a_model_that_answers_nothing_is_refused():
    mute = replace(towns(), settings=replace(SMALL, training=Training(epochs=1, learning_rate=1e-6)))
    with pytest.raises(UsageError, match="answers no question"):
        traced(mute)


def test_recall_counts_what_can_be_found():
    scores = np.array([5.0, 4, 3, 2, 1, 0])
    assert recall_at(scores, [0, 2], 1) == 1  # one of two can be first
    assert [recall_at(scores, [1, 5], k) for k in (1, 5, 6)] == [0, 0.5, 1]
    assert recall_at(np.zeros(6), [0], 5) == 0 and recall_at(np.zeros(6), [0], 6) == 1


def test_the_demos_sources_say_the_answers():
    corpus = demo_corpus(10, people=12, questions=6)
    assert len(corpus.questions) == len(corpus.sources) == 6
    for question, sources in zip(corpus.questions, corpus.sources, strict=True):
        assert all(question["completion"].strip() in corpus.rows[source]["text"] for source in sources)


@pytest.fixture
def patterns(tmp_path):
    """Two relations in ParaRel's files, about the same people."""
    files = {"P19": "born", "P20": "buried"}
    for number, (relation, verb) in enumerate(files.items()):
        wordings = [f"[X] was {verb} {how}in [Y]{dot}" for how in ("", "late ", "long ago ", "indeed ") for dot in (".", " .")]
        records = [{"pattern": it} for it in [*wordings, f"[Y] saw [X] {verb}."]]
        known = [{"sub_label": name, "obj_label": TOWNS[(n + number) % 5]} for n, name in enumerate(NAMES)]
        known.append({"sub_label": "a b c d e", "obj_label": "Arden"})
        for folder, content in (("pattern_data/graphs_json", records), ("trex_lms_vocab", known)):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            text = "\n".join(json.dumps(record) for record in content)
            (tmp_path / folder / f"{relation}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_questions_are_worded_as_none_of_their_sources(patterns):
    corpus = real_corpus(patterns, 3, relations=("P19", "P20"), facts=12, questions=3)
    assert len(corpus.questions) == 6 and len(corpus.rows) == 2 * (3 * 2 + 9 * 3)
    texts = [row["text"] for row in corpus.rows]
    assert not any("a b c" in text for text in texts)
    for question, sources in zip(corpus.questions, corpus.sources, strict=True):
        statement = question["prompt"] + question["completion"]
        name, town = statement.split()[0], statement.split()[-1]
        assert len(sources) == 2 and statement not in texts
        verb = "born" if "born" in statement else "buried"
        assert all(texts[it].split()[0] == name and texts[it].endswith(town) and verb in texts[it] for it in sources)
        assert any(question["prompt"].removeprefix(name) in text for text in texts)  # others are worded so
    assert real_corpus(patterns, 3, relations=("P19", "P20"), facts=12, questions=3).rows.ids == corpus.rows.ids
    with pytest.raises(UsageError, match=r"no trex_lms_vocab/P27.jsonl"):
        real_corpus(patterns, relations=("P27",))


def test_real_facts_are_there(shared_data):
    corpus = real_corpus(shared_data / "facts", 0)
    assert len(corpus.questions) == 48 and all(len(sources) >= 2 for sources in corpus.sources)
