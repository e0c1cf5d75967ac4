import type { Asked, AskedEntry, ByCell, Comparison, Completion, Copyable, DataPage, FactorModule, Factors, FullRow, Job, JobKind, OtherRun } from "./types";
import type { Pair, Progress, Question, Row, Run, SavedScores, Shared, Trouble, Verdict, WhatIf, Decision, DataRow, Grid } from "./types";

/** What went wrong, in the four sentences of the server's errors. */
export class Failure extends Error {
  constructor(readonly trouble: Trouble) {
    super(trouble.what);
  }
}

/** What a caught error says to the reader. */
export function troubleOf(error: unknown): Trouble {
  return error instanceof Failure ? error.trouble : { what: error instanceof Error ? error.message : String(error) };
}

/** What an exported file brings along; null on the live page. */
export const shared: Shared | null = JSON.parse(document.getElementById("whence-data")?.textContent ?? "null");

const TOKEN = "whence-token";

/** Takes the token out of the address, so that a copied link or a screenshot doesn't give it away. */
export function takeToken(): void {
  const given = /^#t=([^&/]+)/.exec(location.hash);
  if (!given) return;
  sessionStorage.setItem(TOKEN, decodeURIComponent(given[1]));
  history.replaceState(null, "", location.pathname + location.search + location.hash.slice(given[0].length).replace(/^&?/, "#"));
}

function headers(): Record<string, string> {
  return { Authorization: `Bearer ${sessionStorage.getItem(TOKEN) ?? ""}` };
}

const GONE = "The server does not answer.";

async function request(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<Response> {
  if (shared) throw new Failure({ what: "This is a shared file: it shows what was asked, and can ask nothing new.", fix: "whence serve RUN" });
  let answer: Response;
  try {
    answer = await fetch(`./api/${path}`, {
      method,
      signal,
      headers: body === undefined ? headers() : { ...headers(), "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure({ what: GONE, fix: "Start it again with whence serve, and reload this page. Nothing is lost.", status: 0 });
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  if (answer.status === 401) {
    throw new Failure({ what: "This page has no valid token.", fix: "Open the link that whence serve printed.", status: 401 });
  }
  throw new Failure({ what: `The server answered ${answer.status}.`, ...said?.error, status: answer.status });
}

async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  return (await request("GET", path, undefined, signal)).json();
}

async function post<T>(path: string, body: unknown = {}, signal?: AbortSignal): Promise<T> {
  return (await request("POST", path, body, signal)).json();
}

const part = encodeURIComponent;

/** A query string of what is neither empty nor null. */
function query(values: Record<string, string | number | string[] | null | undefined>): string {
  const each = Object.entries(values).flatMap(([name, value]) => (Array.isArray(value) ? value : [value]).map((one) => [name, one] as const));
  const given = each.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return given.length ? "?" + given.map(([name, value]) => `${name}=${part(String(value))}`).join("&") : "";
}

async function saved(key: string, where: string[] = []): Promise<Asked> {
  if (shared) {
    const found = shared.asked.find((asked) => asked.key === key);
    if (!found) throw new Failure({ what: "This question is not in the file." });
    return found;
  }
  if (!key.startsWith("scores:")) return get(`ask/${part(key)}${query({ where })}`);
  const at = key.lastIndexOf(":");
  return get(`scores/${part(key.slice("scores:".length, at))}/${key.slice(at + 1)}${query({ where })}`);
}

async function pair(key: string, row: string): Promise<Pair> {
  if (!shared) return post("pair", { key, row });
  const found = shared.pairs[`${key} ${row}`];
  if (!found) throw new Failure({ what: "The link between tokens is not in this file: it has those of pinned and opened rows." });
  return found;
}

export const api = {
  run: (): Promise<Partial<Run>> => (shared ? Promise.resolve(shared.run) : get("run")),
  complete: (prompt: string, completion: string | null, signal?: AbortSignal) => post<Completion>("complete", { prompt, completion }, signal),
  ask: (question: Question, signal?: AbortSignal) => post<Asked>("ask", question, signal),
  saved,
  more: (key: string, side: string, offset: number, where: string[]) =>
    get<{ rows: Row[]; of: number }>(`ask/${part(key)}/rows${query({ side, offset, limit: 20, where })}`),
  asked: async (): Promise<AskedEntry[]> => (shared ? shared.pins : (await get<{ asked: AskedEntry[] }>("asked")).asked),
  scores: async (): Promise<SavedScores[]> => (shared ? [] : (await get<{ scores: SavedScores[] }>("scores")).scores),
  pin: async (key: string, body: { pinned: boolean; note: string; rows: { id: string; note: string }[] }) =>
    (await request("PUT", `ask/${part(key)}/pin`, body)).json() as Promise<AskedEntry>,
  pair,
  map: (key: string, rows: string[] | null) => post<Grid>("map", { key, rows }),
  cell: (key: string, layer: string, module: string, where: string[]) =>
    post<Omit<ByCell, "layer" | "module">>("cell", { key, layer, module, where }),
  whatIf: (key: string, row: string | null, text: string) => post<WhatIf>("whatif", { key, row, text }),
  compare: (a: string, b: string) => post<Comparison>("compare", { a, b, top: 20 }),
  factors: (damping: number) => get<Factors>(`factors${query({ damping })}`),
  factorModule: (name: string, damping: number) => get<FactorModule>(`factors/module${query({ name, damping })}`),
  data: (asked: Record<string, string | number>) => get<DataPage>(`data${query(asked)}`),
  dataRow: (id: string) => get<FullRow>(`data/row${query({ id })}`),
  neighbours: async (id: string) => {
    const { helps, hurts } = await get<{ helps: Row[]; hurts: Row[] }>(`data/neighbours${query({ id, top: 4 })}`);
    const others = (rows: Row[]) => rows.filter((row) => row.id !== id).slice(0, 3); // a row teaches itself most of all
    return { helps: others(helps), hurts: others(hurts) };
  },
  review: (offset: number, decided: string) =>
    get<{ rows: DataRow[]; progress: Progress; copy: Copyable }>(`review${query({ offset, limit: 20, decided })}`),
  decide: (id: string, verdict: Verdict, why: string) =>
    post<{ decision: Decision; progress: Progress }>("decisions", { id, verdict, why, who: "" }),
  undo: () => post<{ undone: { id: string }; progress: Progress }>("decisions/undo"),
  jobs: async () => (await get<{ jobs: Job[] }>("jobs")).jobs,
  start: (kind: JobKind, settings: Record<string, unknown> = {}) => post<Job>("jobs", { kind, settings }),
  cancel: (id: string) => post<Job>(`jobs/${part(id)}/cancel`),
  resume: (id: string) => post<Job>(`jobs/${part(id)}/resume`),
  log: async (id: string) => (await get<{ lines: string[] }>(`jobs/${part(id)}/log?tail=200`)).lines,
  runs: async () => (await get<{ runs: OtherRun[] }>("runs")).runs,
};

/** Saves what the server sends as a file. */
export async function download(method: "GET" | "POST", path: string, name: string, body?: unknown): Promise<void> {
  const blob = await (await request(method, path, body)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const RETRY_MS = 2000;

/** Follows the server's events for as long as the page is open; `online` hears of every connection made and lost. */
export async function follow(on: (event: string, data: unknown) => void, online: (connected: boolean) => void): Promise<void> {
  for (;;) {
    try {
      const answer = await request("GET", "events");
      online(true);
      const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const messages = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
        rest = messages.pop()!;
        for (const message of messages) {
          const event = /^event: ?(.*)$/m.exec(message)?.[1];
          const data = [...message.matchAll(/^data: ?(.*)$/gm)].map((line) => line[1]).join("\n");
          if (event && data) on(event, JSON.parse(data));
        }
      }
    } catch (error) {
      const trouble = troubleOf(error);
      if (trouble.status === 401) return on("refused", trouble); // another server, with another token
    }
    online(false);
    await new Promise((done) => setTimeout(done, RETRY_MS));
  }
}
