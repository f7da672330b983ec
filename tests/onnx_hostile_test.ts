/**
 * Bytes that are no model: cut short, flipped, or with numbers that no model has. Each is refused with a code, or cut as if
 * it were one; none makes a call hang, and none gives another error.
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { KvError } from "../mod.ts";
import { cutModel } from "../src/onnx/cut/cut.ts";
import { makeDecoder } from "./onnx/decoder.ts";
import { families } from "./onnx/families.ts";
import { FORMS } from "./onnx/forms.ts";
import { Random } from "./oracle.ts";

const SEED = 20_261_130;

/** A small decoder in every form; masks take most of the time of a cut. */
const MODELS = (() => {
  const { shape, weights } = families(SEED)[0]!;
  return FORMS.filter(({ form }) => form.dataFile === undefined).map(({ name, form }) => ({
    name,
    bytes: makeDecoder(shape, { ...weights, layers: weights.layers.slice(0, 2) }, form).model,
    tries: form.attention === "gqa" && !form.causalBias ? 300 : 60,
  }));
})();

/** Nodes come first in these models, inputs and outputs last; what lies between is weights. */
const NODES_BYTES = 8000, ENDS_BYTES = 800;

/** How a call ended: the code of a refusal, or "cut". */
function endOf(bytes: Uint8Array): string {
  try {
    const { pieces } = cutModel(bytes);
    return pieces.length > 0 ? "cut" : "nothing";
  } catch (error) {
    if (error instanceof KvError && (error.code === "invalid_config" || error.code === "unsupported")) {
      return error.code;
    }
    throw error;
  }
}

for (const { name, bytes, tries } of MODELS) {
  test(`${name}: a model that was cut short is refused wherever it ends`, { timeout: 120_000 }, () => {
    assert.equal(endOf(bytes), "cut");
    const step = Math.ceil(bytes.length / 100);
    for (let length = 0; length < bytes.length; length += step) {
      const end = endOf(bytes.subarray(0, length));
      // Behind the graph come the versions of operators, which a reader can do without.
      if (length < bytes.length - 64) assert.equal(end, "invalid_config", `${length} of ${bytes.length} bytes`);
    }
  });

  test(`${name}: flipped bytes are refused, or cut`, { timeout: 120_000 }, () => {
    const random = new Random(SEED);
    const ends = new Map<string, number>();
    for (let i = 0; i < tries; i++) {
      const hostile = bytes.slice();
      for (let flips = 1 + i % 3; flips > 0; flips--) {
        const place = random.below(NODES_BYTES + ENDS_BYTES);
        hostile[place < NODES_BYTES ? place : bytes.length - 1 - (place - NODES_BYTES)] = random.below(256);
      }
      const end = endOf(hostile);
      ends.set(end, (ends.get(end) ?? 0) + 1);
    }
    // Names of nodes may change, names of values may not.
    for (const end of ["invalid_config", "cut"]) {
      assert.ok((ends.get(end) ?? 0) > tries / 20, JSON.stringify([...ends]));
    }
  });
}

test("numbers that no model has are refused: long fields, endless varints, a graph within itself", () => {
  const endless = Uint8Array.from({ length: 64 }, () => 0xff);
  const length2to62 = Uint8Array.of(7 * 8 + 2, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x40);
  const group = Uint8Array.of(7 * 8 + 3); // a wire type that no field of ONNX has
  for (const bytes of [endless, length2to62, group, new Uint8Array(0), new TextEncoder().encode("PK\x03\x04")]) {
    assert.equal(endOf(bytes), "invalid_config");
  }
  // Bodies within bodies, 300 deep: a node (1) with an attribute (5) that is a graph (6) with a node (1).
  let deep: Uint8Array = new Uint8Array(0);
  const within = (field: number, content: Uint8Array) => {
    const size: number[] = [];
    for (let rest = content.length;; rest >>>= 7) {
      size.push(rest >= 128 ? rest & 127 | 128 : rest);
      if (rest < 128) break;
    }
    return Uint8Array.of(field * 8 + 2, ...size, ...content);
  };
  for (let depth = 0; depth < 300; depth++) deep = within(1, within(5, within(6, deep)));
  assert.equal(endOf(within(7, deep)), "invalid_config");
});
