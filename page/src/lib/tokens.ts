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

const WIDTH = 150;
const REACH = 70;
const ENDS = /[.!?…。！？]["'”’)\]]*\s*$|\n\s*$/;

/** First and one past the last token of the stretch of at most `width` characters with the largest sum. */
function strongest(pieces: string[], values: number[], width: number): [number, number] {
  let best: [number, number] = [0, 1];
  let most = -1;
  for (let first = 0, last = 0, length = 0, sum = 0; first < pieces.length; first++) {
    for (; last < pieces.length && (length + pieces[last].length <= width || last === first); last++) {
      length += pieces[last].length;
      sum += values[last];
    }
    if (Math.abs(sum) > most) [best, most] = [[first, last], Math.abs(sum)];
    length -= pieces[first].length;
    sum -= values[first];
  }
  return best;
}

/** The sentences around the strongest tokens of a row, in one line, and whether something before or after is left out. */
export function snippet(row: Row, scale: number): { pieces: Piece[]; before: boolean; after: boolean } {
  const { pieces, token_values: values } = row;
  if (!pieces.length) {
    const text = row.text.replace(/\s+/g, " ").trim();
    return { pieces: [{ text: text.slice(0, WIDTH + REACH), shade: "" }], before: false, after: text.length > WIDTH + REACH };
  }
  let [first, last] = strongest(pieces, values, WIDTH);
  const word = (at: number) => at === 0 || at === pieces.length || /^\s/.test(pieces[at]);
  const sentence = (at: number) => at === 0 || at === pieces.length || ENDS.test(pieces[at - 1]);
  const near = (from: number, step: number, stop: (at: number) => boolean) => {
    for (let at = from, length = 0; at >= 0 && at <= pieces.length && length <= REACH; at += step) {
      if (stop(at)) return at;
      length += pieces[step < 0 ? at - 1 : at]?.length ?? 0;
    }
    return null;
  };
  first = near(first, -1, sentence) ?? near(first, -1, word) ?? first;
  last = near(last, 1, sentence) ?? near(last, 1, word) ?? last;
  const ended = last;
  while (last > first && special(pieces[last - 1])) last--;
  while (first < last && special(pieces[first])) first++;
  const shown = runs(pieces.slice(first, last), values.slice(first, last), scale);
  return {
    pieces: shown.map((piece) => ({ ...piece, text: piece.text.replace(/\s*\n\s*/g, " ↵ ") })),
    before: first > 0 && !special(pieces[0]),
    after: ended < pieces.length || row.unread > 0,
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
