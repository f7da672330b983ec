/**
 * Decoders that cannot be cut: each is refused with the node, what about it cannot be, and what would work instead.
 */
import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { KvError, type KvErrorCode } from "../mod.ts";
import { cutModel } from "../src/onnx/cut/cut.ts";
import { makeDecoder } from "./onnx/decoder.ts";
import { families } from "./onnx/families.ts";
import { type Attribute, Graph, MICROSOFT, writeModel } from "./onnx/graph.ts";
import { groupQuery, oneLayer } from "./onnx/one_layer.ts";

function assertRefused(source: string | Uint8Array, code: KvErrorCode, ...texts: readonly RegExp[]): void {
  assert.throws(() => cutModel(source), (error) => {
    assert.ok(error instanceof KvError, `${error}`);
    assert.equal(error.code, code, error.message);
    for (const text of texts) assert.match(error.message, text);
    return true;
  });
}

test("the decoder of these tests is cut when nothing is wrong with it", () => {
  const { pieces, inputs } = cutModel(oneLayer(groupQuery({ local_window_size: 7 })));
  assert.equal(pieces.length, 2);
  assert.equal(pieces[0]!.attention!.windowTokens, 7);
  assert.deepEqual(inputs, [{ name: "input_ids", role: "inputIds", type: "int64" }]);
});

test("attributes that make another attention are refused, with the node", () => {
  const cases: [Readonly<Record<string, Attribute>>, RegExp][] = [
    [{ causal: 0 }, /causal of node attn \(GroupQueryAttention\) must be 1: it is 0/],
    [{ qk_output: 1 }, /qk_output of node attn .* must be 0: it is 1; .* export without/],
    [{ num_heads: 3, kv_num_heads: 2 }, /query heads of node attn .* multiple of its key heads: there are 3 and 2/],
    [{ num_heads: 0 }, /query heads of node attn .*: there are 0 and 2/],
    [{ local_window_size: 0 }, /local_window_size of node attn .* must be -1 or 1 to .*: it is 0/],
    [{ softcap: { float: -1 } }, /softcap of node attn/],
    [{ do_rotary: 1 }, /node attn .* must have cos_cache and sin_cache, as do_rotary is 1/],
  ];
  for (const [attributes, text] of cases) assertRefused(oneLayer(groupQuery(attributes)), "unsupported", text);
});

test("sink logits that are computed, or too few, are refused", () => {
  const before = ["", "", "", ""];
  assertRefused(
    oneLayer((graph) => {
      graph.constant("sinks", "float32", [3], new Float32Array(3));
      groupQuery({}, [...before, "sinks"])(graph);
    }),
    "unsupported",
    /a sink logit for each of its 4 heads: it has 3/,
  );
  assertRefused(
    oneLayer(groupQuery({}, [...before, "x"])),
    "unsupported",
    /sink logits of node attn .* must be weights: x/,
  );
});

/** Attention with a mask that `make` gives. */
function masked(make: (graph: Graph) => void): Uint8Array {
  return oneLayer((graph) => {
    graph.input("position_ids", "int64", ["batch", "tokens"]);
    graph.constant("low", "float32", [], Float32Array.of(-65504));
    graph.constant("none", "float32", [], Float32Array.of(0));
    for (const number of [0, 1, 2, 3]) graph.constant(`${number}`, "int64", [], BigInt64Array.of(BigInt(number)));
    graph.constant("axes", "int64", [3], BigInt64Array.of(0n, 1n, 2n));
    graph.constant("edges", "int64", [2], BigInt64Array.of(1n, 3n));
    graph.node("Shape", ["attention_mask"], "dims");
    graph.node("Gather", ["dims", "1"], "end", { attributes: { axis: 0 } });
    graph.node("Range", ["0", "end", "1"], "range");
    graph.node("Unsqueeze", ["range", "axes"], "columns");
    graph.node("Unsqueeze", ["position_ids", "edges"], "rows");
    make(graph);
    groupQuery({}, ["", "", "", "mask"])(graph);
  });
}

test("a mask is taken for the window it has", () => {
  const model = masked((graph) => {
    graph.constant("window", "int64", [], BigInt64Array.of(600n));
    graph.node("Sub", ["rows", "columns"], "distance");
    graph.node("GreaterOrEqual", ["distance", "window"], "far");
    graph.node("Greater", ["columns", "rows"], "later");
    graph.node("Or", ["far", "later"], "hidden");
    graph.node("Where", ["hidden", "low", "none"], "mask");
  });
  assert.equal(cutModel(model).pieces[0]!.attention!.windowTokens, 600);
});

test("a mask that is not the causal one is refused, with the first tokens where it differs", () => {
  const everySecond = masked((graph) => {
    graph.node("Mod", ["columns", "2"], "parity");
    graph.node("Equal", ["parity", "1"], "hidden");
    graph.node("Where", ["hidden", "low", "none"], "mask");
  });
  assertRefused(everySecond, "unsupported", /mask of node attn .* causal one.*by mask, the token at position \d+/);
  const alibi = masked((graph) => {
    graph.node("Sub", ["columns", "rows"], "distance");
    graph.node("Cast", ["distance"], "mask", { attributes: { to: 1 } });
  });
  assertRefused(alibi, "unsupported", /mask of node attn .* must add 0 to scores, or less than -1000: mask adds -?\d/);
  const learned = masked((graph) => graph.node("MatMul", ["q", "q.weight"], "mask"));
  assertRefused(learned, "unsupported", /mask of node attn .*: mask cannot be told; export with GroupQueryAttention/);
});

test("a length of one past is refused where each sequence has its own, with what takes it", () => {
  const model = oneLayer(groupQuery(), {
    end: (graph) => {
      graph.node("Cast", ["total"], "length", { attributes: { to: 1 } });
      return graph.node("Mul", ["attended", "length"], "scaled");
    },
  });
  assertRefused(
    model,
    "unsupported",
    /must be fed input_ids and position_ids.*count \(ReduceSum\) takes attention_mask/,
  );
});

test("what the rest of the graph takes beside ids and positions is refused, with the node that takes it", () => {
  const model = oneLayer(groupQuery(), {
    end: (graph) => {
      graph.input("token_type_ids", "int64", ["batch", "tokens"]);
      graph.constant("types", "float32", [2, 32], new Float32Array(64));
      graph.node("Gather", ["types", "token_type_ids"], "typed", { name: "segments" });
      return graph.node("Add", ["attended", "typed"], "sum");
    },
  });
  assertRefused(
    model,
    "unsupported",
    /must be fed input_ids and position_ids.*node segments \(Gather\) takes token_type_ids/,
  );
});

test("keys and values that anything but attention takes are refused", () => {
  const model = oneLayer((graph) => {
    graph.nodes("GroupQueryAttention", ["q", "k", "v", "past.key", "past.value", "", ""], ["attended", "present"], {
      domain: MICROSOFT,
      attributes: { num_heads: 4, kv_num_heads: 2 },
    });
  }, { end: (graph) => graph.node("Add", ["attended", "present"], "sum") });
  assertRefused(model, "unsupported", /node sum \(Add\) takes present/);
});

test("what lets tokens know of one another beside attention is refused", () => {
  const convolved = oneLayer(groupQuery(), {
    end: (graph) => {
      graph.constant("kernel", "float32", [1, 1, 3, 1], new Float32Array(3));
      graph.node("Unsqueeze", ["attended", "one"], "planes");
      graph.node("Conv", ["planes", "kernel"], "mixed", { name: "conv", attributes: { pads: [2, 0, 0, 0] } });
      return graph.node("Squeeze", ["mixed", "one"], "sum");
    },
  });
  assertRefused(convolved, "unsupported", /only attention .* may let tokens know .*: node conv \(Conv\) does/);
  const pastless = oneLayer(groupQuery(), {
    end: (graph) => {
      graph.node("Transpose", ["attended"], "across", { attributes: { perm: [0, 2, 1] } });
      graph.node("MatMul", ["attended", "across"], "scores");
      graph.node("Softmax", ["scores"], "shares");
      return graph.node("MatMul", ["shares", "attended"], "sum");
    },
  });
  assertRefused(pastless, "unsupported", /values of node sum \(MatMul\) must be joined to a past .*: attended is not/);
});

test("a graph without attention, or without a past for it, is refused", () => {
  const none = oneLayer((graph) => graph.node("Identity", ["q"], "attended"));
  assertRefused(none, "unsupported", /it must have attention: no node is GroupQueryAttention, /);
  const open = oneLayer((graph) =>
    graph.node("MultiHeadAttention", ["q", "k", "v", "", "", "", "past.key", "past.value"], "attended", {
      name: "attn",
      domain: MICROSOFT,
      attributes: { num_heads: 4 },
    })
  );
  assertRefused(open, "unsupported", /node attn \(MultiHeadAttention\) must hide later tokens: it has no mask/);
});

test("paths that lead to no model are refused", () => {
  const folder = mkdtempSync(join(tmpdir(), "kvern-refused-"));
  try {
    assertRefused(join(folder, "nothing.onnx"), "invalid_config", /is not there/);
    assertRefused(folder, "invalid_config", /must have model\.onnx or onnx\/model\.onnx: .* has neither/);
    writeFileSync(join(folder, "empty.onnx"), "");
    assertRefused(join(folder, "empty.onnx"), "invalid_config", /an ONNX model has a graph/);
    assert.throws(() => cutModel(7 as never), TypeError);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("weights outside the folder of the model are refused, and weights beside bytes", () => {
  const model = (file: string) => {
    const graph = new Graph();
    graph.input("input_ids", "int64", ["batch", "tokens"]);
    graph.constant("table", "float32", [64, 8], new Float32Array(512));
    graph.node("Gather", ["table", "input_ids"], "logits");
    graph.output("logits", "float32", ["batch", "tokens", 8]);
    return graph.files({ dataFile: file }).model;
  };
  for (const file of ["../data", "/etc/passwd", "a/../../data", "C:\\data", ""]) {
    assertRefused(
      model(file),
      "invalid_config",
      /weights must lie in the folder of the model: those of table are in "/,
    );
  }
  assertRefused(model("model.onnx_data"), "unsupported", /weights in model\.onnx_data .* give its path/);
});

const withoutLinks = process.platform === "win32" ? " (skipped: making links takes rights on Windows)" : "";

test(`a model whose files are links is read where they lead, as a cache of downloads has them${withoutLinks}`, {
  skip: withoutLinks !== "",
}, () => {
  const folder = mkdtempSync(join(tmpdir(), "kvern-links-"));
  try {
    const { shape, weights } = families(1)[0]!;
    const { model, data } = makeDecoder(shape, weights, { attention: "gqa", dataFile: "model.onnx_data" });
    mkdirSync(join(folder, "blobs"));
    mkdirSync(join(folder, "snapshot", "onnx"), { recursive: true });
    writeFileSync(join(folder, "blobs", "0123"), model);
    writeFileSync(join(folder, "blobs", "4567"), data!.bytes);
    for (const [name, blob] of [["model.onnx", "0123"], ["model.onnx_data", "4567"]] as const) {
      symlinkSync(join("..", "..", "blobs", blob), join(folder, "snapshot", "onnx", name));
    }
    const cut = cutModel(join(folder, "snapshot"));
    assert.equal(cut.pieces.length, shape.layerCount + 1);
    assert.match(cut.folder!, /blobs$/);
    const named = cut.pieces.map((piece) => new TextDecoder("latin1").decode(piece.model)).join();
    assert.ok(named.includes("4567") && !named.includes("model.onnx_data"));
    rmSync(join(folder, "blobs", "4567"));
    assertRefused(
      join(folder, "snapshot"),
      "invalid_config",
      /its weights must lie beside it: model\.onnx_data does not/,
    );
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("a fingerprint is that of the model, wherever it lies, and of no other", () => {
  const folder = mkdtempSync(join(tmpdir(), "kvern-fingerprint-"));
  try {
    const { shape, weights } = families(1)[0]!;
    const form = { attention: "gqa", dataFile: "model.onnx_data" } as const;
    const path = writeModel(folder, makeDecoder(shape, weights, form));
    const fingerprint = cutModel(path).fingerprint;
    assert.match(fingerprint, /^[0-9a-f]{64}$/);
    assert.equal(cutModel(folder).fingerprint, fingerprint);
    const data = readFileSync(join(folder, "model.onnx_data"));
    data[data.length - 1]! ^= 1;
    writeFileSync(join(folder, "model.onnx_data"), data);
    assert.notEqual(cutModel(folder).fingerprint, fingerprint);
    writeFileSync(join(folder, "alone.onnx"), oneLayer(groupQuery()));
    const alone = cutModel(join(folder, "alone.onnx")).fingerprint;
    assert.equal(alone, cutModel(oneLayer(groupQuery())).fingerprint);
    assert.notEqual(alone, cutModel(oneLayer(groupQuery({ local_window_size: 3 }))).fingerprint);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
