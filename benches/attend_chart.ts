/**
 * The figures of attend.ts as a chart: the share of R by format, a panel for each context and number of threads, and the
 * rivals beside. Rows of another runtime, level, head_dim or number of queries than those of the first row are left out.
 *
 * @module
 */

import { lines, picture, round, text } from "./svg.ts";

/** A row of attend.ts. */
export interface AttendRow {
  readonly runtime: string;
  readonly level: string;
  readonly kv: string;
  readonly tokens: number;
  readonly threads: number;
  readonly gqa: number;
  readonly headDim: number;
  readonly queries: number;
  readonly shareOfRead: number;
  readonly vsGgml: number | null;
  readonly vsOrt: number | null;
}

/** What is drawn of a row: ours first. */
const SERIES = [
  { name: "kvern", color: "ours", width: 24, shareOf: ({ shareOfRead }: AttendRow) => shareOfRead },
  { name: "llama.cpp (ggml)", color: "rival", width: 9, shareOf: (row: AttendRow) => under(row, row.vsGgml) },
  { name: "onnxruntime", color: "other", width: 9, shareOf: (row: AttendRow) => under(row, row.vsOrt) },
] as const;

/** A rival reads the same bytes in so many times the time. */
function under({ shareOfRead }: AttendRow, times: number | null): number | null {
  return times === null ? null : shareOfRead / times;
}

const PANEL = { width: 430, height: 200, left: 44, top: 34, bottom: 26 } as const;
const TOP = 64, GAP = 16;

/** The share of R by format, a panel for each context and number of threads. */
export function attendChart(all: readonly AttendRow[]): string {
  const first = all[0];
  if (first === undefined) throw new Error("Cannot draw a chart as there are no rows");
  const fixed = ["runtime", "level", "gqa", "headDim", "queries"] as const;
  const rows = all.filter((row) => fixed.every((name) => row[name] === first[name]));
  const contexts = [...new Set(rows.map(({ tokens }) => tokens))];
  const threadCounts = [...new Set(rows.map(({ threads }) => threads))];
  const kinds = [...new Set(rows.map(({ kv }) => kv))];
  // A bar may pass R by what the measurement of R missed; never by much.
  const highest = Math.max(1, ...rows.map(({ shareOfRead }) => Math.ceil(shareOfRead * 10) / 10));
  const step = PANEL.width + GAP;
  const width = Math.max(threadCounts.length, 2) * step + GAP;
  const height = TOP + contexts.length * (PANEL.height + GAP);
  const { runtime, level, gqa, headDim, queries } = first;

  const legend = SERIES.map(({ name, color }, i) => {
    const x = GAP + i * 150;
    return `<rect class="${color}" x="${x}" y="42" width="11" height="11"/>` + text(x + 17, 52, name);
  });
  const what = queries === 1 ? "one query" : `${queries} queries`;
  const panels = contexts.flatMap((tokens, line) =>
    threadCounts.map((threads, column) => {
      const shown = rows.filter((row) => row.tokens === tokens && row.threads === threads);
      const at = `translate(${GAP + column * step} ${TOP + line * (PANEL.height + GAP)})`;
      const title = `${tokens} tokens, ${threads} thread${threads === 1 ? "" : "s"}`;
      return `<g transform="${at}">\n${panelOf(title, shown, kinds, highest)}\n</g>`;
    })
  );
  return picture("Attention: share of the speed of memory by format and context", width, height, [
    text(GAP, 26, `Share of R, the rate at which as many threads read memory: ${what}`, "title"),
    ...legend,
    text(width - GAP, 52, `level ${level}, ${runtime}, GQA ${gqa}, head_dim ${headDim}`, "faint", "end"),
    ...panels,
  ]);
}

/** One context and number of threads: a group of bars for each format. */
function panelOf(title: string, rows: readonly AttendRow[], kinds: readonly string[], highest: number): string {
  const { width, height, left, top, bottom } = PANEL;
  const base = height - bottom;
  const yOf = (share: number) => round(base - share / highest * (base - top));
  const quarters = [0, 0.25, 0.5, 0.75, 1].map((share) => ({ y: yOf(share), label: share.toFixed(2) }));
  const parts = [text(left, 18, title), ...lines(left, width, quarters)];
  const step = (width - left) / kinds.length;
  for (const row of rows) {
    const bars = SERIES.flatMap(({ color, width, shareOf }) => {
      const share = shareOf(row);
      return share === null ? [] : [{ color, width, share }];
    });
    const middle = left + (kinds.indexOf(row.kv) + 0.5) * step;
    let x = middle - bars.reduce((sum, { width }) => sum + width, 0) / 2;
    parts.push(text(x + SERIES[0].width / 2, yOf(row.shareOfRead) - 4, row.shareOfRead.toFixed(2), "", "middle"));
    parts.push(text(middle, height - 8, row.kv, "", "middle"));
    for (const { color, width, share } of bars) {
      const y = yOf(share);
      parts.push(`<rect class="${color}" x="${round(x)}" y="${y}" width="${width - 1}" height="${round(base - y)}"/>`);
      x += width;
    }
  }
  return parts.join("\n");
}
