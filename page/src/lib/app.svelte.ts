/** What all pages share: the run, its jobs, where the reader is, and what screen readers are told. */

import { api, follow, shared, troubleOf } from "./api";
import type { Job, JobKind, Run, Trouble } from "./types";

export type PageName = "trace" | "compare" | "factors" | "data" | "runs";
export const PAGES: { name: PageName; title: string; key: string }[] = [
  { name: "trace", title: "Trace", key: "t" },
  { name: "compare", title: "Compare", key: "c" },
  { name: "factors", title: "Factors", key: "f" },
  { name: "data", title: "Data", key: "d" },
  { name: "runs", title: "Runs", key: "r" },
];

const THEME = "whence-theme";

export const app = $state({
  run: null as Run | null,
  trouble: null as Trouble | null,
  jobs: [] as Job[],
  page: "trace" as PageName,
  parts: [] as string[],
  connected: true,
  said: "",
  keys: false,
  theme: localStorage.getItem(THEME) ?? "auto",
});

const UNKNOWN: Run = {
  name: "",
  folder: "",
  version: "",
  model: { name: "", loaded: false, kind: null, parameters: null, device: null, dtype: null, chat: null },
  data: { path: "", rows: null, fingerprint: null, n_train: null, sources: null },
  state: "loading",
  dates: {},
  has: {},
  factors: null,
  index: null,
  stages: [],
  trust: null,
  methods: [],
  limits: {},
  formula: "",
  meaning: "",
  cautions: [],
};

/** Whether the server has opened the run; until then it knows little, and can be asked for nothing else. */
export function opened(): boolean {
  return Object.keys(app.run?.has ?? {}).length > 0;
}

function learn(run: Partial<Run>): void {
  const before = opened();
  app.run = { ...UNKNOWN, ...run };
  app.trouble = null;
  if (!before && opened() && !shared) void api.jobs().then((jobs) => (app.jobs = jobs), () => {});
}

/** The job at work, else the next one in line. */
export function working(kind?: JobKind): Job | undefined {
  const mine = app.jobs.filter((job) => !kind || job.kind === kind);
  return mine.find((job) => job.state === "running") ?? mine.find((job) => job.state === "queued");
}

/** Tells screen readers. */
export function say(text: string): void {
  app.said = text;
}

/** The address of a page; what belongs to it comes after its name. */
export function address(page: PageName, ...parts: string[]): string {
  return "#/" + [page, ...parts.filter(Boolean)].map(encodeURIComponent).join("/");
}

export function go(page: PageName, ...parts: string[]): void {
  const to = address(page, ...parts);
  if (location.hash !== to) location.hash = to;
}

/** Changes the address without a step in the history. */
export function rename(page: PageName, ...parts: string[]): void {
  history.replaceState(null, "", address(page, ...parts));
  readAddress();
}

export function readAddress(): void {
  const [name, ...parts] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  app.page = PAGES.find((page) => page.name === name)?.name ?? "trace";
  app.parts = parts;
  document.title = `${PAGES.find((page) => page.name === app.page)!.title} · whence`;
}

export function setTheme(theme: string): void {
  app.theme = theme;
  localStorage.setItem(THEME, theme);
}

export async function startJob(kind: JobKind, settings: Record<string, unknown> = {}): Promise<Trouble | null> {
  try {
    remember(await api.start(kind, settings));
    say(`${kind} started`);
    return null;
  } catch (error) {
    return troubleOf(error);
  }
}

export function remember(job: Job): void {
  const at = app.jobs.findIndex((each) => each.id === job.id);
  if (at < 0) app.jobs.unshift(job);
  else {
    if (app.jobs[at].state !== job.state && job.state !== "running") say(`${job.kind}: ${job.state}`);
    app.jobs[at] = job;
  }
}

export async function start(): Promise<void> {
  readAddress();
  addEventListener("hashchange", readAddress);
  try {
    learn(await api.run());
  } catch (error) {
    app.trouble = troubleOf(error);
    if (app.trouble.status === 401) return;
  }
  if (shared) return;
  void follow(
    (event, data) => {
      if (event === "job") remember(data as Job);
      if (event === "run") learn(data as Partial<Run>);
      if (event === "refused") app.trouble = data as Trouble;
    },
    (connected) => (app.connected = connected),
  );
}
