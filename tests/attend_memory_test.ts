/** What attention takes of memory beside the cache: not what is left of it after the call, but its most within it. */

import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { runFile } from "./child.ts";

const isLinux = process.platform === "linux";
const unlessLinux = isLinux ? "" : " (skipped: only Linux is asked here what a process had at its height)";

test(
  `attention over 64 MiB of codes makes no copy of them, not even for a while${unlessLinux}`,
  { skip: !isLinux },
  () => {
    // A process of its own: where another test had more, a copy would not show.
    const { code, stdout, stderr } = runFile(new URL("attend_memory_child.ts", import.meta.url), {});
    assert.equal(code, 0, stderr);
    const { grown, storeBytes } = JSON.parse(stdout);
    assert.equal(storeBytes, 58_240 * 1152);
    assert.ok(grown < storeBytes / 4, `${grown} bytes`);
  },
);
