/** The limit that KVERN_MAX_BYTES sets over everything a process reserves. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { systemInfo } from "../mod.ts";
import { MOD, runCode } from "./child.ts";
import { inWorker } from "./workers.ts";

/** Runs `body` under a limit; it prints JSON, and `attempt(call)` gives what a call returns or is refused with. */
function under(limit: string, body: string): unknown {
  const { code, stdout, stderr } = runCode(
    `
    import { BlockPool, BufferPool, ContiguousCache, KvError, PagedCache, systemInfo } from "${MOD}";
    import { inWorker } from "${new URL("./workers.ts", import.meta.url).href}";
    function attempt(call) {
      try {
        return call() ?? "done";
      } catch (error) {
        if (!(error instanceof KvError)) throw error;
        return [error.code, error.message];
      }
    }
    ${body}
    `,
    { env: { KVERN_MAX_BYTES: limit }, denoFlags: ["-A", "--no-check"] },
  );
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout);
}

test("past KVERN_MAX_BYTES every reservation is out_of_memory and says so", { timeout: 60_000 }, () => {
  const MIB = 2 ** 20;
  const result = under(
    `${64 * MIB}`,
    `
    const contiguous = (mib) => new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 128, maxSeqLen: mib * 1024 });
    const shape = { layerCount: 1, kvHeadCount: 8, headDim: 128, blockSize: 64 };
    const first = contiguous(60);
    const rows = new Float32Array(1024 * 1024);
    const sequence = new PagedCache({ ...shape, maxSeqLen: 4096 }).sequence();
    const refused = [
      () => contiguous(5),
      () => { for (let i = 0; i < 16; i++) sequence.append(0, rows, rows); },
      () => new BlockPool(shape).prewarm(1000),
      () => new BufferPool().acquire(5 * ${MIB}),
      () => new BufferPool().prewarm(${MIB}, 5),
    ].map(attempt);
    const during = systemInfo();
    first.free();
    const again = attempt(() => contiguous(50).layerCount);
    console.log(JSON.stringify({ refused, again, maxBytes: during.maxBytes, reserved: during.reservedBytes }));
    `,
  ) as { refused: unknown[]; again: unknown; maxBytes: number; reserved: number };
  for (const answer of result.refused) {
    assert.ok(Array.isArray(answer), `${answer}`);
    assert.equal(answer[0], "out_of_memory", answer[1]);
    assert.match(answer[1], /^Cannot .+ as .+; KVERN_MAX_BYTES is 67108864$/);
  }
  assert.equal(result.refused.length, 5);
  assert.equal(result.maxBytes, 64 * MIB);
  assert.ok(result.reserved >= 60 * MIB && result.reserved <= 64 * MIB, `${result.reserved}`);
  assert.equal(result.again, 1);
});

test("caches that are dropped where the event loop never turns end in out_of_memory", { timeout: 60_000 }, () => {
  const result = under(
    `${2 ** 28}`,
    `
    const rows = new Float32Array(128 * 1024).fill(1);
    const refused = attempt(() => {
      for (let i = 0; i < 3000; i++) {
        const cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 128, maxSeqLen: 8192 });
        cache.append(0, 0, rows, rows);
      }
    });
    console.log(JSON.stringify([refused, systemInfo().reservedBytes]));
    `,
  ) as [unknown, number];
  assert.equal((result[0] as string[])[0], "out_of_memory");
  assert.ok(result[1] <= 2 ** 28 && result[1] > 2 ** 27, `${result[1]}`);
});

test("KVERN_MAX_BYTES is a whole number of bytes and nothing else", { timeout: 60_000 }, () => {
  for (const wrong of ["0", "1.5", "-1", "1e9", "4G", "9007199254740992"]) {
    const [code, message] = under(wrong, "console.log(JSON.stringify(attempt(systemInfo)));") as [string, string];
    assert.equal(code, "invalid_config");
    assert.equal(
      message,
      "Cannot use KVERN_MAX_BYTES as it must be a whole number of bytes, 1 to 9007199254740991: " +
        `KVERN_MAX_BYTES is ${wrong}`,
    );
  }
});

test("the first limit holds for the process: a Worker may name the same one or none", { timeout: 60_000 }, () => {
  const result = under(
    "1000000000",
    `
    const { maxBytes } = systemInfo();
    const workers = [];
    for (const bytes of ["1000000000", "", "999999999"]) {
      workers.push(await inWorker({ kind: "settings", env: { KVERN_MAX_BYTES: bytes } }));
    }
    console.log(JSON.stringify([maxBytes, ...workers.map(({ level, message }) => message ?? typeof level), systemInfo().maxBytes]));
    `,
  );
  const refused = "Cannot use KVERN_MAX_BYTES as the process may reserve 1000000000 since its first use of kvern: " +
    "KVERN_MAX_BYTES is 999999999";
  assert.deepEqual(result, [1e9, "string", "string", refused, 1e9]);
});

test("without a limit there is none, and a Worker cannot set one later", { timeout: 60_000 }, async () => {
  assert.equal(systemInfo().maxBytes, Infinity); // the first use of this process, where no other test came before
  const answer = await inWorker({ kind: "settings", env: { KVERN_MAX_BYTES: "1000000000" } });
  assert.deepEqual(answer, {
    refused: "invalid_config",
    message:
      "Cannot use KVERN_MAX_BYTES as the process may reserve any number of bytes since its first use of kvern: " +
      "KVERN_MAX_BYTES is 1000000000",
  });
  assert.equal(systemInfo().maxBytes, Infinity);
});
