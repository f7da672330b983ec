/**
 * What do the figures of a bench look like?
 *
 *     deno task bench:attend --json > rows.jsonl
 *     deno task bench:chart rows.jsonl docs/attend.svg
 *
 * Reads rows from a file, or `-` for the standard input, and writes an SVG to a file or the standard output: the chart of
 * the bench that wrote the first row.
 *
 * @module
 */
import { readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { attendChart, type AttendRow } from "./attend_chart.ts";
import { prefixChart, type PrefixRow } from "./prefix_chart.ts";

const [from, to, ...more] = process.argv.slice(2);
if (from === undefined || more.length > 0) {
  process.stderr.write("chart.ts: takes the file of rows, or -, and the file of the chart\n");
  process.exit(2);
}
const lines = readFileSync(from === "-" ? 0 : from, "utf8").split("\n").filter((line) => line.startsWith("{"));
const rows = lines.map((line): { bench: string } => JSON.parse(line));
const bench = rows[0]?.bench;
const own = rows.filter((row) => row.bench === bench);
let svg: string;
if (bench === "attend") svg = attendChart(own as unknown as AttendRow[]);
else if (bench === "prefix") svg = prefixChart(own as unknown as PrefixRow[]);
else throw new Error(`Cannot draw a chart as it must be of rows of attend or prefix: ${bench}`);
if (to === undefined) process.stdout.write(svg);
else writeFileSync(to, svg);
