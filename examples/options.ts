/** The command line: one table of options, read by the parser, by the checks and by the help text. */
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import type { DType, FloatDType } from "../mod.ts";
import { type ArgumentRow, choice, helpLines, integer, readArguments, temperature, UsageError } from "./arguments.ts";
import { countText } from "./wording.ts";
import { STEP_TOKENS } from "./ziglet.ts";

/** The caches that `--cache` can choose. */
export type CacheKind = "contiguous" | "paged";
export const CACHE_KINDS: readonly CacheKind[] = ["contiguous", "paged"];

/** The formats that `--kv` can choose: rows as they come, and codes for those that are a block old. */
export const FLOAT_DTYPES: readonly FloatDType[] = ["f32", "f16", "bf16"];
export const KV_DTYPES: readonly DType[] = [...FLOAT_DTYPES, "q8_0", "q4_0", "i8", "i4", "i2"];

/** Is each value stored by itself? */
export function isFloat(dtype: DType): dtype is FloatDType {
  return (FLOAT_DTYPES as readonly DType[]).includes(dtype);
}

/** What the program does: write text, score a file, or time the next token with and without the cache. */
export type Mode = "generate" | "score" | "compare";

/** The most texts at once: each has a token in a step of the model. */
const TEXTS_MAX = STEP_TOKENS;

const STDIN = 0;

/** The command line, read and checked. */
export interface Options {
  mode: Mode;
  /** Directory of config.json and model.safetensors. */
  modelDirectory: string;
  /** Directory of an ONNX model with its tokenizer; null: the model of `modelDirectory`. */
  onnxDirectory: string | null;
  /** The prompt as it is, where an ONNX model has a template for messages. */
  plain: boolean;
  cache: CacheKind;
  /** Positions a block of a paged cache holds. */
  blockSize: number;
  /** Formats of keys and of values. */
  kv: { k: DType; v: DType };
  /** Newest tokens that stay in floats where a format is codes. */
  tail: number;
  /** First tokens that stay in floats where a format is codes. */
  sinks: number;
  json: boolean;
  // generate
  prompt: string;
  tokens: number;
  temperature: number;
  seed: number;
  /** Texts behind one prompt. */
  samples: number;
  /** Texts kept by a beam search; null: no search. */
  beams: number | null;
  /** Print all texts of a beam search, not the best one alone; a terminal gets them unasked. */
  allBeams: boolean;
  /** Write the text a second time in the same cache. */
  repeat: boolean;
  /** Draw the blocks of the cache; a terminal gets the picture unasked where there are several texts. */
  showBlocks: boolean;
  // score
  /** The file to score. */
  score: string;
  /** Bytes a window; null: the model's context. */
  window: number | null;
  /** Bytes to score; null: the whole file. */
  bytes: number | null;
}

interface OptionRow extends ArgumentRow {
  /** The only mode it makes sense in; null: all of them. */
  mode: Mode | null;
  /** Whether it makes sense with a paged cache only. */
  paged?: boolean;
}

const DEFAULTS = {
  prompt: "const ArrayList = struct {\n",
  tokens: 240,
  temperature: 0.7,
  seed: 1,
  cache: "contiguous",
  blockSize: 16, // small, so that the blocks of a short prompt can be seen
  codesBlockSize: 64, // the smallest that can be codes
  kv: "f32",
  onnxPrompt: "Say in one sentence what a mill is.",
  onnxKv: "f16",
} as const;

const OPTIONS = {
  prompt: {
    value: "TEXT",
    mayBeEmpty: true,
    mode: "generate",
    help: `text to go on from (a line of Zig; with --onnx, ${JSON.stringify(DEFAULTS.onnxPrompt)})`,
  },
  "prompt-file": { value: "FILE", mode: "generate", help: "the same, read from a file; - for standard input" },
  tokens: { value: "N", mode: "generate", help: `tokens to write, fewer where the context ends (${DEFAULTS.tokens})` },
  temperature: {
    value: "T",
    mode: "generate",
    help: `0 takes the most likely token each time (${DEFAULTS.temperature})`,
  },
  seed: { value: "N", mode: "generate", help: `same seed, same text (${DEFAULTS.seed})` },
  samples: {
    value: "N",
    mode: "generate",
    paged: true,
    help: `N texts behind one prompt, held once by the cache; text i has seed + i - 1 (1 to ${TEXTS_MAX})`,
  },
  beams: {
    value: "N",
    mode: "generate",
    paged: true,
    help: `beam search: the likeliest text, of N kept at each byte (1 to ${TEXTS_MAX})`,
  },
  "all-beams": { mode: "generate", help: "print the other texts of the search as well (unasked on a terminal)" },
  repeat: {
    mode: "generate",
    paged: true,
    help: "write the text a second time, from where the cache has the prompt by its tokens",
  },
  "show-blocks": {
    mode: "generate",
    paged: true,
    help: "draw the blocks and who shares them (unasked on a terminal, with several texts)",
  },
  score: { value: "FILE", mode: "score", help: "bits per byte that the model needs for the file" },
  window: { value: "N", mode: "score", help: "bytes a window, each starts without a past (the model's context)" },
  bytes: { value: "N", mode: "score", help: "score the first N bytes of the file only" },
  compare: { mode: "compare", help: "time of the next token, with the cache and without it" },
  cache: {
    value: "KIND",
    mode: null,
    help: `${CACHE_KINDS.join(", ")} (${DEFAULTS.cache}; paged where another option needs it)`,
  },
  "block-size": {
    value: "N",
    mode: null,
    paged: true,
    help: `positions a block of a paged cache holds, a power of two from 1 to 256 (${DEFAULTS.blockSize}; ` +
      `${DEFAULTS.codesBlockSize} for codes)`,
  },
  kv: {
    value: "DTYPE",
    mode: null,
    help: `format of keys and values: ${KV_DTYPES.join(", ")} (${DEFAULTS.kv}; with --onnx, ${DEFAULTS.onnxKv})`,
  },
  "kv-k": { value: "DTYPE", mode: null, help: "format of keys alone" },
  "kv-v": { value: "DTYPE", mode: null, help: "format of values alone" },
  tail: { value: "N", mode: null, help: "newest tokens that stay in f16 beside codes, whole blocks (0)" },
  sinks: { value: "N", mode: null, help: "first tokens that stay in f16 beside codes (0)" },
  model: { value: "DIR", mode: null, help: "directory of config.json and model.safetensors (examples/ziglet)" },
  onnx: {
    value: "DIR",
    mode: "generate",
    paged: true,
    help: "another model: a directory of an ONNX file, tokenizer.json and config.json, as model hubs have it",
  },
  plain: { mode: "generate", help: "the prompt as it is, where the model of --onnx has a template for messages" },
  json: { mode: null, help: "one JSON object on stdout, and no text" },
  help: { mode: null, help: "this text; -h, too" },
} as const satisfies Record<string, OptionRow>;

type OptionName = keyof typeof OPTIONS;

/** Pairs that contradict each other, beside those of different modes. */
const EXCLUSIONS: readonly [OptionName, OptionName][] = [
  ["prompt", "prompt-file"],
  ["samples", "beams"],
  ["repeat", "samples"],
  ["repeat", "beams"],
  // A beam search draws nothing.
  ["temperature", "beams"],
  ["seed", "beams"],
  ["show-blocks", "json"],
  // The picture has the blocks of sequences, not those that are kept behind them.
  ["repeat", "show-blocks"],
  ["all-beams", "json"],
  // One text by a model whose weights, tokens and context are its own.
  ["onnx", "model"],
  ["onnx", "samples"],
  ["onnx", "beams"],
  ["onnx", "repeat"],
  ["onnx", "show-blocks"],
];

/** Reads the arguments; a wrong one is a UsageError. */
export function parseOptions(args: string[]): Options | "help" {
  const given = readArguments(args, OPTIONS);
  if (given === "help") return "help";

  const mode: Mode = given.has("score") ? "score" : given.has("compare") ? "compare" : "generate";
  for (const name of given.keys()) {
    const row: OptionRow = OPTIONS[name];
    if (row.mode === null || row.mode === mode) continue;
    if (mode !== "generate") throw new UsageError(`--${name} and --${mode} exclude each other`);
    throw new UsageError(`--${name} needs --${row.mode}`);
  }

  for (const [one, other] of EXCLUSIONS) {
    if (given.has(one) && given.has(other)) throw new UsageError(`--${one} and --${other} exclude each other`);
  }
  if (given.has("all-beams") && !given.has("beams")) throw new UsageError("--all-beams needs --beams");
  if (given.has("plain") && !given.has("onnx")) throw new UsageError("--plain needs --onnx");

  const text = (name: OptionName): string | undefined => given.get(name);
  const hasOnnx = given.has("onnx");
  const both = choice("kv", text("kv") ?? (hasOnnx ? DEFAULTS.onnxKv : DEFAULTS.kv), KV_DTYPES);
  const kv = { k: choice("kv-k", text("kv-k") ?? both, KV_DTYPES), v: choice("kv-v", text("kv-v") ?? both, KV_DTYPES) };
  const codes = (["kv-k", "kv-v", "kv"] as const).find((name) => !isFloat((text(name) ?? DEFAULTS.kv) as DType));
  for (const name of ["tail", "sinks"] as const) {
    if (given.has(name) && isFloat(kv.k) && isFloat(kv.v)) throw new UsageError(`--${name} needs --kv with codes`);
  }
  if (given.has("repeat") && codes !== undefined) {
    // Rows that were floats in the first run would be codes in the second: another text.
    throw new UsageError(`--repeat needs --kv with ${FLOAT_DTYPES.join(", ")}: --${codes} has codes`);
  }
  const needsPaged = codes ?? [...given.keys()].find((name) => (OPTIONS[name] as OptionRow).paged);
  const cache = choice("cache", text("cache") ?? (needsPaged ? "paged" : DEFAULTS.cache), CACHE_KINDS);
  if (cache !== "paged" && needsPaged !== undefined) throw new UsageError(`--${needsPaged} needs --cache paged`);
  return {
    mode,
    modelDirectory: text("model") ?? fileURLToPath(new URL("./ziglet", import.meta.url)),
    onnxDirectory: text("onnx") ?? null,
    plain: given.has("plain"),
    cache,
    blockSize: blockSize(text("block-size")) ?? (codes || hasOnnx ? DEFAULTS.codesBlockSize : DEFAULTS.blockSize),
    kv,
    tail: integer("tail", text("tail"), 0) ?? 0,
    sinks: integer("sinks", text("sinks"), 0) ?? 0,
    json: given.has("json"),
    prompt: text("prompt") ?? readPrompt(text("prompt-file")) ??
      (hasOnnx ? DEFAULTS.onnxPrompt : DEFAULTS.prompt),
    tokens: integer("tokens", text("tokens"), 1) ?? DEFAULTS.tokens,
    temperature: temperature("temperature", text("temperature")) ?? DEFAULTS.temperature,
    seed: integer("seed", text("seed"), 0) ?? DEFAULTS.seed,
    samples: integer("samples", text("samples"), 1, TEXTS_MAX) ?? 1,
    beams: integer("beams", text("beams"), 1, TEXTS_MAX),
    allBeams: given.has("all-beams"),
    repeat: given.has("repeat"),
    showBlocks: given.has("show-blocks"),
    score: text("score") ?? "",
    window: integer("window", text("window"), 1),
    bytes: integer("bytes", text("bytes"), 1),
  };
}

/** The text of --help. */
export function helpText(): string {
  return `A small language model (5.3 M parameters, one token is one byte) writes Zig, or another one with --onnx; kvern is its KV cache.

  deno run -A examples/generate.ts [options]
  bun examples/generate.ts [options]
  node examples/generate.ts [options]

${helpLines(OPTIONS)}
`;
}

/** The bytes of a file that was named, `-` for standard input. */
export function readGivenFile(path: string): Uint8Array {
  try {
    return readFileSync(path === "-" ? STDIN : path);
  } catch (error) {
    const code = (error as { code?: string }).code;
    throw new UsageError(`${path}: ${code === "ENOENT" ? "no such file" : `cannot be read (${code ?? error})`}`);
  }
}

/** The text of a file, as it stands there; null where none is given. */
function readPrompt(path: string | undefined): string | null {
  if (path === undefined) return null;
  const bytes = readGivenFile(path);
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new UsageError(`${path}: its ${countText(bytes.length, "byte")} are no text in UTF-8`);
  }
}

/** A size of blocks; null where the option is not given. */
export function blockSize(text: string | undefined): number | null {
  if (text === undefined) return null;
  const sizes = Array.from({ length: 9 }, (_, exponent) => `${2 ** exponent}`);
  return Number(choice("block-size", text, sizes));
}
