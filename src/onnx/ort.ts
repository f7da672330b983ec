/**
 * The part of onnxruntime that is used, in the shape that `onnxruntime-node` and `onnxruntime-web` share, and the sessions
 * that run the pieces of a model.
 *
 * Neither package is imported: a program hands in the one it has.
 *
 * @module
 */

import { KvError } from "../error.ts";
import type { CutModel } from "./cut/cut_model.ts";

/** A tensor of onnxruntime. */
export interface OrtTensor {
  /** Its element type: `"float32"`, `"int64"` and so on. */
  readonly type: string;
  /** Its axes, outermost first. */
  readonly dims: readonly number[];
  /** Its elements, a typed array where they are numbers. */
  readonly data: unknown;
}

/** Tensors by the names of the values they are. */
export type OrtTensors = Readonly<Record<string, OrtTensor>>;

/** A model that onnxruntime has loaded. */
export interface OrtSession {
  /** What is known of its outputs; older versions do not say. */
  readonly outputMetadata?: readonly OrtValue[];
  /** Computes all outputs. */
  run(feeds: OrtTensors): Promise<OrtTensors>;
  /** Gives its memory back. */
  release(): Promise<void>;
}

/** What onnxruntime says of an output. */
export interface OrtValue {
  /** The name of the value. */
  readonly name: string;
  /** Its axes: a number, or the name of one that varies. */
  readonly shape?: readonly (number | string)[];
}

/** Options of a session, as onnxruntime takes them: `intraOpNumThreads`, `executionProviders`, `extra` and the others. */
export type OrtSessionOptions = Readonly<Record<string, unknown>>;

/** The package `onnxruntime-node` or `onnxruntime-web`, as `import * as ort from ...` gives it. */
export interface Ort {
  /** Makes tensors. */
  readonly Tensor: {
    new (type: "float32", data: Float32Array, dims: readonly number[]): OrtTensor;
    new (type: "int64", data: BigInt64Array, dims: readonly number[]): OrtTensor;
    new (type: "int32", data: Int32Array, dims: readonly number[]): OrtTensor;
    new (type: "bool", data: Uint8Array, dims: readonly number[]): OrtTensor;
  };
  /** Loads models. */
  readonly InferenceSession: {
    /** Loads a model from its bytes. */
    create(model: Uint8Array, options?: OrtSessionOptions): Promise<OrtSession>;
  };
}

/** The package, where its names stand in it or in what it exports by default. */
export function checkOrt(ort: unknown): Ort {
  for (const found of [ort, (ort as { default?: unknown } | undefined)?.default]) {
    const { Tensor, InferenceSession } = (found ?? {}) as Partial<Ort>;
    if (typeof Tensor === "function" && typeof InferenceSession?.create === "function") return found as Ort;
  }
  throw new TypeError(
    "ort must be the package onnxruntime-node or onnxruntime-web: it has no InferenceSession and Tensor",
  );
}

/** A session for each piece. */
export async function createSessions(
  ort: Ort,
  { pieces, folder }: CutModel,
  options: OrtSessionOptions = {},
): Promise<OrtSession[]> {
  const given = sessionOptions(options, folder);
  const sessions: OrtSession[] = [];
  try {
    for (const piece of pieces) sessions.push(await ort.InferenceSession.create(piece.model, given));
  } catch (error) {
    const place = `piece ${sessions.length} of ${pieces.length}`;
    await releaseSessions(sessions);
    throw failure(`load the model as onnxruntime does not take ${place}`, error);
  }
  return sessions;
}

/** Gives the memory of all sessions back; one that fails to does not keep the others. */
export async function releaseSessions(sessions: readonly OrtSession[]): Promise<void> {
  await Promise.allSettled(sessions.map((session) => session.release()));
}

/** What onnxruntime said no to. */
export function failure(action: string, cause: unknown): KvError {
  return new KvError("model_failed", `Cannot ${action}: ${cause instanceof Error ? cause.message : cause}`, { cause });
}

/**
 * The options of every session: those that were given, and where weights lie.
 *
 * Threads of a session spin for a while after its last node, waiting for the next one. Here that would be the work of another
 * session or kvern's, which wants the same cores: so they stop at once, unless the options say otherwise. And each session
 * would keep an arena as large as its largest run: of a model of 135 M parameters 740 MB after a prompt of 2048 tokens, and
 * 100 MB without (2 cores of an AMD EPYC, 512 tokens a run). A step took as long either way.
 */
function sessionOptions(options: OrtSessionOptions, folder: string | undefined): OrtSessionOptions {
  const extra = (options.extra ?? {}) as Record<string, unknown>;
  const session = { force_spinning_stop: "1", ...(extra.session ?? {}) as Record<string, unknown> };
  const place = folder === undefined ? {} : { model_external_initializers_file_folder_path: folder };
  return { enableCpuMemArena: false, ...options, extra: { ...extra, session: { ...session, ...place } } };
}
