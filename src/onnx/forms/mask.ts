/**
 * What a mask lets tokens see: kvern computes causal attention with or without a window, so a mask has to be one of these.
 *
 * It is asked for several lengths. A window shows in the first past that is longer than it.
 *
 * @module
 */

import type { Known } from "../evaluate/array.ts";
import { Evaluation } from "../evaluate/evaluate.ts";
import type { Model } from "../model/model.ts";
import { cannotCut } from "../model/refusal.ts";
import type { Lengths } from "../evaluate/scenario.ts";
import { ELEMENT } from "../model/tensor.ts";
import type { Values } from "../model/values.ts";

/** A value that hides keys from tokens: what is true, what is false, or what is 0 is seen. */
export interface Mask {
  readonly name: string;
  /** A sum's 0 is seen, and what is far below it is not. */
  readonly seen: "true" | "false" | "zero";
}

/** Masks of a graph. */
export class Masks {
  readonly #model: Model;
  readonly #values: Values;
  readonly #found = new Map<string, { windowTokens?: number }>();

  constructor(model: Model, values: Values) {
    this.#model = model;
    this.#values = values;
  }

  /** Is a value computed from lengths alone? */
  isMask(name: string): boolean {
    return this.#of(name, LENGTHS[1]!)?.values !== undefined;
  }

  /** The window of all masks together, if they have one; `isCausal` says that later tokens are hidden without them. */
  windowOf(masks: readonly Mask[], user: string, isCausal: boolean): { readonly windowTokens?: number } {
    const key = JSON.stringify([masks, isCausal]);
    const found = this.#found.get(key) ?? this.#find(masks, user, isCausal);
    this.#found.set(key, found);
    return found;
  }

  #find(masks: readonly Mask[], user: string, isCausal: boolean): { windowTokens?: number } {
    const names = masks.map(({ name }) => name).join(" and ");
    let windowTokens: number | undefined;
    for (const lengths of LENGTHS) {
      const seen = this.#rows(masks, user, lengths);
      // A table of as many positions as the model was made for ends somewhere.
      if (seen === undefined && lengths.past > TABLE_MIN) break;
      if (seen === undefined) {
        throw cannotCut(
          `the mask of ${user} must be computed from lengths and attention_mask: ${names} cannot be told; ` +
            "export with GroupQueryAttention, which needs none",
        );
      }
      windowTokens ??= windowIn(seen, lengths);
      checkRows(seen, lengths, { names, user, isCausal, windowTokens });
    }
    if (windowTokens === undefined) return {};
    const edge = { past: windowTokens + 2, tokens: 4 };
    const seen = this.#rows(masks, user, edge);
    if (seen !== undefined) checkRows(seen, edge, { names, user, isCausal, windowTokens });
    return { windowTokens };
  }

  /** Which keys each token sees, `[token][total]`; undefined where it cannot be told. */
  #rows(masks: readonly Mask[], user: string, lengths: Lengths): Uint8Array[] | undefined {
    const total = lengths.past + lengths.tokens;
    const rows = Array.from({ length: lengths.tokens }, () => new Uint8Array(total).fill(1));
    for (const mask of masks) {
      const known = this.#of(mask.name, lengths);
      const [columnCount = 1, rowCount = 1] = [...known?.dims ?? []].reverse();
      const fits = (columnCount === total || columnCount === 1) && (rowCount === lengths.tokens || rowCount === 1);
      if (known?.values === undefined || !fits) return undefined;
      const { values } = known;
      const plane = columnCount * rowCount;
      for (let i = plane; i < values.length; i++) {
        if (values[i] !== values[i % plane]) {
          throw cannotCut(`the mask of ${user} must be the same for every head: ${mask.name} is not`);
        }
      }
      for (const [i, row] of rows.entries()) {
        for (let j = 0; j < total; j++) {
          const value = values[i % rowCount * columnCount + j % columnCount]!;
          if (!isSeen(value, mask, known.type, user)) row[j] = 0;
        }
      }
    }
    return rows;
  }

  #of(mask: string, lengths: Lengths): Known | undefined {
    return new Evaluation(this.#model, this.#values, lengths).of(mask);
  }
}

function isSeen(value: number, { name, seen }: Mask, type: number, user: string): boolean {
  if (seen === "false") return value === 0;
  if (seen === "true" || type === ELEMENT.bool) return value !== 0;
  if (value === 0) return true;
  if (value <= HIDDEN_MAX) return false;
  throw cannotCut(`the mask of ${user} must add 0 to scores, or less than ${HIDDEN_MAX}: ${name} adds ${value}`);
}

/** What is added to a score that counts for nothing: the lowest f16 is -65504, and older exporters add -10000. */
const HIDDEN_MAX = -1000;

/** Positions that every table of a mask has. */
const TABLE_MIN = 100;

/** Lengths that a mask is asked for: prompts, chunks behind a past, and pasts longer than the windows of models. */
const LENGTHS: readonly Lengths[] = [
  { past: 0, tokens: 5 },
  { past: 3, tokens: 1 },
  { past: 6, tokens: 4 },
  { past: 40, tokens: 2 },
  { past: 700, tokens: 1 },
  { past: 5000, tokens: 1 },
  { past: 70_000, tokens: 1 },
];

/** Tokens that the last row sees, where it does not see all. */
function windowIn(seen: readonly Uint8Array[], { past, tokens }: Lengths): number | undefined {
  const count = seen.at(-1)!.reduce((sum, isSeen) => sum + isSeen, 0);
  return count < past + tokens && count > 0 ? count : undefined;
}

function checkRows(
  seen: readonly Uint8Array[],
  { past }: Lengths,
  { names, user, isCausal, windowTokens = Infinity }: {
    readonly names: string;
    readonly user: string;
    readonly isCausal: boolean;
    readonly windowTokens?: number | undefined;
  },
): void {
  for (const [i, row] of seen.entries()) {
    const position = past + i;
    for (const [j, isSeen] of row.entries()) {
      const isLater = j > position;
      if (isLater && isCausal) continue;
      const wanted = !isLater && j > position - windowTokens;
      if ((isSeen === 1) === wanted) continue;
      throw cannotCut(
        `the mask of ${user} must be the causal one, with or without a window: by ${names}, the token at position ` +
          `${position} ${isSeen === 1 ? "sees" : "does not see"} position ${j}`,
      );
    }
  }
}
