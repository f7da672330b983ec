/** kvern imported over the network: the library comes along once, is kept, and is compared whenever it is opened. */

import assert from "node:assert/strict";
import {
  appendFileSync,
  chmodSync,
  chownSync,
  copyFileSync,
  mkdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import process from "node:process";
import { systemInfo } from "../mod.ts";
import { LIBRARY_FILES, releasedPlace, stagePackage, type Target } from "../zig/package.ts";
import { stageOwnPackage, TARGET } from "./own_package.ts";
import { ask, filesBelow, reason, refused, remoteTest, VARIABLES, windows } from "./remote_package.ts";

const { libraryPath } = systemInfo();
const LIBRARY = `/${releasedPlace(TARGET)}`;
const BY_HAND = /or take lib\/<target> from the release and name its library in KVERN_LIB or with setLibraryPath\(\)/;

remoteTest(
  "a module from the network fetches its library once, keeps it, and then starts without a network",
  async (setting) => {
    const first = await ask(setting);
    assert.ok(first.libraryPath?.startsWith(setting.kept), first.message ?? first.libraryPath);
    assert.deepEqual(readFileSync(first.libraryPath!), readFileSync(libraryPath));
    assert.deepEqual(filesBelow(setting.kept), [first.libraryPath]);
    if (!windows) {
      for (let at = dirname(first.libraryPath!); at !== dirname(setting.kept); at = dirname(at)) {
        assert.equal(statSync(at).mode & 0o777, 0o700, at);
      }
    }
    assert.equal(setting.asked.get(LIBRARY), 1);
    assert.equal((await ask(setting)).libraryPath, first.libraryPath);
    assert.equal(setting.asked.get(LIBRARY), 1);

    await setting.unplug();
    const flags = `--allow-env=${VARIABLES} --allow-read=${setting.kept} --allow-ffi=${setting.kept}`;
    assert.equal((await ask(setting, { flags })).libraryPath, first.libraryPath);
  },
);

remoteTest("await loadLibrary() lets other work go on; without it the first use waits", async (setting) => {
  setting.delayMs = 500;
  const { libraryPath: path, ticks } = await ask(setting, {
    before: "await Promise.all([loadLibrary(), loadLibrary()]);",
  });
  assert.ok(path?.startsWith(setting.kept), path);
  assert.ok(ticks! > 10, `${ticks} turns of the event loop while the library came`);

  rmSync(setting.kept, { recursive: true });
  assert.equal((await ask(setting)).ticks, 0);
  assert.ok(setting.asked.get(LIBRARY)! >= 2);
});

remoteTest("a Worker that uses kvern first fetches the library as well", async (setting) => {
  const code = `import { systemInfo } from "${setting.url}mod.ts"; postMessage(systemInfo().libraryPath);`;
  const before = `
    const worker = new Worker(URL.createObjectURL(new Blob([${JSON.stringify(code)}])), { type: "module" });
    const path = await new Promise((resolve) => worker.onmessage = ({ data }) => resolve(data));
    worker.terminate();
    if (path !== systemInfo().libraryPath) throw new Error("the Worker opened " + path);`;
  const { libraryPath: path, message } = await ask(setting, { before });
  assert.ok(path?.startsWith(setting.kept), message);
  assert.equal(setting.asked.get(LIBRARY), 1);
});

remoteTest("what Deno has to allow is named at once, and is enough", async (setting) => {
  const { host } = new URL(setting.url);
  const given = `--allow-env=${VARIABLES}`;
  const rest = (folder: string) => `--allow-net=${host} --allow-write=${folder}`;
  const rows: [flags: string, wanted: string][] = [
    [given, `--allow-read=${setting.kept} --allow-ffi=${setting.kept} ${rest(setting.kept)}`],
    [`${given} -R -N`, `--allow-ffi=${setting.kept} --allow-write=${setting.kept}`],
    [`${given} -N -W --allow-ffi`, `--allow-read=${setting.kept}`],
  ];
  for (const [flags, wanted] of rows) {
    const { code, message } = await ask(setting, { flags });
    assert.equal(code, "needs_permission", message);
    assert.ok(message!.includes(`: run with ${wanted}, or take`), message);
  }
  assert.deepEqual(filesBelow(setting.kept), []);

  // Without a look at the variables the folder is written as the shell finds it.
  const { message } = await ask(setting, { flags: "" });
  const flags = /run with (.*), or take/.exec(message!)![1]!;
  assert.match(
    flags,
    new RegExp(`^--allow-env=${VARIABLES} --allow-read=\\S+kvern --allow-ffi=\\S+kvern --allow-net=${host} `),
  );
  assert.ok((await ask(setting, { flags })).libraryPath?.startsWith(setting.kept), flags);
});

remoteTest("several processes at once end with one library and nothing beside it", async (setting) => {
  setting.delayMs = 200;
  const paths = await Promise.all([1, 2, 3].map(() => ask(setting)));
  for (const { libraryPath: path, message } of paths) assert.ok(path?.startsWith(setting.kept), message);
  assert.equal(filesBelow(setting.kept).length, 1);
});

remoteTest("what the server gives is kept only if it is the library of the release", async (setting) => {
  const file = join(setting.package, LIBRARY);
  const bytes = readFileSync(file), changed = Uint8Array.from(bytes);
  changed[bytes.length >> 1]! ^= 1;
  const rows: [given: Uint8Array, reason: RegExp][] = [
    [bytes.subarray(0, 1000), /it has 1000 bytes, the released one has \d+/],
    [Uint8Array.from([...bytes.subarray(0, 100), ...bytes]), /it has \d+ bytes, the released one has \d+/],
    [changed, /its SHA-256 is [0-9a-f]{64}, that of the released one [0-9a-f]{64}/],
  ];
  for (const [given, reason] of rows) {
    writeFileSync(file, given);
    const message = await refused(setting);
    assert.match(message, reason);
    assert.match(message, BY_HAND);
    assert.ok(message.includes(`, ${setting.url}lib/`), message);
  }
  rmSync(file);
  assert.match(await refused(setting), /the server answered 404/);
  assert.match(await refused(setting, { before: "await loadLibrary();" }), /the server answered 404/);
  assert.deepEqual(filesBelow(setting.kept), []);
});

remoteTest("without a network and without a copy one error says what was tried and what to do", async (setting) => {
  await ask(setting); // Deno keeps the modules
  const [kept] = filesBelow(setting.kept);
  rmSync(setting.kept, { recursive: true });
  await setting.unplug();
  for (const before of ["", "await loadLibrary();"]) {
    const message = await refused(setting, { before });
    assert.ok(message.includes(`tried ${kept} (no such file), ${setting.url}${LIBRARY.slice(1)} (`), message);
    assert.match(message, BY_HAND);
  }
  // The ways around it.
  const copy = join(setting.home, "copy.so");
  copyFileSync(libraryPath, copy);
  assert.equal((await ask(setting, { env: { KVERN_LIB: copy } })).libraryPath, copy);
  const before = `setLibraryPath(${JSON.stringify(copy)}); await loadLibrary();`;
  assert.equal((await ask(setting, { before })).libraryPath, copy);
});

remoteTest("a copy that was damaged is fetched again, and never opened", async (setting) => {
  const { libraryPath: path } = await ask(setting);
  appendFileSync(path!, "x");
  const again = await ask(setting);
  assert.equal(again.libraryPath, path, again.message);
  assert.deepEqual(readFileSync(path!), readFileSync(libraryPath));

  const changed = readFileSync(path!);
  changed[changed.length >> 1]! ^= 1;
  writeFileSync(path!, changed);
  await setting.unplug();
  assert.match(await refused(setting), /its SHA-256 is [0-9a-f]{64}, that of the released one/);
});

const noModes = reason || (windows ? " (skipped: Windows has no modes)" : "");
const noOwners = reason || (process.getuid?.() === 0 ? "" : " (skipped: only root gives a folder to another user)");
const noXdg = reason || (VARIABLES.length > 1 ? "" : " (skipped: this system has no XDG_CACHE_HOME)");
remoteTest("a folder that others can look into is refused before anything is fetched into it", async (setting) => {
  mkdirSync(setting.kept, { recursive: true });
  chmodSync(setting.kept, 0o777);
  const message = await refused(setting);
  assert.ok(message.includes(`${setting.kept} is not, its mode is 777; remove it, or take`), message);
  assert.equal(setting.asked.get(LIBRARY), undefined);
  chmodSync(setting.kept, 0o700);
  const { libraryPath: path } = await ask(setting);
  chmodSync(dirname(path!), 0o770);
  assert.match(await refused(setting), /its mode is 770/);
}, noModes);

remoteTest("a cache directory of another user is refused", async (setting) => {
  const { libraryPath: path } = await ask(setting);
  chownSync(setting.kept, 12345, 12345);
  assert.ok((await refused(setting)).includes(`${setting.kept} is not, its owner is user 12345, not 0`));
  chownSync(setting.kept, 0, 0);
  assert.equal((await ask(setting)).libraryPath, path);
}, noOwners);

remoteTest("no home and a relative one are refused, and so is a file where the folder should be", async (setting) => {
  const home = (value: string) => ({ env: { HOME: value, LOCALAPPDATA: value } });
  assert.match(
    await refused(setting, home("")),
    new RegExp(`as ${VARIABLES.join(" or ")} must name a folder to keep it in: `),
  );
  assert.match(await refused(setting, home("relative")), /is relative/);
  mkdirSync(dirname(setting.kept), { recursive: true });
  writeFileSync(setting.kept, "", { mode: 0o600 });
  assert.match(await refused(setting), /it cannot be kept in \S+kvern/);
});

remoteTest("XDG_CACHE_HOME says where the library is kept, unless it is relative", async (setting) => {
  const cache = join(setting.home, "elsewhere");
  assert.ok((await ask(setting, { env: { XDG_CACHE_HOME: cache } })).libraryPath?.startsWith(join(cache, "kvern")));
  const { libraryPath: path } = await ask(setting, { env: { XDG_CACHE_HOME: "relative" } });
  assert.ok(path?.startsWith(setting.kept), path);
}, noXdg);

remoteTest("a package without a library for this target says which it has", async (setting) => {
  const other = Object.keys(LIBRARY_FILES).find((target) => target !== TARGET) as Target;
  rmSync(setting.package, { recursive: true });
  stagePackage(setting.package, { [other]: libraryPath });
  const message = await refused(setting);
  assert.ok(message.includes(`must have one for ${TARGET}: it has ${other}`), message);
});

remoteTest("a library of another target is refused by the system, with the path", async (setting) => {
  const foreign = readFileSync(libraryPath);
  foreign.fill(0xff, 16, 20); // neither a shared library nor for this CPU, in ELF
  if (process.platform !== "linux") foreign.fill(0xff, 0, 20);
  const file = join(setting.home, "foreign");
  writeFileSync(file, foreign);
  rmSync(setting.package, { recursive: true });
  stageOwnPackage(setting.package, file);
  assert.match(await refused(setting), /tried \S+kvern\S* \(.+\)/);
});
