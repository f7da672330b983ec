/**
 * The blocks of a cache as a picture: a row for each sequence, a cell for each block in the order of positions.
 *
 *     sample 1  a4 a4 o  o
 *     sample 2  a4 a4 o  o
 *
 * A letter and a number are a block that so many sequences share, the same letter in one column the same block; `o` is
 * a block of one sequence, `.` a free one. Colours say the same once more.
 */
import { type BlockSurvey, type Cell, cellName } from "./blocks.ts";
import { countText, formatBytes } from "./wording.ts";

/** Where the picture is drawn. */
export interface PictureOptions {
  /** What a row is, for example "sample". */
  rowName: string;
  /** Columns of the terminal. */
  columns: number;
  colors: boolean;
  /** Bytes of a contiguous cache for the same sequences. */
  contiguousBytes: number;
}

const LETTERS = "abcdefghijklmnopqrstuvwxyz";
const OWN = "o";
const FREE = ".";
const MARGIN = "  ";

// Black on a colour, one for each letter; bright black; dim (ECMA-48).
const SHARED_CODES = [42, 46, 43, 45, 44, 47].map((background) => `30;${background}`);
const OWN_CODE = "100";
const FREE_CODE = "2";

/** Draws the blocks, in lines that are shorter than the terminal is wide. */
export function drawBlocks(survey: BlockSurvey, options: PictureOptions): string {
  const { tables, blocksFree } = survey;
  const { rowName, columns, colors } = options;
  const letters = lettersOf(tables);
  const most = Math.max(1, ...tables.flat().map(({ references }) => references));
  const cellSize = most === 1 ? 1 : 1 + `${most}`.length;
  const paint = (text: string, code: string) => colors ? `\x1b[${code}m${text}\x1b[0m` : text;
  const draw = (cell: Cell) => {
    const letter = letters.get(cellName(cell));
    if (letter === undefined) return paint(OWN.padEnd(cellSize), OWN_CODE);
    return paint(`${LETTERS[letter % LETTERS.length]}${cell.references}`.padEnd(cellSize), colorOf(letter));
  };

  const labels = tables.map((_, i) => tables.length === 1 ? rowName : `${rowName} ${i + 1}`);
  const labelSize = Math.max(...labels.map(({ length }) => length), "free".length) + 2;
  const perLine = Math.max(1, Math.floor((columns - 1 - MARGIN.length - labelSize + 1) / (cellSize + 1)));
  const row = (label: string, cells: string[]) => {
    const lines: string[] = [];
    for (let start = 0; start === 0 || start < cells.length; start += perLine) {
      const shown = start === 0 ? label : "";
      lines.push(MARGIN + shown.padEnd(labelSize) + cells.slice(start, start + perLine).join(" "));
    }
    return lines;
  };
  // Free blocks have no order: one line is enough to see that there are some, and how many.
  const freeShown = blocksFree > perLine ? Math.max(0, perLine - 4) : blocksFree;
  const free = new Array<string>(freeShown).fill(paint(FREE.padEnd(cellSize), FREE_CODE));
  if (freeShown < blocksFree) free.push(`+${blocksFree - freeShown}`);
  const lines = [
    ...tables.flatMap((cells, i) => row(labels[i]!, cells.map(draw))),
    ...(blocksFree === 0 ? [] : row("free", free)),
    "",
    ...legend(survey, options, paint),
  ];
  return lines.map((line) => line.trimEnd()).join("\n");
}

/** What the symbols mean, how many blocks there are of each, and what they take. */
function legend(
  survey: BlockSurvey,
  { columns, contiguousBytes }: PictureOptions,
  paint: (text: string, code: string) => string,
): string[] {
  const { blockSize, tables, blocksUsed, blocksShared, blocksFree, tableEntries, usedBytes } = survey;
  // Where blocks have left the tail they are of two sizes: a line then says what its blocks take on average.
  const blockBytes = blocksUsed === 0 ? 0 : usedBytes / blocksUsed;
  const line = (symbol: string, code: string, meaning: string, blocks: number) => {
    const count = `${blocks}`.padStart(5), bytes = formatBytes(blocks * blockBytes).padStart(9);
    return `${MARGIN}${paint(symbol.padEnd(2), code)}${count}  ${bytes}  ${meaning}`;
  };
  const sums = [
    `${countText(blocksUsed, "block")} of ${countText(blockSize, "position")} used, ${formatBytes(usedBytes)};`,
    `were nothing shared: ${tableEntries}, ${formatBytes(tableEntries * blockBytes)};`,
    `a contiguous cache for ${countText(tables.length, "sequence")}: ${formatBytes(contiguousBytes)}`,
  ];
  return [
    line("aN", SHARED_CODES[0]!, "shared by N", blocksShared),
    line(OWN, OWN_CODE, "unshared", blocksUsed - blocksShared),
    line(FREE, FREE_CODE, "free", blocksFree),
    ...fill(sums, columns - 1 - MARGIN.length).map((text) => MARGIN + text),
  ];
}

/** Pieces of text in as few lines of `width` as they fit in. */
function fill(pieces: string[], width: number): string[] {
  const lines: string[] = [];
  for (const piece of pieces.flatMap((piece) => piece.length <= width ? [piece] : piece.split(" "))) {
    const last = lines.at(-1);
    if (last !== undefined && last.length + 1 + piece.length <= width) lines[lines.length - 1] = `${last} ${piece}`;
    else lines.push(piece);
  }
  return lines;
}

/** A letter for each shared block, by the order of rows, and other ones for the blocks in the same column. */
function lettersOf(tables: Cell[][]): Map<string, number> {
  const letters = new Map<string, number>();
  const length = Math.max(0, ...tables.map((cells) => cells.length));
  for (let column = 0; column < length; column++) {
    let next = 0;
    for (const cells of tables) {
      const cell = cells[column];
      if (cell === undefined || cell.references === 1 || letters.has(cellName(cell))) continue;
      letters.set(cellName(cell), next++);
    }
  }
  return letters;
}

function colorOf(letter: number): string {
  return SHARED_CODES[letter % SHARED_CODES.length]!;
}
