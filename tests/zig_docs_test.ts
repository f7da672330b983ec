/**
 * The pages of `zig build docs`: every name of `zig/src/kvern.zig` is on them, with words about it. A browser runs the
 * program that renders them; so does this test.
 *
 * @module
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { findToolOrNone, ZIG_FOLDER, zigEnvironment } from "../zig/toolchain.ts";
import { inDeno } from "./child.ts";

const zig = findToolOrNone("zig");
const reason = !inDeno
  ? " (skipped: it tests no TypeScript, and runs under Deno)"
  : zig
  ? ""
  : " (skipped: no Zig 0.16)";

/** The exports of Zig's `main.wasm` that are used here. */
interface Pages {
  readonly memory: WebAssembly.Memory;
  alloc(byteCount: number): number;
  unpack(pointer: number, byteCount: number): void;
  set_input_string(byteCount: number): number;
  find_decl(): number;
  categorize_decl(decl: number, resolveAliasCount: number): number;
  get_aliasee(): number;
  find_module_root(module: number): number;
  decl_docs_html(decl: number, isShort: number): bigint;
}

/** The category of a name that stands for another one. */
const ALIAS = 7;

/** The pages as a browser has them: the program with the sources in its memory. */
async function open(folder: string): Promise<Pages> {
  const sources = readFileSync(join(folder, "sources.tar"));
  const panic = () => assert.fail("the pages cannot be rendered");
  const program = new WebAssembly.Module(readFileSync(join(folder, "main.wasm")));
  const { exports } = await WebAssembly.instantiate(program, { js: { log() {}, panic } });
  const pages = exports as unknown as Pages;
  const pointer = pages.alloc(sources.length);
  new Uint8Array(pages.memory.buffer, pointer, sources.length).set(sources);
  pages.unpack(pointer, sources.length);
  return pages;
}

/** What the page of a declaration says, as HTML. */
function docsOf(pages: Pages, decl: number): string {
  const slice = pages.decl_docs_html(decl, 0);
  const bytes = new Uint8Array(pages.memory.buffer, Number(slice & 0xffff_ffffn), Number(slice >> 32n));
  return new TextDecoder().decode(bytes);
}

/** What the page of a name says; undefined where there is no such name. */
function docsOfName(pages: Pages, name: string): string | undefined {
  const pointer = pages.set_input_string(name.length);
  new Uint8Array(pages.memory.buffer, pointer, name.length).set(new TextEncoder().encode(name));
  let decl = pages.find_decl();
  if (decl < 0) return undefined;
  while (docsOf(pages, decl) === "" && pages.categorize_decl(decl, 0) === ALIAS) decl = pages.get_aliasee();
  return docsOf(pages, decl);
}

test(`zig build docs has words about every name of the package${reason}`, {
  skip: reason !== "",
  timeout: 600_000,
}, async () => {
  const prefix = mkdtempSync(join(tmpdir(), "kvern-docs-"));
  try {
    const args = ["build", "docs", "--prefix", prefix];
    const { status, stderr } = spawnSync(zig!, args, { cwd: ZIG_FOLDER, env: zigEnvironment(), encoding: "utf8" });
    assert.equal(status, 0, stderr);
    const pages = await open(join(prefix, "docs"));
    assert.match(docsOf(pages, pages.find_module_root(0)), /^<p>kvern is the KV cache of a transformer/);
    assert.equal(docsOfName(pages, "kvern.NoSuchName"), undefined);
    const source = readFileSync(join(ZIG_FOLDER, "src/kvern.zig"), "utf8");
    const names = [...source.matchAll(/^pub const (\w+) =/gm)].map(([, name]) => name!);
    assert.ok(names.length > 50, `${names.length} names`);
    assert.deepEqual(names.filter((name) => !docsOfName(pages, `kvern.${name}`)), []);
  } finally {
    rmSync(prefix, { recursive: true });
  }
});
