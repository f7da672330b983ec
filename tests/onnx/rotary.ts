/** How graphs rotate queries and keys to their positions: by tables that a node takes, or by slices and products. */
import type { Builder } from "./builder.ts";
import { MICROSOFT } from "./graph.ts";
import { positionsOf } from "./mask.ts";
import { rotaryOf } from "./shapes.ts";

/** The tables of rotation of a layer, `[position][rotaryDim / 2]`. */
export function rotaryTables(builder: Builder, layer: number): readonly [cos: string, sin: string] {
  const { shape } = builder;
  const { theta, dims } = rotaryOf(shape, layer);
  const half = dims / 2;
  const table = (wave: (angle: number) => number) =>
    Float32Array.from(
      { length: shape.maxSeqLen * half },
      (_, i) => wave(Math.floor(i / half) * theta ** (-2 * (i % half) / dims)),
    );
  const kind = theta === shape.ropeTheta ? "" : "_local";
  return [
    builder.floats(`cos_cache${kind}`, [shape.maxSeqLen, half], table(Math.cos)),
    builder.floats(`sin_cache${kind}`, [shape.maxSeqLen, half], table(Math.sin)),
  ];
}

/** Heads turned to their positions by a node of their own. */
export function rotated(builder: Builder, layer: number, name: string, x: string): string {
  const { headDim, rotaryDim = headDim, qHeadCount, kvHeadCount } = builder.shape;
  const isPartial = rotaryDim !== headDim;
  const attributes = {
    interleaved: builder.form.interleaved ? 1 : 0,
    num_heads: isPartial ? (name.endsWith("q_rotary") ? qHeadCount : kvHeadCount) : 0,
    rotary_embedding_dim: isPartial ? rotaryDim : 0,
  };
  const inputs = [x, positionsOf(builder), ...rotaryTables(builder, layer)];
  return builder.node("RotaryEmbedding", `${name}/RotaryEmbedding`, inputs, attributes, MICROSOFT);
}

const waves = new WeakMap<Builder, readonly [cos: string, sin: string]>();

/** Cosines and sines of the positions, `[batch, 1, tokens, headDim]`; made once a graph. */
function wavesOf(builder: Builder): readonly [string, string] {
  const made = waves.get(builder);
  if (made) return made;
  const { headDim, ropeTheta } = builder.shape;
  const name = "/model/rotary_emb";
  const frequencies = Float32Array.from({ length: headDim / 2 }, (_, i) => ropeTheta ** (-2 * i / headDim));
  const inverse = builder.graph.constant("model.rotary_emb.inv_freq", "float32", [1, headDim / 2, 1], frequencies);
  const row = builder.node("Unsqueeze", `${name}/Unsqueeze`, [positionsOf(builder), builder.integers([1])]);
  const angles = builder.node("MatMul", `${name}/MatMul`, [inverse, builder.cast(`${name}/Cast`, row, "float32")]);
  const columns = builder.node("Transpose", `${name}/Transpose`, [angles], { perm: [0, 2, 1] });
  const both = builder.node("Concat", `${name}/Concat`, [columns, columns], { axis: -1 });
  const wave = (operator: string) => {
    const value = builder.node(operator, `${name}/${operator}`, [both]);
    const cast = builder.float === "float32" ? value : builder.cast(`${name}/${operator}/Cast`, value, builder.float);
    return builder.node("Unsqueeze", `${name}/${operator}/Unsqueeze`, [cast, builder.integers([1])]);
  };
  const pair = [wave("Cos"), wave("Sin")] as const;
  waves.set(builder, pair);
  return pair;
}

/** x * cos + rotate_half(x) * sin. */
export function turned(builder: Builder, name: string, x: string): string {
  const [cos, sin] = wavesOf(builder);
  const half = builder.shape.headDim / 2;
  const last = builder.integers([3]);
  const slice = (part: number, start: number, end: number) =>
    builder.node("Slice", `${name}/Slice_${part}`, [x, builder.integers([start]), builder.integers([end]), last]);
  const negative = builder.node("Neg", `${name}/Neg`, [slice(1, half, Number.MAX_SAFE_INTEGER)]);
  const crossed = builder.node("Concat", `${name}/Concat`, [negative, slice(0, 0, half)], { axis: -1 });
  return builder.node("Add", `${name}/Add`, [
    builder.node("Mul", `${name}/Mul`, [x, cos]),
    builder.node("Mul", `${name}/Mul_1`, [crossed, sin]),
  ]);
}
