/** What the server says, as `GET /api/openapi.json` describes it. Effects are in nats per copy of a row. */

export type Word = "strong" | "medium" | "weak" | "nothing";
export type Verdict = "drop" | "keep" | "fix" | "unsure";

export interface Trouble {
  what: string;
  given?: string;
  accepted?: string;
  fix?: string;
  code?: number | null;
  job?: JobKind;
  status?: number;
}

export interface Place {
  file: string;
  line: number | null;
  row: number;
}

/** The same in a shell and in Python, null where there is no such thing; the note is about the command. */
export interface Copyable {
  command: string | null;
  python: string | null;
  note: string;
}

export interface Run {
  name: string;
  folder: string;
  version: string;
  model: {
    name: string;
    loaded: boolean;
    kind: string | null;
    parameters: number | null;
    device: string | null;
    dtype: string | null;
    chat: boolean | null;
  };
  data: { path: string; rows: number | null; fingerprint: string | null; n_train: number | null; sources: string[] | null };
  state: "loading" | "ready" | "failed";
  error?: Trouble;
  damaged?: string;
  loading?: { what: string; seconds: number } | null;
  dates: Record<string, string | null>;
  has: Record<string, boolean>;
  factors: { method: string; modules: number; examples: number } | null;
  index: { rows: number; bytes_per_row: number; recall: Record<string, number> | null } | null;
  stages: { stage: string; state: "done" | "begun" | "todo"; seconds: number | null; files: number; bytes: number }[];
  trust: { badge: string; checks: Record<string, string>; warnings: string[] } | null;
  methods: { name: string; title: string; source: string; causal: boolean }[];
  limits: Record<string, number>;
  formula: string | string[];
  meaning: string;
  cautions: string[];
}

export interface AnswerToken {
  text: string;
  start: number;
  end: number;
  logprob?: number | null;
  p?: number | null;
  top?: { text: string; p: number }[];
}

export interface Completion {
  prompt: string;
  completion: string;
  source: string | null;
  logprob: number | null;
  rendered: string;
  tokens: AnswerToken[];
  seconds: number;
}

export interface Question {
  prompt: string;
  completion: string | null;
  span: [number, number] | null;
  contrast: string | null;
  method: string;
  row?: string;
}

export interface Row {
  rank: number;
  effect: string;
  value: number;
  slope: number;
  limit: string;
  raw: number;
  share: number;
  percentile: number;
  times_median: number | null;
  id: string;
  source: string | null;
  stage: string | null;
  copies: number;
  tokens: number;
  text: string;
  hub: boolean;
  exact: boolean | null;
  overlap: number | null;
  words: string[];
  pieces: string[];
  token_values: number[];
  unread: number;
  modules: [string, number][];
  word: Word;
  place: Place | null;
  window: [number, number] | null;
  decision: Verdict | null;
  estimate: number | null;
  /** What goes through the cell of the map that rows are ordered by. */
  part?: number;
}

/** Rows in the order of one cell of the map of layers and modules. */
export interface ByCell {
  layer: string;
  module: string;
  raises: Row[];
  lowers: Row[];
  words: string;
}

export interface Histogram {
  edges: number[];
  counts: number[];
}

export interface Grid {
  layers: string[];
  modules: string[];
  values: (number | null)[][];
  rows: number;
}

export interface Query {
  id: string;
  prompt: string;
  completion: string;
  contrast: string | null;
  span: string | null;
  measured: string;
  value: number | null;
  log_p: number | null;
  ceiling: string;
  tokens: number | null;
  sign: string;
  target: string;
  raises: Row[];
  lowers: Row[];
  statistics: {
    maximum: number;
    minimum: number;
    mean: number;
    median: number;
    deviation: number;
    median_size: number;
    percentiles: [number, number][];
  };
  histogram: Histogram;
  stands_out: number | null;
  diffuse: boolean;
  excluded: boolean;
  grid: Grid | null;
  sources: [string, number, number][];
  overlap: { top: number; every: number; correlation: number | null } | null;
  copy_rank: number | null;
}

export interface Asked {
  key: string;
  asked: Question;
  scan: { how: string; rows: number; exact: number; recall: Record<string, number> | null; words: string };
  seconds: Record<string, number>;
  unit: string;
  method: string;
  slope: boolean;
  gain: number;
  directed: boolean;
  n_train: number;
  meaning: string;
  notes: string[];
  verdict: { word: Word; words: string };
  query: Query;
  answer_tokens: AnswerToken[] | null;
  /** Conditions that the rows meet, and how many rows do. */
  where: string[];
  of: number;
  /** Of training, which the rows are from; empty where there is one, or where they are from all. */
  stage: string;
  stages: StagePart[];
  /** Not in an exported file. */
  copy?: Copyable;
}

/** What went through one of several trainings; `key` names the question with the rows of that one alone. */
export interface StagePart {
  stage: string;
  key: string;
  rows: number;
  share: number;
  raises: number;
  lowers: number;
  net: number;
  transport: string;
  top: Record<"raises" | "lowers", Pick<Row, "rank" | "id" | "value" | "text" | "word">[]>;
}

export interface AskedEntry {
  key: string;
  prompt: string;
  completion: string;
  span: [number, number] | null;
  method: string;
  when: string;
  pinned: boolean;
  note: string;
  rows?: { id: string; note: string }[];
}

export interface SavedScores {
  name: string;
  queries: { number: number; id: string; prompt: string; completion: string; span: string | null }[];
  rows: number;
  unit: string;
  method: string;
  when: string;
  stages: string[];
}

export interface Pair {
  row: string;
  pieces: string[];
  answer: AnswerToken[];
  values: number[][];
  row_values: number[];
  answer_values: number[];
  scale: number;
  text: string;
  modules: [string, number][];
  seconds: number;
}

export interface Predicted {
  value: number;
  limit?: string;
  pieces: string[];
  token_values: number[];
  word: Word;
  tokens?: number;
}

export interface WhatIf {
  original: Predicted | null;
  edited: Predicted;
  difference: number | null;
  words: string;
  seconds: number;
}

export interface Side {
  key: string;
  method: string;
  unit: string;
  prompt: string | null;
  completion: string;
  stage: string;
  rows: number;
  share: number | null;
  net: number | null;
}

/** Two questions whose rows are the same; or, as of two stages of training, others. */
export type Comparison = (Common | (Record<"a" | "b", Side & Pick<Query, "raises" | "lowers">> & { rows_in_common: 0 })) & { copy: Copyable };

export interface Common {
  a: Side;
  b: Side;
  rows_in_common: number;
  spearman: number | null;
  "overlap@10"?: number;
  "overlap@100"?: number;
  rows: {
    id: string;
    text: string;
    source: string | null;
    place: Place | null;
    rank_a: number | null;
    rank_b: number | null;
    value_a: number | null;
    value_b: number | null;
    moved: number | null;
  }[];
  only_a: string[];
  only_b: string[];
  scatter: { a: number[]; b: number[]; ids: string[] };
}

export interface Health {
  module: string;
  shape: number[];
  mean: number;
  largest: number;
  condition: number | null;
  effective_rank: number;
  zero: number;
  negative: number;
  not_finite: number;
  sound: boolean;
  warnings: string[];
}

export interface Factors {
  about: Record<string, unknown>;
  damping: number;
  modules: Health[];
  copy: Copyable | null;
}

export interface Line {
  ranks: number[];
  values: number[];
}

export interface FactorModule {
  module: string;
  shape: number[];
  d: number;
  effective_rank: number;
  spectrum: Line;
  zero: number;
  negative: number;
  cumulative: { ranks: number[]; shares: number[]; marks: Record<string, number> };
  distribution: Histogram;
  sides: { inputs: Line; outputs: Line } | null;
  map: { cells: (number | null)[][]; low: number; high: number; order: string; block: number[] };
  copy: Copyable | null;
}

export interface Decision {
  verdict: Verdict;
  why: string;
  who: string;
  when: string;
}

export interface DataRow {
  number: number;
  id: string;
  text: string;
  cut: boolean;
  source: string | null;
  copies: number;
  place: Place | null;
  self: number | null;
  self_rank?: number | null;
  decision: Decision | null;
}

export interface DataPage {
  total: number;
  found: number;
  offset: number;
  rows: DataRow[];
  has_self: boolean;
  copy: Copyable;
  histograms: { length: Histogram | null; self: Histogram | null };
}

export interface FullRow {
  number: number;
  id: string;
  text: string;
  source: string | null;
  copies: number;
  place: Place | null;
  tokens: { text: string; in_loss: boolean }[];
  self: number | null;
  self_rank: number | null;
  decision: Decision | null;
}

export interface Progress {
  decided: number;
  of: number;
  by: Partial<Record<Verdict, number>>;
}

export type JobKind = "fit" | "index" | "self" | "score" | "validate" | "run";

export interface Job {
  id: string;
  kind: JobKind;
  state: "queued" | "running" | "done" | "failed" | "cancelled" | "interrupted";
  created: string;
  started: string | null;
  ended: string | null;
  attempt: number;
  stage: { name: string; done: number; total: number | null; unit: string; left: number | null; elapsed: number } | null;
  share: number | null;
  notes: string[];
  error: Trouble | null;
  /** Of scores: what their question is called. */
  result: { key?: string | null } | null;
  settings: Record<string, unknown>;
  command: string | null;
}

export interface OtherRun {
  name: string;
  folder: string;
  current: boolean;
  scores: number;
  when: string;
}

/** What an exported file has in it. */
export interface Shared {
  run: Run;
  asked: Asked[];
  pairs: Record<string, Pair>;
  pins: AskedEntry[];
  redacted: boolean;
  made: string;
}
