/**
 * What do the figures of attend.ts look like?
 *
 *     deno task bench:attend --json > rows.jsonl
 *     deno task bench:chart rows.jsonl docs/attend.svg
 *
 * Reads rows from a file, or `-` for the standard input, and writes an SVG to a file or the standard output: the share of
 * R by format, a panel for each context and number of threads, and the rivals beside. Rows of another runtime, level,
 * head_dim or number of queries than those of the first row are left out.
 */
import { readFileSync, writeFileSync } from "node:fs";
import process from "node:process";

/** A row of attend.ts. */
interface Row {
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
  { name: "kvern", color: "ours", width: 24, shareOf: ({ shareOfRead }: Row) => shareOfRead },
  { name: "llama.cpp (ggml)", color: "ggml", width: 9, shareOf: (row: Row) => under(row, row.vsGgml) },
  { name: "onnxruntime", color: "ort", width: 9, shareOf: (row: Row) => under(row, row.vsOrt) },
] as const;

/** A rival reads the same bytes in so many times the time. */
function under({ shareOfRead }: Row, times: number | null): number | null {
  return times === null ? null : shareOfRead / times;
}

const PANEL = { width: 430, height: 200, left: 44, top: 34, bottom: 26 } as const;
const TOP = 64, GAP = 16;

/** Readable on white and on black: a page's theme is not known to an image, the system's is. */
const STYLE = `
  text { font: 12px system-ui, sans-serif; fill: #24292f }
  .title { font-size: 15px; font-weight: 600 }
  .faint { fill: #57606a }
  .line { stroke: #8c959f; stroke-opacity: 0.35 }
  .ours { fill: #0969da }
  .ggml { fill: #bc4c00 }
  .ort { fill: #8250df }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .faint { fill: #9198a1 }
    .ours { fill: #4493f8 }
    .ggml { fill: #f0883e }
    .ort { fill: #ab7df8 }
  }`;

/** The chart of rows. */
function chartOf(all: readonly Row[]): string {
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
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img">`,
    `<title>Attention: share of the speed of memory by format and context</title>`,
    `<style>${STYLE}\n</style>`,
    text(GAP, 26, `Share of R, the rate at which as many threads read memory: ${what}`, "title"),
    ...legend,
    text(width - GAP, 52, `level ${level}, ${runtime}, GQA ${gqa}, head_dim ${headDim}`, "faint", "end"),
    ...panels,
    "</svg>\n",
  ].join("\n");
}

/** One context and number of threads: a group of bars for each format. */
function panelOf(title: string, rows: readonly Row[], kinds: readonly string[], highest: number): string {
  const { width, height, left, top, bottom } = PANEL;
  const base = height - bottom;
  const yOf = (share: number) => round(base - share / highest * (base - top));
  const parts = [text(left, 18, title)];
  for (let quarter = 0; quarter <= 4; quarter++) {
    const y = yOf(quarter / 4);
    parts.push(`<line class="line" x1="${left}" x2="${width}" y1="${y}" y2="${y}"/>`);
    parts.push(text(left - 8, y + 4, (quarter / 4).toFixed(2), "faint", "end"));
  }
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

function text(x: number, y: number, content: string, kind = "", anchor = "start"): string {
  const escaped = content.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  return `<text x="${round(x)}" y="${round(y)}" class="${kind}" text-anchor="${anchor}">${escaped}</text>`;
}

/** A tenth of a pixel. */
function round(value: number): number {
  return Math.round(value * 10) / 10;
}

const [from, to, ...more] = process.argv.slice(2);
if (from === undefined || more.length > 0) {
  process.stderr.write("chart.ts: takes the file of rows, or -, and the file of the chart\n");
  process.exit(2);
}
const lines = readFileSync(from === "-" ? 0 : from, "utf8").split("\n").filter((line) => line.startsWith("{"));
const rows = lines.map((line): Row & { bench: string } => JSON.parse(line)).filter(({ bench }) => bench === "attend");
const svg = chartOf(rows);
if (to === undefined) process.stdout.write(svg);
else writeFileSync(to, svg);
