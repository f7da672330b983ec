/**
 * Makes decoders as ONNX: one shape and one set of weights, in every form that exporters give.
 *
 *     input_ids -> embedding -> layers x { x += attention(norm(x)) ; x += mlp(norm(x)) } -> norm -> logits
 */
import { Builder, type Form } from "./builder.ts";
import { groupQueryAttention } from "./gqa.ts";
import type { ModelFiles } from "./graph.ts";
import { multiHeadAttention } from "./mha.ts";
import { pagedAttention, pagedInputs } from "./paged.ts";
import { plainAttention } from "./plain.ts";
import { type DecoderShape, type DecoderWeights, interleavedHeads } from "./shapes.ts";
import { standardAttention } from "./standard.ts";

const ATTENTIONS = {
  gqa: groupQueryAttention,
  mha: multiHeadAttention,
  standard: standardAttention,
  plain: plainAttention,
  paged: pagedAttention,
};

export function makeDecoder(shape: DecoderShape, given: DecoderWeights, form: Form): ModelFiles {
  const weights = form.interleaved ? interleavedHeads(shape, given) : given;
  const builder = new Builder(shape, form);
  const { graph } = builder;
  const paged = form.attention === "paged";
  const tokens = paged ? ["num_tokens"] : ["batch_size", "sequence_length"];
  graph.input("input_ids", builder.ids, tokens);
  if (paged) pagedInputs(builder);
  else graph.input("attention_mask", "int64", ["batch_size", "total_sequence_length"]);
  const takesPositions = form.positionIds || (form.rotary !== undefined && form.rotary !== "inside");
  if (takesPositions && !form.positionsMade) {
    graph.input("position_ids", builder.ids, tokens);
  }
  graph.output("logits", builder.float, [...tokens, shape.vocabSize]);

  const embedding = form.tied
    ? builder.node("Transpose", "/model/embed_tokens/Transpose", ["lm_head.MatMul.weight"], { perm: [1, 0] })
    : builder.floats("model.embed_tokens.weight", [shape.vocabSize, shape.hiddenSize], weights.embedding);
  let x = builder.node("Gather", "/model/embed_tokens/Gather", [embedding, "input_ids"]);
  if (shape.embeddingScale !== undefined) {
    x = builder.node("Mul", "/model/embed_tokens/Mul", [x, builder.scalar(shape.embeddingScale)]);
  }
  let normed = builder.norm("/model/layers.0/input_layernorm", x, weights.layers[0]!.inputNorm);
  weights.layers.forEach((layer, index) => {
    const name = `/model/layers.${index}`;
    const attended = ATTENTIONS[form.attention](builder, index, normed, layer);
    let added = builder.linear(`${name}/attn/o_proj`, attended, layer.oProj, shape.hiddenSize, layer.oBias);
    if (layer.attentionOutNorm) {
      added = builder.norm(`${name}/post_attention_out_layernorm`, added, layer.attentionOutNorm);
    }
    const middle = builder.addNorm(`${name}/post_attention_layernorm`, x, added, layer.mlpNorm);
    let fed = builder.mlp(`${name}/mlp`, middle.normed, layer);
    if (layer.mlpOutNorm) fed = builder.norm(`${name}/post_feedforward_layernorm`, fed, layer.mlpOutNorm);
    const next = weights.layers[index + 1];
    const end = next ? `/model/layers.${index + 1}/input_layernorm` : "/model/norm";
    ({ normed, sum: x } = builder.addNorm(end, middle.sum, fed, next?.inputNorm ?? weights.finalNorm));
  });
  const { logitSoftcap } = shape;
  const logits = builder.linear("/lm_head", normed, weights.embedding, shape.vocabSize);
  const limited = logitSoftcap === undefined ? logits : builder.softcapped("/lm_head/softcap", logits, logitSoftcap);
  graph.node("Identity", [limited], "logits", { name: "/lm_head/Identity" });
  const opset = form.attention === "standard" ? { opset: 23 } : {};
  return graph.files({ ...opset, ...(form.dataFile === undefined ? {} : { dataFile: form.dataFile }) });
}
