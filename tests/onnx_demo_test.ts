/** The demo with another model: ziglet as a folder of a model hub, with a tokenizer whose tokens are bytes. */
import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { parseOptions } from "../examples/options.ts";
import { generate, type Result } from "./generate_child.ts";
import { makeDecoder } from "./onnx/decoder.ts";
import { GOLDEN, ZIGLET_SHAPE, ZIGLET_WEIGHTS } from "./onnx/ziglet.ts";
import { ONNX_PATH, withoutOnnx } from "./onnx_runtime.ts";
import { TOKENIZERS_PATH, withoutTokenizers } from "./tokenizer_packages.ts";

/** Why a test is skipped; empty where the packages are there. */
const without = withoutOnnx || withoutTokenizers;

/** The letters that stand for bytes in a tokenizer of bytes: itself where it can be seen, and letters from 256 on. */
const LETTERS = (() => {
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const isSeen = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    return String.fromCodePoint(isSeen ? byte : next++);
  });
})();

/** The token that begins a text: byte 0. */
const BOS = "<bos>";

const TOKENIZER = {
  version: "1.0",
  added_tokens: [
    { id: 0, content: BOS, special: true, single_word: false, lstrip: false, rstrip: false, normalized: false },
  ],
  normalizer: null,
  pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: false },
  post_processor: {
    type: "TemplateProcessing",
    single: [{ SpecialToken: { id: BOS, type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }],
    pair: [],
    special_tokens: { [BOS]: { id: BOS, ids: [0], tokens: [BOS] } },
  },
  decoder: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: false },
  model: {
    type: "BPE",
    dropout: null,
    unk_token: null,
    fuse_unk: false,
    vocab: Object.fromEntries(LETTERS.map((letter, byte) => [letter, byte])),
    merges: [],
  },
};

const TEMPLATE =
  "{{ bos_token }}{% for message in messages %}// {{ message.role }}: {{ message.content }}\n{% endfor %}" +
  "{% if add_generation_prompt %}const {% endif %}";

/** Runs the demo on a folder that has these files beside the model. */
async function demo(files: Record<string, unknown>, args: readonly string[]): Promise<Result> {
  const folder = mkdtempSync(join(tmpdir(), "kvern-demo-"));
  try {
    mkdirSync(join(folder, "onnx"));
    const { model } = makeDecoder(ZIGLET_SHAPE, ZIGLET_WEIGHTS, { attention: "gqa" });
    writeFileSync(join(folder, "onnx", "model.onnx"), model);
    writeFileSync(join(folder, "config.json"), JSON.stringify({ max_position_embeddings: 512, eos_token_id: 0 }));
    for (const [name, json] of Object.entries(files)) {
      writeFileSync(join(folder, name), typeof json === "string" ? json : JSON.stringify(json));
    }
    // The packages lie where the program is started, as if somebody had installed them there.
    mkdirSync(join(folder, "node_modules"));
    symlinkSync(ONNX_PATH, join(folder, "node_modules", "onnxruntime-node"), "junction");
    symlinkSync(TOKENIZERS_PATH, join(folder, "node_modules", "@huggingface"), "junction");
    return await generate(["--onnx", folder, ...args], { cwd: folder });
  } finally {
    rmSync(folder, { recursive: true });
  }
}

function demoTest(name: string, run: () => Promise<void>): void {
  test(`${name}${without}`, { skip: without !== "", timeout: 120_000 }, run);
}

demoTest("generate.ts --onnx writes the golden text of ziglet", async () => {
  const { prompt, greedy } = GOLDEN.cases[0]!;
  const args = [`--prompt=${prompt}`, "--plain", "--temperature=0", `--tokens=${greedy.length}`, "--kv=f32"];
  const { code, stdout, stderr } = await demo({ "tokenizer.json": TOKENIZER }, args);
  assert.deepEqual({ code, stdout, stderr }, { code: 0, stdout: `${prompt}${greedy}\n`, stderr: "" });
});

demoTest("generate.ts --onnx makes a message of the prompt, by the template of the model", async () => {
  const args = ["--prompt=a list", "--temperature=0", "--tokens=20", "--kv=f32"];
  const config = { chat_template: TEMPLATE, bos_token: { content: BOS } };
  const plain = "// user: a list\nconst ";
  const wanted = await demo({ "tokenizer.json": TOKENIZER }, ["--plain", ...args.slice(1), `--prompt=${plain}`]);
  assert.equal(wanted.code, 0, wanted.stderr);
  const rest = wanted.stdout.slice(plain.length);
  for (
    const files of [
      { "tokenizer_config.json": config },
      { "tokenizer_config.json": { ...config, chat_template: undefined }, "chat_template.jinja": TEMPLATE },
    ]
  ) {
    const { code, stdout, stderr } = await demo({ "tokenizer.json": TOKENIZER, ...files }, args);
    assert.deepEqual({ code, stdout, stderr }, { code: 0, stdout: rest, stderr: "" });
  }
});

demoTest("generate.ts --onnx --json tells what it came to, with codes as with floats", async () => {
  const { code, stdout } = await demo({ "tokenizer.json": TOKENIZER }, ["--json", "--kv=i4", "--tokens=30"]);
  assert.equal(code, 0);
  const { kv, tokens, cache, cacheBytes } = JSON.parse(stdout);
  assert.deepEqual({ kv, tokens, cache }, { kv: "i4", tokens: 30, cache: "paged" });
  assert.ok(cacheBytes > 0);
});

demoTest("generate.ts --onnx refuses a folder without a tokenizer", async () => {
  const { code, stderr } = await demo({}, []);
  assert.equal(code, 2);
  assert.match(stderr, /has no tokenizer\.json/);
});

test("--onnx excludes the options that are about the small model or several texts", () => {
  for (const other of ["--samples=2", "--repeat", "--beams=2", "--show-blocks", "--model=x"]) {
    assert.throws(() => parseOptions(["--onnx=x", other]), /exclude each other/);
  }
  assert.throws(() => parseOptions(["--onnx=x", "--cache=contiguous"]), /--onnx needs --cache paged/);
  assert.throws(() => parseOptions(["--plain"]), /--plain needs --onnx/);
});
