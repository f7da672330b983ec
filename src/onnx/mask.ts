/**
 * What a mask lets tokens see: kvern computes causal attention with or without a window, so a mask has to be one of these.
 *
 * It is asked for several lengths. A window shows in the first past that is longer than it.
 *
 * @module
 */

import type { Known } from "./array.ts";
import { Evaluation } from "./evaluate.ts";
import type { Model } from "./model.ts";
import { cannotCut } from "./refusal.ts";
import { inputsFor, type Lengths } from "./scenario.ts";
import { ELEMENT } from "./tensor.ts";
import type { Values } from "./values.ts";

/** Masks of a graph. */
export class Masks {
  readonly #model: Model;
  readonly #values: Values;
  readonly #found = new Map<string, { windowTokens?: number }>();

  constructor(model: Model, values: Values) {
    this.#model = model;
    this.#values = values;
  }

  /**
   * The window of a mask, if it has one; `isCausal` says that the node hides later tokens by itself. What is true or 0 is
   * seen, what is false or far below 0 is not.
   */
  windowOf(mask: string, user: string, isCausal: boolean): { windowTokens?: number } {
    const key = `${isCausal} ${mask}`;
    const found = this.#found.get(key) ?? this.#find(mask, user, isCausal);
    this.#found.set(key, found);
    return found;
  }

  /** Refuses a list of keys that are not padding where it says that one is. */
  checkUnpadded(mask: string, user: string): void {
    const known = this.#of(mask, { past: 3, tokens: 2 });
    if (known?.values?.every((value) => value >= 1)) return;
    throw cannotCut(`${user} may mask no key as padding: ${mask} does, or cannot be told; export it without`);
  }

  #find(mask: string, user: string, isCausal: boolean): { windowTokens?: number } {
    let windowTokens: number | undefined;
    for (const lengths of LENGTHS) {
      const seen = this.#rows(mask, user, lengths);
      // A table of as many positions as the model was made for ends somewhere.
      if (seen === undefined && lengths.past > TABLE_MIN) break;
      if (seen === undefined) {
        throw cannotCut(
          `the mask of ${user} must be computed from lengths and attention_mask: ${mask} cannot be told; ` +
            "export with GroupQueryAttention, which needs none",
        );
      }
      windowTokens ??= windowIn(seen, lengths);
      checkRows(seen, lengths, { mask, user, isCausal, windowTokens });
    }
    if (windowTokens === undefined) return {};
    const edge = { past: windowTokens + 2, tokens: 4 };
    const seen = this.#rows(mask, user, edge);
    if (seen !== undefined) checkRows(seen, edge, { mask, user, isCausal, windowTokens });
    return { windowTokens };
  }

  /** Which keys each token sees, `[token][total]`; undefined where it cannot be told. */
  #rows(mask: string, user: string, lengths: Lengths): boolean[][] | undefined {
    const known = this.#of(mask, lengths);
    if (known?.values === undefined) return undefined;
    const { values, dims, type } = known;
    const total = lengths.past + lengths.tokens;
    const tokens = dims.at(-2) ?? 1;
    if (dims.at(-1) !== total || tokens !== lengths.tokens) return undefined;
    const isSeen = (value: number) => {
      if (type === ELEMENT.bool) return value !== 0;
      if (value === 0) return true;
      if (value <= HIDDEN_MAX) return false;
      throw cannotCut(`the mask of ${user} must be 0 or below ${HIDDEN_MAX}: ${mask} adds ${value} to scores`);
    };
    const rows = Array.from(
      { length: tokens },
      (_, i) => Array.from({ length: total }, (_, j) => isSeen(values[i * total + j]!)),
    );
    // The same for every head, where it has an axis of them.
    for (let i = tokens * total; i < values.length; i++) {
      if (isSeen(values[i]!) !== rows[Math.floor(i / total) % tokens]![i % total]) {
        throw cannotCut(`the mask of ${user} must be the same for every head: ${mask} is not`);
      }
    }
    return rows;
  }

  #of(mask: string, lengths: Lengths): Known | undefined {
    return new Evaluation(this.#values, inputsFor(this.#model, lengths)).of(mask);
  }
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
  { past: 700, tokens: 2 },
  { past: 5000, tokens: 2 },
  { past: 40_000, tokens: 2 },
  { past: 140_000, tokens: 2 },
];

/** Tokens that the last row sees, where it does not see all. */
function windowIn(seen: readonly (readonly boolean[])[], { past, tokens }: Lengths): number | undefined {
  const count = seen.at(-1)!.filter((isSeen) => isSeen).length;
  return count < past + tokens && count > 0 ? count : undefined;
}

function checkRows(
  seen: readonly (readonly boolean[])[],
  { past }: Lengths,
  { mask, user, isCausal, windowTokens = Infinity }: {
    readonly mask: string;
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
      if (isSeen === wanted) continue;
      throw cannotCut(
        `the mask of ${user} must be the causal one, with or without a window: by ${mask}, the token at position ` +
          `${position} ${isSeen ? "sees" : "does not see"} position ${j}`,
      );
    }
  }
}
