/**
 * Nodes of attention as no exporter of the other tests writes them, in decoders of one layer: what a cut gives is what
 * onnxruntime makes of the whole graph.
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { cutModel } from "../src/onnx/cut/cut.ts";
import type { AttentionLayer } from "../src/onnx/cut/cut_model.ts";
import { type Graph, MICROSOFT } from "./onnx/graph.ts";
import { groupQuery, lengths, ONE_LAYER, oneLayer, type OneLayerOptions } from "./onnx/one_layer.ts";
import { Pieces } from "./onnx/pieces.ts";
import { type OnnxRuntime, onnxRuntime, type OnnxTensor, withoutOnnx } from "./onnx_runtime.ts";

const { qHeadCount, kvHeadCount, headDim } = ONE_LAYER;

/** A decoder, and what its layer says beside its heads. */
interface Case {
  readonly attend: (graph: Graph) => void;
  readonly options?: OneLayerOptions;
  readonly layer: Partial<AttentionLayer>;
}

const MULTI_HEAD = { name: "attn", domain: MICROSOFT, attributes: { num_heads: qHeadCount, unidirectional: 1 } };

/** `attended` as a value `[1, heads, tokens, head_dim]` made of rows, and the other way round. */
function turned(graph: Graph, name: string, heads: number): string {
  graph.constant(`${name}.dims`, "int64", [4], BigInt64Array.of(0n, -1n, BigInt(heads), BigInt(headDim)));
  graph.node("Reshape", [name, `${name}.dims`], `${name}.apart`);
  return graph.node("Transpose", [`${name}.apart`], `${name}.turned`, { attributes: { perm: [0, 2, 1, 3] } });
}

const CASES: Readonly<Record<string, Case>> = {
  "GroupQueryAttention with its own scale": { attend: groupQuery(), layer: {} },
  "GroupQueryAttention with a smooth softmax": {
    attend: groupQuery({ smooth_softmax: 1 }),
    layer: { sinkLogits: new Float32Array(qHeadCount) },
  },
  "GroupQueryAttention with window, cap and scale": {
    attend: groupQuery({ local_window_size: 3, softcap: { float: 2 }, scale: { float: 0.5 } }),
    layer: { windowTokens: 3, softcap: 2, softmaxScale: 0.5 },
  },
  "GroupQueryAttention with sink logits by a Cast": {
    attend: (graph) => {
      graph.constant("sinks16", "float16", [qHeadCount], Uint16Array.of(0x3c00, 0xbc00, 0x4000, 0x0000));
      graph.node("Cast", ["sinks16"], "sinks", { attributes: { to: 1 } });
      groupQuery({}, ["", "", "", "", "sinks"])(graph);
    },
    layer: { sinkLogits: Float32Array.of(1, -1, 2, 0) },
  },
  "MultiHeadAttention that is causal by itself, with a bias": {
    attend: (graph) => {
      const width = 3 * qHeadCount * headDim;
      graph.constant("bias", "float32", [width], Float32Array.from({ length: width }, (_, i) => Math.sin(i)));
      graph.nodes(
        "MultiHeadAttention",
        ["q", "k", "v", "bias", "", "", "past.key", "past.value"],
        ["attended", "present.key", "present.value"],
        MULTI_HEAD,
      );
    },
    options: { kvHeads: qHeadCount },
    layer: {},
  },
  "MultiHeadAttention with a mask of padding": {
    attend: (graph) => {
      graph.node("Cast", ["attention_mask"], "padding", { attributes: { to: 6 } });
      graph.nodes(
        "MultiHeadAttention",
        ["q", "k", "v", "", "padding", "", "past.key", "past.value"],
        ["attended", "present.key", "present.value"],
        MULTI_HEAD,
      );
    },
    options: { kvHeads: qHeadCount },
    layer: {},
  },
  "Attention of ONNX over heads apart": {
    attend: (graph) => {
      const [q, k, v] = [["q", qHeadCount], ["k", kvHeadCount], ["v", kvHeadCount]].map(([name, heads]) => {
        const value = turned(graph, name as string, heads as number);
        return graph.output(value, "float32", ["batch", heads as number, "tokens", headDim]);
      }) as [string, string, string];
      graph.nodes("Attention", [q, k, v, "", "past.key", "past.value"], ["y", "present.key", "present.value"], {
        name: "attn",
        attributes: { is_causal: 1, scale: { float: 0.25 } },
      });
      graph.node("Transpose", ["y"], "apart", { attributes: { perm: [0, 2, 1, 3] } });
      graph.constant("rows", "int64", [3], BigInt64Array.of(0n, 0n, -1n));
      graph.node("Reshape", ["apart", "rows"], "attended");
    },
    options: { opset: 23 },
    layer: { softmaxScale: 0.25 },
  },
  "Attention of ONNX over rows, with a mask of truths": {
    attend: (graph) => {
      lengths(graph);
      graph.constant("zero", "int64", [], BigInt64Array.of(0n));
      graph.constant("step", "int64", [], BigInt64Array.of(1n));
      graph.constant("first", "int64", [1], BigInt64Array.of(0n));
      graph.node("Squeeze", ["count", "first"], "end");
      graph.node("Shape", ["input_ids"], "dims");
      graph.node("Gather", ["dims", "step"], "tokens", { attributes: { axis: 0 } });
      graph.node("Sub", ["end", "tokens"], "start");
      graph.node("Range", ["start", "end", "step"], "rows");
      graph.node("Range", ["zero", "end", "step"], "columns");
      graph.node("Unsqueeze", ["rows", "one"], "down");
      graph.node("LessOrEqual", ["columns", "down"], "seen");
      graph.nodes("Attention", ["q", "k", "v", "seen", "past.key", "past.value"], ["attended", "pk", "pv"], {
        name: "attn",
        attributes: { q_num_heads: qHeadCount, kv_num_heads: kvHeadCount },
      });
    },
    options: { opset: 23 },
    layer: {},
  },
};

const TOKENS = [3, 1, 4, 1, 5, 9, 2, 6];

/** The logits of the whole graph. */
async function whole(ort: OnnxRuntime, model: Uint8Array, kvHeads: number): Promise<Float32Array> {
  const session = await ort.InferenceSession.create(model, { logSeverityLevel: 3 });
  const ids = (values: readonly number[]) =>
    new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const none = new ort.Tensor("float32", new Float32Array(0), [1, kvHeads, 0, headDim]);
  const all: Record<string, OnnxTensor> = {
    input_ids: ids(TOKENS),
    attention_mask: ids(TOKENS.map(() => 1)),
    "past.key": none,
    "past.value": none,
  };
  const { logits } = await session.run(Object.fromEntries(session.inputNames.map((name) => [name, all[name]!])));
  await session.release();
  return logits!.data as Float32Array;
}

for (const [name, { attend, options = {}, layer }] of Object.entries(CASES)) {
  const model = oneLayer(attend, options);
  const kvHeads = options.kvHeads ?? kvHeadCount;

  test(`${name}: the layer is what the graph says`, () => {
    const { q: _q, k: _k, v: _v, output: _output, node, ...rest } = cutModel(model).pieces[0]!.attention!;
    assert.match(node, /^node attn \(\w+Attention\)$|^node attn \(Attention\)$/);
    assert.deepEqual(rest, { qHeadCount, kvHeadCount: kvHeads, headDim, ...layer });
  });

  test(`${name}, cut, gives what the whole graph gives${withoutOnnx}`, { skip: withoutOnnx !== "" }, async () => {
    await using pieces = await Pieces.load(onnxRuntime!, cutModel(model));
    const sequence = pieces.sequence();
    const given = [
      ...await pieces.step([sequence], [TOKENS.slice(0, 5)]),
      ...await pieces.step([sequence], [TOKENS.slice(5)]),
    ];
    const expected = await whole(onnxRuntime!, model, kvHeads);
    assert.equal(given.length, expected.length);
    for (const [i, logit] of given.entries()) {
      assert.ok(Math.abs(logit - expected[i]!) <= 1e-4, `logit ${i}: ${logit}, ${expected[i]}`);
    }
  });
}
