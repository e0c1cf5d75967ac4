/** The question on the Trace page; it stays while other pages are looked at. */

import { api, shared, troubleOf } from "./api";
import { app, rename, say } from "./app.svelte";
import { scaleOf } from "./tokens";
import { count, many } from "./words";
import type { AnswerToken, Asked, AskedEntry, ByCell, Grid, Job, Pair, Row, Trouble } from "./types";

export const trace = $state({
  prompt: "",
  pasted: "",
  pasting: false,
  contrast: "",
  method: "auto",
  answer: null as { prompt: string; completion: string; tokens: AnswerToken[] } | null,
  span: null as [number, number] | null,
  asked: null as Asked | null,
  busy: "" as "" | "answer" | "rows" | "open",
  trouble: null as Trouble | null,
  side: "raises" as "raises" | "lowers",
  find: "",
  source: "",
  narrowing: false,
  cell: null as ByCell | null,
  refused: null as Trouble | null,
  open: null as string | null,
  tab: "tokens" as "tokens" | "layers" | "whatif" | "about",
  pairs: {} as Record<string, Pair | Trouble>,
  grids: {} as Record<string, Grid | Trouble>,
  more: {} as Record<string, Row[]>,
  ended: {} as Record<string, boolean>,
  at: null as { side: "row" | "answer"; token: number } | null,
  history: [] as AskedEntry[],
});

let cancel = new AbortController();

/** Starts anew what can be asked only once at a time. */
function turn(busy: "answer" | "rows" | "open"): AbortSignal {
  cancel.abort();
  cancel = new AbortController();
  trace.busy = busy;
  trace.trouble = null;
  return cancel.signal;
}

async function whileBusy(busy: "answer" | "rows" | "open", work: (signal: AbortSignal) => Promise<void>): Promise<void> {
  const signal = turn(busy);
  try {
    await work(signal);
  } catch (error) {
    if (!signal.aborted) {
      trace.trouble = troubleOf(error);
      say(trace.trouble.what);
    }
  }
  if (!signal.aborted) trace.busy = "";
}

/** Gets the answer with the probabilities of its tokens, then the rows behind it. */
export function askPrompt(): Promise<void> {
  const completion = trace.pasting && trace.pasted ? trace.pasted : null;
  return whileBusy("answer", async (signal) => {
    forget();
    const answer = await api.complete(trace.prompt, completion, signal);
    trace.answer = answer;
    trace.busy = "rows";
    await find(null, signal);
  });
}

/** Asks about some of the answer's tokens, first and one past last, or all of it. */
export function askSpan(span: [number, number] | null): Promise<void> {
  return whileBusy("rows", (signal) => find(span, signal));
}

/** What is asked now: about the marked tokens, or all of the answer. */
export function question() {
  const answer = trace.answer!;
  const span = trace.span;
  const characters: [number, number] | null = span && [answer.tokens[span[0]].start, answer.tokens[span[1] - 1].end];
  const contrast = (!span && trace.contrast) || null;
  return { prompt: answer.prompt, completion: answer.completion, span: characters, contrast, method: trace.method };
}

/** The last job that scored, or scores, all rows for the question of now. */
export function scoring(): Job | undefined {
  if (!trace.answer) return;
  const asked = Object.entries(question()).filter(([name]) => name !== "method");
  return app.jobs.find((job) => job.kind === "score" && asked.every(([name, value]) => JSON.stringify(job.settings[name]) === JSON.stringify(value)));
}

async function find(span: [number, number] | null, signal: AbortSignal): Promise<void> {
  trace.span = span;
  show(await api.ask(question(), signal));
  rename("trace", trace.asked!.key);
  say(`${trace.asked!.verdict.words} Listed: ${many(trace.asked!.query.raises.length, "row")} that raise${trace.asked!.query.raises.length === 1 ? "s" : ""} it.`);
  void loadHistory();
}

function forget(): void {
  Object.assign(trace, { asked: null, span: null, open: null, pairs: {}, grids: {}, more: {}, ended: {}, at: null, refused: null, source: "", find: "", cell: null });
}

function show(asked: Asked): void {
  forget();
  trace.asked = asked;
  trace.side = asked.query.raises.length || !asked.query.lowers.length ? "raises" : "lowers";
  const tokens = asked.answer_tokens;
  if (tokens) {
    const completion = asked.asked.completion ?? asked.query.completion;
    const prompt = asked.asked.prompt ?? asked.query.prompt;
    const same = trace.answer?.completion === completion && trace.answer.prompt === prompt;
    if (!same) trace.answer = { prompt, completion, tokens }; // else somebody may be dragging over its tokens
    const characters = asked.asked.span;
    const inside = tokens.flatMap((token, at) => (characters && token.start < characters[1] && token.end > characters[0] ? [at] : []));
    trace.span = inside.length ? [inside[0], inside.at(-1)! + 1] : null;
  } else trace.answer = null;
  trace.prompt = asked.asked.prompt ?? asked.query.prompt;
  trace.contrast = asked.asked.contrast ?? "";
}

/** Shows a question that was asked before, or that saved scores have, and perhaps opens one of its rows. */
export function showSaved(key: string, row?: string): Promise<void> {
  return whileBusy("open", async () => {
    show(await api.saved(key));
    rename("trace", key, row ?? "");
    if (row) open(row);
  });
}

/** Shows the first rows that meet these conditions, of all that there are. */
export async function narrow(where: string[]): Promise<void> {
  const key = trace.asked!.key;
  trace.refused = null;
  trace.narrowing = true;
  try {
    const found = await api.saved(key, where);
    if (trace.asked?.key === key) {
      Object.assign(trace, { asked: found, more: {}, ended: {}, find: "", cell: null });
      if (trace.open && !rowOf(trace.open)) open(null);
      say(where.length ? `Only rows that meet ${where.join(" and ")}: ${count(found.of)}` : "All rows");
    }
  } catch (error) {
    trace.refused = troubleOf(error);
  }
  trace.narrowing = false;
}

/** Puts the rows in the order of what they do through one layer and module; again, in that of the whole effect. */
export async function orderBy(layer: string, module: string): Promise<void> {
  const { key, where } = trace.asked!;
  const again = trace.cell?.layer === layer && trace.cell.module === module;
  trace.cell = null;
  trace.refused = null;
  if (again) return;
  trace.narrowing = true;
  try {
    const found = await api.cell(key, layer, module, where);
    if (trace.asked?.key === key) trace.cell = { layer, module, ...found };
    say(`Rows ${found.words}`);
  } catch (error) {
    trace.refused = troubleOf(error);
  }
  trace.narrowing = false;
}

/** The source whose rows are shown. */
export function sourceShown(): string {
  return trace.source || (trace.asked?.where.find((each) => each.startsWith("source=")) ?? "").slice("source=".length);
}

/** Shows the rows of one source: all of them, or those in this file. */
export function showSource(name: string): void {
  if (shared) trace.source = name;
  else void narrow([...trace.asked!.where.filter((each) => !each.startsWith("source=")), ...(name ? [`source=${name}`] : [])]);
}

export async function loadHistory(): Promise<void> {
  trace.history = await api.asked().catch(() => trace.history);
}

/** All rows that are there of one side, with those that were loaded later. */
export function rowsOf(side: "raises" | "lowers"): Row[] {
  return trace.cell ? trace.cell[side] : wholeRowsOf(side);
}

function wholeRowsOf(side: "raises" | "lowers"): Row[] {
  return trace.asked ? [...trace.asked.query[side], ...(trace.more[side] ?? [])] : [];
}

export function rowOf(id: string | null): Row | undefined {
  return [...rowsOf("raises"), ...rowsOf("lowers"), ...wholeRowsOf("raises"), ...wholeRowsOf("lowers")].find((row) => row.id === id);
}

/** The unit of one effect: "nats" of "nats per copy". */
export function unit(): string {
  return trace.asked?.unit.replace(/ per copy$/, "") ?? "nats";
}

export function scaleOfAll(): number {
  return trace.asked ? scaleOf([...trace.asked.query.raises, ...trace.asked.query.lowers]) : 0;
}

export async function loadMore(): Promise<void> {
  const side = trace.side;
  const key = trace.asked!.key;
  try {
    const { rows } = await api.more(key, side, rowsOf(side).length, trace.asked!.where);
    if (trace.asked?.key !== key) return;
    trace.more[side] = [...(trace.more[side] ?? []), ...rows];
    trace.ended[side] = !rows.length;
  } catch (error) {
    trace.trouble = troubleOf(error);
  }
}

/** Opens a row, and fetches how its tokens and those of the answer are linked. */
export function open(id: string | null): void {
  trace.open = id;
  trace.at = null;
  if (!trace.asked) return;
  rename("trace", trace.asked.key, id ?? "");
  if (id && trace.asked.slope) void link(id); // a word overlap has no gradients to link
}

export async function link(id: string): Promise<void> {
  const key = trace.asked!.key;
  if (trace.pairs[id] && !("what" in trace.pairs[id])) return;
  delete trace.pairs[id];
  const found = await api.pair(key, id).catch(troubleOf);
  if (trace.asked?.key === key) trace.pairs[id] = found;
}

/** The link of the open row, where it has arrived. */
export function pairOf(id: string | null): Pair | null {
  const found = id ? trace.pairs[id] : undefined;
  return found && !("what" in found) ? found : null;
}

export async function loadGrid(rows: string[] | null): Promise<void> {
  const key = trace.asked!.key;
  const name = rows?.join(" ") ?? "";
  const found = trace.grids[name];
  if (found && !("what" in found)) return;
  const grid = await api.map(key, rows).catch(troubleOf);
  if (trace.asked?.key === key) trace.grids[name] = grid;
}

/** What of this question is pinned. */
export function pinned(): { id: string; note: string }[] {
  return trace.history.find((entry) => entry.key === trace.asked?.key)?.rows ?? [];
}

export function isPinned(id: string): boolean {
  return pinned().some((row) => row.id === id);
}

export async function savePins(key: string, rows: { id: string; note: string }[], note?: string): Promise<void> {
  const entry = trace.history.find((each) => each.key === key);
  try {
    const kept = await api.pin(key, { pinned: rows.length > 0, note: note ?? entry?.note ?? "", rows });
    const at = trace.history.findIndex((each) => each.key === key);
    if (at < 0) trace.history.unshift(kept);
    else trace.history[at] = kept;
  } catch (error) {
    trace.trouble = troubleOf(error);
  }
}

export async function togglePin(id: string): Promise<void> {
  if (!trace.asked || shared) return;
  const had = isPinned(id);
  const rows = had ? pinned().filter((row) => row.id !== id) : [...pinned(), { id, note: "" }];
  await savePins(trace.asked.key, rows);
  say(had ? "Row unpinned" : "Row pinned");
}
