/**
 * The house rules as tests: who may import whom, where the runtimes are named, which names and leftovers are refused,
 * and what has to say the same in two places.
 *
 * A rule is a function from files to complaints. Each is first shown a small bad example, so that it is known to be
 * able to complain, and then the repository.
 *
 * @module
 */
import assert from "node:assert/strict";
import { existsSync, globSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, posix, sep } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { VERSIONS } from "../zig/toolchain.ts";

const ROOT = dirname(dirname(fileURLToPath(import.meta.url)));

/** Texts by path; paths are relative to the root, with `/`. */
type Files = ReadonlyMap<string, string>;

const TEXT = /\.(ts|zig|zon|c|md|json|jsonc|toml|yml|txt|lock)$|(^|\/)(LICENSE|run|\.gitignore)$/;

/** Every text file of the repository but what is built or installed, and the Zig code the model is measured on. */
const files: Files = (() => {
  const found = new Map<string, string>();
  const walk = (folder: string) => {
    for (const entry of readdirSync(join(ROOT, folder), { withFileTypes: true })) {
      const path = posix.join(folder, entry.name);
      if (entry.isDirectory()) {
        if (
          !/^(\.git|lib|zig\/(\.toolchain|\.zig-cache|zig-out|zig-pkg)|benches\/rivals\/(node_modules|install-\w+))$/
            .test(path)
        ) walk(path);
      } else if (TEXT.test(path) && path !== "examples/ziglet/heldout.txt") {
        found.set(path, readFileSync(join(ROOT, path), "utf8").replaceAll("\r\n", "\n"));
      }
    }
  };
  walk("");
  return found;
})();

function text(path: string): string {
  const found = files.get(path);
  assert.ok(found !== undefined, `${path} must exist`);
  return found;
}

/** Files of the repository whose path matches. */
function only(pattern: RegExp): Files {
  return new Map([...files].filter(([path]) => pattern.test(path)));
}

/** The bad example of a rule: `{ path: text }`. */
function sample(texts: Record<string, string>): Files {
  return new Map(Object.entries(texts));
}

function assertNone(complaints: readonly string[]): void {
  assert.ok(complaints.length === 0, `\n  ${complaints.join("\n  ")}`);
}

// Reading code: enough of each language to tell code from text, and imports from the rest.

/** TypeScript with every comment, string and regular expression emptied; code inside `${}` stays. */
function codeOf(source: string): string {
  let code = "";
  let i = 0;
  const nests: number[] = []; // for each open `${`, the braces opened inside it
  const skipString = (quote: string) => {
    for (i++; i < source.length && source[i] !== quote; i++) if (source[i] === "\\") i++;
    i++;
    code += '""';
  };
  const skipTemplate = () => {
    for (; i < source.length && source[i] !== "`"; i++) {
      if (source[i] === "\\") i++;
      else if (source.startsWith("${", i)) {
        nests.push(0);
        i += 2;
        return;
      }
    }
    i++;
  };
  while (i < source.length) {
    const c = source[i]!;
    if (source.startsWith("//", i)) { while (i < source.length && source[i] !== "\n") i++; }
    else if (source.startsWith("/*", i)) i = source.indexOf("*/", i + 2) + 2;
    else if (c === '"' || c === "'") skipString(c);
    else if (c === "`") {
      i++;
      code += '""';
      skipTemplate();
    } else if (c === "/" && /(^|[(,=:[!&|?{};>]|\breturn)\s*$/.test(code)) {
      // A regular expression, since nothing stands before it that could be divided.
      for (let inClass = false; ++i < source.length && (inClass || source[i] !== "/");) {
        if (source[i] === "\\") i++;
        else if (source[i] === "[") inClass = true;
        else if (source[i] === "]") inClass = false;
      }
      i++;
      code += '""';
    } else if (c === "}" && nests.at(-1) === 0) {
      nests.pop();
      i++;
      code += " ";
      skipTemplate();
    } else {
      if (nests.length > 0 && c === "{") nests[nests.length - 1]!++;
      if (nests.length > 0 && c === "}") nests[nests.length - 1]!--;
      code += c;
      i++;
    }
  }
  return code;
}

/** What a TypeScript file imports: paths of the repository, and specifiers of anything else. */
function importsOfTypeScript(path: string, source: string): string[] {
  const withoutComments = source.replace(/\/\*[\s\S]*?\*\//g, "").replace(/^\s*\/\/.*$/gm, "");
  const statement = /^(?:import|export)\b(?:[^;"']*?\bfrom)?\s*["']([^"']+)["']/gm;
  const call = /(?<![@.\w])import\(\s*["']([^"']+)["']/g;
  return [...withoutComments.matchAll(statement), ...withoutComments.matchAll(call)].map((found) => {
    const specifier = found[1]!;
    return specifier.startsWith(".") ? posix.join(posix.dirname(path), specifier) : specifier;
  });
}

/** Zig without its line comments and multi-line strings. */
function zigCodeOf(source: string): string {
  return source.replace(/^\s*\\\\.*$/gm, "").replace(
    /"(?:[^"\\\n]|\\.)*"|\/\/.*$/gm,
    (found) => found.startsWith("/") ? "" : found,
  );
}

/** The files of the package a Zig file imports. */
function importsOfZig(path: string, source: string): string[] {
  return [...zigCodeOf(source).matchAll(/@import\("([^"]+\.zig)"\)/g)].map((found) =>
    posix.join(posix.dirname(path), found[1]!)
  );
}

/** Zig without its `test` blocks; `zig fmt` ends each with a brace in the first column. */
function withoutTests(source: string): string {
  return source.replace(/^test\b[^\n]*\{(\}|[\s\S]*?\n\})$/gm, "");
}

/** Who imports whom. */
function graphOf(sources: Files, importsOf: (path: string, source: string) => string[]): Map<string, string[]> {
  return new Map([...sources].map(([path, source]) => [path, importsOf(path, source)]));
}

// The dependency rule.

/** Rows of the house, lowest first; a path belongs to the first row that has it. */
type Rows = readonly RegExp[];

const TYPESCRIPT_ROWS: Rows = [
  /^src\/(error|ffi\/exports|ffi\/manifest|ffi\/permission)\.ts$/,
  /^src\/ffi\/(deno|bun|node|download|integrity|places|record|runtime|status)\.ts$/,
  /^src\/ffi\/(embedded|library|remote|settings)\.ts$/,
  /^src\/options\/[a-z0-9_]+\.ts$/,
  // What is handed out: types only, which the files below make objects of.
  /^src\/cache\.ts$/,
  /^src\/memory\/[a-z0-9_]+\.ts$/,
  /^src\/(?!onnx\.ts$)[a-z0-9_]+\.ts$/,
  /^src\/onnx\/([a-z]+\/)?[a-z0-9_]+\.ts$/,
  /^(mod|src\/onnx)\.ts$/,
  /^(tests|benches|examples)\/|^zig\/\w+\.ts$/,
];

const ZIG_ROWS: Rows = [
  /^zig\/src\/(shape|dtype|group)\.zig$/,
  /^zig\/src\/kernels(\.zig$|\/)/,
  /^zig\/src\/device\//,
  /^zig\/src\/cache\//,
  /^zig\/src\/attention\//,
  /^zig\/src\/kvern\.zig$/,
  /^zig\/src\/(abi|bench)\//,
  // The last row has the roots that nothing imports: the library, and what checks and measures it.
  /^zig\/src\/(abi|memcheck|bench)\.zig$/,
];

/** Files outside every row, and imports of a later row. */
function rowComplaints(graph: Map<string, string[]>, rows: Rows): string[] {
  const rowOf = (path: string) => rows.findIndex((row) => row.test(path));
  const complaints: string[] = [];
  for (const [path, imports] of graph) {
    if (rowOf(path) === -1) complaints.push(`${path} belongs to no row of the house`);
    for (const imported of imports) {
      // A test may look at what is built on the thing it tests: nothing imports it, so no cycle can come of that.
      if (path.endsWith("_test.zig")) continue;
      if (rowOf(imported) > rowOf(path)) complaints.push(`${path} imports ${imported}, which stands in a later row`);
    }
  }
  return complaints;
}

/** Every cycle, once, from the file that was met first. */
function cycleComplaints(graph: Map<string, string[]>): string[] {
  const complaints: string[] = [];
  const done = new Set<string>();
  const visit = (path: string, trail: readonly string[]) => {
    const start = trail.indexOf(path);
    if (start !== -1) complaints.push(`imports in a circle: ${[...trail.slice(start), path].join(" -> ")}`);
    if (start !== -1 || done.has(path)) return;
    for (const imported of graph.get(path) ?? []) visit(imported, [...trail, path]);
    done.add(path);
  };
  for (const path of graph.keys()) visit(path, []);
  return complaints;
}

/** What runs or tests the tools in `zig/`; the rivals of the benches come as packages of npm, as the tools do. */
const TOOL_USERS = new RegExp(
  "^benches/rivals/install\\.ts$|^tests/((all|npm_(layer|packages)|own_package|\\w+_(packages|runtime))\\.ts|" +
    "(all|bundle|installed|levels_built|library|npm_layer|package|publish\\w*|release\\w*|remote|reproducible|tarball|tidy|" +
    "toolchain|zig_docs)_test\\.ts)$",
);

/** What the rows alone do not say of TypeScript: which doors are shut, and that nothing comes from outside. */
function typeScriptDoorComplaints(graph: Map<string, string[]>): string[] {
  const complaints: string[] = [];
  for (const [path, imports] of graph) {
    for (const imported of imports) {
      const isInside = graph.has(imported) || /^(src|zig|tests|benches|examples)\/|^mod\.ts$/.test(imported);
      const isUser = /^(tests|benches|examples)\//.test(path);
      const looksAtFfi = /^tests\/((abi|hostile|tidy|record|status|library|places|ffi)_test|abi_calls)\.ts$/.test(path);
      const looksAtOnnx = /^tests\/(onnx\w*_test\.ts|onnx\/)/.test(path);
      const runsTools = TOOL_USERS.test(path);
      const mayImport = isInside
        ? !isUser || /^(mod|src\/onnx)\.ts$/.test(imported) || /^(tests|benches|examples)\//.test(imported) ||
          (looksAtFfi && imported.startsWith("src/ffi/")) ||
          (looksAtOnnx && imported.startsWith("src/onnx/")) ||
          (runsTools && /^zig\/\w+\.ts$/.test(imported))
        : imported.startsWith("node:");
      if (!mayImport) complaints.push(`${path} may not import ${imported}`);
    }
  }
  return complaints;
}

/** What the rows alone do not say of Zig: kernels are reached by dispatch, CUDA by device. */
function zigDoorComplaints(sources: Files): string[] {
  const complaints: string[] = [];
  for (const [path, source] of sources) {
    // `_ = @import("x.zig");` pulls the tests of a file in and takes nothing from it.
    const used = source.replace(/_ = @import\("[^"]*"\);/g, "");
    const isCheck = path.endsWith("_test.zig") || path.startsWith("zig/src/bench/");
    for (const imported of importsOfZig(path, used)) {
      const isKernel = imported.startsWith("zig/src/kernels/") && !imported.endsWith("/dispatch.zig");
      // Tests and benches compare with the scalar reference wherever they are.
      const mayReach = /^zig\/src\/kernels(\.zig$|\/)/.test(path) ||
        (isCheck && imported.startsWith("zig/src/kernels/reference/"));
      if (isKernel && !mayReach) complaints.push(`${path} reaches ${imported} past kernels/dispatch.zig`);
      const isCuda = imported.includes("/device/cuda/") && !path.includes("/device/cuda/");
      if (isCuda && path !== "zig/src/device/device.zig") {
        complaints.push(`${path} reaches ${imported} past device/device.zig`);
      }
    }
  }
  return complaints;
}

const typeScript = only(/^(mod\.ts$|(src|tests|benches|examples)\/.*\.ts$|zig\/\w+\.ts$)/);
const typeScriptGraph = graphOf(typeScript, importsOfTypeScript);
const zig = only(/^zig\/src\/.*\.zig$/);
const zigGraph = graphOf(zig, importsOfZig);

test("a TypeScript file imports from its own row or an earlier one", () => {
  const bad = sample({
    "src/error.ts": 'import { KvCache } from "./cache.ts";\n// import "./device.ts";',
    "src/ffi/status.ts": 'import {\n  a,\n} from "./library.ts";',
    "src/cache.ts": 'export * from "../mod.ts";',
    "src/options/rows.ts": 'import "../memory/view.ts";',
    "src/memory/view.ts": 'import "../paged_cache.ts";',
    "src/ffi/more.ts": "",
  });
  assert.deepEqual(rowComplaints(graphOf(bad, importsOfTypeScript), TYPESCRIPT_ROWS), [
    "src/error.ts imports src/cache.ts, which stands in a later row",
    "src/ffi/status.ts imports src/ffi/library.ts, which stands in a later row",
    "src/cache.ts imports mod.ts, which stands in a later row",
    "src/options/rows.ts imports src/memory/view.ts, which stands in a later row",
    "src/memory/view.ts imports src/paged_cache.ts, which stands in a later row",
    "src/ffi/more.ts belongs to no row of the house",
  ]);
  assert.ok(typeScriptGraph.get("mod.ts")!.length > 0, "mod.ts has imports, and they are found");
  assertNone(rowComplaints(typeScriptGraph, TYPESCRIPT_ROWS));
});

test("tests, benches and examples know the entries only, and nothing comes from outside", () => {
  const bad = sample({
    "src/cache.ts": 'import { x } from "npm:left-pad@1";\nimport fs from "node:fs";',
    "examples/generate.ts": 'import { library } from "../src/ffi/library.ts";\nimport "../mod.ts";',
    "tests/cache_test.ts": 'const { run } = await import("../zig/toolchain.ts");',
    "tests/abi_test.ts": 'import { EXPORTS } from "../src/ffi/exports.ts";\nimport "../src/cache.ts";',
  });
  assert.deepEqual(typeScriptDoorComplaints(graphOf(bad, importsOfTypeScript)), [
    "src/cache.ts may not import npm:left-pad@1",
    "examples/generate.ts may not import src/ffi/library.ts",
    "tests/cache_test.ts may not import zig/toolchain.ts",
    "tests/abi_test.ts may not import src/cache.ts",
  ]);
  assertNone(typeScriptDoorComplaints(typeScriptGraph));
});

test("a Zig file imports from its own row or an earlier one", () => {
  const bad = sample({
    "zig/src/shape.zig": 'const cache = @import("cache/contiguous.zig");\n// @import("abi.zig")',
    "zig/src/kvern.zig": 'pub const status = @import("abi/status.zig");',
    "zig/src/more.zig": 'const std = @import("std");',
  });
  assert.deepEqual(rowComplaints(graphOf(bad, importsOfZig), ZIG_ROWS), [
    "zig/src/shape.zig imports zig/src/cache/contiguous.zig, which stands in a later row",
    "zig/src/kvern.zig imports zig/src/abi/status.zig, which stands in a later row",
    "zig/src/more.zig belongs to no row of the house",
  ]);
  assert.ok(zigGraph.get("zig/src/abi.zig")!.length > 0, "abi.zig has imports, and they are found");
  assertNone(rowComplaints(zigGraph, ZIG_ROWS));
});

test("kernels are reached through dispatch.zig, CUDA through device.zig", () => {
  const bad = sample({
    "zig/src/cache/paged.zig": 'const convert = @import("../kernels/convert.zig");',
    "zig/src/attention/attend.zig": 'const driver = @import("../device/cuda/driver.zig");',
    "zig/src/cache/paged_test.zig":
      'const truth = @import("../kernels/reference/float.zig");\nconst table = @import("../kernels/table.zig");',
    "zig/src/cache/rows.zig": 'const truth = @import("../kernels/reference/float.zig");',
    "zig/src/kvern.zig": 'test {\n    _ = @import("kernels/convert.zig");\n}',
  });
  assert.deepEqual(zigDoorComplaints(bad), [
    "zig/src/cache/paged.zig reaches zig/src/kernels/convert.zig past kernels/dispatch.zig",
    "zig/src/attention/attend.zig reaches zig/src/device/cuda/driver.zig past device/device.zig",
    "zig/src/cache/paged_test.zig reaches zig/src/kernels/table.zig past kernels/dispatch.zig",
    "zig/src/cache/rows.zig reaches zig/src/kernels/reference/float.zig past kernels/dispatch.zig",
  ]);
  assertNone(zigDoorComplaints(zig));
});

test("no imports go in a circle", () => {
  const bad = new Map([["a", ["b"]], ["b", ["c", "d"]], ["c", ["a"]], ["d", []]]);
  assert.deepEqual(cycleComplaints(bad), ["imports in a circle: a -> b -> c -> a"]);
  assertNone(cycleComplaints(typeScriptGraph));
  // A file and its tests know each other: the file pulls them in.
  const zigWithoutTests = [...zigGraph].filter(([path]) => !path.endsWith("_test.zig"));
  assertNone(cycleComplaints(new Map(zigWithoutTests)));
});

/** Parameters named after an object of the house that take anything, where its type would be an import. */
function anytypeComplaints(sources: Files): string[] {
  const parameter = /\b((?:cache|sequence|group|table|pool|block|rows?|query|queries|object|handle)s?): anytype/g;
  return [...sources].flatMap(([path, source]) =>
    [...zigCodeOf(source).matchAll(parameter)].map(([, name]) => `${path} takes anything as ${name}`)
  );
}

test("no anytype stands in place of an import", () => {
  const bad = sample({
    "zig/src/cache/paged/stats.zig":
      "pub fn collect(cache: anytype) void {}\n// table: anytype\nfn f(sequences: anytype) void {}",
    "zig/src/shape.zig": "pub fn rowElements(shape: anytype) u64 {}",
  });
  assert.deepEqual(anytypeComplaints(bad), [
    "zig/src/cache/paged/stats.zig takes anything as cache",
    "zig/src/cache/paged/stats.zig takes anything as sequences",
  ]);
  assertNone(anytypeComplaints(zig));
});

// What Zig compiles and tests.

/** The roots `build.zig` names. */
const ZIG_ROOTS = [...text("zig/build.zig").matchAll(/"(src\/[^"]+\.zig)"/g)].map((found) => `zig/${found[1]}`);
/** The one root it tests: the highest row, which sees all the others. */
const ZIG_TEST_ROOT = "zig/src/abi.zig";

function reached(graph: Map<string, string[]>, roots: readonly string[]): Set<string> {
  const seen = new Set<string>();
  const visit = (path: string) => {
    if (seen.has(path)) return;
    seen.add(path);
    graph.get(path)?.forEach(visit);
  };
  roots.forEach(visit);
  return seen;
}

/** The files whose tests a file names in a `test` block: `_ = @import("x.zig");`, or `_ = x;` with an imported `x`. */
function pullsOfZig(path: string, source: string): string[] {
  const code = zigCodeOf(source);
  const imported = new Map(
    [...code.matchAll(/\bconst (\w+) = @import\("([^"]+\.zig)"\)/g)].map((found) => [found[1]!, found[2]!]),
  );
  const pulled = [...code.matchAll(/_ = (?:@import\("([^"]+\.zig)"\)|(\w+));/g)];
  return pulled.flatMap((found) => found[1] ?? imported.get(found[2]!) ?? []).map((file) =>
    posix.join(posix.dirname(path), file)
  );
}

/** Files no root reaches, and files with tests that the test root does not pull in: Zig runs no test of a file it only imports. */
function deadZigComplaints(sources: Files): string[] {
  const compiled = reached(graphOf(sources, importsOfZig), ZIG_ROOTS);
  const tested = reached(graphOf(sources, pullsOfZig), [ZIG_TEST_ROOT]);
  return [...sources].flatMap(([path, source]) => {
    if (!compiled.has(path)) return [`${path} is imported by nothing that is compiled`];
    const hasTests = /^test\b/m.test(zigCodeOf(source));
    return hasTests && !tested.has(path) ? [`${path} has tests that abi.zig does not pull in`] : [];
  });
}

test("every Zig file is compiled and every Zig test is run", () => {
  const bad = sample({
    "zig/src/abi.zig": 'test {\n    _ = @import("kvern.zig");\n}',
    "zig/src/kvern.zig":
      'const shape = @import("shape.zig");\nconst d = @import("dtype.zig").D;\ntest {\n    _ = shape;\n}',
    "zig/src/shape.zig": 'test {\n    _ = @import("shape_test.zig");\n}',
    "zig/src/shape_test.zig": 'test "a" {}',
    "zig/src/dtype.zig": 'test "b" {}',
    "zig/src/group.zig": "",
  });
  assert.deepEqual(deadZigComplaints(bad), [
    "zig/src/dtype.zig has tests that abi.zig does not pull in",
    "zig/src/group.zig is imported by nothing that is compiled",
  ]);
  assertNone(deadZigComplaints(zig));
});

// Names and leftovers.

/** What a runtime has of its own, used outside the files that may; strings and comments are no uses. */
function runtimeNameComplaints(sources: Files): string[] {
  return [...sources].flatMap(([path, source]) => {
    if (/^src\/ffi\/(deno|bun|node|runtime)\.ts$/.test(path)) return [];
    const found = /\b(Deno|Bun|process\.(?:versions|permission|release))\b/.exec(codeOf(source));
    return found ? [`${path} names ${found[1]}`] : [];
  });
}

test("the runtimes are named in src/ffi/{deno,bun,node,runtime}.ts only", () => {
  const bad = sample({
    "src/a.ts": "const x = Deno.env;",
    "src/b.ts": "const y = `is ${Bun.version}`;",
    "src/c.ts": "// Deno\n/* Bun */ const a = 'Deno' + \"Bun\" + `Deno` + `${`Bun` + 1}`; const r = /Deno[/]Bun/;",
    "src/d.ts": "const quote = /[\"'`]/.test(x) ? 1 / 2 : 3 / 4; Deno;",
    "src/e.ts": "if (process.versions.node) run();",
    "src/ffi/deno.ts": "Deno.dlopen;",
    "src/ffi/node.ts": "process.permission;",
  });
  assert.deepEqual(runtimeNameComplaints(bad), [
    "src/a.ts names Deno",
    "src/b.ts names Bun",
    "src/d.ts names Deno",
    "src/e.ts names process.versions",
  ]);
  assertNone(runtimeNameComplaints(only(/^(src\/.*|mod)\.ts$/)));
});

/** Fields of a record that are read or written by a number; the first word, which says the size, has no name. */
function recordComplaints(sources: Files): string[] {
  return [...sources].flatMap(([path, source]) => {
    const found = /\b\w*(record|records|words)\[[1-9]\d*\]/i.exec(codeOf(source));
    return found ? [`${path} has ${found[0]}`] : [];
  });
}

test("the fields of a record have names", () => {
  const bad = sample({
    "src/a.ts": "record[0] = 8; const rows = record[3]!;",
    "tests/a_test.ts": "systemWords[2]; words[VIEW.start];",
  });
  assert.deepEqual(recordComplaints(bad), ["src/a.ts has record[3]", "tests/a_test.ts has systemWords[2]"]);
  assertNone(recordComplaints(only(/^(src|tests)\/.*\.ts$/)));
});

/** What was left behind while working. */
function leftoverComplaints(sources: Files): string[] {
  // The words are put together here, or this file would complain of itself.
  const rules: readonly [where: RegExp, what: RegExp][] = [
    [/\.(ts|zig|c|toml|yml)$|\.ci\/run$/, new RegExp("\\b(TO" + "DO|FIX" + "ME|XX" + "X)\\b")],
    [/_test\.ts$/, new RegExp("\\b(test|describe|it)\\.on" + "ly\\(|\\bon" + "ly: true|\\bt\\.sk" + "ip\\(")],
  ];
  return [...sources].flatMap(([path, source]) => {
    const complaints = rules.flatMap(([where, what]) => {
      const found = where.test(path) ? what.exec(source) : null;
      return found ? [`${path} has ${found[0]}`] : [];
    });
    const isLibrary = /^(mod|src\/.*)\.ts$/.test(path); // the example in a comment may print
    const printed = isLibrary ? /\bconsole\.\w+|\bdebugger\b/.exec(codeOf(source)) : null;
    if (printed) complaints.push(`${path} has ${printed[0]}`);
    const isShipped = /^zig\/src\/.*\.zig$/.test(path) && !/(_test|\/bench(\/\w+)?)\.zig$/.test(path);
    if (isShipped && zigCodeOf(withoutTests(source)).includes("std.debug.print")) {
      complaints.push(`${path} has std.debug.print`);
    }
    return complaints;
  });
}

test("nothing is left over", () => {
  const bad = sample({
    "src/a.ts": "// console.log(0);\nconsole.log(1);",
    "tests/a_test.ts": "test.on" + 'ly("x", () => {});',
    "zig/src/a.zig":
      'test "a" {\n    std.debug.print("fine", .{});\n}\n\nfn f() void {\n    std.debug.print("x", .{});\n}\n',
    "zig/src/b.zig": 'test "a" {\n    std.debug.print("fine", .{});\n}\n// FIX' + "ME\n",
    "zig/src/a_test.zig": 'fn f() void {\n    std.debug.print("fine", .{});\n}\n',
  });
  assert.deepEqual(leftoverComplaints(bad), [
    "src/a.ts has console.log",
    "tests/a_test.ts has test.on" + "ly(",
    "zig/src/a.zig has std.debug.print",
    "zig/src/b.zig has FIX" + "ME",
  ]);
  assertNone(leftoverComplaints(files));
});

const TOP_LEVEL = new Set(
  ("deno.json bunfig.toml mod.ts zig src tests benches README.md CHANGELOG.md docs examples LICENSE deno.lock .gitattributes .gitignore .ci .github")
    .split(" "),
);

/** Names that say nothing, rooms outside the house, files with nothing in them. */
function nameComplaints(sources: Files): string[] {
  return [...sources].flatMap(([path, source]) => {
    const complaints: string[] = [];
    const [top, ...rest] = path.split("/");
    if (!TOP_LEVEL.has(top!)) complaints.push(`${path} has no place at the top level`);
    for (const part of [top!, ...rest]) {
      if (/^(utils?|common|helpers?|misc|scripts|types\.ts|index\.ts|package\.json)(\.\w+)?$/.test(part)) {
        complaints.push(`${path} has the name ${part}`);
      }
    }
    if (source.trim() === "") complaints.push(`${path} is empty`);
    return complaints;
  });
}

test("files have names that say what they are, and something in them", () => {
  const bad = sample({
    "notes.md": "x",
    "src/utils.ts": "x",
    "src/helpers/a.ts": "x",
    "src/index.ts": "x",
    "src/a.ts": " \n",
  });
  assert.deepEqual(nameComplaints(bad), [
    "notes.md has no place at the top level",
    "src/utils.ts has the name utils.ts",
    "src/helpers/a.ts has the name helpers",
    "src/index.ts has the name index.ts",
    "src/a.ts is empty",
  ]);
  assertNone(nameComplaints(files));
});

/** Paths of somebody's machine, and the hosts of package registries. */
function machineComplaints(sources: Files): string[] {
  const path = new RegExp("(?<![\\w.*)}\\]])/(work|opt|root|home/\\w+|Users/\\w+)/");
  const host = new RegExp("\\bregistry\\.(npmjs|yarnpkg)\\." + "\\w+|\\bnpm\\.jsr\\." + "\\w+");
  return [...sources].flatMap(([name, source]) => {
    const found = path.exec(source) ?? host.exec(source);
    return found ? [`${name} names ${found[0]}`] : [];
  });
}

test("no file names a machine or a registry's host", () => {
  const bad = sample({
    "README.md": "run /op" + "t/tools/bin/zig",
    "deno.lock": "https://registry.npmjs." + "org/x",
    "src/a.ts": "x => x.replace(/a/work/)",
  });
  assert.deepEqual(machineComplaints(bad), [
    "README.md names /op" + "t/",
    "deno.lock names registry.npmjs." + "org",
  ]);
  assertNone(machineComplaints(files));
});

// What stands in two places.

/** The first block of TypeScript in a piece of Markdown. */
function exampleOf(markdown: string): string | undefined {
  return /^```ts\n([\s\S]*?)\n```$/m.exec(markdown)?.[1];
}

/** The documentation of a module without its stars. */
function moduleDocOf(source: string): string {
  const comment = /^\/\*\*([\s\S]*?)\*\//.exec(source)?.[1] ?? "";
  return comment.replace(/^ \* ?/gm, "");
}

test("the example of the README is the example of mod.ts", () => {
  assert.equal(exampleOf(moduleDocOf("/**\n * A.\n *\n * ```ts\n * a;\n *\n *   b;\n * ```\n */\nx")), "a;\n\n  b;");
  const example = exampleOf(moduleDocOf(text("mod.ts")));
  assert.ok(example, "the module documentation of mod.ts has a ```ts block");
  const [, section] = text("README.md").split("\n## Example\n");
  assert.ok(section, "the README has a section with the example");
  assert.equal(exampleOf(section), example);
});

/** The names by which links reach the headings of a page. */
function anchorsOf(markdown: string): string[] {
  return [...markdown.matchAll(/^#+ (.+)$/gm)].map(([, heading]) =>
    heading!.toLowerCase().replace(/[^\w\- ]/g, "").replaceAll(" ", "-")
  );
}

/** Links of published pages that lead nowhere or to what is not published, files they name, and pages nobody links. */
function linkComplaints(
  pages: Files,
  exists: (path: string) => boolean,
  isPublished: (path: string) => boolean,
): string[] {
  const linked = new Set<string>();
  const complaints = [...pages].flatMap(([path, source]) =>
    [...source.replace(/^```[\s\S]*?^```$/gm, "").matchAll(/\]\(([^)\s]+)\)/g)].flatMap(([, link]) => {
      if (/^https?:/.test(link!)) return [];
      const [file, anchor] = link!.split("#");
      const target = file === "" ? path : posix.join(posix.dirname(path), file!);
      if (path === "README.md") linked.add(target);
      if (!exists(target)) return [`${path} links ${link}, which is not there`];
      if (!isPublished(target)) return [`${path} links ${link}, which is not published`];
      const isLost = anchor !== undefined && !anchorsOf(pages.get(target) ?? "").includes(anchor);
      return isLost ? [`${path} links ${link}, which is no heading there`] : [];
    })
  );
  const file = /`[^`\n]*?\b((?:src|zig|tests|benches|examples|docs)\/[\w./-]+\.\w+)[^`\n]*`/g;
  const named = [...pages].flatMap(([path, source]) =>
    [...source.matchAll(file)].filter(([, name]) => !exists(name!)).map(([, name]) => `${path} names ${name}`)
  );
  const lonely = [...pages.keys()].filter((path) => path.startsWith("docs/") && !linked.has(path));
  return [...complaints, ...named, ...lonely.map((path) => `README.md does not link ${path}`)];
}

test("every link of the README and of docs/ leads somewhere, and every file they name is there", () => {
  const bad = sample({
    "README.md":
      "[a](docs/a.md) [b](docs/b.md#one) ![c](benches/c.svg) [d](#two-words)\n```ts\nf[0](x)\n```\n# Two, words",
    "docs/a.md": "[b](b.md#two) [home](../README.md#two-words) [web](https://kvern.example)",
    "docs/b.md": "# One",
    "docs/lonely.md": "x",
  });
  const exists = (path: string) => bad.has(path) || path === "benches/c.svg";
  assert.deepEqual(linkComplaints(bad, exists, (path) => !path.startsWith("benches/")), [
    "README.md links benches/c.svg, which is not published",
    "docs/a.md links b.md#two, which is no heading there",
    "README.md does not link docs/lonely.md",
  ]);
  assert.deepEqual(
    linkComplaints(sample({ "README.md": "[a](docs/a.md), `deno test -A tests/a.ts`" }), () => false, () => true),
    [
      "README.md links docs/a.md, which is not there",
      "README.md names tests/a.ts",
    ],
  );
  const published = new Set(
    globSync(JSON.parse(text("deno.json")).publish.include, { cwd: ROOT }).map((path) => path.replaceAll(sep, "/")),
  );
  const pages = only(/^(README\.md|CHANGELOG\.md|docs\/.*\.md)$/);
  assert.ok(pages.size > 1);
  assertNone(linkComplaints(pages, (path) => existsSync(join(ROOT, path)), (path) => published.has(path)));
});

/** Mentions of a version that is not the pinned one. */
function versionComplaints(sources: Files): string[] {
  return [...sources].flatMap(([path, source]) =>
    [...source.matchAll(/\b(deno|bun|node|zig)@(\d[\w.]*\d)/g)]
      .filter(([, name, version]) => VERSIONS[name as keyof typeof VERSIONS] !== version)
      .map(([mention]) => `${path} says ${mention}`)
  );
}

test("every command names the versions of zig/toolchain.ts", () => {
  const bad = sample({ "README.md": `npx -y deno@${VERSIONS.deno} task demo, deno@1.0.0, bun@0.1.2.` });
  assert.deepEqual(versionComplaints(bad), ["README.md says deno@1.0.0", "README.md says bun@0.1.2"]);
  assertNone(
    versionComplaints(only(/^(README\.md|docs\/.*|\.ci\/run|\.github\/.*|src\/.*|mod\.ts|examples\/.*|zig\/.*)$/)),
  );

  const npx = `npx -y deno@${VERSIONS.deno} task`;
  for (const task of ["demo", "test"]) {
    assert.ok(text("README.md").includes(`${npx} ${task}`), `README: ${npx} ${task}`);
  }
  assert.ok(text(".ci/run").includes(`\n${npx} test\n`), ".ci/run runs the test command of the README");
  assert.match(text(".github/workflows/ci.yml"), /^ +- run: bash \.ci\/run$/m);
  assert.match(text("zig/build.zig.zon"), new RegExp(`\\.minimum_zig_version = "${VERSIONS.zig}"`));
});

test("kvern has one license", () => {
  const { license } = JSON.parse(text("deno.json"));
  assert.ok(text("LICENSE").startsWith(`${license} License\n`));
});

/** Tasks that are named somewhere and stand in no `deno.json`. */
function taskComplaints(sources: Files, tasks: readonly string[]): string[] {
  return [...sources].flatMap(([path, source]) =>
    [...source.matchAll(/\bdeno(?:@[\d.]+)? task ([a-z][\w:-]*)/g)]
      .filter(([, task]) => !tasks.includes(task!))
      .map(([mention]) => `${path} says \`${mention}\``)
  );
}

test("every task that is named exists", () => {
  const bad = sample({ "README.md": "`deno task build`, `deno task walk:dog` and `npx -y deno@1.2.3 task fly`" });
  assert.deepEqual(taskComplaints(bad, ["build"]), [
    "README.md says `deno task walk:dog`",
    "README.md says `deno@1.2.3 task fly`",
  ]);
  const tasks = Object.keys(JSON.parse(text("deno.json")).tasks);
  const others = new Map([...files].filter(([path]) => path !== "tests/tidy_test.ts"));
  assertNone(taskComplaints(others, tasks));
});

/** Codes of errors that nothing gives and that are not documented so, and those of which it is no longer true. */
function codeComplaints(errors: string, sources: Files): string[] {
  const given = [...sources].map(([path, source]) => {
    if (!path.endsWith(".zig")) return source.replace(/\/\*[\s\S]*?\*\//g, "");
    return [...source.matchAll(/\berror\.\w+ => \.(\w+),/g)].map(([, status]) => `"${status}"`).join();
  }).join("\n");
  return [...errors.matchAll(/^ \* - `(\w+)`: (.*)$/gm)].flatMap(([, code, meaning]) => {
    const isAwaited = meaning!.includes("no call gives it yet");
    if (given.includes(`"${code}"`) !== isAwaited) return [];
    return [isAwaited ? `${code} is given, and is documented as not yet` : `${code} is given by nothing`];
  });
}

test("every code of an error is given by some call, or documented as not yet", () => {
  const errors =
    " * - `full`: a.\n * - `lost`: b.\n * - `later`: c; no call gives it yet.\n * - `now`: d; no call gives it yet.";
  const bad = sample({
    "src/a.ts": '/** "lost" */\nthrow new KvError("full", text);',
    "zig/src/status.zig": "const lost = 1;\nerror.Now => .now,",
  });
  assert.deepEqual(codeComplaints(errors, bad), [
    "lost is given by nothing",
    "now is given, and is documented as not yet",
  ]);
  const errorFile = text("src/error.ts");
  const documented = [...errorFile.matchAll(/^ \* - `(\w+)`: /gm)].map(([, code]) => code);
  assert.deepEqual(documented, [...errorFile.matchAll(/^ {2}\| "(\w+)"/gm)].map(([, code]) => code));
  const others = new Map(
    [...only(/^(src\/.*\.ts|zig\/src\/abi\/status\.zig)$/)].filter(([path]) => path !== "src/error.ts"),
  );
  assertNone(codeComplaints(errorFile, others));
});

test("both type checks have the same compiler options", () => {
  const withoutComments = text("tests/bun_check.jsonc").replace(/^\s*\/\/.*$/gm, "");
  const { lib, types, ...shared } = JSON.parse(withoutComments).compilerOptions;
  assert.deepEqual(shared, JSON.parse(text("deno.json")).compilerOptions);
  assert.deepEqual({ lib, types }, { lib: ["esnext", "dom"], types: [] });
});
