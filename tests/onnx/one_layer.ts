/** Decoders of one layer, for one node of attention each: with random weights, and as little around it as can be. */
import { Random } from "../oracle.ts";
import { type Attribute, Graph, MICROSOFT } from "./graph.ts";

/** Sizes of these decoders. */
export const ONE_LAYER = { qHeadCount: 4, kvHeadCount: 2, headDim: 8, vocabSize: 12, hiddenSize: 16 } as const;

const { qHeadCount, kvHeadCount, headDim, vocabSize, hiddenSize } = ONE_LAYER;

/** What may differ. */
export interface OneLayerOptions {
  /** Heads of keys and values. */
  readonly kvHeads?: number;
  /** What the logits are made of: `attended`, or what is made of it. */
  readonly end?: (graph: Graph) => string;
  /** The version of ONNX's operators. */
  readonly opset?: number;
}

/**
 * An embedding, projections `q`, `k`, `v`, attention by `attend`, which makes `attended` of them, and logits. Inputs are
 * `input_ids`, `attention_mask`, `past.key` and `past.value`.
 */
export function oneLayer(attend: (graph: Graph) => void, options: OneLayerOptions = {}): Uint8Array {
  const { kvHeads = kvHeadCount, end = () => "attended", opset = 17 } = options;
  const random = new Random(7);
  const graph = new Graph();
  graph.input("input_ids", "int64", ["batch", "tokens"]);
  graph.input("attention_mask", "int64", ["batch", "total"]);
  for (const side of ["key", "value"]) graph.input(`past.${side}`, "float32", ["batch", kvHeads, "past", headDim]);
  graph.constant("table", "float32", [vocabSize, hiddenSize], random.floats(vocabSize * hiddenSize, 2));
  graph.node("Gather", ["table", "input_ids"], "x");
  for (const [name, heads] of [["q", qHeadCount], ["k", kvHeads], ["v", kvHeads]] as const) {
    const width = heads * headDim;
    graph.constant(`${name}.weight`, "float32", [hiddenSize, width], random.floats(hiddenSize * width));
    graph.node("MatMul", ["x", `${name}.weight`], name);
  }
  attend(graph);
  const width = qHeadCount * headDim;
  graph.constant("head.weight", "float32", [width, vocabSize], random.floats(width * vocabSize));
  graph.node("MatMul", [end(graph), "head.weight"], "logits");
  graph.output("logits", "float32", ["batch", "tokens", vocabSize]);
  return graph.files({ opset }).model;
}

/** Attention as a GroupQueryAttention called `attn`; `inputs` come behind the two lengths. */
export function groupQuery(
  attributes: Readonly<Record<string, Attribute>> = {},
  inputs: readonly string[] = [],
): (graph: Graph) => void {
  return (graph) => {
    lengths(graph);
    const all = ["q", "k", "v", "past.key", "past.value", "last", "total", ...inputs];
    graph.node("GroupQueryAttention", all, "attended", {
      name: "attn",
      domain: MICROSOFT,
      attributes: { num_heads: qHeadCount, kv_num_heads: kvHeadCount, ...attributes },
    });
  };
}

/** `last`, the index of the last token, and `total`, the number of all, out of `attention_mask`; also `one` and `count`. */
export function lengths(graph: Graph): void {
  graph.constant("one", "int64", [1], BigInt64Array.of(1n));
  graph.node("ReduceSum", ["attention_mask", "one"], "count", { attributes: { keepdims: 0 } });
  graph.node("Sub", ["count", "one"], "before");
  graph.node("Cast", ["before"], "last", { attributes: { to: 6 } });
  graph.node("Cast", ["count"], "total", { attributes: { to: 6 } });
}
