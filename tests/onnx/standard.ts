/** Attention as ONNX has it since operators 23, `Attention`: what PyTorch's newest exporter gives. */
import type { Builder } from "./builder.ts";
import { pastInput, presentOutput, projections } from "./gqa.ts";
import { biasOfLengths } from "./mask.ts";
import type { LayerWeights } from "./shapes.ts";

export function standardAttention(builder: Builder, layer: number, x: string, weights: LayerWeights): string {
  const { shape, graph } = builder;
  const name = `/model/layers.${layer}/self_attn`;
  const heads = projections(builder, layer, name, x, weights);
  const past = ["key", "value"].map((side) => pastInput(builder, layer, side));
  const present = ["key", "value"].map((side) => presentOutput(builder, layer, side));
  const attention = `${name}/Attention`;
  graph.nodes("Attention", [...heads, biasOfLengths(builder), ...past], [`${attention}/output_0`, ...present], {
    name: attention,
    attributes: {
      q_num_heads: shape.qHeadCount,
      kv_num_heads: shape.kvHeadCount,
      scale: { float: shape.softmaxScale ?? 1 / Math.sqrt(shape.headDim) },
      ...(shape.softcap === undefined ? {} : { softcap: { float: shape.softcap } }),
      is_causal: 0,
    },
  });
  return `${attention}/output_0`;
}
