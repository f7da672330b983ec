/**
 * One step: tokens join their sequences, all of them or none.
 *
 * Rows stay pending until every layer of every sequence has them, and are committed at once. Whatever fails before, and
 * whoever fails, the pending rows are dropped, and all sequences are what they were.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { countText } from "../ffi/status.ts";
import { isPaged, type PagedSequence } from "../memory/sequence.ts";
import type { PagedCache } from "../paged_cache.ts";
import { memoryOf, type Sequence } from "../sequence.ts";
import type { Pieces } from "./pieces.ts";
import { type Addition, runsOf } from "./runs.ts";
import { checkSignal } from "./signal.ts";

/** What a step is asked for. */
export interface StepRequest {
  readonly sequences: readonly Sequence[];
  /** Tokens of each sequence. */
  readonly tokens: readonly Uint32Array[];
  readonly allLogits: boolean;
  readonly tokensPerRun: number;
  readonly signal: AbortSignal | undefined;
}

/** Runs a step, and gives the logits of each sequence: those of the last token, or of all: `[token][vocab]`. */
export async function runStep(pieces: Pieces, cache: PagedCache, request: StepRequest): Promise<Float32Array[]> {
  const { sequences, tokens, allLogits, tokensPerRun, signal } = request;
  checkSignal(signal);
  checkSequences(cache, sequences);
  const additions = sequences.map((sequence, i) => ({ sequence, start: sequence.seqLen, tokens: tokens[i]! }));
  additions.forEach((addition, i) => checkRoom(addition, i));
  try {
    const found = sequences.map<Float32Array[]>(() => []);
    for (const parts of runsOf(additions, tokensPerRun, allLogits)) {
      const logits = await pieces.run(parts, cache, signal);
      const width = logits.length / parts.reduce((sum, { logitCount }) => sum + logitCount, 0);
      let end = 0;
      for (const { index, logitCount } of parts) {
        if (logitCount > 0) found[index]!.push(logits.slice(end * width, (end += logitCount) * width));
      }
    }
    checkSignal(signal);
    additions.forEach(checkUntouched); // a commit cannot fail after that
    for (const { sequence, tokens } of additions) sequence.commit(tokens.length, { tokens });
    return found.map(joined);
  } catch (error) {
    additions.forEach(dropPending);
    throw error;
  }
}

/** Refuses sequences that no step can be for. */
function checkSequences(cache: PagedCache, sequences: readonly Sequence[]): void {
  const seen = new Set<number>();
  for (const [i, sequence] of sequences.entries()) {
    const memory = pagedOf(sequence);
    if (memory.cache.handle !== cache.handle && memory.handle !== 0) {
      throw invalid(`sequence ${i} is of another cache than the decoder's`);
    }
    memory.checkOwn("step");
    const { seqLen } = sequence; // refuses one that was freed
    if (seen.has(memory.handle)) throw invalid(`each sequence may stand there once: sequence ${i} stood there before`);
    seen.add(memory.handle);
    if (rowsOf(sequence).some((rows) => rows !== seqLen)) {
      throw new KvError(
        "commit_mismatch",
        `Cannot step as sequence ${i} has rows pending: commit(n) or truncate(seqLen) comes first`,
      );
    }
  }
}

function checkRoom({ sequence: { maxSeqLen }, start, tokens }: Addition, i: number): void {
  if (start + tokens.length <= maxSeqLen) return;
  throw new KvError(
    "cache_full",
    `Cannot step as a sequence holds at most ${countText(maxSeqLen, "token")}: sequence ${i} has ${start}, ` +
      `${tokens.length} were to come`,
  );
}

/** Refuses a sequence that somebody else changed while the step ran. */
function checkUntouched({ sequence, start, tokens }: Addition, i: number): void {
  const end = start + tokens.length;
  if (sequence.seqLen === start && rowsOf(sequence).every((rows) => rows === end)) return;
  throw new KvError("commit_mismatch", `Cannot step as sequence ${i} was changed while the step ran`);
}

/** Drops what a step has appended; a sequence that was freed in the meantime has nothing. */
function dropPending({ sequence }: Addition): void {
  try {
    sequence.truncate(sequence.seqLen);
  } catch (error) {
    if (!(error instanceof KvError && error.code === "stale_handle")) throw error;
  }
}

/** Committed and pending rows of each layer. */
function rowsOf(sequence: Sequence): number[] {
  const memory = pagedOf(sequence);
  return Array.from({ length: sequence.layerCount }, (_, layer) => memory.rowCount(layer));
}

function pagedOf(sequence: Sequence): PagedSequence {
  const memory = memoryOf(sequence);
  if (isPaged(memory)) return memory;
  throw new TypeError("a sequence must be one of the decoder's cache: it is one of a ContiguousCache");
}

/** Arrays as one. */
function joined(arrays: readonly Float32Array[]): Float32Array {
  if (arrays.length === 1) return arrays[0]!;
  const whole = new Float32Array(arrays.reduce((sum, { length }) => sum + length, 0));
  let end = 0;
  for (const array of arrays) {
    whole.set(array, end);
    end += array.length;
  }
  return whole;
}

function invalid(rule: string): KvError {
  return new KvError("invalid_config", `Cannot step as ${rule}`);
}
