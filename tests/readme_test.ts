/** The TypeScript in the README and in `docs/` runs as it stands there, in every runtime. */

import assert from "node:assert/strict";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { pathToFileURL } from "node:url";
import { MOD, runCode } from "./child.ts";
import { makeDecoder } from "./onnx/decoder.ts";
import { ZIGLET_SHAPE, ZIGLET_WEIGHTS } from "./onnx/ziglet.ts";
import { ONNX_PATH, withoutOnnx } from "./onnx_runtime.ts";

const ROOT = new URL("../", import.meta.url);
const ENTRIES: Record<string, string> = {
  "": MOD,
  "/embed": new URL("src/embed.ts", ROOT).href,
  "/onnx": new URL("src/onnx.ts", ROOT).href,
};
const PAGES = [
  "README.md",
  ...readdirSync(new URL("docs/", ROOT)).filter((name) => name.endsWith(".md")).sort()
    .map((name) => `docs/${name}`),
];

/** The blocks of TypeScript of a page. */
function blocksOf(page: string): string[] {
  const markdown = readFileSync(new URL(page, ROOT), "utf8").replaceAll("\r\n", "\n");
  return [...markdown.matchAll(/^```ts\n([\s\S]*?)\n```$/gm)].map((found) => found[1]!);
}

const blocks = PAGES.flatMap((page) => blocksOf(page).map((block, i) => ({ page, i, block })));

/** The folder that stands for `model/` in the blocks: ziglet, as a model of a hub. */
const MODEL = mkdtempSync(join(tmpdir(), "kvern-readme-"));
writeFileSync(join(MODEL, "model.onnx"), makeDecoder(ZIGLET_SHAPE, ZIGLET_WEIGHTS, { attention: "gqa" }).model);
writeFileSync(join(MODEL, "config.json"), JSON.stringify({ max_position_embeddings: ZIGLET_SHAPE.maxSeqLen }));
after(() => rmSync(MODEL, { recursive: true }));

/** What stands for the package onnxruntime-node, which is installed elsewhere. */
const ORT = join(MODEL, "ort.mjs");
writeFileSync(
  ORT,
  `import { createRequire } from "node:module";
   export const { InferenceSession, Tensor } = createRequire(import.meta.url)(${JSON.stringify(ONNX_PATH)});`,
);

/** A block as it runs here, where neither the package nor onnxruntime is installed. */
function runnable(block: string): string {
  return block
    .replaceAll(/"@kvern\/kvern(\/\w+)?"/g, (_, entry) => `"${ENTRIES[entry ?? ""]}"`)
    .replaceAll('"onnxruntime-node"', JSON.stringify(pathToFileURL(ORT).href))
    .replaceAll('"model/"', JSON.stringify(MODEL));
}

test("the README has an example, the pages have others, and each has its import", () => {
  assert.ok(blocks.length >= 2, `${blocks.length} blocks`);
  assert.equal(blocks[0]!.page, "README.md");
  assert.ok(blocks.some(({ page }) => page === "docs/caches.md"));
  for (const { page, block } of blocks) assert.match(block, /^import \{ .* \} from "@kvern\/kvern(\/onnx)?";$/m, page);
});

for (const { page, i, block } of blocks) {
  const reason = block.includes("onnxruntime-node") ? withoutOnnx : "";
  const name = `block ${i + 1} of TypeScript in ${page} runs: ${block.split("\n")[0]}${reason}`;
  test(name, { skip: reason !== "", timeout: 120_000 }, () => {
    const { code, stderr } = runCode(runnable(block));
    assert.equal(code, 0, stderr);
  });
}
