/**
 * The way out: text on stdout as it comes, and a status line where somebody is looking.
 *
 * On a terminal the status is drawn on the line below the text and moves down with it. In a pipe there is the text
 * and nothing else; a status then goes to stderr, once, and only if that is a terminal.
 *
 * Everything is written synchronously: what has been written has been written, and a closed pipe (EPIPE) is an
 * exception at the write, not an event at some later time.
 */
import { writeSync } from "node:fs";
import process from "node:process";
import { isatty } from "node:tty";
import { type Facts, statusLine } from "./wording.ts";

const STDOUT = 1;
const STDERR = 2;
const STATUS_INTERVAL_MS = 100;

// Escape codes (ECMA-48, VT100). Index moves down and keeps the column, where a line feed would not.
const INDEX = "\x1bD";
const CURSOR_UP = "\x1b[A";
const CURSOR_DOWN = "\x1b[B";
const SAVE_CURSOR = "\x1b7";
const RESTORE_CURSOR = "\x1b8";
const ERASE_BELOW = "\x1b[J";

/** Stdout, and the status line below it if it is a terminal. */
export class Terminal {
  /** Whether the status line is drawn, and kept up to date, below the text. */
  readonly #live: boolean;
  readonly #quiet: boolean;
  #column = 0; // of the cursor, at a width of one column a character
  #status = "";
  #statusShown = false;
  #statusTime = -Infinity;

  /** With `quiet` only `line` writes anything: for output that a program reads. */
  constructor({ quiet }: { quiet: boolean }) {
    this.#quiet = quiet;
    this.#live = !quiet && isatty(STDOUT) && process.env.TERM !== "dumb";
    // Without this the line below the text would be left behind on Ctrl-C.
    if (this.#live) process.once("SIGINT", this.#interrupt);
  }

  /** Whether somebody is looking. */
  get live(): boolean {
    return this.#live;
  }

  /** Columns of the terminal; 80 where there is none. */
  get columns(): number {
    return process.stdout.columns || 80;
  }

  /** Whether colours may be used (https://no-color.org). */
  get colors(): boolean {
    return this.#live && !process.env.NO_COLOR;
  }

  /** Writes text that the model made. */
  text(text: string): void {
    if (this.#quiet || text === "") return;
    this.#write(this.#live ? printable(text) : text);
  }

  /** Ends the line, if it is not at its start. */
  endLine(): void {
    if (!this.#quiet && this.#column !== 0) this.#write("\n");
  }

  /** Writes whole lines, whatever they are. */
  line(text: string): void {
    this.endLine();
    this.#write(`${text}\n`);
  }

  /** Brings the status line up to date, ten times a second at most, and lets a Ctrl-C through. */
  async status(makeFacts: () => Facts): Promise<void> {
    const now = performance.now();
    if (!this.#live || now - this.#statusTime < STATUS_INTERVAL_MS) return;
    this.#statusTime = now;
    this.#status = statusLine(makeFacts(), this.columns);
    this.#write("");
    await new Promise((resolve) => setTimeout(resolve, 0));
  }

  /** Writes the last status, to stay. With `always` it also goes where nobody looks (to stderr, not into the text). */
  finish(facts: Facts, { always = false }: { always?: boolean } = {}): void {
    process.removeListener("SIGINT", this.#interrupt);
    if (this.#quiet) return;
    this.#status = "";
    this.endLine();
    const text = statusLine(facts, this.columns);
    if (this.#live) this.#write(`${text}\n`);
    else if (always || isatty(STDERR)) writeAll(STDERR, `${text}\n`);
  }

  /** Text where the cursor is, then the status below it: one write, so that nothing flickers. */
  #write(text: string): void {
    const lineStart = text.lastIndexOf("\n") + 1;
    this.#column = lineStart > 0 ? text.length - lineStart : this.#column + text.length;
    const erase = this.#statusShown ? ERASE_BELOW : "";
    const status = this.#drawnStatus();
    this.#statusShown = status !== "";
    writeAll(STDOUT, erase + text + status);
  }

  /** The codes that draw the status line and come back. */
  #drawnStatus(): string {
    if (this.#status === "") return "";
    const { columns } = this;
    // With a full line the cursor waits behind the last column, a place that no escape code brings back.
    if (this.#column > 0 && this.#column % columns === 0) return "";
    const visible = this.#status.slice(0, columns - 1);
    // Index and up first: they scroll the screen if need be, and the saved place is right afterwards.
    return INDEX + CURSOR_UP + SAVE_CURSOR + CURSOR_DOWN + "\r" + ERASE_BELOW + visible + RESTORE_CURSOR;
  }

  #interrupt = () => {
    this.#status = "";
    this.#write("\n");
    process.exit(128 + 2); // as a shell reports the signal
  };
}

/** Writes one line to stderr, the name of the program first. */
export function printError(program: string, message: string): void {
  writeAll(STDERR, `${program}: ${printable(message.trim().replace(/\s*\n\s*/g, " "))}\n`);
}

/** Control characters would move the cursor, or worse; all but tab and line feed become U+FFFD. */
function printable(text: string): string {
  // deno-lint-ignore no-control-regex
  return text.replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f]/g, "\ufffd");
}

function writeAll(file: number, text: string): void {
  const bytes = new TextEncoder().encode(text);
  let written = 0;
  while (written < bytes.length) {
    try {
      written += writeSync(file, bytes, written);
    } catch (error) {
      if ((error as { code?: string }).code !== "EAGAIN") throw error;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1); // a full non-blocking pipe: wait for 1 ms
    }
  }
}
