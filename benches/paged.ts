/**
 * What do blocks cost, and what do they save: forks, batches, attention over blocks instead of one run of rows?
 *
 *     deno task bench:paged [--json] [--smoke] [--fork 4096,131072] [--append 1,16,256] [--tokens 1024,4096,32768]
 *         [--sequences 1,4,16,64,256]
 *     bun benches/paged.ts
 *
 * f16 rows of 8 KV heads of 128, in blocks of 64 positions. Each row has a rival, whose time over ours is `x rival`:
 *
 *     fork      forks a sequence of so many tokens and frees the fork;      against a copy of its stored rows
 *     append    one token to each of so many sequences, in one call;        against a call for each sequence
 *     attend    one query over so many tokens of one sequence;              against a contiguous cache of the same rows
 *     batch     one query to each of so many sequences of 1024 tokens;      against contiguous caches, a call for each
 *     ragged    one query to each of 32 sequences, 31 of 4096 tokens and one of 65536; against 32 of as many tokens each
 *
 * Goals: a fork below 100 us at any length, ragged within 1.1 x its rival. attend, batch and ragged go through at least max(1 GiB, 2 x the last cache level),
 * layer after layer. Before timing, attend must give the bits of the contiguous cache and a fork must not take a block;
 * after timing, the last result must be the same bits as the first.
 */
import { ContiguousCache, type KvCache, PagedCache, type Sequence } from "../mod.ts";
import { checkClose, hashOf } from "./checking.ts";
import { numbers, rotatedBytes, SHAPE } from "./inputs.ts";
import { printRows, readOptions, type Row, tell, tellMachine, timeOf } from "./rows.ts";

const BATCH_TOKENS = 1024;

const options = readOptions(["fork", "append", "tokens", "sequences"]);
const { smoke } = options;
const forkTokens = options.numbers("fork", smoke ? [100, 1000] : [4096, 131072]);
const appendCounts = options.numbers("append", smoke ? [1, 8] : [1, 16, 256]);
const attendTokens = options.numbers("tokens", smoke ? [64, 100] : [1024, 2048, 4096, 8192, 16384, 32768]);
const batchCounts = options.numbers("sequences", smoke ? [1, 3] : [1, 4, 16, 64, 256]);
const batchTokens = smoke ? 100 : BATCH_TOKENS;
const { kvHeadCount, headDim, gqa } = SHAPE;
const kvDim = kvHeadCount * headDim;
/** f16 keys and values of a token in a layer. */
const TOKEN_BYTES = 2 * kvDim * 2;

/** A row of the table before it is printed. */
interface Measured {
  readonly call: string;
  readonly tokens: number;
  readonly sequences: number;
  readonly ns: number;
  readonly rivalNs: number;
}

const shapeOf = (layerCount: number, maxSeqLen: number) => (
  { layerCount, kvHeadCount, headDim, maxSeqLen, dtype: "f16" } as const
);

/** Layers of `tokens` rows that are together too large for a processor's caches. */
function layersFor(tokens: number): number {
  return Math.ceil(rotatedBytes(smoke) / (tokens * TOKEN_BYTES));
}

/** Puts the same rows in every layer; long ones in pieces. */
function fill(sequence: KvCache, tokens: number, seed: number): void {
  const piece = Math.min(tokens, 4096);
  const k = numbers(seed, piece * kvDim), v = numbers(seed + 1, piece * kvDim);
  for (let start = 0; start < tokens; start += piece) {
    const count = Math.min(piece, tokens - start) * kvDim;
    for (let layer = 0; layer < sequence.layerCount; layer++) {
      sequence.append(layer, k.subarray(0, count), v.subarray(0, count));
    }
    sequence.commit(count / kvDim);
  }
}

/** Two results that must be the same bits; gives their hash. */
function checkSame(what: string, ours: Float32Array, theirs: Float32Array): string {
  const hash = hashOf(ours);
  if (hash !== hashOf(theirs)) throw new Error(`${what} gives other bits than the contiguous cache`);
  return hash;
}

/** A fork shares all blocks, whatever the length; the rival copies what is in them. */
async function measureFork(tokens: number): Promise<Measured> {
  using cache = new PagedCache(shapeOf(1, tokens));
  const parent = cache.sequence();
  fill(parent, tokens, 1);
  const { usedBlocks, allocations } = cache.poolStats();
  const q = numbers(3, gqa * kvDim);
  const hash = hashOf(parent.attend(0, q));
  const forks = Array.from({ length: 4 }, () => parent.fork());
  for (const fork of forks) checkSame(`attend over a fork of ${tokens} tokens`, fork.attend(0, q), parent.attend(0, q));
  checkClose("a table of a fork", forks[0]!.blockTable(0), parent.blockTable(0), 0);
  const checkBlocks = () => {
    const stats = cache.poolStats();
    checkClose("blocks after forks", [stats.usedBlocks, stats.allocations], [usedBlocks, allocations], 0);
  };
  checkBlocks();
  forks.forEach((fork) => fork.free());
  tell(options, `fork at ${tokens} tokens: equal to its parent, no block taken, hash ${hash}`);

  const ns = await timeOf(() => parent.fork().free(), smoke);
  checkBlocks();
  const { k, v } = parent.gather(0, { dtype: "f16" });
  const copyK = k.slice(), copyV = v.slice();
  const rivalNs = await timeOf(() => {
    copyK.set(k as Uint16Array<ArrayBuffer>);
    copyV.set(v as Uint16Array<ArrayBuffer>);
  }, smoke);
  return { call: "fork", tokens, sequences: 1, ns, rivalNs };
}

/** A token to each of many sequences; all are taken back when they are full. */
async function measureAppend(count: number): Promise<Measured> {
  const capacity = smoke ? 64 : 1024;
  using cache = new PagedCache(shapeOf(1, capacity));
  const sequences = Array.from({ length: count }, () => cache.sequence());
  const k = numbers(1, count * kvDim), v = numbers(2, count * kvDim);
  const rowOf = (rows: Float32Array, i: number) => rows.subarray(i * kvDim, (i + 1) * kvDim);
  const rows = sequences.map((_, i) => ({ k: rowOf(k, i), v: rowOf(v, i) }));
  const together = () => cache.append(0, k, v, { sequences });
  const apart = () => sequences.forEach((sequence, i) => sequence.append(0, rows[i]!.k, rows[i]!.v));

  together();
  apart();
  for (const sequence of sequences) {
    const { k, v } = sequence.gather(0);
    checkClose("keys appended in one call", k.subarray(0, kvDim), k.subarray(kvDim), 0);
    checkClose("values appended in one call", v.subarray(0, kvDim), v.subarray(kvDim), 0);
  }
  const hash = hashOf(sequences.at(-1)!.gather(0, { dtype: "f16" }).k);
  tell(options, `append to ${count} sequences: equal to a call for each, hash ${hash}`);

  const timeFilling = (append: () => void) => {
    const refill = () => sequences.forEach((sequence) => sequence.truncate(0));
    // Every block is taken and touched.
    refill();
    for (let length = 0; length < capacity; length++) append();
    let length = capacity;
    return timeOf(() => {
      if (length === capacity) refill(), length = 0;
      append();
      length++;
    }, smoke);
  };
  return {
    call: "append",
    tokens: 1,
    sequences: count,
    ns: await timeFilling(together),
    rivalNs: await timeFilling(apart),
  };
}

/** One query over `tokens` rows of each sequence; the contiguous cache has the same rows. */
async function measureAttend(call: string, tokens: number, count: number): Promise<Measured> {
  const layerCount = layersFor(tokens * count);
  const shape = shapeOf(layerCount, tokens);
  using paged = new PagedCache(shape);
  using contiguous = new ContiguousCache({ ...shape, sequenceCount: count });
  const sequences: Sequence[] = [];
  for (let i = 0; i < count; i++) {
    sequences.push(paged.sequence());
    fill(sequences[i]!, tokens, 1 + 2 * i);
    fill(contiguous.sequence(i), tokens, 1 + 2 * i);
  }
  const q = numbers(3, count * gqa * kvDim);
  const ours = new Float32Array(q.length), theirs = new Float32Array(q.length);
  const rows = sequences.map((_, i) => {
    const start = i * gqa * kvDim, end = start + gqa * kvDim;
    return { plain: contiguous.sequence(i), q: q.subarray(start, end), given: { into: theirs.subarray(start, end) } };
  });
  const given = { sequences, into: ours };
  const attend = (layer: number) => paged.attend(layer, q, given);
  const attendPlain = (layer: number) => rows.forEach(({ plain, q, given }) => plain.attend(layer, q, given));

  attend(0);
  attendPlain(0);
  const hash = checkSame(`attend over ${count} x ${tokens} rows`, ours, theirs);
  tell(options, `${call}, ${count} x ${tokens} tokens: equal to the contiguous cache, hash ${hash}`);
  let calls = 0;
  const rivalNs = await timeOf(() => attendPlain(calls++ % layerCount), smoke);
  const ns = await timeOf(() => attend(calls++ % layerCount), smoke);
  if (hashOf(ours) !== hash) throw new Error(`${call} gives other bits than at first`);
  return { call, tokens, sequences: count, ns, rivalNs };
}

/** One query to each of 32 sequences of one cache, of so many tokens each. */
async function timeBatch(name: string, lengths: readonly number[]): Promise<number> {
  const tokens = lengths.reduce((sum, length) => sum + length);
  const layerCount = layersFor(tokens);
  using cache = new PagedCache(shapeOf(layerCount, Math.max(...lengths)));
  const sequences = lengths.map((length, i) => {
    const sequence = cache.sequence();
    fill(sequence, length, 1 + 2 * i);
    return sequence;
  });
  const q = numbers(3, lengths.length * gqa * kvDim);
  const into = new Float32Array(q.length);
  cache.attend(0, q, { sequences, into });
  const hash = hashOf(into);
  const alone = sequences.map((sequence, i) => sequence.attend(0, q.subarray(i * gqa * kvDim, (i + 1) * gqa * kvDim)));
  checkClose(`attend over ${name} sequences`, into, alone.flatMap((output) => [...output]), 0);
  tell(options, `${name}, ${tokens} tokens: equal to a call for each, hash ${hash}`);
  let calls = 0;
  const ns = await timeOf(() => cache.attend(calls++ % layerCount, q, { sequences, into }), smoke);
  if (hashOf(into) !== hash) throw new Error(`${name} gives other bits than at first`);
  return ns;
}

/** Sequences of very different lengths against as many of one length, and as many rows. */
async function measureRagged(): Promise<Measured> {
  const unit = smoke ? 64 : 4096;
  const lengths = [16 * unit, ...Array.from({ length: 31 }, () => unit)];
  const tokens = lengths.reduce((sum, length) => sum + length) / lengths.length;
  const rivalNs = await timeBatch("uniform", lengths.map(() => tokens));
  const ns = await timeBatch("ragged", lengths);
  return { call: "ragged", tokens, sequences: lengths.length, ns, rivalNs };
}

tellMachine(options);
const measured: Measured[] = [];
for (const tokens of forkTokens) measured.push(await measureFork(tokens));
for (const count of appendCounts) measured.push(await measureAppend(count));
for (const tokens of attendTokens) measured.push(await measureAttend("attend", tokens, 1));
for (const count of batchCounts) measured.push(await measureAttend("batch", batchTokens, count));
measured.push(await measureRagged());

const rows = measured.map(({ call, tokens, sequences, ns, rivalNs }): Row => {
  const us = ns / 1e3, nsPerToken = ns / (tokens * sequences), vsRival = rivalNs / ns;
  return {
    json: { call, tokens, sequences, us, nsPerToken, vsRival },
    cells: [call, tokens, sequences, us.toFixed(2), nsPerToken.toFixed(3), vsRival.toFixed(2)],
  };
});
printRows(options, "paged", ["call", "tokens", "sequences", "us", "ns/token", "x rival"], rows);
