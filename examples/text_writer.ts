/** From bytes to text on a terminal: one of several texts at a time, each under a line that names it. */
import type { Terminal } from "./terminal.ts";

/** Writes one of several texts at a time, under a line that says which, as far as it is known. */
export class TextWriter {
  readonly #terminal: Terminal;
  readonly #prompt: string;
  /** Of the present text; null between two. A byte is a token, a character may be several: it waits for the rest. */
  #decoder: TextDecoder | null = null;
  #written = 0;

  constructor(terminal: Terminal, prompt: string) {
    this.#terminal = terminal;
    this.#prompt = prompt;
  }

  /** Writes what is new of a text: all bytes that are known of it are given. */
  grow(title: string, bytes: number[]): void {
    if (this.#decoder === null) {
      this.#decoder = newDecoder();
      this.#terminal.endLine();
      this.#terminal.text(`--- ${title} ---\n${this.#prompt}`);
    }
    this.#terminal.text(this.#decoder.decode(Uint8Array.from(bytes.slice(this.#written)), { stream: true }));
    this.#written = bytes.length;
  }

  /** Ends the present text. */
  end(): void {
    if (this.#decoder !== null) this.#terminal.text(this.#decoder.decode());
    this.#terminal.endLine();
    this.#decoder = null;
    this.#written = 0;
  }
}

/** The text of bytes. */
export function textOf(bytes: number[]): string {
  return newDecoder().decode(Uint8Array.from(bytes));
}

/** No byte order mark is dropped. */
export function newDecoder(): TextDecoder {
  return new TextDecoder("utf-8", { ignoreBOM: true });
}
