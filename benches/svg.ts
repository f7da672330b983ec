/**
 * What the charts of the benches have in common: a style, texts, and the axes of a panel.
 *
 * @module
 */

/** Readable on white and on black: a page's theme is not known to an image, the system's is. */
const STYLE = `
  text { font: 12px system-ui, sans-serif; fill: #24292f }
  .title { font-size: 15px; font-weight: 600 }
  .faint { fill: #57606a }
  .line { stroke: #8c959f; stroke-opacity: 0.35 }
  .ours { fill: #0969da }
  .rival { fill: #bc4c00 }
  .other { fill: #8250df }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .faint { fill: #9198a1 }
    .ours { fill: #4493f8 }
    .rival { fill: #f0883e }
    .other { fill: #ab7df8 }
  }`;

/** A text of one line. */
export function text(x: number, y: number, content: string, kind = "", anchor = "start"): string {
  const escaped = content.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  return `<text x="${round(x)}" y="${round(y)}" class="${kind}" text-anchor="${anchor}">${escaped}</text>`;
}

/** A tenth of a pixel. */
export function round(value: number): number {
  return Math.round(value * 10) / 10;
}

/** Lines across a panel at these heights, each with what it stands for. */
export function lines(
  left: number,
  right: number,
  at: readonly { readonly y: number; readonly label: string }[],
): string[] {
  return at.flatMap(({ y, label }) => [
    `<line class="line" x1="${left}" x2="${right}" y1="${y}" y2="${y}"/>`,
    text(left - 8, y + 4, label, "faint", "end"),
  ]);
}

/** A whole picture. */
export function picture(title: string, width: number, height: number, parts: readonly string[]): string {
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img">`,
    `<title>${title}</title>`,
    `<style>${STYLE}\n</style>`,
    ...parts,
    "</svg>\n",
  ].join("\n");
}
