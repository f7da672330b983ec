/** Makes a failing list of steps short, so that a person can read what went wrong. */

/**
 * The shortest list found that still fails: chunks are left out, large ones first, then single steps are made simpler,
 * as long as `fails` says that what is left fails, too. Steps must mean the same in any list.
 *
 * @example Only one of a hundred numbers matters
 * ```ts
 * shrink(Array.from({ length: 100 }, (_, i) => i), (steps) => steps.includes(7)); // [7]
 * ```
 */
export function shrink<Step>(
  steps: readonly Step[],
  fails: (steps: readonly Step[]) => boolean,
  simpler: (step: Step) => Step[] = () => [],
): Step[] {
  let kept = [...steps];
  let before: Step[];
  do {
    before = kept;
    for (let chunk = kept.length >> 1; chunk >= 1; chunk >>= 1) {
      for (let start = 0; start < kept.length;) {
        const rest = kept.toSpliced(start, chunk);
        if (fails(rest)) kept = rest;
        else start += chunk;
      }
    }
    for (let i = 0; i < kept.length; i++) {
      const found = simpler(kept[i]!).map((step) => kept.with(i, step)).find(fails);
      if (found !== undefined) kept = found;
    }
  } while (kept !== before && JSON.stringify(kept) !== JSON.stringify(before));
  return kept;
}
