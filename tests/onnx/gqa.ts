/** Attention as one node, `GroupQueryAttention`: the form of onnxruntime-genai's builder and of onnx-community's models. */
import type { Builder } from "./builder.ts";
import { type Attribute, MICROSOFT } from "./graph.ts";
import { biasOfPositions, maskLengths, positionsOf } from "./mask.ts";
import { rotaryTables, rotated } from "./rotary.ts";
import { type LayerWeights, windowOf } from "./shapes.ts";

/** Attention of a layer over its normed input; gives `[..., q_head * headDim]`. */
export function groupQueryAttention(builder: Builder, layer: number, x: string, weights: LayerWeights): string {
  const { shape, form, graph } = builder;
  const name = `/model/layers.${layer}/attn`;
  const rotaryInside = form.rotary !== "nodes";
  const heads = form.packed
    ? packedProjection(builder, name, x, weights)
    : projections(builder, layer, name, x, weights);
  const past = ["key", "value"].map((side) => pastInput(builder, layer, side));
  const present = ["key", "value"].map((side) => presentOutput(builder, layer, side));
  const { lengths, total } = maskLengths(builder);
  const inputs = [...heads, ...past, lengths, total];
  if (rotaryInside) inputs.push(...rotaryTables(builder, layer));
  const optional = [
    form.positionIds && rotaryInside ? positionsOf(builder) : "",
    form.causalBias ? biasOfPositions(builder) : "",
    weights.sinkLogits
      ? builder.floats(`model.layers.${layer}.attn.sinks`, [shape.qHeadCount], weights.sinkLogits)
      : "",
    ...["", ""], // scales of a past in codes
    ...headNormInputs(builder, layer, weights),
  ];
  if (optional.some((input) => input !== "")) {
    while (inputs.length < 9) inputs.push("");
    inputs.push(...optional);
    while (inputs.at(-1) === "") inputs.pop();
  }
  const attention = `${name}/GroupQueryAttention`;
  graph.nodes("GroupQueryAttention", inputs, [`${attention}/output_0`, ...present], {
    name: attention,
    domain: MICROSOFT,
    attributes: {
      num_heads: shape.qHeadCount,
      kv_num_heads: shape.kvHeadCount,
      scale: { float: shape.softmaxScale ?? 1 / Math.sqrt(shape.headDim) },
      local_window_size: windowOf(shape, layer) || -1,
      softcap: { float: shape.softcap ?? 0 },
      do_rotary: rotaryInside ? 1 : 0,
      rotary_interleaved: form.interleaved ? 1 : 0,
      ...headNormAttributes(builder, weights),
    },
  });
  return `${attention}/output_0`;
}

/** The weights of the norms of heads, where the node has them: both or none. */
export function headNormInputs(builder: Builder, layer: number, { qNorm, kNorm }: LayerWeights): string[] {
  if (!builder.form.headNormsInside || !qNorm || !kNorm) return ["", ""];
  const name = `model.layers.${layer}.attn`;
  const { headDim } = builder.shape;
  return [
    builder.floats(`${name}.q_norm.layernorm.weight`, [headDim], qNorm),
    builder.floats(`${name}.k_norm.layernorm.weight`, [headDim], kNorm),
  ];
}

/** What a node says of such norms. */
export function headNormAttributes({ form, shape }: Builder, { qNorm }: LayerWeights): Record<string, Attribute> {
  return form.headNormsInside && qNorm ? { qk_norm_epsilon: { float: shape.rmsNormEps } } : {};
}

/** Queries, keys and values by a matrix each, normed by head and rotated where nodes do that. */
export function projections(builder: Builder, layer: number, name: string, x: string, weights: LayerWeights): string[] {
  const { qHeadCount, kvHeadCount, headDim } = builder.shape;
  const qSize = qHeadCount * headDim, kvSize = kvHeadCount * headDim;
  let q = builder.linear(`${name}/q_proj`, x, weights.qProj, qSize, weights.qBias);
  let k = builder.linear(`${name}/k_proj`, x, weights.kProj, kvSize, weights.kBias);
  const v = builder.linear(`${name}/v_proj`, x, weights.vProj, kvSize, weights.vBias);
  if (builder.form.headNormsInside) return [q, k, v];
  if (weights.qNorm) q = builder.headNorm(`${name}/q_norm`, q, weights.qNorm);
  if (weights.kNorm) k = builder.headNorm(`${name}/k_norm`, k, weights.kNorm);
  if (builder.form.rotary !== "nodes") return [q, k, v];
  return [rotated(builder, layer, `${name}/q_rotary`, q), rotated(builder, layer, `${name}/k_rotary`, k), v];
}

/** One matrix for queries, keys and values; keys and values are no inputs of their own then. */
export function packedProjection(builder: Builder, name: string, x: string, weights: LayerWeights): string[] {
  const { qHeadCount, kvHeadCount, headDim } = builder.shape;
  const matrix = joined(weights.qProj, weights.kProj, weights.vProj);
  const biases = [weights.qBias, weights.kBias, weights.vBias].filter((bias) => bias !== undefined);
  const bias = biases.length === 3 ? joined(...biases) : undefined;
  return [builder.linear(`${name}/qkv_proj`, x, matrix, (qHeadCount + 2 * kvHeadCount) * headDim, bias), "", ""];
}

function joined(...parts: readonly Float32Array[]): Float32Array {
  const whole = new Float32Array(parts.reduce((size, part) => size + part.length, 0));
  let end = 0;
  for (const part of parts) {
    whole.set(part, end);
    end += part.length;
  }
  return whole;
}

/** The input with a layer's past keys or values, `[batch, kv_head, past, headDim]`. */
export function pastInput({ graph, shape, float }: Builder, layer: number, side: string): string {
  const dims = ["batch_size", shape.kvHeadCount, "past_sequence_length", shape.headDim];
  return graph.input(`past_key_values.${layer}.${side}`, float, dims);
}

/** The output with the past and the new ones behind it. */
export function presentOutput({ graph, shape, float }: Builder, layer: number, side: string): string {
  const dims = ["batch_size", shape.kvHeadCount, "total_sequence_length", shape.headDim];
  return graph.output(`present.${layer}.${side}`, float, dims);
}
