/** The model of the examples on kvern's cache, against golden numbers; and its loader, against damaged files. */
import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { ContiguousCache, type FloatDType, PagedCache, type Sequence } from "../mod.ts";
import { searchBeams } from "../examples/beams.ts";
import { type Sample, writeSamples } from "../examples/samples.ts";
import { argmax, logSumExp } from "../examples/sampling.ts";
import { batchStep } from "../examples/step.ts";
import { ModelFileError } from "../examples/weights.ts";
import { loadZiglet, STEP_TOKENS, type Ziglet } from "../examples/ziglet.ts";

const ZIGLET = fileURLToPath(new URL("../examples/ziglet", import.meta.url));
const TIMEOUT = { timeout: 60_000 };

interface Golden {
  bos: number;
  tolerance: number;
  cases: { prompt: string; logitsTop: [number, number][]; logSumExp: number; greedy: string }[];
}
const golden: Golden = JSON.parse(readFileSync(join(ZIGLET, "golden.json"), "utf8"));
const ziglet = loadZiglet(ZIGLET);

function newCache(model: Ziglet, dtype: FloatDType = "f32", maxSeqLen = model.config.maxSeqLen): ContiguousCache {
  const { layerCount, kvHeadCount, headDim } = model.config;
  return new ContiguousCache({ layerCount, kvHeadCount, headDim, maxSeqLen, dtype });
}

function newPagedCache(dtype: FloatDType, blockSize: number): PagedCache {
  const { layerCount, kvHeadCount, headDim, maxSeqLen } = ziglet.config;
  return new PagedCache({ layerCount, kvHeadCount, headDim, maxSeqLen, dtype, blockSize });
}

function tokensOf(prompt: string): Uint8Array {
  return Uint8Array.of(golden.bos, ...new TextEncoder().encode(prompt));
}

/** The largest distance of two rows; NaN if there is one. */
function distance(a: ArrayLike<number>, b: ArrayLike<number>): number {
  assert.equal(a.length, b.length);
  return Math.max(...Array.from(a, (value, i) => Math.abs(value - b[i]!)));
}

for (const { prompt, logitsTop, logSumExp: goldenLogSumExp, greedy } of golden.cases) {
  const name = JSON.stringify(prompt);

  test(`the logits behind ${name} are the golden ones`, TIMEOUT, () => {
    using cache = newCache(ziglet);
    const logits = ziglet.prefill(tokensOf(prompt), cache.sequence(0));
    assert.equal(logits.length, 256);
    const top = [...logits.keys()].sort((a, b) => logits[b]! - logits[a]!).slice(0, logitsTop.length);
    const expected = logitsTop.map(([, logit]) => logit);
    assert.ok(distance(top.map((token) => logits[token]!), expected) <= golden.tolerance);
    assert.ok(distance(logitsTop.map(([token]) => logits[token]!), expected) <= golden.tolerance);
    assert.ok(Math.abs(logSumExp(logits) - goldenLogSumExp) <= golden.tolerance);
  });

  test(`the greedy text behind ${name} is the golden one`, TIMEOUT, () => {
    using cache = newCache(ziglet);
    let logits = ziglet.prefill(tokensOf(prompt), cache.sequence(0));
    let text = ""; // Latin-1: a byte is a character
    while (text.length < greedy.length) {
      const token = argmax(logits);
      text += String.fromCharCode(token);
      logits = ziglet.forward(Uint8Array.of(token), cache.sequence(0));
    }
    assert.equal(text, greedy);
  });
}

test("forward() gives the same logits in steps of 64, 3 and 1", TIMEOUT, () => {
  const tokens = Uint8Array.from({ length: 130 }, (_, i) => i === 0 ? golden.bos : 32 + i * 7 % 90);
  const [first, ...others] = [64, 3, 1].map((step) => {
    using cache = newCache(ziglet);
    const rows: number[] = []; // [token][vocab]
    for (let start = 0; start < tokens.length; start += step) {
      rows.push(...ziglet.forward(tokens.subarray(start, start + step), cache.sequence(0), "all"));
    }
    assert.equal(cache.getSeqLen(0), tokens.length);
    return rows;
  });
  // Logits of up to about 20 after 6 layers; what differs is the order of f32 sums: 2^-24 * 20 * (6 layers * 7 sums)
  // is 5e-5. A missing or a misplaced position moves them by more than 0.1.
  for (const other of others) assert.ok(distance(first!, other) <= 1e-3);
});

test("forward() gives other logits once a position of the cache is taken back", TIMEOUT, () => {
  using cache = newCache(ziglet);
  const sequence = cache.sequence(0);
  const tokens = tokensOf(golden.cases[0]!.prompt);
  const whole = ziglet.prefill(tokens, sequence).slice();
  sequence.truncate(tokens.length - 2);
  const cut = ziglet.forward(tokens.subarray(tokens.length - 1), sequence).slice();
  assert.ok(distance(whole, cut) > 0.1);
  sequence.truncate(tokens.length - 2);
  const restored = ziglet.prefill(tokens.subarray(tokens.length - 2), sequence);
  assert.ok(distance(whole, restored) <= 1e-3);
});

for (const dtype of ["f16", "bf16"] as const) {
  test(`a cache of ${dtype} gives nearly the golden logits`, TIMEOUT, () => {
    for (const { prompt, logitsTop } of golden.cases) {
      using cache = newCache(ziglet, dtype);
      const logits = ziglet.prefill(tokensOf(prompt), cache.sequence(0));
      const error = distance(logitsTop.map(([token]) => logits[token]!), logitsTop.map(([, logit]) => logit));
      // Keys and values are off by 2^-11 (f16) or 2^-8 (bf16) of themselves at most. Logits of up to 10 behind six
      // layers of mixing were off by 1.1e-3 and 1.2e-2 (measured, level avx512); an f32 cache is off by 1e-6.
      assert.ok(error <= (dtype === "f16" ? 4 * 2 ** -11 : 4 * 2 ** -8), `${prompt}: ${error}`);
      assert.ok(error >= 1e-5, `${prompt}: ${error}`);
    }
  });
}

for (const dtype of ["f32", "f16", "bf16"] as const) {
  test(`a paged cache of ${dtype} gives the bits of the contiguous one, at every block size`, TIMEOUT, () => {
    for (const blockSize of [1, 16, 64, 256]) {
      for (const { prompt } of golden.cases) {
        using contiguous = newCache(ziglet, dtype);
        using paged = newPagedCache(dtype, blockSize);
        const sequence = paged.sequence();
        const expected = ziglet.prefill(tokensOf(prompt), contiguous.sequence(0)).slice();
        assert.deepEqual(ziglet.prefill(tokensOf(prompt), sequence), expected, prompt);
        // And behind a step of one token.
        const next = Uint8Array.of(argmax(expected));
        const one = ziglet.forward(next, contiguous.sequence(0)).slice();
        assert.deepEqual(ziglet.forward(next, sequence), one, prompt);
      }
    }
  });
}

test("run() gives each sequence of a batch the bits it gets alone, at positions of its own", TIMEOUT, () => {
  using paged = newPagedCache("f32", 16);
  const sequences = golden.cases.map(({ prompt }) => {
    const sequence = paged.sequence();
    ziglet.prefill(tokensOf(prompt), sequence);
    return sequence;
  });
  assert.ok(new Set(sequences.map(({ seqLen }) => seqLen)).size > 1);
  for (let step = 0; step < 20; step++) {
    const tokens = Uint8Array.from(golden.cases, ({ greedy }) => greedy.charCodeAt(step));
    const rows = ziglet.run(tokens, batchStep(paged, sequences), "all").slice(); // [sequence][vocab]
    golden.cases.forEach(({ prompt, greedy }, i) => {
      if (step % 7 !== 0) return;
      using alone = newCache(ziglet);
      ziglet.prefill(tokensOf(prompt), alone.sequence(0));
      let logits = new Float32Array();
      for (let past = 0; past <= step; past++) {
        logits = ziglet.forward(Uint8Array.of(greedy.charCodeAt(past)), alone.sequence(0)).slice();
      }
      assert.deepEqual(rows.subarray(i * 256, (i + 1) * 256), logits, `${prompt}, step ${step}`);
    });
  }
});

test("forward() refuses no tokens, more than a step, and more than the context", TIMEOUT, () => {
  using cache = newCache(ziglet, "f32", 2000);
  const sequence = cache.sequence(0);
  assert.throws(() => ziglet.forward(new Uint8Array(0), sequence), RangeError);
  assert.throws(() => ziglet.forward(new Uint8Array(STEP_TOKENS + 1), sequence), RangeError);
  assert.equal(sequence.seqLen, 0);
  ziglet.prefill(new Uint8Array(1023), sequence);
  assert.throws(() => ziglet.forward(new Uint8Array(2), sequence), /1024 positions: the last token has position 1024/);
  ziglet.forward(new Uint8Array(1), sequence);
  assert.throws(() => ziglet.forward(new Uint8Array(1), sequence), RangeError);
  assert.equal(sequence.seqLen, 1024);
});

test("forward() refuses a cache of another shape", TIMEOUT, () => {
  using cache = new ContiguousCache({ layerCount: 6, kvHeadCount: 8, headDim: 64, maxSeqLen: 8 });
  assert.throws(() => ziglet.forward(new Uint8Array(1), cache.sequence(0)), /8 KV heads/);
});

// ----------------------------------------------------------------------------------------------- damaged files

/** A model of 1 layer with 2 query heads and 1 KV head of 4: small enough to damage in every place. */
const TINY_CONFIG = {
  vocab_size: 256,
  hidden_size: 8,
  num_hidden_layers: 1,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  head_dim: 4,
  intermediate_size: 12,
  max_position_embeddings: 16,
  rope_theta: 10000,
  rms_norm_eps: 1e-5,
  tie_word_embeddings: true,
  bos_token_id: 0,
};

const TINY_SHAPES: Record<string, number[]> = {
  "model.embed_tokens.weight": [256, 8],
  "model.layers.0.input_layernorm.weight": [8],
  "model.layers.0.q_proj.weight": [8, 8],
  "model.layers.0.k_proj.weight": [4, 8],
  "model.layers.0.v_proj.weight": [4, 8],
  "model.layers.0.o_proj.weight": [8, 8],
  "model.layers.0.post_attention_layernorm.weight": [8],
  "model.layers.0.gate_proj.weight": [12, 8],
  "model.layers.0.up_proj.weight": [12, 8],
  "model.layers.0.down_proj.weight": [8, 12],
  "model.norm.weight": [8],
};

/** A safetensors file whose elements are all `bits`. */
function safetensors(shapes: Record<string, number[]>, { dtype = "BF16", bits = 0x3f00 } = {}): Uint8Array {
  const header: Record<string, unknown> = {};
  let end = 0;
  for (const [name, shape] of Object.entries(shapes)) {
    const begin = end;
    end += 2 * shape.reduce((product, length) => product * length, 1);
    header[name] = { dtype, shape, data_offsets: [begin, end] };
  }
  const json = JSON.stringify(header);
  return safetensorsOf(json.padEnd(Math.ceil(json.length / 8) * 8), new Uint16Array(end / 2).fill(bits));
}

function safetensorsOf(header: string, data: Uint16Array): Uint8Array {
  const file = new Uint8Array(8 + header.length + data.byteLength);
  const littleEndian = true;
  new DataView(file.buffer).setBigUint64(0, BigInt(header.length), littleEndian);
  file.set(new TextEncoder().encode(header), 8);
  file.set(new Uint8Array(data.buffer), 8 + header.length);
  return file;
}

/** Calls `run` with a function that loads a model from these two files. */
function withFiles(run: (load: (weights: Uint8Array, config?: string) => Ziglet) => void): void {
  const directory = mkdtempSync(join(tmpdir(), "kvern-"));
  try {
    run((weights, config = JSON.stringify(TINY_CONFIG)) => {
      writeFileSync(join(directory, "config.json"), config);
      writeFileSync(join(directory, "model.safetensors"), weights);
      return loadZiglet(directory);
    });
  } finally {
    rmSync(directory, { recursive: true });
  }
}

/** The file is refused with a line that names it and says `problem`. */
function refused(load: () => unknown, file: string, problem: RegExp): void {
  assert.throws(load, (error) => {
    assert.ok(error instanceof ModelFileError, String(error));
    assert.match(error.message, problem);
    assert.ok(error.message.includes(file), error.message);
    assert.doesNotMatch(error.message, /\n/);
    return true;
  });
}

const WEIGHTS = "model.safetensors";

test("loadZiglet() takes a model of another shape, and it runs", TIMEOUT, () => {
  withFiles((load) => {
    const tiny = load(safetensors(TINY_SHAPES));
    using cache = newCache(tiny);
    const logits = tiny.prefill(Uint8Array.of(0, 1, 2, 3, 4), cache.sequence(0));
    // All weights are 0.5, so all logits are equal.
    assert.ok(logits.every((logit) => Number.isFinite(logit) && logit === logits[0]));
    assert.ok(logits[0]! > 0);
  });
});

test("samples and beams end where the model ends the text", TIMEOUT, async () => {
  let tiny: Ziglet | undefined;
  withFiles((load) => tiny = load(safetensors(TINY_SHAPES)));
  // All bytes are equally likely, so the first of them is taken: the one that ends a text.
  const run = async <Result>(search: (...given: [PagedCache, Sequence[], Float32Array]) => Promise<Result>) => {
    using cache = new PagedCache({ layerCount: 1, kvHeadCount: 1, headDim: 4, maxSeqLen: 16, blockSize: 4 });
    const first = cache.sequence();
    const logits = tiny!.prefill(Uint8Array.of(0, 1, 2), first);
    return await search(cache, [first, first.fork()], logits);
  };
  const told: number[] = [];
  const progress = (samples: readonly Sample[]) => {
    told.push(...samples.filter(({ finished }) => finished).map(({ number }) => number));
    return Promise.resolve();
  };
  const given = { tokens: 9, temperature: 0, seed: 1 };
  const samples = await run((...start) => writeSamples(tiny!, ...start, given, progress));
  assert.deepEqual(samples, [1, 2].map((number) => ({ number, bytes: [], ended: true, finished: true })));
  assert.deepEqual(told, [1, 2]);

  const beams = await run((...start) => searchBeams(tiny!, ...start, 9, () => Promise.resolve()));
  assert.deepEqual(beams.map(({ bytes, ended }) => [bytes, ended]), [[[], true], [[1], true]]);
  beams.forEach(({ score }, i) => assert.ok(Math.abs(score + (i + 1) * Math.log(256)) <= 1e-6, `${score}`));
});

test("loadZiglet() refuses a directory without a model", TIMEOUT, () => {
  refused(() => loadZiglet(join(ZIGLET, "nowhere")), "config.json", /no such file/);
});

test("loadZiglet() refuses a truncated file, wherever it ends", TIMEOUT, () => {
  withFiles((load) => {
    const file = safetensors(TINY_SHAPES);
    for (let length = 0; length < file.length; length += length < 32 ? 1 : 13) {
      refused(() => load(file.subarray(0, length)), WEIGHTS, /bytes|JSON|truncated/);
    }
    refused(() => load(file.subarray(0, file.length - 1)), WEIGHTS, /truncated/);
  });
});

test("loadZiglet() refuses bytes behind the last tensor", TIMEOUT, () => {
  withFiles((load) => {
    refused(() => load(Uint8Array.of(...safetensors(TINY_SHAPES), 0)), WEIGHTS, /1 bytes that belong to no tensor/);
  });
});

test("loadZiglet() refuses every flipped bit of the header", TIMEOUT, () => {
  withFiles((load) => {
    const file = safetensors(TINY_SHAPES);
    const headerEnd = file.length - 2 * Object.values(TINY_SHAPES).reduce((sum, [a = 1, b = 1]) => sum + a * b, 0);
    assert.ok(headerEnd > 1000 && headerEnd < 1200);
    for (let bit = 0; bit < 8 * headerEnd; bit++) {
      const flipped = file.slice();
      flipped[bit >> 3]! ^= 1 << (bit & 7);
      refused(() => load(flipped), WEIGHTS, /./);
    }
  });
});

test("loadZiglet() refuses headers that are JSON and no header", TIMEOUT, () => {
  withFiles((load) => {
    const data = new Uint16Array(4);
    const entry = (fields: object) =>
      JSON.stringify({ x: { dtype: "BF16", shape: [4], data_offsets: [0, 8], ...fields } });
    refused(() => load(safetensorsOf("[]", data)), WEIGHTS, /not a JSON object/);
    refused(() => load(safetensorsOf("null", data)), WEIGHTS, /not a JSON object/);
    refused(() => load(safetensorsOf('{"x":3}', data)), WEIGHTS, /not an object/);
    refused(() => load(safetensorsOf(entry({ shape: [-4] }), data)), WEIGHTS, /no valid shape/);
    refused(() => load(safetensorsOf(entry({ shape: "4" }), data)), WEIGHTS, /no valid shape/);
    refused(() => load(safetensorsOf(entry({ shape: [1.5] }), data)), WEIGHTS, /no valid shape/);
    refused(() => load(safetensorsOf(entry({ shape: [2 ** 52, 2 ** 52] }), data)), WEIGHTS, /needs/);
    refused(() => load(safetensorsOf(entry({ data_offsets: [8, 0] }), data)), WEIGHTS, /give -8/);
    refused(() => load(safetensorsOf(entry({ data_offsets: [0, 8, 8] }), data)), WEIGHTS, /no valid data_offsets/);
    refused(() => load(safetensorsOf(entry({ data_offsets: [0, 1e15] }), data)), WEIGHTS, /truncated/);
  });
});

test("loadZiglet() refuses a missing tensor, one too many, a wrong shape and a wrong dtype", TIMEOUT, () => {
  withFiles((load) => {
    const { "model.norm.weight": _, ...missing } = TINY_SHAPES;
    refused(() => load(safetensors(missing)), WEIGHTS, /no tensor "model.norm.weight"/);
    refused(() => load(safetensors({ ...TINY_SHAPES, "lm_head.weight": [256, 8] })), WEIGHTS, /"lm_head.weight"/);
    const turned = { ...TINY_SHAPES, "model.layers.0.up_proj.weight": [8, 12] };
    refused(() => load(safetensors(turned)), WEIGHTS, /"model.layers.0.up_proj.weight" has shape \[8,12\].*\[12,8\]/);
    refused(() => load(safetensors(TINY_SHAPES, { dtype: "F16" })), WEIGHTS, /"F16"/);
  });
});

test("loadZiglet() refuses weights that are NaN or infinite", TIMEOUT, () => {
  withFiles((load) => {
    for (const bits of [0x7f80, 0xff80, 0x7fc0, 0xffff]) {
      refused(() => load(safetensors(TINY_SHAPES, { bits })), WEIGHTS, /NaN or an infinity/);
    }
  });
});

test("loadZiglet() refuses a config that contradicts itself or the code", TIMEOUT, () => {
  withFiles((load) => {
    const weights = safetensors(TINY_SHAPES);
    const wrong: [object, RegExp][] = [
      [{ num_attention_heads: 3, num_key_value_heads: 2 }, /multiple of num_key_value_heads/],
      [{ num_key_value_heads: 0 }, /num_key_value_heads must be an integer/],
      [{ num_hidden_layers: "6" }, /num_hidden_layers must be an integer/],
      [{ num_hidden_layers: 1.5 }, /num_hidden_layers/],
      [{ max_position_embeddings: 1e9 }, /max_position_embeddings/],
      [{ head_dim: 6 }, /head_dim must be a multiple of 4/],
      [{ head_dim: 512 }, /head_dim/],
      [{ hidden_size: undefined }, /hidden_size/],
      [{ intermediate_size: 13 }, /intermediate_size/],
      [{ vocab_size: 32000 }, /a token is a byte/],
      [{ bos_token_id: 256 }, /bos_token_id/],
      [{ rope_theta: -1 }, /rope_theta/],
      [{ rms_norm_eps: null }, /rms_norm_eps/],
      [{ tie_word_embeddings: false }, /tie_word_embeddings/],
    ];
    for (const [fields, problem] of wrong) {
      refused(() => load(weights, JSON.stringify({ ...TINY_CONFIG, ...fields })), "config.json", problem);
    }
    refused(() => load(weights, "{"), "config.json", /not JSON/);
    refused(() => load(weights, "[]"), "config.json", /not a JSON object/);
    // Two layers by the config, one in the file.
    refused(() => load(weights, JSON.stringify({ ...TINY_CONFIG, num_hidden_layers: 2 })), WEIGHTS, /model.layers.1/);
  });
});
