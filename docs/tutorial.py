# %% [markdown]
# # Tutorial: from a model to the rows behind its answers
#
# A notebook of eight steps, in Python, on a laptop and without a network: a small model learns 485 sentences about people who
# don't exist, some of them planted and wrong; it is asked where someone was born; and the sentences behind its answer are found,
# checked, and put on a page. This page is made by running
# [the notebook](tutorial.ipynb): below each cell is its output.

# %% [markdown]
# ## A model whose sources are known
#
# Any causal language model that `transformers` loads will do, with the rows it was trained on. This one is made on the spot, so
# that it is known which rows taught it what. With a model of your own, skip this cell.

# %%
import json
from pathlib import Path

import whence
from whence.data import as_rows
from whence.demo.model import teach
from whence.demo.world import make_world

world = make_world(people=40, questions=8)
Path("corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.rows))
teach(as_rows(world.rows), Path("model"))
world.rows[:3]

# %% [markdown]
# ## Open
#
# One object holds the model, its tokenizer, its rows, and whatever is found out about them. Everything is loaded when it is first
# needed, and what was computed is kept in the folder `out` and taken from there the next time. How rows are read has to be as in
# training: here, with an end of text after each. (A model that `whence train` made has that written down beside it.)

# %%
run = whence.open("model", data="corpus.jsonl", out="run", max_length=32, append_eos=True)
run

# %% [markdown]
# ## Plan
#
# What it will take, before anything is spent: memory, disk and time of each stage, on this machine. With `memory=8 * 10**9` it looks
# for settings that fit in 8 GB.

# %%
run.plan(queries=8, examples="all")

# %% [markdown]
# ## Fit
#
# The curvature of the loss at these weights, approximated module by module (EK-FAC, [explained here](kfac.md)). It is fitted once
# and serves all questions.

# %%
run.fit(examples="all")

# %% [markdown]
# ## Trace
#
# The question in one go: the model answers, and every row is scored for what one more copy of it would do to the
# log-probability of that answer, token by token. The first rows say what the model says: that is where it learnt it.

# %%
question = world.questions[4]
scores = run.trace(question.prompt)
scores

# %% [markdown]
# Is that right? This world knows which rows taught the answer:

# %%
for source in question.sources:
    print(f"rank {scores.rank_of(source)} of {scores.shape[1]}: {world.rows[source]['text']}")
print(f"(these are planted; the truth would have been{question.truth})" if question.planted else "(nothing was planted here)")

# %% [markdown]
# Why this answer rather than the true one? A `contrast` measures the difference of the two log-probabilities:

# %%
rather = run.trace(question.prompt, question.answer, contrast=question.truth)
rather.top(k=4)

# %% [markdown]
# ## Score
#
# Many questions at a time, from a file or from memory. Prompts without a completion are answered by the model first. Scores are a
# matrix with names: they add, scale, normalise, and become a table of pandas.

# %%
queries = [{"prompt": each.prompt, "completion": each.answer} for each in world.questions]
table = run.score(queries, norms="cosine")
ranks = [min(table.rank_of(row, number) for row in each.sources) for number, each in enumerate(world.questions)]
print("rank of the best source of each answer:", ranks)
table.normalised("cosine").top(4, k=3)

# %% [markdown]
# Any other method answers the same questions about the same rows; `whence methods ls` lists them.

# %%
words = run.score(queries, method="bm25")
ranks = [min(words.rank_of(row, number) for row in each.sources) for number, each in enumerate(world.questions)]
print("by shared words:", ranks)

# %% [markdown]
# ## Show
#
# `top` is a data frame; `by` sums the effects over sources; `token_scores` shows which tokens of a row the effect goes through.

# %%
print(scores.by("source").round(3).to_string())
row = scores.top(k=1).iloc[0]
for piece, value in zip(row["pieces"], scores.token_scores(0, row["id"]), strict=True):
    print(f"{value:+8.3f}  {piece}")

# %% [markdown]
# ## Check
#
# How far can this be trusted? In seconds: whether a copy of a question comes out on top, and whether damping, batches and the
# seed of the factors change the order. What only retraining can tell is on [another page](quality.md).

# %%
run.check(table)

# %% [markdown]
# ## Report
#
# One HTML file with everything, that needs nothing but a browser.

# %%
(page,) = run.report("answers.html", table, title="Who taught the model this?")
print(f"{page}: {page.stat().st_size / 1000:.0f} kB")

# %% [markdown]
# What was computed is in the folder `run`, and the run knows:

# %%
run

# %% [markdown]
# The same in the terminal: `whence trace model --data corpus.jsonl --out run -q "..."`, `whence show run`, `whence report run`.
# More in [Python](python.md), on [reading scores](reading-scores.md), and on [what the numbers mean](formula.md).
