/** How numbers are written for people, as in `whence/show/numbers.py`. */

import type { Place, Word } from "./types";

const SUPERSCRIPT: Record<string, string> = { "-": "⁻", ...Object.fromEntries([..."⁰¹²³⁴⁵⁶⁷⁸⁹"].map((sign, digit) => [String(digit), sign])) };

export function powerOfTen(power: number): string {
  return "10" + [...String(power)].map((letter) => SUPERSCRIPT[letter]).join("");
}

/** A signed number with three significant digits: +0.0213, −8,110, −3.53×10⁻⁵, 0. */
export function signed(value: number): string {
  if (value === 0) return "0";
  const sign = value < 0 ? "−" : "+";
  const size = Math.abs(value);
  if (size >= 999.5 && size < 999_500) return sign + Math.round(Number(size.toPrecision(3))).toLocaleString("en");
  if (size >= 1e-4 && size < 999.5) return sign + size.toPrecision(3);
  const [digits, power] = size.toExponential(2).split("e");
  return `${sign}${digits}×${powerOfTen(Number(power))}`;
}

export function count(value: number): string {
  return value.toLocaleString("en");
}

/** "1 row", "1,172 rows". */
export function many(value: number, one: string, more = `${one}s`): string {
  return `${count(value)} ${value === 1 ? one : more}`;
}

export function percent(value: number): string {
  if (value > 0 && value < 0.001) return "< 0.1 %";
  return `${(100 * value).toFixed(value >= 0.1 ? 0 : 1)} %`;
}

/** A probability in three digits, near 1 as 99.9 %. */
export function probability(p: number): string {
  return p >= 0.0005 ? `${(100 * p).toPrecision(p > 0.9995 ? 4 : 3)} %` : `${signed(p).slice(1)}`;
}

/** A time that people would say: 40 ms, 2.1 s, 4 min. */
export function seconds(value: number): string {
  if (value < 0.9995) return `${Math.max(1, Math.round(1000 * value))} ms`;
  if (value < 59.5) return `${value < 10 ? value.toFixed(1) : Math.round(value)} s`;
  if (value < 3570) return `${Math.round(value / 60)} min`;
  return `${(value / 3600).toFixed(1)} h`;
}

export function bytes(value: number): string {
  const power = Math.max(0, Math.min(4, Math.floor(Math.log10(Math.max(1, value)) / 3)));
  return `${(value / 1000 ** power).toFixed(power ? 1 : 0)} ${["B", "KB", "MB", "GB", "TB"][power]}`;
}

export function plain(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return count(value);
  return Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? signed(value).replace("+", "") : value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

/** When something was made, in the reader's time: 29 Nov 2026, 14:03. */
export function date(iso: string): string {
  const time = new Date(iso);
  return Number.isNaN(time.getTime())
    ? iso
    : time.toLocaleString("en-GB", { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" });
}

/** The file and line of a row: train.jsonl:271. */
export function placeOf(place: Place | null): string {
  if (!place) return "";
  const file = place.file.split("/").pop();
  return place.line === null ? `${file}, row ${count(place.row)}` : `${file}:${place.line}`;
}

export const EFFECT: Record<Word, string> = { strong: "strong", medium: "medium", weak: "weak", nothing: "does not stand out" };

export const MEANS: Record<Word, string> = {
  strong: "far outside what training rows usually do to an answer",
  medium: "outside what training rows usually do to an answer",
  weak: "hardly more than what many rows do: read it with care",
  nothing: "within what any row does by chance",
};

/** Whether a row raises or lowers, as a word and an arrow. */
export function direction(value: number): { word: string; arrow: string; kind: "up" | "down" | "none" } {
  if (value > 0) return { word: "raises", arrow: "▲", kind: "up" };
  if (value < 0) return { word: "lowers", arrow: "▼", kind: "down" };
  return { word: "has no effect", arrow: "–", kind: "none" };
}

/** One line of a text, for lists. */
export function oneLine(text: string, width = 90): string {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > width ? line.slice(0, width - 1).trimEnd() + "…" : line;
}
