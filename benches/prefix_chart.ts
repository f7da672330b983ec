/**
 * The conversation of prefix.ts as a chart: what each turn computes and how long it takes, with the index and without.
 *
 * @module
 */

import { lines, picture, round, text } from "./svg.ts";

/** A row of prefix.ts; those of a turn have tokens. */
export interface PrefixRow {
  readonly call: string;
  readonly count: number;
  readonly us: number;
  readonly vsRival: number;
  /** Tokens the turn computed, and what it computes without the index. */
  readonly tokens: number | null;
  readonly rivalTokens: number | null;
}

/** What is drawn of a turn: ours first. */
const PANELS = [
  {
    title: "Tokens computed",
    ours: ({ tokens }: PrefixRow) => tokens!,
    rival: ({ rivalTokens }: PrefixRow) => rivalTokens!,
    label: (value: number) => String(Math.round(value)),
  },
  {
    title: "Time for rows of 8 layers, ms",
    ours: ({ us }: PrefixRow) => us / 1e3,
    rival: ({ us, vsRival }: PrefixRow) => us * vsRival / 1e3,
    label: (value: number) => value.toFixed(value < 10 ? 1 : 0),
  },
] as const;

const PANEL = { width: 430, height: 200, left: 52, top: 34, bottom: 26 } as const;
const TOP = 64, GAP = 16;

/** A conversation turn by turn. */
export function prefixChart(all: readonly PrefixRow[]): string {
  const turns = all.filter(({ call }) => call === "turn");
  if (turns.length === 0) throw new Error("Cannot draw a chart as there are no rows of turns");
  const step = PANEL.width + GAP;
  const legend = [["ours", "with the prefix index"], ["rival", "without"]].map(([color, name], i) => {
    const x = GAP + i * 180;
    return `<rect class="${color}" x="${x}" y="42" width="11" height="11"/>` + text(x + 17, 52, name!);
  });
  const panels = PANELS.map((panel, i) =>
    `<g transform="translate(${GAP + i * step} ${TOP})">\n${panelOf(panel, turns)}\n</g>`
  );
  return picture(
    "A conversation with and without the prefix index",
    PANELS.length * step + GAP,
    TOP + PANEL.height + GAP,
    [text(GAP, 26, "A conversation: each turn has all that was said as its prompt", "title"), ...legend, ...panels],
  );
}

/** A pair of bars for each turn. */
function panelOf({ title, ours, rival, label }: typeof PANELS[number], turns: readonly PrefixRow[]): string {
  const { width, height, left, top, bottom } = PANEL;
  const base = height - bottom;
  const highest = Math.max(...turns.map((turn) => Math.max(ours(turn), rival(turn))));
  const yOf = (value: number) => round(base - value / highest * (base - top));
  const quarters = [0, 0.25, 0.5, 0.75, 1].map((part) => ({ y: yOf(part * highest), label: label(part * highest) }));
  const parts = [text(left, 18, title), ...lines(left, width, quarters)];
  const step = (width - left) / turns.length, bar = step * 0.4;
  turns.forEach((turn, i) => {
    const x = left + (i + 0.1) * step;
    const bars = [{ color: "ours", value: ours(turn) }, { color: "rival", value: rival(turn) }];
    bars.forEach(({ color, value }, k) => {
      const y = yOf(value);
      const at = `x="${round(x + k * bar)}" y="${y}" width="${round(bar - 0.5)}" height="${round(base - y)}"`;
      parts.push(`<rect class="${color}" ${at}/>`);
    });
    if (turns.length <= 10 || turn.count % 5 === 0) {
      parts.push(text(x + bar, height - 8, `turn ${turn.count}`, "", "middle"));
    }
  });
  return parts.join("\n");
}
