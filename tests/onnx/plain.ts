/** Attention as products and a softmax over `[batch, head, tokens, headDim]`: what PyTorch's exporter gives, and optimum. */
import type { Builder } from "./builder.ts";
import { projections } from "./gqa.ts";
import { biasOfLengths, lengthOf } from "./mask.ts";
import { headsOutward, joinedPast, repeatedHeads } from "./repeat_kv.ts";
import { turned } from "./rotary.ts";
import type { LayerWeights } from "./shapes.ts";

export function plainAttention(builder: Builder, layer: number, x: string, weights: LayerWeights): string {
  const { shape, form } = builder;
  const name = `/model/layers.${layer}/self_attn`;
  const [q, k, v] = projections(builder, layer, name, x, weights).map((rows, i) =>
    headsOutward(builder, `${name}/${"qkv"[i]}`, rows)
  ) as [string, string, string];
  const turns = form.rotary === "plain";
  const queries = turns ? turned(builder, `${name}/q_rope`, q) : q;
  const newKeys = turns ? turned(builder, `${name}/k_rope`, k) : k;
  const keys = repeatedHeads(builder, `${name}/k`, joinedPast(builder, `${name}/k`, layer, "key", newKeys));
  const values = repeatedHeads(builder, `${name}/v`, joinedPast(builder, `${name}/v`, layer, "value", v));
  const across = builder.node("Transpose", `${name}/Transpose_3`, [keys], { perm: [0, 1, 3, 2] });
  const scale = shape.softmaxScale ?? 1 / Math.sqrt(shape.headDim);
  let scores: string;
  if (form.scaledApart) {
    const root = builder.scalar(Math.sqrt(scale));
    scores = builder.node("MatMul", `${name}/MatMul`, [
      builder.node("Mul", `${name}/Mul_8`, [queries, root]),
      builder.node("Mul", `${name}/Mul_9`, [across, root]),
    ]);
  } else {
    const product = builder.node("MatMul", `${name}/MatMul`, [queries, across]);
    scores = builder.node("Mul", `${name}/Mul_8`, [product, builder.scalar(scale)]);
  }
  const masked = builder.node("Add", `${name}/Add_2`, [scores, biasOfLengths(builder)]);
  const shares = builder.node("Softmax", `${name}/Softmax`, [masked], { axis: -1 });
  const found = builder.node("MatMul", `${name}/MatMul_1`, [shares, values]);
  const inward = builder.node("Transpose", `${name}/Transpose_4`, [found], { perm: [0, 2, 1, 3] });
  const lengths = [0, 1].map((axis) =>
    builder.node("Unsqueeze", `${name}/out/${axis}/Unsqueeze`, [
      lengthOf(builder, `${name}/out/${axis}`, x, axis),
      builder.integers([0]),
    ])
  );
  const dims = builder.node("Concat", `${name}/Concat_9`, [...lengths, builder.integers([-1])], { axis: 0 });
  return builder.node("Reshape", `${name}/Reshape_5`, [inward, dims]);
}
