/**
 * Keys and values in the tensors of a graph whose cache is one tensor a layer: `[1, kv_head, row, head_dim]`.
 *
 * @module
 */

import { KvError } from "../error.ts";
import type { FloatDType } from "../options/dtype.ts";
import type { LayerShape } from "../options/paged.ts";
import type { Rows } from "../options/rows.ts";
import { kindOf } from "../options/typed_array.ts";

/** A tensor of keys or values: one of onnxruntime or transformers.js, or a plain object. */
export interface KvTensor {
  /** Its element type: `"float32"` or `"float16"`. */
  readonly type: string;
  /** Its axes: `[1, kv_head, row, head_dim]`. */
  readonly dims: readonly number[];
  /** Its elements; f16 as a `Float16Array` or as the bits in a `Uint16Array`. */
  readonly data: unknown;
  /** Where they are, as onnxruntime says it: `"cpu"` where they can be read. */
  readonly location?: string;
}

/**
 * Tensors of keys and values by the names a graph has for them: `past_key_values.N.key` and `.value`, as they go in, or
 * `present.N.key` and `.value`, as they come out. What is no state of the model, `logits` say, may stand beside them.
 */
export type PastKeyValues = Readonly<Record<string, KvTensor>>;

/** What graphs call the keys and values that go in, and those that come out. */
const PREFIXES = ["past_key_values", "present"];

/** The name of a tensor that goes in. */
export function pastName(layer: number, side: "key" | "value"): string {
  return `past_key_values.${layer}.${side}`;
}

/** The rows of one layer, as its two tensors have them. */
export interface LayerTensors {
  readonly dtype: FloatDType;
  readonly kvHeadCount: number;
  readonly rowCount: number;
  readonly headDim: number;
  /** `[kv_head][row][head_dim]` */
  readonly k: Rows;
  readonly v: Rows;
}

/**
 * The tensors of all layers: those of layer 0, 1, and so on, as many as there are.
 *
 * State that is no row of a layer, such as that of a convolution or of another model's attention, cannot be kept with
 * the rows, and a run without it would go on from a wrong place: it is refused.
 */
export function readLayers(past: PastKeyValues, action: string): LayerTensors[] {
  if (typeof past !== "object" || past === null) {
    throw new TypeError(`pastKeyValues must be an object: ${kindOf(past)}`);
  }
  const layers: LayerTensors[] = [];
  const known = new Set<string>();
  while (true) {
    const names = (["key", "value"] as const).map((side) => nameOf(past, layers.length, side));
    const [key, value] = names;
    if (key === undefined && value === undefined) break;
    if (key === undefined || value === undefined) {
      throw refuse(action, `layer ${layers.length} must have a key and a value: it has ${key ?? value} alone`);
    }
    known.add(key).add(value);
    layers.push(readLayer(past, key, value, action));
  }
  for (const name in past) {
    if (!/^(past|present)/.test(name) || known.has(name)) continue;
    throw new KvError(
      "unsupported",
      `Cannot ${action} as all state must be keys and values of layers 0, 1 and so on: there is ${name}`,
    );
  }
  if (layers.length === 0) {
    throw refuse(action, `there must be ${PREFIXES.map((prefix) => `${prefix}.0.key`).join(" or ")}: there is neither`);
  }
  const { rowCount } = layers[0]!;
  const other = layers.findIndex((layer) => layer.rowCount !== rowCount);
  if (other < 0) return layers;
  throw refuse(
    action,
    `all layers must have equally many rows: layer 0 has ${rowCount}, layer ${other} has ${layers[other]!.rowCount}`,
  );
}

function nameOf(past: PastKeyValues, layer: number, side: "key" | "value"): string | undefined {
  return PREFIXES.map((prefix) => `${prefix}.${layer}.${side}`).find((name) => past[name] !== undefined);
}

function readLayer(past: PastKeyValues, key: string, value: string, action: string): LayerTensors {
  const k = readTensor(past, key, action), v = readTensor(past, value, action);
  if (k.dims.some((dim, axis) => dim !== v.dims[axis]) || k.dtype !== v.dtype) {
    const [kText, vText] = [k, v].map(({ dtype, dims }) => `${dtype} [${dims.join(", ")}]`);
    throw refuse(action, `${key} and ${value} must be alike: one is ${kText}, the other ${vText}`);
  }
  const [, kvHeadCount, rowCount, headDim] = k.dims as [number, number, number, number];
  return { dtype: k.dtype, kvHeadCount, rowCount, headDim, k: k.rows, v: v.rows };
}

/** The arrays that elements of a type come in. */
const KINDS: ReadonlyMap<string, readonly string[]> = new Map([
  ["float32", ["Float32Array"]],
  ["float16", ["Uint16Array", "Float16Array"]],
]);

function readTensor(
  past: PastKeyValues,
  name: string,
  action: string,
): { readonly dtype: FloatDType; readonly dims: readonly number[]; readonly rows: Rows } {
  const tensor = past[name]!;
  const { type, dims, location = "cpu" } = tensor;
  if (location !== "cpu" && location !== "cpu-pinned") {
    throw new KvError(
      "unsupported",
      `Cannot ${action} as ${name} must be in the memory of the CPU: it is on ${location}`,
    );
  }
  if (!Array.isArray(dims) || dims.length !== 4 || dims[0] !== 1 || !dims.every((dim) => dim >>> 0 === dim)) {
    const shape = Array.isArray(dims) ? `[${dims.join(", ")}]` : kindOf(dims);
    throw refuse(action, `${name} must be [1, kv_head, row, head_dim], of one sequence: it is ${shape}`);
  }
  const { data } = tensor;
  const kind = kindOf(data);
  const kinds = KINDS.get(type);
  if (kinds === undefined) {
    throw new KvError("unsupported", `Cannot ${action} as ${name} must be float32 or float16: it is ${type}`);
  }
  if (!kinds.includes(kind)) {
    throw new TypeError(`the data of ${name} must be a ${kinds.join(" or a ")}, as it is ${type}: ${kind}`);
  }
  const rows = data as Rows;
  const length = dims.reduce((product, dim) => product * dim);
  if (rows.length !== length) {
    throw new KvError(
      "invalid_size",
      `Cannot ${action} as ${name} must have ${length} elements, as its dims say: it has ${rows.length}`,
    );
  }
  return { dtype: type === "float32" ? "f32" : "f16", dims: [...dims], rows };
}

/** Refuses tensors of other layers than those of a cache. */
export function checkLayers(tensors: readonly LayerTensors[], shapes: readonly LayerShape[], action: string): void {
  if (tensors.length !== shapes.length) {
    throw refuse(action, `the cache has ${shapes.length} layers: there are tensors of ${tensors.length}`);
  }
  shapes.forEach(({ kvHeadCount, headDim }, layer) => {
    const tensor = tensors[layer]!;
    if (tensor.kvHeadCount === kvHeadCount && tensor.headDim === headDim) return;
    throw refuse(
      action,
      `layer ${layer} of the cache has ${kvHeadCount} KV heads of ${headDim}: its tensors have ` +
        `${tensor.kvHeadCount} of ${tensor.headDim}`,
    );
  });
}

function refuse(action: string, rule: string): KvError {
  return new KvError("invalid_config", `Cannot ${action} as ${rule}`);
}
