/**
 * Installs the rivals of the benches, pinned: llama.cpp and onnxruntime-node.
 *
 *     deno task bench:rivals
 *
 * They stand in no configuration, where everybody would download them who only builds kvern, and lie in
 * `benches/rivals/node_modules`, below which only the benches look. Without them the benches run and have no figures of
 * rivals. No script of a package is run.
 *
 * @module
 */
import { existsSync, mkdtempSync, readFileSync, renameSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { download, say, seconds, ToolchainError } from "../../zig/toolchain.ts";

/** The packages: of one version each, for this platform only. */
const PLATFORM = "linux-x64";
const PACKAGES = [
  {
    name: "@node-llama-cpp/linux-x64",
    version: "3.22.1",
    integrity: "sha512-5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg==",
  },
  {
    name: "onnxruntime-node",
    version: "1.30.0",
    integrity: "sha512-twhs1C2C/BFkz1yc5OY0KIU2GUq6DURO7hD4bx5Q2Qy3nAMJwRXW8xU3NVczE29VA9lolLOYepoD8fjTGOfIqw==",
  },
] as const;
const TITLE = PACKAGES.map(({ name, version }) => `${name} ${version}`).join(" and ");

const FOLDER = dirname(fileURLToPath(import.meta.url));
const INSTALLED = join(FOLDER, "node_modules");

/** Are these versions there? */
function isInstalled(): boolean {
  return PACKAGES.every(({ name, version }) => {
    const path = join(INSTALLED, name, "package.json");
    return existsSync(path) && JSON.parse(readFileSync(path, "utf8")).version === version;
  });
}

async function install(): Promise<void> {
  const platform = `${process.platform}-${process.arch}`;
  if (platform !== PLATFORM) {
    say(`the rivals are for ${PLATFORM} and this is ${platform}: nothing is installed, the benches do without them`);
    return;
  }
  if (isInstalled()) return say(`${TITLE} are installed`);
  if (!process.versions.deno) {
    throw new ToolchainError("Cannot install the rivals without Deno: use it to run this file");
  }
  say(`installing ${TITLE} from npm into benches/rivals/node_modules (320 MB of disk)`);
  const started = performance.now();
  const folder = mkdtempSync(join(FOLDER, "install-"));
  const stop = new AbortController();
  const interrupted = () => stop.abort();
  process.once("SIGINT", interrupted).once("SIGTERM", interrupted);
  try {
    await download(folder, { title: TITLE, advice: "Check the network", packages: PACKAGES }, stop.signal);
    rmSync(INSTALLED, { recursive: true, force: true });
    renameSync(join(folder, "node_modules"), INSTALLED);
  } finally {
    process.off("SIGINT", interrupted).off("SIGTERM", interrupted);
    rmSync(folder, { recursive: true, force: true });
  }
  say(`installed the rivals in ${seconds(started)}`);
}

try {
  await install();
} catch (error) {
  if (!(error instanceof ToolchainError)) throw error;
  say(error.message);
  process.exitCode = 1;
}
