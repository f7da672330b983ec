/** Calls whose arrays lie over each other or over the cache's own memory: a sample in a process of its own. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { runCode } from "./child.ts";
import type { OverlapReport } from "./hostile_overlap.ts";

const MODULE = new URL("./hostile_overlap.ts", import.meta.url).href;

for (const seed of [20261128, Date.now() >>> 0]) {
  test(`calls over overlapping and own memory are exact or refused (seed ${seed})`, { timeout: 120_000 }, () => {
    const body = `import { overlap } from "${MODULE}"; console.log(JSON.stringify(overlap(2000, ${seed})));`;
    const { code, stdout, stderr } = runCode(body);
    assert.equal(code, 0, `seed ${seed}: ${stderr}`);
    const { exact, refused }: OverlapReport = JSON.parse(stdout);
    for (const name of ["append", "gather", "attend", "quantizeRows", "extend"]) {
      assert.ok(exact[name]! > 20, JSON.stringify({ exact, refused }));
    }
    for (const name of ["gather", "attend"]) assert.ok(refused[name]! > 20, JSON.stringify({ exact, refused }));
  });
}
