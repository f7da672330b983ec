/** Every form in which decoders are written here, and which decoder a form can write. */
import type { Form } from "./builder.ts";
import type { DecoderShape, DecoderWeights } from "./shapes.ts";

/** A form, and what is known of it. */
export interface NamedForm {
  readonly name: string;
  readonly form: Form;
}

const forms: Readonly<Record<string, Form>> = {
  "GroupQueryAttention": { attention: "gqa" },
  "GroupQueryAttention of packed QKV": { attention: "gqa", packed: true, norms: "skip" },
  "GroupQueryAttention behind RotaryEmbedding": { attention: "gqa", rotary: "nodes" },
  "GroupQueryAttention with position_ids and int32": { attention: "gqa", positionIds: true, ids: "int32" },
  "GroupQueryAttention with the causal mask as a bias": { attention: "gqa", positionIds: true, causalBias: true },
  "GroupQueryAttention of side-by-side pairs": { attention: "gqa", interleaved: true, tied: true },
  "GroupQueryAttention with weights in a file": { attention: "gqa", dataFile: "model.onnx_data" },
  "MultiHeadAttention": { attention: "mha", rotary: "nodes" },
  "Attention of ONNX": { attention: "standard", rotary: "nodes" },
  "products and a softmax": { attention: "plain", rotary: "plain", norms: "plain", constantNodes: true },
  "products and a softmax, scaled apart": { attention: "plain", rotary: "plain", norms: "plain", scaledApart: true },
  "products and a softmax, positions made": {
    ...{ attention: "plain", rotary: "plain", norms: "plain", positionsMade: true },
  },
  "products and a softmax behind RotaryEmbedding": { attention: "plain", rotary: "nodes" },
};

/** The forms in f32 that onnxruntime runs by itself. */
export const FORMS: readonly NamedForm[] = Object.entries(forms).map(([name, form]) => ({ name, form }));

/** The forms in f32 that onnxruntime has no kernel for on CPUs. */
export const CUT_ONLY_FORMS: readonly NamedForm[] = [
  { name: "GroupQueryAttention with norms of heads", form: { attention: "gqa", headNormsInside: true } },
  {
    name: "GroupQueryAttention of packed QKV with norms of heads",
    form: { attention: "gqa", headNormsInside: true, packed: true },
  },
  { name: "PagedAttention", form: { attention: "paged" } },
  {
    name: "PagedAttention of packed QKV with norms of heads",
    form: { attention: "paged", headNormsInside: true, packed: true },
  },
];

/** The forms of f16 graphs; onnxruntime runs the first two by itself. */
export const HALF_FORMS: readonly NamedForm[] = [
  { name: "GroupQueryAttention in f16", form: { attention: "gqa", float: "float16" } },
  {
    name: "GroupQueryAttention of packed QKV in f16",
    form: { attention: "gqa", float: "float16", packed: true, norms: "skip" },
  },
  { name: "PagedAttention", form: { attention: "paged", float: "float16" } },
  { name: "PagedAttention of packed QKV", form: { attention: "paged", float: "float16", packed: true, norms: "skip" } },
];

/** The forms with matrices of 4 bits. */
export const INT4_FORMS: readonly NamedForm[] = [
  { name: "GroupQueryAttention and MatMulNBits", form: { attention: "gqa", int4: true } },
  {
    name: "GroupQueryAttention of packed QKV and MatMulNBits",
    form: { attention: "gqa", int4: true, packed: true, norms: "skip" },
  },
];

/** Can the form write what distinguishes that decoder? Nodes but GroupQueryAttention know no windows, limits and sinks. */
export function canWrite(
  { attention, packed, rotary, headNormsInside }: Form,
  shape: DecoderShape,
  { layers }: DecoderWeights,
): boolean {
  if (packed && layers[0]!.qNorm && !headNormsInside) return false;
  if (rotary === "plain" && shape.rotaryDim !== undefined) return false;
  if (attention === "gqa" || attention === "paged") return true;
  return shape.windows === undefined && shape.softcap === undefined && layers[0]!.sinkLogits === undefined;
}
