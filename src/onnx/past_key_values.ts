/**
 * Keys and values of engines whose cache is one tensor a layer, kept in a paged cache from one run to the next.
 *
 * A graph that cannot be cut at its attention, and the `generate` of transformers.js, take `past_key_values` and give
 * `present` tensors: copied at each step, shared by no two conversations, never in few bits. `keep` writes what a run
 * computed behind the longest prefix that the cache has of it, `pastKeyValues` gives a later run what it starts from.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { countText } from "../ffi/status.ts";
import type { SequenceCommitOptions } from "../options/commit.ts";
import { floatDtypeCode } from "../options/dtype.ts";
import { givenOptions, type OptionNames, optionNames } from "../options/option_names.ts";
import type { LayerShape } from "../options/paged.ts";
import type { TenantOptions } from "../options/prompt.ts";
import type { PagedCache } from "../paged_cache.ts";
import type { Sequence } from "../sequence.ts";
import type { Rows } from "../options/rows.ts";
import { checkLayers, type KvTensor, type PastKeyValues, pastName, readLayers } from "./kv_tensor.ts";
import { checkTokens } from "./tokens.ts";

/** A class that makes tensors, as the `Tensor` of onnxruntime and that of transformers.js. */
export interface KvTensorClass<Tensor> {
  /** Makes a tensor of f32. */
  new (type: "float32", data: Float32Array, dims: number[]): Tensor;
  /** Makes a tensor of f16, of which `data` are the bits. */
  new (type: "float16", data: Uint16Array, dims: number[]): Tensor;
}

/** How the tensors of {@linkcode pastKeyValues} are made. */
export interface PastKeyValuesOptions<Tensor> {
  /** Makes the tensors; without one they are plain objects. */
  readonly Tensor?: KvTensorClass<Tensor>;
  /** The dtype of the tensors, that of the inputs of the graph: `"f32"`, the default, or `"f16"`. */
  readonly dtype?: "f32" | "f16";
}

const PAST_NAMES: OptionNames = optionNames<PastKeyValuesOptions<unknown>>({ Tensor: true, dtype: true });

/**
 * The committed rows of a sequence as the tensors that a graph takes: `past_key_values.N.key` and `.value`, each
 * `[1, kv_head, seqLen, head_dim]`.
 *
 * They are copies: what a run makes of them leaves the sequence as it is. Rows that left the tail come as the values of
 * their codes. With transformers.js, `new DynamicCache(pastKeyValues(sequence, { Tensor }))` is what `generate` takes.
 *
 * @example Into a graph, and out of it again
 * ```ts
 * import assert from "node:assert/strict";
 * import { PagedCache } from "@kvern/kvern";
 * import { keep, pastKeyValues } from "@kvern/kvern/onnx";
 *
 * using cache = new PagedCache({ layerCount: 1, kvHeadCount: 2, headDim: 4, maxSeqLen: 64, prefix: {} });
 * const tensor = () => ({ type: "float32", dims: [1, 2, 3, 4], data: new Float32Array(24).fill(0.5) });
 * const outputs = { "present.0.key": tensor(), "present.0.value": tensor() }; // of a run over three tokens
 * keep(cache, [7, 8, 9], outputs).free();
 *
 * const sequence = cache.sequence({ tokens: Uint32Array.of(7, 8, 9, 10) });
 * const feeds = pastKeyValues(sequence);
 * assert.deepEqual(feeds["past_key_values.0.key"]!.dims, [1, 2, 3, 4]); // token 10 is left to compute
 * ```
 *
 * @throws {TypeError} an option of the wrong type
 * @throws {KvError} `position_out_of_range` where a window or retention let rows go; `unsupported` for a tensor of 2^32
 * elements and more; `stale_handle`
 */
export function pastKeyValues<Tensor = KvTensor>(
  sequence: Sequence,
  options?: PastKeyValuesOptions<Tensor>,
): Record<string, Tensor> {
  const { Tensor: tensorClass, dtype = "f32" } = givenOptions(options, PAST_NAMES, "make past_key_values");
  if (tensorClass !== undefined && typeof tensorClass !== "function") {
    throw new TypeError(`Tensor must be a class: ${typeof tensorClass}`);
  }
  floatDtypeCode("dtype", dtype);
  const type = typeOf(dtype);
  const makeTensor = (rows: Rows, dims: number[]): Tensor => {
    if (tensorClass === undefined) return { type, dims, data: rows } satisfies KvTensor as Tensor;
    return new (tensorClass as new (type: string, data: Rows, dims: number[]) => Tensor)(type, rows, dims);
  };
  const count = sequence.seqLen;
  const tensors: Record<string, Tensor> = {};
  for (let layer = 0; layer < sequence.layerCount; layer++) {
    const { kvHeadCount, headDim } = sequence.layerShape(layer);
    const { k, v } = sequence.gather(layer, { layout: "head_major", start: 0, count, dtype });
    for (const [side, rows] of [["key", k], ["value", v]] as const) {
      tensors[pastName(layer, side)] = makeTensor(rows, [1, kvHeadCount, count, headDim]);
    }
  }
  return tensors;
}

/** What ONNX calls a dtype. */
function typeOf(dtype: "f32" | "f16"): "float32" | "float16" {
  if (dtype === "f32" || dtype === "f16") return dtype === "f32" ? "float32" : "float16";
  throw new KvError("invalid_config", `Cannot make past_key_values as their dtype must be f32 or f16: it is ${dtype}`);
}

/** Whose rows {@linkcode keep} keeps, and for how long. */
export interface KeepOptions extends TenantOptions, Pick<SequenceCommitOptions, "priority" | "ttlMs"> {}

const KEEP_NAMES: OptionNames = optionNames<KeepOptions>({
  salt: true,
  fingerprint: true,
  priority: true,
  ttlMs: true,
});

/**
 * Keeps what a run computed: a sequence of `cache` with a row for each row of the tensors.
 *
 * `tokens` are those of the rows, from the first on, and may be more than those: the last token of a text has no row yet.
 * The sequence starts with the longest prefix of them that the cache has in the same `salt` and `fingerprint`, and only
 * rows behind that are read and appended. `fingerprint` should name the weights and their quantization: rows of one
 * model are nonsense to another.
 *
 * Free the sequence once nobody goes on from it. In a cache with `prefix: {}` its rows stay to be found until their memory
 * is wanted, else as long as the sequence is.
 *
 * @throws {TypeError} tokens that are no numbers, or tensors that are none
 * @throws {KvError} `invalid_config`, `invalid_size` for tensors of another shape than that of the cache's layers, and for
 * fewer tokens than rows; `unsupported` for state that is no keys and values, and for tensors on a GPU; `cache_full`,
 * `pool_empty`, `out_of_memory`, `not_finite`, `stale_handle`
 */
export function keep(
  cache: PagedCache,
  tokens: ArrayLike<number>,
  pastKeyValues: PastKeyValues,
  options?: KeepOptions,
): Sequence {
  const action = "keep past_key_values";
  const { salt, fingerprint, priority, ttlMs } = givenOptions(options, KEEP_NAMES, action);
  const layers = readLayers(pastKeyValues, action);
  const ids = checkTokens("tokens", tokens);
  checkLayers(layers, Array.from({ length: cache.layerCount }, (_, layer) => cache.layerShape(layer)), action);
  const { rowCount } = layers[0]!;
  if (rowCount > ids.length) {
    const rows = countText(rowCount, "row");
    throw new KvError("invalid_size", `Cannot ${action} as each of ${rows} needs a token: tokens has ${ids.length}`);
  }
  // A cache leaves the last token of a prompt to compute: the last row is found where the token behind it is given, too.
  const prompt = ids.slice(0, rowCount < cache.maxSeqLen ? rowCount + 1 : rowCount);
  const sequence = cache.sequence({
    tokens: prompt,
    ...(salt === undefined ? {} : { salt }),
    ...(fingerprint === undefined ? {} : { fingerprint }),
  });
  try {
    const known = sequence.seqLen;
    if (known === rowCount) return sequence;
    const headRows = (rows: Rows, headDim: number) => rows.subarray(known * headDim);
    layers.forEach(({ k, v, dtype, headDim }, layer) => {
      const headStride = rowCount * headDim;
      sequence.append(layer, headRows(k, headDim), headRows(v, headDim), { layout: "head_major", headStride, dtype });
    });
    sequence.commit(rowCount - known, {
      tokens: ids.slice(known, rowCount),
      ...(priority === undefined ? {} : { priority }),
      ...(ttlMs === undefined ? {} : { ttlMs }),
    });
    return sequence;
  } catch (error) {
    sequence.free();
    throw error;
  }
}

/**
 * The layers of a cache for such tensors, to make one that fits a model.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { PagedCache } from "@kvern/kvern";
 * import { layersOf } from "@kvern/kvern/onnx";
 *
 * const tensor = { type: "float32", dims: [1, 3, 0, 64], data: new Float32Array(0) };
 * const pastKeyValues = { "past_key_values.0.key": tensor, "past_key_values.0.value": tensor };
 * using cache = new PagedCache({ layers: layersOf(pastKeyValues), maxSeqLen: 2048, store: "i4", prefix: {} });
 * assert.deepEqual(cache.layerShape(0), { kvHeadCount: 3, headDim: 64 });
 * ```
 *
 * @throws {TypeError} tensors that are none
 * @throws {KvError} as {@linkcode keep}
 */
export function layersOf(pastKeyValues: PastKeyValues): LayerShape[] {
  const layers = readLayers(pastKeyValues, "read the layers of past_key_values");
  return layers.map(({ kvHeadCount, headDim }) => ({ kvHeadCount, headDim }));
}
