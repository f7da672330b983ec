/**
 * A trace of prompts as a server sees them: documents of which a few are asked for most of the time, each with an ending of
 * its own. A plain trie of all tokens says what must be found. `KVERN_PROMPTS` says how many, a million say.
 */

import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { PagedCache, type PagedCacheOptions, type PrefixStats } from "../mod.ts";
import { Random } from "./oracle.ts";

const PROMPT_COUNT = Number(process.env.KVERN_PROMPTS ?? 20_000);
const DOCUMENT_COUNT = 3000, DOCUMENT_TOKENS = 40, ENDING_TOKENS = 9;
const BLOCK_BYTES = 4 * 2 * 2 * 2;
const SHAPE = { layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 64, blockSize: 4 } as const;

/** Prompts of a Zipf distribution over documents: the one of rank r is asked for about 1 / r times as often as the first. */
function* prompts(): Generator<Uint32Array> {
  const dice = new Random(1);
  const random = () => dice.next();
  for (let i = 0; i < PROMPT_COUNT; i++) {
    const document = Math.floor(DOCUMENT_COUNT ** random());
    const kept = DOCUMENT_TOKENS - Math.floor(random() * random() * DOCUMENT_TOKENS);
    const ending = 1 + Math.floor(random() * ENDING_TOKENS);
    yield Uint32Array.from(
      { length: kept + ending },
      (_, at) => at < kept ? (at < 6 ? at : document * 1000 + at) : Math.floor(random() * 100),
    );
  }
}

/** A trie of tokens. */
type Trie = Map<number, Trie>;

/** How many of these tokens a trie has from the first on, before all of them are in it. */
function addTo(trie: Trie, tokens: Uint32Array): number {
  let node = trie, known = 0;
  for (const [at, token] of tokens.entries()) {
    const next = node.get(token);
    if (next !== undefined) known = at + 1;
    node = next ?? node.set(token, new Map()).get(token)!;
  }
  return known;
}

/** Lets each prompt be computed from where it is known; `look` sees where it started and how much of it the trie knew. */
function run(
  options: Partial<PagedCacheOptions>,
  look: (start: number, most: number, stats: () => PrefixStats) => void,
) {
  using cache = new PagedCache({ ...SHAPE, prefix: {}, ...options });
  const rows = new Float32Array(SHAPE.maxSeqLen * SHAPE.headDim);
  const trie: Trie = new Map();
  for (const tokens of prompts()) {
    using sequence = cache.sequence({ tokens });
    const start = sequence.seqLen, count = tokens.length - start;
    look(start, Math.min(addTo(trie, tokens), tokens.length - 1), () => cache.stats().prefix);
    sequence.append(0, rows.subarray(0, count * 2), rows.subarray(0, count * 2));
    sequence.commit(count, { tokens: tokens.subarray(start) });
  }
  return cache.stats();
}

test(`${PROMPT_COUNT} prompts start where a trie of all tokens says`, () => {
  let prompt = 0, hits = 0;
  const { prefix } = run({}, (start, most) => {
    assert.equal(start, most, `prompt ${prompt++}`);
    if (start > 0) hits++;
  });
  assert.equal(prefix.hits, hits);
  assert.ok(hits > PROMPT_COUNT * 0.9);
  assert.equal(prefix.evictedBlocks, 0);
});

test(`${PROMPT_COUNT} prompts in a small cache find what is left, and memory stays flat`, () => {
  const maxBytes = 4096 * BLOCK_BYTES;
  let prompt = 0, found = 0, known = 0, halfway = 0;
  const { prefix, reservedBytes } = run({ maxBytes: 2 * maxBytes, prefix: { maxBytes } }, (start, most, stats) => {
    assert.ok(start <= most, `prompt ${prompt}`);
    found += start;
    known += most;
    if (++prompt === PROMPT_COUNT >> 1) halfway = stats().metadataBytes;
    if (prompt % 1000 === 0) assert.ok(stats().cachedBytes <= maxBytes);
  });
  assert.ok(found > known / 4, `${found} of ${known} tokens`);
  assert.ok(prefix.evictedBlocks > PROMPT_COUNT / 2);
  assert.ok(prefix.metadataBytes <= halfway * 1.1, `${prefix.metadataBytes} bytes, ${halfway} halfway`);
  assert.ok(reservedBytes <= 2 * maxBytes);
});
