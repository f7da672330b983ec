/**
 * What graphs make of `attention_mask` and `position_ids` for nodes that take a mask: every exporter has nodes of its own
 * for the same numbers.
 */
import type { Builder } from "./builder.ts";

/** Makes a value once for each graph. */
function once<T>(make: (builder: Builder) => T): (builder: Builder) => T {
  const made = new WeakMap<Builder, T>();
  return (builder) => {
    if (!made.has(builder)) made.set(builder, make(builder));
    return made.get(builder)!;
  };
}

/** Length of one axis of a value, as a number of no axis. */
export function lengthOf(builder: Builder, name: string, value: string, axis: number): string {
  const dims = builder.node("Shape", `${name}/Shape`, [value]);
  return builder.node("Gather", `${name}/Gather`, [dims, builder.integers(axis)], { axis: 0 });
}

/** Index of the last token of each sequence, and the length of the mask: what GroupQueryAttention takes in its place. */
export const maskLengths: (builder: Builder) => { lengths: string; total: string } = once((builder) => {
  const name = "/model/attn_mask_reformat/attn_mask_subgraph";
  const ones = builder.node("ReduceSum", `${name}/ReduceSum`, ["attention_mask", builder.integers([1])], {
    keepdims: 0,
  });
  const last = builder.node("Sub", `${name}/Sub`, [ones, builder.integers([1])]);
  const lengths = builder.cast(`${name}/Sub/Cast`, last, "int32");
  return { lengths, total: builder.cast(`${name}/Gather/Cast`, lengthOf(builder, name, "attention_mask", 1), "int32") };
});

/** The lowest number of the graph's floats, which stands for a position that is not seen. */
function lowest(builder: Builder): string {
  return builder.scalar(builder.float === "float16" ? -65504 : -3.4028234663852886e38);
}

/** Where a token sees a position, `[1, 1, tokens, total]`: by `position_ids`. */
export const biasOfPositions: (builder: Builder) => string = once((builder) => {
  const name = "/model/attn_mask_reformat/causal";
  const total = lengthOf(builder, name, "attention_mask", 1);
  const range = builder.node("Range", `${name}/Range`, [builder.integers(0), total, builder.integers(1)]);
  const columns = builder.node("Unsqueeze", `${name}/Unsqueeze`, [range, builder.integers([0, 1, 2])]);
  const rows = builder.node("Unsqueeze", `${name}/Unsqueeze_1`, [positionsOf(builder), builder.integers([1, 3])]);
  const later = builder.node("Greater", `${name}/Greater`, [columns, rows]);
  return builder.node("Where", `${name}/Where`, [later, lowest(builder), builder.scalar(0)]);
});

/** Length of the past, and of past and input together. */
const lengthsOf: (builder: Builder) => { past: string; total: string } = once((builder) => {
  const tokens = lengthOf(builder, "/model/input_ids", "input_ids", 1);
  const past = lengthOf(builder, "/model/past", "past_key_values.0.key", 2);
  return { past, total: builder.node("Add", "/model/Add", [past, tokens]) };
});

/** Positions of the input's tokens, `[tokens]`. */
const cachePositions: (builder: Builder) => string = once((builder) => {
  const { past, total } = lengthsOf(builder);
  return builder.node("Range", "/model/Range", [past, total, builder.integers(1)]);
});

/** The same as `position_ids`, `[1, tokens]`: what a decoder that has no such input makes of its lengths. */
const positionsOfLengths: (builder: Builder) => string = once((builder) =>
  builder.node("Unsqueeze", "/model/positions/Unsqueeze", [cachePositions(builder), builder.integers([0])])
);

/** `position_ids` as int64, which is what nodes take. */
export const positionsOf: (builder: Builder) => string = once((builder) => {
  if (builder.form.positionsMade) return positionsOfLengths(builder);
  return builder.ids === "int64" ? "position_ids" : builder.cast("/model/position_ids/Cast", "position_ids", "int64");
});

/**
 * The causal mask by the length of the past and of the input, and zeros of `attention_mask` as positions that are not seen,
 * as PyTorch's exporter writes it.
 */
export const biasOfLengths: (builder: Builder) => string = once((builder) => {
  const name = "/model";
  const { total } = lengthsOf(builder);
  const kvPosition = builder.node("Range", `${name}/Range_1`, [builder.integers(0), total, builder.integers(1)]);
  const rows = builder.node("Unsqueeze", `${name}/Unsqueeze`, [cachePositions(builder), builder.integers([0, 1, 3])]);
  const columns = builder.node("Unsqueeze", `${name}/Unsqueeze_1`, [kvPosition, builder.integers([0, 1, 2])]);
  const causal = builder.node("LessOrEqual", `${name}/LessOrEqual`, [columns, rows]);
  const real = builder.cast(`${name}/Cast`, "attention_mask", "bool");
  const realRow = builder.node("Unsqueeze", `${name}/Unsqueeze_2`, [real, builder.integers([1, 2])]);
  const seen = builder.node("And", `${name}/And`, [causal, realRow]);
  return builder.node("Where", `${name}/Where`, [seen, builder.scalar(0), lowest(builder)]);
});
