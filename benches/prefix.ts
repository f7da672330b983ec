/**
 * What does it cost to find a prefix again, and what does it save?
 *
 *     deno task bench:prefix [--json] [--smoke] [--match 32768,131072] [--blocks 100000] [--turns 20]
 *     bun benches/prefix.ts
 *     deno task bench:prefix --json > rows.jsonl && deno task bench:chart rows.jsonl docs/prefix.svg
 *
 * Blocks of 64 positions; their rows are small, as no row is read. Each row has a rival, whose time over ours is `x rival`:
 *
 *     match       explains a prompt of so many tokens, all of them there;    against a plain trie of JavaScript Maps
 *     adopt       makes a sequence with that prompt and frees it;            against the match alone
 *     stranger    explains a prompt that its tenant has not, and another     against the same when nobody has it
 *                 tenant has whole
 *     evict       appends and commits a block while a cache with so many     against the same with room for it
 *                 blocks is full
 *     turn        the turn of that number of a conversation whose prompt     against the same without the index
 *                 is all that was said, on 8 layers of 8 heads of 128
 *     chat        all turns of it                                            against the same without the index
 *
 * `computed` are the tokens whose rows the caller computed, in share of those of the rival. Goals: 32768 tokens matched in
 * less than 1 ms, 131072 in less than 4; stranger as fast as its rival. `index bytes` is what the index takes for a block of
 * 64 positions, 32 layers and 8 heads of 128 in f16, which has 16 MiB: 1 % of that is the goal.
 *
 * Before timing, what is found is compared with the trie, and rows with those of a cache without the index.
 */
import { PagedCache, type Sequence } from "../mod.ts";
import { checkClose, hashOf } from "./checking.ts";
import { numbers, SHAPE } from "./inputs.ts";
import { cell, keep, printRows, readOptions, type Row, tell, tellMachine, timeOf } from "./rows.ts";

const options = readOptions(["match", "blocks", "turns"]);
const { smoke } = options;
const matchTokens = options.numbers("match", smoke ? [100, 1000] : [32768, 131072]);
const blockCounts = options.numbers("blocks", [smoke ? 50 : 100_000]);
const turnCounts = options.numbers("turns", [smoke ? 3 : 20]);
const BLOCK_SIZE = 64, SMALL_DIM = 2, SYSTEM_TOKENS = smoke ? 70 : 2000, TURN_TOKENS = smoke ? 30 : 150;
const SMALL = { layerCount: 1, kvHeadCount: 1, headDim: SMALL_DIM, blockSize: BLOCK_SIZE, dtype: "f16" } as const;
const { kvHeadCount, headDim } = SHAPE;
const CHAT = { layerCount: smoke ? 1 : 8, kvHeadCount, headDim, blockSize: BLOCK_SIZE, dtype: "f16" } as const;

interface Measured {
  readonly call: string;
  readonly count: number;
  readonly ns: number;
  readonly rivalNs: number;
  readonly computed?: number;
  readonly indexBytes?: number;
  readonly tokens?: number;
  readonly rivalTokens?: number;
}

/** A plain trie of tokens. */
type Trie = Map<number, Trie>;

function remember(trie: Trie, tokens: Uint32Array): void {
  for (const token of tokens) {
    const next: Trie = trie.get(token) ?? new Map();
    trie.set(token, next);
    trie = next;
  }
}

function matched(trie: Trie, tokens: Uint32Array): number {
  let node: Trie | undefined = trie, count = 0;
  for (const token of tokens) {
    node = node.get(token);
    if (!node) break;
    count++;
  }
  return count;
}

/** Ids of a seed, of a vocabulary of 50 000. */
function promptOf(seed: number, length: number): Uint32Array {
  return Uint32Array.from(numbers(seed, length), (x) => Math.floor(Math.abs(x) * 20_000));
}

/** Appends rows for the tokens that a sequence lacks, the same at the same position, and commits them. */
function compute(sequence: Sequence, tokens: Uint32Array, rows: Float32Array, { tells }: { tells: boolean }): number {
  const start = sequence.seqLen, count = tokens.length - start, dim = sequence.kvDim;
  const part = rows.subarray(start * dim, tokens.length * dim);
  for (let layer = 0; layer < sequence.layerCount; layer++) sequence.append(layer, part, part);
  if (tells) sequence.commit(count, { tokens: tokens.subarray(start) });
  else sequence.commit(count);
  return count;
}

async function measureMatch(tokens: number): Promise<Measured[]> {
  using cache = new PagedCache({ ...SMALL, maxSeqLen: tokens + 1, prefix: {} });
  const prompt = promptOf(tokens, tokens);
  const rows = numbers(1, tokens * SMALL_DIM);
  const donor = cache.sequence({ salt: "first" });
  compute(donor, prompt, rows, { tells: true });
  donor.free();
  const trie: Trie = new Map();
  remember(trie, prompt);
  for (const length of [tokens, tokens >> 1, 1]) {
    const asked = prompt.slice(0, length + 1).fill(1 << 20, length); // the whole prompt, or another token behind a part
    const { knownTokens } = cache.explain(asked, { salt: "first" });
    checkClose(`a prompt of ${length} tokens`, [knownTokens], [matched(trie, asked)], 0);
    if (cache.explain(asked, { salt: "second" }).knownTokens !== 0) {
      throw new Error("a prompt of another tenant is found");
    }
  }
  const hot = cache.sequence({ tokens: prompt, salt: "first" });
  const gathered = hot.gather(0, { dtype: "f16" }).k;
  using plain = new PagedCache({ ...SMALL, maxSeqLen: tokens + 1 });
  const cold = plain.sequence();
  compute(cold, prompt.subarray(0, tokens - 1), rows, { tells: false });
  checkClose("rows that were found", gathered, cold.gather(0, { dtype: "f16" }).k, 0);
  hot.free();
  tell(options, `match of ${tokens} tokens: equal to a trie, hash ${hashOf(gathered)}`);

  const tenant = { salt: "first" }, stranger = { salt: "second" };
  const ns = await timeOf(() => keep(cache.explain(prompt, tenant)), smoke);
  const trieNs = await timeOf(() => keep(matched(trie, prompt)), smoke);
  const adoptNs = await timeOf(() => cache.sequence({ tokens: prompt, ...tenant }).free(), smoke);
  // By turns, as the two are to be the same and the machine is not.
  using empty = new PagedCache({ ...SMALL, maxSeqLen: tokens + 1, prefix: {} });
  let unknownNs = Infinity, strangerNs = Infinity;
  for (let i = 0; i < 2; i++) {
    unknownNs = Math.min(unknownNs, await timeOf(() => keep(empty.explain(prompt, stranger)), smoke));
    strangerNs = Math.min(strangerNs, await timeOf(() => keep(cache.explain(prompt, stranger)), smoke));
  }
  return [
    { call: "match", count: tokens, ns, rivalNs: trieNs },
    { call: "adopt", count: tokens, ns: adoptNs, rivalNs: ns },
    { call: "stranger", count: tokens, ns: strangerNs, rivalNs: unknownNs },
  ];
}

/** A block more for a sequence, in a cache with so many blocks that nobody uses and room for them alone, or for more. */
async function measureEvict(blocks: number): Promise<Measured> {
  const blockBytes = BLOCK_SIZE * SMALL_DIM * 2 * 2, chain = 16;
  const rows = numbers(1, chain * BLOCK_SIZE * SMALL_DIM);
  const time = async (maxBytes: number) => {
    using cache = new PagedCache({ ...SMALL, maxSeqLen: chain * BLOCK_SIZE, prefix: { maxBytes } });
    let seed = 0;
    const one = (count: number) => {
      const sequence = cache.sequence();
      const tokens = new Uint32Array(count * BLOCK_SIZE).fill(7);
      tokens[0] = seed++;
      compute(sequence, tokens, rows, { tells: true });
      sequence.free();
    };
    for (let i = 0; i < Math.ceil(blocks / chain); i++) one(chain);
    const { cachedBlocks, metadataBytes } = cache.stats().prefix;
    checkClose(
      "cached blocks",
      [cachedBlocks],
      [Math.min(maxBytes / blockBytes, Math.ceil(blocks / chain) * chain)],
      0,
    );
    const ns = await timeOf(() => one(1), smoke);
    return { ns, indexBytes: metadataBytes / cachedBlocks, evicted: cache.stats().prefix.evictedBlocks };
  };
  const free = await time(1e6 * blocks * blockBytes);
  const full = await time(blocks * blockBytes);
  if (free.evicted !== 0 || full.evicted === 0) {
    throw new Error("blocks go where there is room, or stay where there is none");
  }
  return { call: "evict", count: blocks, ns: full.ns, rivalNs: free.ns, indexBytes: full.indexBytes };
}

/** What each turn computed and how long it took, and the rows at the end. */
interface Conversation {
  readonly computed: readonly number[];
  readonly ns: readonly number[];
  readonly hash: string;
}

function chat(tokens: Uint32Array, turns: number, rows: Float32Array, { finds }: { finds: boolean }): Conversation {
  using cache = new PagedCache({ ...CHAT, maxSeqLen: tokens.length, ...(finds ? { prefix: {} } : {}) });
  const computed: number[] = [], ns: number[] = [];
  let hash = "";
  for (let turn = 1; turn <= turns; turn++) {
    const prompt = tokens.subarray(0, SYSTEM_TOKENS + turn * TURN_TOKENS);
    const started = performance.now();
    const sequence = finds ? cache.sequence({ tokens: prompt }) : cache.sequence();
    computed.push(compute(sequence, prompt, rows, { tells: finds }));
    ns.push((performance.now() - started) * 1e6);
    if (turn === turns) hash = hashOf(sequence.gather(0, { dtype: "f16" }).k);
    sequence.free();
  }
  return { computed, ns, hash };
}

/** A conversation: each turn has a prompt of all that was said. A row for each turn, and one for all of them. */
function measureChat(turns: number): Measured[] {
  const tokens = promptOf(3, SYSTEM_TOKENS + turns * TURN_TOKENS);
  const rows = numbers(4, tokens.length * kvHeadCount * headDim);
  const hot: Conversation[] = [], cold: Conversation[] = [];
  // By turns, as the machine is not the same for long.
  for (let i = 0; i < (smoke ? 1 : 9); i++) {
    hot.push(chat(tokens, turns, rows, { finds: true }));
    cold.push(chat(tokens, turns, rows, { finds: false }));
  }
  if (hot[0]!.hash !== cold[0]!.hash) throw new Error("a conversation with the index has other rows than without");
  const ours = hot[0]!.computed, theirs = cold[0]!.computed;
  checkClose("tokens computed", [sum(ours)], [tokens.length], 0);
  tell(options, `chat of ${turns} turns: equal to one without the index, hash ${hot[0]!.hash}`);
  const each = Array.from({ length: turns }, (_, i): Measured => ({
    call: "turn",
    count: i + 1,
    ns: median(hot.map(({ ns }) => ns[i]!)),
    rivalNs: median(cold.map(({ ns }) => ns[i]!)),
    computed: ours[i]! / theirs[i]!,
    tokens: ours[i]!,
    rivalTokens: theirs[i]!,
  }));
  const ns = median(hot.map(({ ns }) => sum(ns))), rivalNs = median(cold.map(({ ns }) => sum(ns)));
  return [...each, { call: "chat", count: turns, ns, rivalNs, computed: sum(ours) / sum(theirs) }];
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1]!;
}

tellMachine(options);
const measured: Measured[] = [];
for (const tokens of matchTokens) measured.push(...await measureMatch(tokens));
for (const blocks of blockCounts) measured.push(await measureEvict(blocks));
for (const turns of turnCounts) measured.push(...measureChat(turns));

const rows = measured.map(({ call, count, ns, rivalNs, ...more }): Row => {
  const { computed = null, indexBytes = null, tokens = null, rivalTokens = null } = more;
  const us = ns / 1e3, vsRival = rivalNs / ns;
  return {
    json: { call, count, us, vsRival, computed, indexBytes, tokens, rivalTokens },
    cells: [call, count, us.toFixed(2), vsRival.toFixed(2), cell(computed, 3), cell(indexBytes, 0)],
  };
});
printRows(options, "prefix", ["call", "count", "us", "x rival", "computed", "index bytes"], rows);
