/**
 * Beam search: not one text but the N likeliest of all texts behind the prompt, as far as N at a time can tell.
 *
 * At each byte every text is continued with all 256, and the N of the largest sums of log-probabilities go on. Two of
 * them often have the same past: the cache lets their sequences share its blocks, and `reorder` moves the sequences
 * without copying what they share.
 */
import type { PagedCache, Sequence } from "../mod.ts";
import { logSumExp } from "./sampling.ts";
import { batchStep } from "./step.ts";
import type { Ziglet } from "./ziglet.ts";

/** A text behind the prompt. */
export interface Beam {
  bytes: number[];
  /** The natural log of its probability, its end included where the model ended it. */
  score: number;
  /** Whether the model ended it; else it has all bytes, or the context is full. */
  ended: boolean;
}

/** A beam and one byte more. */
interface Candidate {
  score: number;
  /** Which beam. */
  parent: number;
  token: number;
}

/**
 * The likeliest texts of at most `tokens` bytes, best first, as many as there are sequences. These all hold the prompt;
 * `logits` `[vocab]` are those behind it. The same calls give the same texts: a tie goes to the better parent, then to
 * the smaller byte. `progress` is told of all texts that may yet be among those found, after every byte.
 */
export async function searchBeams(
  ziglet: Ziglet,
  cache: PagedCache,
  sequences: readonly Sequence[],
  logits: Float32Array,
  tokens: number,
  progress: (beams: readonly Beam[]) => Promise<void>,
): Promise<Beam[]> {
  const { bosToken, maxSeqLen } = ziglet.config;
  const width = sequences.length;
  const finished: Beam[] = []; // best first, at most `width`
  let live: Beam[] = [{ bytes: [], score: 0, ended: false }];
  let rows = logits; // [beam][vocab]

  for (let length = 1; length <= tokens; length++) {
    // 1. The candidates in order: `width` that go on, and those that end before the last of them.
    const goOn: Candidate[] = [];
    for (const candidate of rankCandidates(live, rows)) {
      if (goOn.length === width) break;
      if (candidate.token !== bosToken) goOn.push(candidate);
      else finished.push({ bytes: live[candidate.parent]!.bytes, score: candidate.score, ended: true });
    }
    finished.sort((a, b) => b.score - a.score).splice(width);
    live = goOn.map(({ score, parent, token }) => ({
      bytes: [...live[parent]!.bytes, token],
      score,
      ended: false,
    }));

    // 2. Each sequence takes over the past of its parent.
    cache.reorder(sequences, goOn.map(({ parent }) => parent));

    // 3. A score can only fall: nothing that goes on can get past `width` better ones.
    const isDecided = finished.length === width && finished.at(-1)!.score >= live[0]!.score;
    if (isDecided || length === tokens || sequences[0]!.seqLen === maxSeqLen) break;

    // 4. One step runs the new bytes of all.
    rows = ziglet.run(Uint8Array.from(goOn, ({ token }) => token), batchStep(cache, sequences), "all");
    await progress([...finished, ...live]);
  }
  return [...finished, ...live].sort((a, b) => b.score - a.score).slice(0, width);
}

/** Every beam with every byte, best first. */
function rankCandidates(beams: readonly Beam[], rows: Float32Array): Candidate[] {
  const vocabSize = rows.length / beams.length;
  const candidates = beams.flatMap(({ score }, parent) => {
    const logits = rows.subarray(parent * vocabSize, (parent + 1) * vocabSize); // [vocab]
    const sum = logSumExp(logits);
    return Array.from(logits, (logit, token): Candidate => ({ score: score + (logit - sum), parent, token }));
  });
  // Sorting is stable, and parents and bytes ascend.
  return candidates.sort((a, b) => b.score - a.score);
}
