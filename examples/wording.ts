/** Numbers of things in words, bytes in units, and facts in one line of a terminal. */

/** For example "1 token" or "240 tokens". */
export function countText(count: number, thing: string): string {
  return `${count} ${thing}${count === 1 ? "" : "s"}`;
}

/** For example "384 KiB" or "6.0 MiB". */
export function formatBytes(bytes: number): string {
  return bytes < 2 ** 20 ? `${(bytes / 2 ** 10).toFixed(0)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

/** For example "4 ms" or "1.3 s". */
export function formatSeconds(seconds: number): string {
  return seconds < 1 ? `${(seconds * 1000).toFixed(0)} ms` : `${seconds.toFixed(1)} s`;
}

/** What a status line says. */
export interface Facts {
  /** Always said, first. */
  readonly counts: readonly string[];
  /** Said as far as the line has room for them, the most important one first. */
  readonly details: readonly string[];
  /** Always said, last. */
  readonly ending?: readonly string[];
}

/** The facts as `[one, two, three]`, shorter than the terminal is wide where leaving out details can do that. */
export function statusLine({ counts, details, ending = [] }: Facts, columns: number): string {
  const shown = details.slice();
  const line = () => `[${[...counts, ...shown, ...ending].join(", ")}]`;
  // In the last column the cursor of some terminals is on the next line already.
  while (shown.length > 0 && line().length >= columns) shown.pop();
  return line();
}
