/** The TypeScript in the README and in `docs/` runs as it stands there, in every runtime. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";
import { MOD, runCode } from "./child.ts";

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

test("the README has an example, the pages have others, and each has its import", () => {
  assert.ok(blocks.length >= 2, `${blocks.length} blocks`);
  assert.equal(blocks[0]!.page, "README.md");
  assert.ok(blocks.some(({ page }) => page === "docs/caches.md"));
  for (const { page, block } of blocks) assert.match(block, /^import \{ .* \} from "@kvern\/kvern";$/m, page);
});

for (const { page, i, block } of blocks) {
  test(`block ${i + 1} of TypeScript in ${page} runs: ${block.split("\n")[0]}`, () => {
    const { code, stderr } = runCode(
      block.replaceAll(/"@kvern\/kvern(\/\w+)?"/g, (_, entry) => `"${ENTRIES[entry ?? ""]}"`),
    );
    assert.equal(code, 0, stderr);
  });
}
