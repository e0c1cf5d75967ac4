import type { Row } from "./types";

/** Shares of the strongest token from which on tokens are coloured, in three steps. */
export const LEVELS = [0.05, 0.2, 0.5];

/** How a token is coloured: 0 not at all, 1 to 3 raise, -1 to -3 lower. */
export function level(value: number, scale: number): number {
  if (!scale || !value) return 0;
  return Math.sign(value) * LEVELS.filter((share) => Math.abs(value) >= share * scale).length;
}

/** The class of a level: u1 to u3, d1 to d3. */
export function shade(value: number, scale: number): string {
  const found = level(value, scale);
  return found > 0 ? `u${found}` : found < 0 ? `d${-found}` : "";
}

/** One scale for all rows of a question: the largest effect of a token. */
export function scaleOf(rows: Row[]): number {
  return rows.reduce((most, row) => row.token_values.reduce((high, value) => Math.max(high, Math.abs(value)), most), 0);
}

const SPECIAL = /^\s*(?:<\|[^|<>\s]{1,40}\|>|<\/?s>|<(?:pad|bos|eos|unk)>|\[(?:PAD|CLS|SEP|UNK|MASK)\])\s*$/;

/** Whether a token is one of the tokenizer's own, as `whence/show/tokens.py` has them. */
export function special(text: string): boolean {
  return SPECIAL.test(text);
}

/** A token as it is drawn: blanks before it, what it spells, and what the eye would miss. */
export function drawn(text: string): { blank: string; word: string } {
  const blank = text.slice(0, text.length - text.trimStart().length);
  if (blank.length === text.length) return { blank: "", word: text.replaceAll("\n", "↵\n") };
  return blank.includes("\n") ? { blank: "", word: text.replaceAll("\n", "↵\n") } : { blank, word: text.slice(blank.length).replaceAll("\n", "↵\n") };
}

export interface Piece {
  text: string;
  shade: string;
}

/** Neighbouring tokens of one colour joined, blanks at their ends left uncoloured. */
export function runs(pieces: string[], values: number[], scale: number): Piece[] {
  const found: Piece[] = [];
  pieces.forEach((text, at) => {
    const own = shade(values[at] ?? 0, scale);
    const last = found.at(-1);
    if (last && last.shade === own) last.text += text;
    else found.push({ text, shade: own });
  });
  return found.flatMap((piece) => {
    if (!piece.shade || !piece.text.trim()) return [piece];
    const start = piece.text.length - piece.text.trimStart().length;
    const end = piece.text.trimEnd().length;
    return [
      { text: piece.text.slice(0, start), shade: "" },
      { text: piece.text.slice(start, end), shade: piece.shade },
      { text: piece.text.slice(end), shade: "" },
    ].filter((each) => each.text);
  });
}

const SENTENCE = /[.!?…。！？]["'”’)\]]*\s|\n/;
const REACH = 24;
const WIDTH = 260;

/** The sentences around the strongest tokens of a row, in one line, and whether something before or after is left out. */
export function snippet(row: Row, scale: number): { pieces: Piece[]; before: boolean; after: boolean } {
  if (!row.pieces.length || !row.window) {
    const text = row.text.replace(/\s+/g, " ").trim();
    return { pieces: [{ text: text.slice(0, WIDTH), shade: "" }], before: false, after: text.length > WIDTH };
  }
  let [first, last] = row.window;
  for (let back = 1; back <= REACH && first - back >= 0; back++) {
    const begins = first - back === 0 || SENTENCE.test(row.pieces[first - back - 1] + " ");
    if (begins) {
      first -= back;
      break;
    }
  }
  for (let on = 0; on < REACH && last + on < row.pieces.length; on++) {
    if (SENTENCE.test(row.pieces[last + on] + " ")) {
      last += on + 1;
      break;
    }
  }
  const ended = last;
  while (last > first && special(row.pieces[last - 1])) last--;
  while (first < last && special(row.pieces[first])) first++;
  const shown = runs(row.pieces.slice(first, last), row.token_values.slice(first, last), scale);
  return {
    pieces: shown.map((piece) => ({ ...piece, text: piece.text.replace(/\s*\n\s*/g, " ↵ ") })),
    before: first > 0,
    after: ended < row.pieces.length || row.unread > 0,
  };
}

/** Which tokens are part of a word that the row shares with the question. */
export function sharedTokens(pieces: string[], words: string[]): boolean[] {
  const found = pieces.map(() => false);
  if (!words.length) return found;
  const wanted = new Set(words.map((word) => word.toLowerCase()));
  const ends: number[] = [];
  let length = 0;
  for (const piece of pieces) ends.push((length += piece.length));
  for (const match of pieces.join("").matchAll(/[\p{L}\p{N}_]+/gu)) {
    if (!wanted.has(match[0].toLowerCase())) continue;
    const from = ends.findIndex((end) => end > match.index);
    for (let at = from; at < pieces.length && (at === 0 ? 0 : ends[at - 1]) < match.index + match[0].length; at++) found[at] = true;
  }
  return found;
}
