/**
 * A package on a server of the loopback, and programs that import it from there with an empty home: what the tests of
 * kvern over the network need.
 *
 * @module
 */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { inDeno } from "./child.ts";
import { stageOwnPackage } from "./own_package.ts";

/** Why none of these tests runs here, for their names; empty where they do. */
export const reason: string = inDeno ? "" : " (skipped: only Deno imports over the network)";

/** Is this Windows, which has no modes and other folders? */
export const windows: boolean = process.platform === "win32";

/** A package on a server, and an empty home. */
export interface Setting {
  /** The package's address, with a slash at its end. */
  readonly url: string;
  /** The folder that is served. */
  readonly package: string;
  readonly home: string;
  /** The folder of what kvern keeps. */
  readonly kept: string;
  /** How often each path was asked for. */
  readonly asked: Map<string, number>;
  /** Holds back the library for so long. */
  delayMs: number;
  /** From now on nobody answers. */
  unplug(): Promise<void>;
}

/** The variables that tell where the user's caches lie. */
export const VARIABLES: readonly string[] = windows
  ? ["LOCALAPPDATA"]
  : process.platform === "darwin"
  ? ["HOME"]
  : ["XDG_CACHE_HOME", "HOME"];

/** Declares a test with a package of one library on a server, in Deno alone. */
export function remoteTest(name: string, body: (setting: Setting) => Promise<void>, unless: string = reason): void {
  test(name + unless, { skip: unless !== "", timeout: 120_000 }, async (context: TestContext) => {
    const folder = realpathSync(mkdtempSync(join(tmpdir(), "kvern-remote-")));
    context.after(() => rmSync(folder, { recursive: true }));
    const place = join(folder, "package"), home = join(folder, "home");
    mkdirSync(home);
    stageOwnPackage(place);

    const asked = new Map<string, number>();
    const server = createServer((request, response) => {
      const path = request.url!;
      asked.set(path, (asked.get(path) ?? 0) + 1);
      const isLibrary = path.startsWith("/lib/");
      let file: Uint8Array;
      try {
        file = readFileSync(join(place, path));
      } catch {
        return response.writeHead(404).end();
      }
      response.setHeader("content-type", isLibrary ? "application/octet-stream" : "application/typescript");
      setTimeout(() => response.end(file), isLibrary ? setting.delayMs : 0);
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const { port } = server.address() as { port: number };
    const unplug = () =>
      new Promise<void>((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      });
    const caches = windows ? home : join(home, process.platform === "darwin" ? "Library/Caches" : ".cache");
    const kept = join(caches, "kvern");
    const setting: Setting = {
      url: `http://127.0.0.1:${port}/`,
      package: place,
      home,
      kept,
      asked,
      delayMs: 0,
      unplug,
    };
    try {
      await body(setting);
    } finally {
      await unplug();
    }
  });
}

/** What `systemInfo()` gave in a program of its own, or its error, and what else it printed. */
export interface Said {
  readonly libraryPath?: string;
  readonly code?: string;
  readonly message?: string;
  readonly ticks?: number;
}

/** How a program is started. */
export interface AskOptions {
  /** All but `--allow-import`; everything is allowed by default. */
  readonly flags?: string;
  readonly before?: string;
  readonly env?: Record<string, string>;
}

/** Uses kvern in a program of its own. */
export async function ask({ url, home }: Setting, options: AskOptions = {}): Promise<Said> {
  const { flags = "-R -W -N -E -S --allow-ffi", before = "", env = {} } = options;
  const program = join(home, "program.ts");
  writeFileSync(
    program,
    `import { loadLibrary, setLibraryPath, systemInfo } from "${url}mod.ts";
     let said: Record<string, unknown>;
     let ticks = 0;
     const timer = setInterval(() => ticks++, 1);
     try {
       ${before}
       said = { ...systemInfo(), ticks };
     } catch (error) {
       said = { code: error.code, message: error.message };
     }
     clearInterval(timer);
     console.log(JSON.stringify(said));`,
  );
  const deno = JSON.stringify(process.execPath);
  const command = `${deno} run --no-prompt --no-lock --allow-import=127.0.0.1 ${flags} ${JSON.stringify(program)}`;
  const { XDG_CACHE_HOME: _, KVERN_LIB: __, ...rest } = process.env;
  const child = spawn(command, {
    shell: true, // it reads the variables in a flag
    env: { ...rest, HOME: home, LOCALAPPDATA: home, DENO_DIR: join(home, "deno"), NO_COLOR: "1", ...env },
  });
  let stdout = "", stderr = "";
  child.stdout.setEncoding("utf8").on("data", (text) => stdout += text);
  child.stderr.setEncoding("utf8").on("data", (text) => stderr += text);
  const code = await new Promise((resolve) => child.once("close", resolve));
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout);
}

/** Every file below a folder that may not be there. */
export function filesBelow(folder: string): string[] {
  try {
    return readdirSync(folder, { recursive: true, encoding: "utf8" }).map((path) => join(folder, path))
      .filter((path) => statSync(path).isFile());
  } catch {
    return [];
  }
}

/** The text with which a program was refused the library. */
export async function refused(setting: Setting, options?: AskOptions): Promise<string> {
  const { code, message } = await ask(setting, options);
  assert.equal(code, "library_unavailable", message);
  return message!;
}
