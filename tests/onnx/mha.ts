/** Attention as `MultiHeadAttention`, which knows no shared heads: keys and values are repeated before it where they are. */
import type { Builder } from "./builder.ts";
import { pastInput, presentOutput, projections } from "./gqa.ts";
import { MICROSOFT } from "./graph.ts";
import { biasOfLengths } from "./mask.ts";
import { headsOutward, joinedPast, repeatedHeads } from "./repeat_kv.ts";
import type { LayerWeights } from "./shapes.ts";

export function multiHeadAttention(builder: Builder, layer: number, x: string, weights: LayerWeights): string {
  const { shape, graph } = builder;
  const name = `/model/layers.${layer}/attn`;
  const [q, ...kv] = projections(builder, layer, name, x, weights);
  const sides = ["key", "value"];
  const isShared = shape.qHeadCount !== shape.kvHeadCount;
  const heads = kv.map((rows, i) => {
    if (!isShared) return rows;
    const place = `${name}/${sides[i]}`;
    const all = joinedPast(builder, place, layer, sides[i]!, headsOutward(builder, place, rows));
    const inward = builder.node("Transpose", `${place}/Transpose_2`, [repeatedHeads(builder, place, all)], {
      perm: [0, 2, 1, 3],
    });
    const size = shape.qHeadCount * shape.headDim;
    return builder.node("Reshape", `${place}/Reshape_4`, [inward, builder.integers([0, 0, size])]);
  });
  const past = isShared ? [] : sides.map((side) => pastInput(builder, layer, side));
  const present = isShared ? [] : sides.map((side) => presentOutput(builder, layer, side));
  const attention = `${name}/MultiHeadAttention`;
  const inputs = [q!, ...heads, "", "", biasOfLengths(builder), ...past];
  graph.nodes("MultiHeadAttention", inputs, [`${attention}/output_0`, ...present], {
    name: attention,
    domain: MICROSOFT,
    attributes: {
      num_heads: shape.qHeadCount,
      scale: { float: shape.softmaxScale ?? 1 / Math.sqrt(shape.headDim) },
      unidirectional: 0,
    },
  });
  return `${attention}/output_0`;
}
