/**
 * What graphs make of the length of their past: where two sequences have pasts of different lengths, each has to get its
 * own.
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { cutModel } from "../src/onnx/cut/cut.ts";
import type { ModelInput } from "../src/onnx/cut/cut_model.ts";
import type { Graph } from "./onnx/graph.ts";
import { groupQuery, ONE_LAYER, oneLayer } from "./onnx/one_layer.ts";
import { Pieces } from "./onnx/pieces.ts";
import { onnxRuntime, withoutOnnx } from "./onnx_runtime.ts";

const WIDTH = ONE_LAYER.qHeadCount * ONE_LAYER.headDim;
const POSITIONS = 32;

function numbers(graph: Graph): void {
  for (const number of [0, 1, 2]) graph.constant(`${number}`, "int64", [], BigInt64Array.of(BigInt(number)));
  graph.constant("axis0", "int64", [1], BigInt64Array.of(0n));
  graph.constant("axis1", "int64", [1], BigInt64Array.of(1n));
  graph.constant("far", "int64", [1], BigInt64Array.of(BigInt(Number.MAX_SAFE_INTEGER)));
  const table = Float32Array.from({ length: POSITIONS * WIDTH }, (_, i) => Math.sin(i * i));
  graph.constant("places", "float32", [POSITIONS, WIDTH], table);
  graph.node("Shape", ["input_ids"], "ids.dims");
  graph.node("Gather", ["ids.dims", "1"], "tokens", { attributes: { axis: 0 } });
  graph.node("Shape", ["past.key"], "past.dims");
  graph.node("Gather", ["past.dims", "2"], "past", { attributes: { axis: 0 } });
  graph.node("Add", ["past", "tokens"], "all");
}

/** Ways to add a learned row for each position to what attention gives. */
const WAYS: Readonly<
  Record<string, { readonly make: (graph: Graph) => string; readonly roles: ModelInput["role"][] }>
> = {
  "a sum over attention_mask": {
    make: (graph) => {
      graph.node("CumSum", ["attention_mask", "1"], "sums");
      graph.node("Sub", ["sums", "1"], "places.all");
      graph.node("Unsqueeze", ["past", "axis0"], "start");
      graph.node("Slice", ["places.all", "start", "far", "axis1"], "places.new");
      return graph.node("Gather", ["places", "places.new"], "placed");
    },
    roles: ["inputIds", "positionIds"],
  },
  "a range behind the past, in another type": {
    make: (graph) => {
      graph.node("Range", ["past", "all", "1"], "range");
      graph.node("Cast", ["range"], "range32", { attributes: { to: 6 } });
      graph.node("Unsqueeze", ["range32", "axis0"], "places.new");
      return graph.node("Gather", ["places", "places.new"], "placed");
    },
    roles: ["inputIds", "positionIds"],
  },
  "a table cut at the length of all": {
    make: (graph) => {
      graph.input("position_ids", "int64", ["batch", "tokens"]);
      graph.node("Unsqueeze", ["all", "axis0"], "end");
      graph.node("Slice", ["places", "axis0", "end", "axis0"], "places.all");
      return graph.node("Gather", ["places.all", "position_ids"], "placed");
    },
    roles: ["inputIds", "positionIds", "totalSequenceLength"],
  },
};

for (const [name, { make, roles }] of Object.entries(WAYS)) {
  const model = oneLayer(groupQuery(), {
    end: (graph) => {
      numbers(graph);
      return graph.node("Add", ["attended", make(graph)], "sum");
    },
  });

  test(`${name} gives way to what is fed`, () => {
    const { inputs } = cutModel(model);
    assert.deepEqual(inputs.map(({ role }) => role).sort(), [...roles].sort());
  });

  test(`${name}: sequences of unequal pasts say what each says alone${withoutOnnx}`, {
    skip: withoutOnnx !== "",
  }, async () => {
    await using pieces = await Pieces.load(onnxRuntime!, cutModel(model));
    const texts = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10]];
    const alone: number[] = [];
    for (const text of texts) {
      const sequence = pieces.sequence();
      await pieces.step([sequence], [text.slice(0, -1)]);
      alone.push(...await pieces.step([sequence], [text.slice(-1)]));
    }
    const sequences = texts.map(() => pieces.sequence());
    await pieces.step(sequences, texts.map((text) => text.slice(0, -1)));
    const together = await pieces.step(sequences, texts.map((text) => text.slice(-1)));
    assert.deepEqual([...together], alone);
    assert.notDeepEqual(alone.slice(0, ONE_LAYER.vocabSize), alone.slice(ONE_LAYER.vocabSize));
  });
}
