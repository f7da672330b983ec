/** The TypeScript in the README runs as it stands there, in both runtimes. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { MOD, runCode } from "./child.ts";

const README = readFileSync(new URL("../README.md", import.meta.url), "utf8").replaceAll("\r\n", "\n");
const blocks = [...README.matchAll(/^```ts\n([\s\S]*?)\n```$/gm)].map((found) => found[1]!);

test("the README has an example with its import, and others that go on from it", () => {
  assert.ok(blocks.length >= 2, `${blocks.length} blocks`);
  assert.match(blocks[0]!, /^import \{ .* \} from "@kvern\/kvern";$/m);
});

for (const [i, block] of blocks.entries()) {
  test(`block ${i + 1} of TypeScript in the README runs: ${block.split("\n")[0]}`, () => {
    const imports = block.includes("@kvern/kvern") ? "" : `import { PagedCache } from "@kvern/kvern";\n`;
    const { code, stderr } = runCode((imports + block).replaceAll("@kvern/kvern", MOD));
    assert.equal(code, 0, stderr);
  });
}
