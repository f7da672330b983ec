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
  const rows = builder.node("Unsqueeze", `${name}/Unsqueeze_1`, [builder.positions(), builder.integers([1, 3])]);
  const later = builder.node("Greater", `${name}/Greater`, [columns, rows]);
  return builder.node("Where", `${name}/Where`, [later, lowest(builder), builder.scalar(0)]);
});

/**
 * The same by the length of the past and of the input, and zeros of `attention_mask` as positions that are not seen, as
 * PyTorch's exporter writes it.
 */
export const biasOfLengths: (builder: Builder) => string = once((builder) => {
  const name = "/model";
  const tokens = lengthOf(builder, `${name}/input_ids`, "input_ids", 1);
  const past = lengthOf(builder, `${name}/past`, "past_key_values.0.key", 2);
  const total = builder.node("Add", `${name}/Add`, [past, tokens]);
  const cachePosition = builder.node("Range", `${name}/Range`, [past, total, builder.integers(1)]);
  const kvPosition = builder.node("Range", `${name}/Range_1`, [builder.integers(0), total, builder.integers(1)]);
  const rows = builder.node("Unsqueeze", `${name}/Unsqueeze`, [cachePosition, builder.integers([0, 1, 3])]);
  const columns = builder.node("Unsqueeze", `${name}/Unsqueeze_1`, [kvPosition, builder.integers([0, 1, 2])]);
  const causal = builder.node("LessOrEqual", `${name}/LessOrEqual`, [columns, rows]);
  const real = builder.cast(`${name}/Cast`, "attention_mask", "bool");
  const realRow = builder.node("Unsqueeze", `${name}/Unsqueeze_2`, [real, builder.integers([1, 2])]);
  const seen = builder.node("And", `${name}/And`, [causal, realRow]);
  return builder.node("Where", `${name}/Where`, [seen, builder.scalar(0), lowest(builder)]);
});
