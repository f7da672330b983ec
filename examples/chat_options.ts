/** The command line of chat_pool.ts. */
import { fileURLToPath } from "node:url";
import { type ArgumentRow, choice, helpLines, integer, readArguments, temperature } from "./arguments.ts";
import type { ChatOptions } from "./chat.ts";
import { blockSize, FLOAT_DTYPES } from "./options.ts";

/** The command line, read and checked. */
export interface ChatPoolOptions extends ChatOptions {
  /** Directory of config.json and model.safetensors. */
  modelDirectory: string;
  json: boolean;
}

const SYSTEM = `//! Small functions for numbers and slices, in plain Zig.
//! Each of them has a doc comment, takes what it needs as arguments, and allocates no memory.

const std = @import("std");
const assert = std.debug.assert;
const testing = std.testing;
const mem = std.mem;
const math = std.math;
`;
const DEFAULTS = {
  conversations: 8,
  turns: 2,
  tokens: 48,
  temperature: 0.7,
  seed: 1,
  blockSize: 16,
  kv: "f32",
} as const;

const OPTIONS = {
  conversations: { value: "N", help: `conversations behind one system prompt (${DEFAULTS.conversations})` },
  turns: { value: "N", help: `turns of each (${DEFAULTS.turns})` },
  tokens: { value: "N", help: `the most bytes of an answer (${DEFAULTS.tokens})` },
  system: { value: "TEXT", mayBeEmpty: true, help: "what every conversation begins with (a few lines of Zig)" },
  temperature: { value: "T", help: `0 takes the most likely byte each time (${DEFAULTS.temperature})` },
  seed: { value: "N", help: `of the first conversation, the others have the next (${DEFAULTS.seed})` },
  "block-size": {
    value: "N",
    help: `positions a block of the cache holds, a power of two from 1 to 256 (${DEFAULTS.blockSize})`,
  },
  kv: { value: "DTYPE", help: `format of keys and values: ${FLOAT_DTYPES.join(", ")} (${DEFAULTS.kv})` },
  model: { value: "DIR", help: "directory of config.json and model.safetensors (examples/ziglet)" },
  json: { help: "one JSON object on stdout, and no text" },
  help: { help: "this text; -h, too" },
} as const satisfies Record<string, ArgumentRow>;

/** Reads the arguments; a wrong one is a UsageError. */
export function parseChatOptions(args: string[]): ChatPoolOptions | "help" {
  const given = readArguments(args, OPTIONS);
  if (given === "help") return "help";
  const count = (name: "conversations" | "turns" | "tokens", max?: number) =>
    integer(name, given.get(name), 1, max) ?? DEFAULTS[name];
  return {
    conversations: count("conversations", 10_000),
    turns: count("turns"),
    tokens: count("tokens"),
    system: given.get("system") ?? SYSTEM,
    temperature: temperature("temperature", given.get("temperature")) ?? DEFAULTS.temperature,
    seed: integer("seed", given.get("seed"), 0) ?? DEFAULTS.seed,
    blockSize: blockSize(given.get("block-size")) ?? DEFAULTS.blockSize,
    kv: choice("kv", given.get("kv") ?? DEFAULTS.kv, FLOAT_DTYPES),
    modelDirectory: given.get("model") ?? fileURLToPath(new URL("./ziglet", import.meta.url)),
    json: given.has("json"),
  };
}

/** The text of --help. */
export function chatHelpText(): string {
  return `Many conversations behind one system prompt: what is not computed again, as the cache finds it by its tokens.

  deno run -A examples/chat_pool.ts [options]
  bun examples/chat_pool.ts [options]
  node examples/chat_pool.ts [options]

${helpLines(OPTIONS)}
`;
}
