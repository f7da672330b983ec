/** Attention as `PagedAttention`: all tokens of a batch in one row, past rows in blocks. onnxruntime has it for CUDA alone. */
import type { Builder } from "./builder.ts";
import { headNormAttributes, headNormInputs, packedProjection, projections } from "./gqa.ts";
import { MICROSOFT } from "./graph.ts";
import { rotaryTables } from "./rotary.ts";
import { type LayerWeights, windowOf } from "./shapes.ts";

/** What tells the node which token is whose, and where the past of each sequence lies. */
const BATCH_INPUTS = {
  cumulative_sequence_lengths: ["batch_size + 1"],
  past_sequence_lengths: ["batch_size"],
  block_table: ["batch_size", "max_num_blocks"],
};

export function pagedInputs({ graph }: Builder): void {
  for (const [name, dims] of Object.entries(BATCH_INPUTS)) graph.input(name, "int32", dims);
}

export function pagedAttention(builder: Builder, layer: number, x: string, weights: LayerWeights): string {
  const { shape, form, graph, float } = builder;
  const name = `/model/layers.${layer}/attn`;
  const heads = form.packed
    ? packedProjection(builder, name, x, weights)
    : projections(builder, layer, name, x, weights);
  const cacheDims = ["num_blocks", "block_size", shape.kvHeadCount, shape.headDim];
  const caches = ["key", "value"].map((side) => graph.input(`past_key_values.${layer}.${side}`, float, cacheDims));
  const present = ["key", "value"].map((side) => graph.output(`present.${layer}.${side}`, float, cacheDims));
  const rotaryInside = form.rotary !== "nodes";
  const inputs = [...heads, ...caches, ...Object.keys(BATCH_INPUTS)];
  if (rotaryInside) inputs.push(...rotaryTables(builder, layer));
  const sinks = weights.sinkLogits
    ? builder.floats(`model.layers.${layer}.attn.sinks`, [shape.qHeadCount], weights.sinkLogits)
    : "";
  while (inputs.length < 11) inputs.push(""); // slot_mapping is the last of them
  inputs.push(sinks, ...headNormInputs(builder, layer, weights));
  while (inputs.at(-1) === "") inputs.pop();
  const attention = `${name}/PagedAttention`;
  graph.nodes("PagedAttention", inputs, [`${attention}/output_0`, ...present], {
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
