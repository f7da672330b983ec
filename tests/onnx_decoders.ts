/** Decoders for the tests of `OnnxDecoder`: two layers of ziglet, an onnxruntime that can be made to fail, and sequences of it. */
import assert from "node:assert/strict";
import type { Sequence } from "../mod.ts";
import type { Ort, OrtSession, OrtTensors } from "../src/onnx.ts";
import { OnnxDecoder, type OnnxDecoderOptions } from "../src/onnx.ts";
import { makeDecoder } from "./onnx/decoder.ts";
import type { DecoderShape } from "./onnx/shapes.ts";
import { ZIGLET_SHAPE, ZIGLET_WEIGHTS } from "./onnx/ziglet.ts";
import { onnxRuntime } from "./onnx_runtime.ts";

/** onnxruntime, for tests that are skipped where there is none. */
export const ort = onnxRuntime as unknown as Ort;

/** Layers of the small model. */
export const LAYER_COUNT = 2;

/** Tokens of its vocabulary. */
export const VOCAB_SIZE: number = ZIGLET_SHAPE.vocabSize;

/** The first layers of ziglet as an ONNX file, with a shape of its own where that is told. */
export function smallModel(shape: Partial<DecoderShape> = {}): Uint8Array {
  const layers = ZIGLET_WEIGHTS.layers.slice(0, LAYER_COUNT);
  return makeDecoder({ ...ZIGLET_SHAPE, layerCount: LAYER_COUNT, ...shape }, { ...ZIGLET_WEIGHTS, layers }, {
    attention: "gqa",
  }).model;
}

/** The small model, loaded. */
export function loadSmall(options: Partial<OnnxDecoderOptions> = {}): Promise<OnnxDecoder> {
  return OnnxDecoder.load(smallModel(), { ort, maxSeqLen: 256, ...options });
}

/** What a watched onnxruntime has done, and what it is to do before its next runs. */
export interface Watch {
  readonly ort: Ort;
  /** Sessions that were made and not released. */
  sessionCount: number;
  runCount: number;
  /** Called before each run, with its number from 0 on; what it throws is the error of the run. */
  beforeRun: (run: number) => void | Promise<void>;
}

/** onnxruntime, watched. */
export function watched(): Watch {
  const watch: Watch = {
    ort: {
      Tensor: ort.Tensor,
      InferenceSession: {
        async create(model, options): Promise<OrtSession> {
          const session = await ort.InferenceSession.create(model, options);
          watch.sessionCount += 1;
          return {
            ...(session.outputMetadata === undefined ? {} : { outputMetadata: session.outputMetadata }),
            async run(feeds: OrtTensors): Promise<OrtTensors> {
              await watch.beforeRun(watch.runCount++);
              return await session.run(feeds);
            },
            async release(): Promise<void> {
              watch.sessionCount -= 1;
              await session.release();
            },
          };
        },
      },
    },
    sessionCount: 0,
    runCount: 0,
    beforeRun: () => {},
  };
  return watch;
}

/** The tokens of a text. */
export function tokensOf(text: string): number[] {
  return [0, ...new TextEncoder().encode(text)];
}

/** A sequence that has a text. */
export async function sequenceOf(decoder: OnnxDecoder, text: string): Promise<Sequence> {
  const sequence = decoder.sequence();
  await decoder.step([sequence], [tokensOf(text)]);
  return sequence;
}

/** Fails unless all logits are within `bound`; NaN is not. */
export function assertNear(given: Float32Array, wanted: Float32Array, bound: number): void {
  assert.equal(given.length, wanted.length);
  const worst = given.reduce((worst, logit, i) => {
    const distance = Math.abs(logit - wanted[i]!);
    return distance <= worst ? worst : distance;
  }, 0);
  assert.ok(worst <= bound, `off by ${worst}`);
}
