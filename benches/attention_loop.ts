/**
 * The rival of attend: attention over f32 rows in plain TypeScript, as fast as it gets without native code.
 *
 * Blocks of 16 rows with an online softmax; a key or value read once serves four query heads, and their four sums do
 * not wait for each other; values come two rows at a time, so that a sum is loaded and stored half as often. At 4096
 * tokens that is 1.5 times (Deno) and 1.8 times (Bun) as fast as a loop of one head and one row at a time (best of 20,
 * EPYC Zen 5, November 2026).
 */

/** What is attended: k and v are `[row][kv_head][head_dim]`, q and output `[query][q_head][head_dim]`; causal. */
export interface AttentionCase {
  readonly q: Float32Array;
  readonly k: Float32Array;
  readonly v: Float32Array;
  readonly queryCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  /** Query heads that share a KV head. */
  readonly gqa: number;
}

const BLOCK_ROWS = 16;

/** Writes the attention of every query and head into `output`. */
export function attentionLoop(attention: AttentionCase, output: Float32Array): void {
  const { q, k, v, queryCount, kvHeadCount, headDim, gqa } = attention;
  const kvDim = kvHeadCount * headDim;
  const rowCount = k.length / kvDim;
  const scale = 1 / Math.sqrt(headDim);
  const group: Group = {
    query: new Float64Array(gqa * headDim),
    sums: new Float64Array(gqa * headDim),
    weights: new Float64Array(gqa * BLOCK_ROWS),
    maxima: new Float64Array(gqa),
    totals: new Float64Array(gqa),
    k,
    v,
    kvDim,
    headDim,
    gqa,
  };

  for (let query = 0; query < queryCount; query++) {
    const seen = rowCount - queryCount + query + 1;
    for (let kvHead = 0; kvHead < kvHeadCount; kvHead++) {
      const first = (query * kvHeadCount + kvHead) * gqa * headDim; // of the group, in q and output
      for (let i = 0; i < gqa * headDim; i++) group.query[i] = q[first + i]! * scale;
      group.sums.fill(0);
      group.maxima.fill(-Infinity);
      group.totals.fill(0);
      for (let start = 0; start < seen; start += BLOCK_ROWS) {
        const count = Math.min(BLOCK_ROWS, seen - start);
        const at = start * kvDim + kvHead * headDim;
        let head = 0;
        for (; head + 4 <= gqa; head += 4) scoreFour(group, head, at, count);
        for (; head < gqa; head++) scoreOne(group, head, at, count);
        for (head = 0; head < gqa; head++) weigh(group, head, count);
        for (head = 0; head + 4 <= gqa; head += 4) addFour(group, head, at, count);
        for (; head < gqa; head++) addOne(group, head, at, count);
      }
      for (let head = 0; head < gqa; head++) {
        for (let d = 0; d < headDim; d++) {
          output[first + head * headDim + d] = group.sums[head * headDim + d]! / group.totals[head]!;
        }
      }
    }
  }
}

/** The query heads of one KV head, and what the softmax knows of each so far. */
interface Group {
  /** `[head][head_dim]`, softmax_scale applied. */
  readonly query: Float64Array;
  /** `[head][head_dim]`: sum of weight * v. */
  readonly sums: Float64Array;
  /** `[head][row of the block]`: scores, then weights. */
  readonly weights: Float64Array;
  /** Largest score of each head, and its sum of weights. */
  readonly maxima: Float64Array;
  readonly totals: Float64Array;
  readonly k: Float32Array;
  readonly v: Float32Array;
  readonly kvDim: number;
  readonly headDim: number;
  readonly gqa: number;
}

/** Scores of four heads; `at` is the first row of the block. */
function scoreFour({ query, weights, k, kvDim, headDim }: Group, head: number, at: number, count: number): void {
  const q0 = head * headDim, q1 = q0 + headDim, q2 = q1 + headDim, q3 = q2 + headDim;
  for (let row = 0; row < count; row++, at += kvDim) {
    let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (let d = 0; d < headDim; d++) {
      const key = k[at + d]!;
      s0 += query[q0 + d]! * key;
      s1 += query[q1 + d]! * key;
      s2 += query[q2 + d]! * key;
      s3 += query[q3 + d]! * key;
    }
    const w = head * BLOCK_ROWS + row;
    weights[w] = s0;
    weights[w + BLOCK_ROWS] = s1;
    weights[w + 2 * BLOCK_ROWS] = s2;
    weights[w + 3 * BLOCK_ROWS] = s3;
  }
}

/** Scores of one head. */
function scoreOne({ query, weights, k, kvDim, headDim }: Group, head: number, at: number, count: number): void {
  const q = head * headDim;
  for (let row = 0; row < count; row++, at += kvDim) {
    let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    let d = 0;
    for (; d + 4 <= headDim; d += 4) {
      s0 += query[q + d]! * k[at + d]!;
      s1 += query[q + d + 1]! * k[at + d + 1]!;
      s2 += query[q + d + 2]! * k[at + d + 2]!;
      s3 += query[q + d + 3]! * k[at + d + 3]!;
    }
    for (; d < headDim; d++) s0 += query[q + d]! * k[at + d]!;
    weights[head * BLOCK_ROWS + row] = s0 + s1 + s2 + s3;
  }
}

/** Scores become weights relative to the largest score so far; a larger one than before shrinks the sums. */
function weigh({ sums, weights, maxima, totals, headDim }: Group, head: number, count: number): void {
  const first = head * BLOCK_ROWS;
  let max = maxima[head]!;
  for (let row = 0; row < count; row++) max = Math.max(max, weights[first + row]!);
  if (max > maxima[head]!) {
    const shrink = Math.exp(maxima[head]! - max);
    for (let d = 0; d < headDim; d++) sums[head * headDim + d]! *= shrink;
    totals[head]! *= shrink;
    maxima[head] = max;
  }
  let total = 0;
  for (let row = 0; row < count; row++) {
    const weight = Math.exp(weights[first + row]! - max);
    weights[first + row] = weight;
    total += weight;
  }
  totals[head]! += total;
}

/** Adds the weighed values to the sums of four heads. */
function addFour({ sums, weights, v, kvDim, headDim }: Group, head: number, at: number, count: number): void {
  const o0 = head * headDim, o1 = o0 + headDim, o2 = o1 + headDim, o3 = o2 + headDim;
  for (let row = 0; row < count; row += 2, at += 2 * kvDim) {
    const hasTwo = row + 1 < count;
    const w = head * BLOCK_ROWS + row;
    const a0 = weights[w]!, b0 = hasTwo ? weights[w + 1]! : 0;
    const a1 = weights[w + BLOCK_ROWS]!, b1 = hasTwo ? weights[w + BLOCK_ROWS + 1]! : 0;
    const a2 = weights[w + 2 * BLOCK_ROWS]!, b2 = hasTwo ? weights[w + 2 * BLOCK_ROWS + 1]! : 0;
    const a3 = weights[w + 3 * BLOCK_ROWS]!, b3 = hasTwo ? weights[w + 3 * BLOCK_ROWS + 1]! : 0;
    const next = hasTwo ? at + kvDim : at;
    for (let d = 0; d < headDim; d++) {
      const a = v[at + d]!, b = v[next + d]!;
      sums[o0 + d]! += a0 * a + b0 * b;
      sums[o1 + d]! += a1 * a + b1 * b;
      sums[o2 + d]! += a2 * a + b2 * b;
      sums[o3 + d]! += a3 * a + b3 * b;
    }
  }
}

/** Adds the weighed values to the sums of one head. */
function addOne({ sums, weights, v, kvDim, headDim }: Group, head: number, at: number, count: number): void {
  const o = head * headDim;
  for (let row = 0; row < count; row += 2, at += 2 * kvDim) {
    const hasTwo = row + 1 < count;
    const w = head * BLOCK_ROWS + row;
    const wa = weights[w]!, wb = hasTwo ? weights[w + 1]! : 0;
    const next = hasTwo ? at + kvDim : at;
    for (let d = 0; d < headDim; d++) sums[o + d]! += wa * v[at + d]! + wb * v[next + d]!;
  }
}
