/**
 * The types as a program sees them that uses kvern through declarations, whatever `lib` it is compiled with: a name the
 * library of types does not know turns into `any` there, without a word, where `skipLibCheck` is set.
 *
 * @module
 */
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import process from "node:process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { inDeno, runCode } from "./child.ts";

const TYPESCRIPT = "npm:typescript@5.9.3";

/** Lines that must pass, and lines of which each must be refused; `Float16Array` is not known to all. */
const GOOD = `import { ContiguousCache, KvError, memoryBytes, PagedCache, type KvCache, type Rows } from "kvern";
const shape = { layerCount: 1, kvHeadCount: 1, headDim: 32, maxSeqLen: 64 } as const;
const cache = new ContiguousCache({ ...shape, dtype: "f16" });
const sequences: KvCache[] = [cache.sequence(0), new PagedCache(shape).sequence()];
for (const sequence of sequences) {
  const { start, views } = sequence.append(0, new Float32Array(32), new Float32Array(32));
  sequence.append(0, new Uint16Array(32), new Uint16Array(32), { dtype: "bf16", layout: "head_major" });
  const rows: Rows = sequence.gather(0).k;
  const first: number = rows.subarray(start)[views.length]!;
  const output: Float32Array = sequence.attend(0, new Float32Array(32), { softcap: first });
  if (output.length !== memoryBytes(shape)) throw new KvError("aborted", "text", { cause: views[0]?.k?.length });
  sequence.free();
}
`;
const GOOD_NOW = `import { ContiguousCache, type KvCache } from "kvern";
using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 32, maxSeqLen: 64 });
cache.append(0, 0, new Float16Array(32), new Float16Array(32));
using sequence: KvCache = cache.sequence(0);
const ends: Disposable[] = [cache, sequence];
`;
const BAD = `import * as kvern from "kvern";
declare const cache: kvern.ContiguousCache, paged: kvern.PagedCache, sequence: kvern.KvCache, one: kvern.Sequence;
declare const rows: kvern.Rows, f32: Float32Array;
sequence.append(0, "not an array", 5);
cache.append(0, 0, "not an array", 5);
cache.store(0, 0, [1], [1]);
sequence.append(0, new Float64Array(32), new Float64Array(32));
one.append(0, {}, {});
paged.append(0, "not an array", f32, { sequences: [one] });
sequence.append(0, f32, f32, { dtyp: "f16" });
sequence.gather(0, { into: { k: "not an array", v: f32 } });
cache.nonsense;
paged.nonsense;
sequence.nonsense;
one.nonsense;
rows.nonsense;
sequence.views(0)[0]!.nonsense;
sequence.append(0, f32, f32).views[0]!.k!.nonsense;
sequence.attend(0, f32).nonsense;
sequence.attend(0, f32, { into: "not an array" });
new kvern.KvError("aborted", "text", 5);
new kvern.KvError("nonsense", "text");
kvern.quantizeRows(f32, { dtype: "q8_0" }).nonsense;
kvern.systemInfo().nonsense;
const text: string = sequence.seqLen;
const none: { nonsense: 1 } = rows;
`;

/**
 * Makes declarations of `files` as a registry does, and checks programs against them: prints what each is refused for.
 */
const CHECK = `
const ts = (await import(TYPESCRIPT)).default;
const { files, programs } = JSON.parse(DATA);
const declarations = new Map();
for (const [path, text] of Object.entries(files)) {
  const { outputText, diagnostics } = ts.transpileDeclaration(text, {
    fileName: path,
    compilerOptions: { isolatedDeclarations: true, target: ts.ScriptTarget.ESNext },
  });
  if (diagnostics.length > 0) throw new Error(path);
  declarations.set("/kvern/" + path.replace(/\\.ts$/, ".d.ts"), outputText.replaceAll('.ts"', '.js"'));
}
const results = programs.map(({ lib, text }) => {
  const options = {
    lib: lib.map((name) => "lib." + name + ".d.ts"),
    target: ts.ScriptTarget.ES2022,
    module: ts.ModuleKind.ESNext,
    moduleResolution: ts.ModuleResolutionKind.Bundler,
    paths: { kvern: ["/kvern/mod.d.ts"] },
    types: [],
    strict: true,
    exactOptionalPropertyTypes: true,
    skipLibCheck: true,
    noEmit: true,
  };
  const host = ts.createCompilerHost(options);
  const { readFile, fileExists } = host;
  const read = (path) => path === "/program.ts" ? text : declarations.get(path);
  host.directoryExists = () => true;
  host.readFile = (path) => read(path) ?? readFile(path);
  host.fileExists = (path) => read(path) !== undefined || fileExists(path);
  host.getSourceFile = (path, version) => {
    const source = host.readFile(path);
    return source === undefined ? undefined : ts.createSourceFile(path, source, version);
  };
  const program = ts.createProgram({ rootNames: ["/program.ts"], options, host });
  return ts.getPreEmitDiagnostics(program).map(({ file, start, messageText }) => ({
    file: file?.fileName ?? "",
    line: file === undefined ? 0 : file.getLineAndCharacterOfPosition(start).line,
    text: ts.flattenDiagnosticMessageText(messageText, " "),
  }));
});
console.log(JSON.stringify(results));
`;

interface Complaint {
  readonly file: string;
  readonly line: number;
  readonly text: string;
}

/** The sources a program reaches through `mod.ts`. */
function sources(): Record<string, string> {
  const root = fileURLToPath(new URL("..", import.meta.url));
  const paths = readdirSync(`${root}src`, { recursive: true, encoding: "utf8" }).filter((path) => path.endsWith(".ts"));
  const all = ["mod.ts", ...paths.map((path) => `src/${path}`)];
  return Object.fromEntries(all.map((path) => [path, readFileSync(`${root}${path}`, "utf8")]));
}

function check(programs: readonly { readonly lib: readonly string[]; readonly text: string }[]): Complaint[][] {
  const data = JSON.stringify(JSON.stringify({ files: sources(), programs }));
  const { code, stdout, stderr } = runCode(`const TYPESCRIPT = "${TYPESCRIPT}", DATA = ${data};\n${CHECK}`, {
    env: { DENO_TLS_CA_STORE: process.env.DENO_TLS_CA_STORE ?? "mozilla,system" }, // as the tools are installed
  });
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout);
}

const reason = inDeno ? "" : " (skipped: it runs no code of kvern, and is run under Deno)";

test(`no type turns into any, whatever the consumer's lib${reason}`, { skip: !inDeno, timeout: 300_000 }, () => {
  const libs = [["es2022"], ["es2022", "dom"], ["es2024"], ["esnext"]];
  const results = check([
    ...libs.flatMap((lib) => [{ lib, text: GOOD }, { lib, text: BAD }]),
    { lib: ["esnext"], text: GOOD_NOW },
  ]);
  const badLines = BAD.split("\n").flatMap((line, i) => /^(import|declare|$)/.test(line) ? [] : [i]);
  for (const [i, lib] of libs.entries()) {
    assert.deepEqual(results[2 * i], [], `${lib}: the good program passes`);
    const refused = new Set(results[2 * i + 1]!.map(({ line }) => line));
    const passed = badLines.filter((line) => !refused.has(line)).map((line) => BAD.split("\n")[line]);
    assert.deepEqual(passed, [], `${lib}: each of these lines is refused`);
  }
  assert.deepEqual(results.at(-1), [], "the good program of today passes");
});
