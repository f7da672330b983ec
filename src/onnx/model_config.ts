/**
 * What the files beside a model say of it: how many positions it knows, and with which tokens it ends a text.
 *
 *     config.json              max_position_embeddings, eos_token_id
 *     generation_config.json   eos_token_id
 *     genai_config.json        model.context_length, model.eos_token_id
 *
 * They are read where they are there: none of them is needed to run a model.
 *
 * @module
 */

import { readFileSync, statSync } from "node:fs";
import { basename, dirname, join } from "node:path";

/** What is known of a model beside its graph. */
export interface ModelConfig {
  /** Positions it was made for. */
  readonly positionCount?: number;
  /** Tokens that end a text. */
  readonly endTokens: readonly number[];
}

/** The files beside a model that is a folder or a file; exporters put the file into a folder `onnx` of its own. */
export function readModelConfig(path: string): ModelConfig {
  const folder = statSync(path).isDirectory() ? path : dirname(path);
  const folders = basename(folder) === "onnx" ? [folder, dirname(folder)] : [folder];
  const read = (name: string) =>
    folders.map((folder) => readJson(join(folder, name))).find((json) => json !== undefined);
  const config = read("config.json"), generation = read("generation_config.json");
  const genai = fieldOf(read("genai_config.json"), "model");

  const positionCount = [
    fieldOf(config, "max_position_embeddings"),
    fieldOf(fieldOf(config, "text_config"), "max_position_embeddings"),
    fieldOf(genai, "context_length"),
  ].find(isCount);
  const endTokens = [generation, config, genai].map((json) => tokensOf(fieldOf(json, "eos_token_id")))
    .find((tokens) => tokens.length > 0) ?? [];
  return { endTokens, ...(positionCount === undefined ? {} : { positionCount }) };
}

function readJson(path: string): unknown {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch {
    return undefined; // it is not there, or not for us to read
  }
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new SyntaxError(`Cannot read ${path}: ${error instanceof Error ? error.message : error}`, { cause: error });
  }
}

function fieldOf(json: unknown, name: string): unknown {
  return typeof json === "object" && json !== null ? (json as Record<string, unknown>)[name] : undefined;
}

function isCount(value: unknown): value is number {
  return typeof value === "number" && value > 0 && value >>> 0 === value;
}

/** One token or several. */
function tokensOf(value: unknown): number[] {
  const tokens: unknown[] = Array.isArray(value) ? value : [value];
  return tokens.filter((token) => token === 0 || isCount(token)) as number[];
}
