/** The workflows of GitHub: that they are YAML, name what is there, and give the right to publish to one job alone. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import process from "node:process";
import { test } from "node:test";
import { inDeno, runCode } from "./child.ts";

const FOLDER = new URL("../.github/workflows/", import.meta.url);

interface Step {
  readonly uses?: string;
  readonly run?: string;
  readonly if?: string;
}

interface Job {
  readonly "runs-on"?: string;
  readonly uses?: string;
  readonly needs?: string | readonly string[];
  readonly if?: string;
  readonly permissions?: Readonly<Record<string, string>>;
  readonly strategy?: { readonly matrix: { readonly os: readonly string[] } };
  readonly steps?: readonly Step[];
}

interface Workflow {
  readonly on: Readonly<Record<string, unknown>>;
  readonly permissions: Readonly<Record<string, string>>;
  readonly jobs: Readonly<Record<string, Job>>;
}

/** The workflows by file name, read by a package of npm. */
function workflows(): Record<string, Workflow> {
  const texts = readdirSync(FOLDER).map((name) => [name, readFileSync(new URL(name, FOLDER), "utf8")]);
  const { code, stdout, stderr } = runCode(
    `import { parse } from "npm:yaml@2.8.1";
    const texts = ${JSON.stringify(texts)};
    console.log(JSON.stringify(Object.fromEntries(texts.map(([name, text]) => [name, parse(text)]))));`,
    { env: { DENO_TLS_CA_STORE: process.env.DENO_TLS_CA_STORE ?? "mozilla,system" } }, // as the tools are installed
  );
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout);
}

/** What is wrong with a workflow, besides what `tidy_test.ts` finds: tasks and versions that are not there. */
function complaints(all: Readonly<Record<string, Workflow>>): string[] {
  return Object.entries(all).flatMap(([file, { permissions, jobs }]) => {
    const found: string[] = [];
    if (JSON.stringify(permissions) !== '{"contents":"read"}') found.push(`${file} may do more than read`);
    for (const [name, job] of Object.entries(jobs)) {
      for (const needed of [job.needs ?? []].flat()) {
        if (!(needed in jobs)) found.push(`${file}: ${name} needs ${needed}, which is no job`);
      }
      if (job.uses !== undefined) {
        const called = all[job.uses.replace("./.github/workflows/", "")];
        if (!called || !("workflow_call" in called.on)) {
          found.push(`${file}: ${name} calls ${job.uses}, which it cannot`);
        }
      }
      for (const { uses } of job.steps ?? []) {
        if (uses !== undefined && !/^actions\/[\w-]+@(v\d+|[0-9a-f]{40})$/.test(uses)) {
          found.push(`${file}: ${name} uses ${uses}`);
        }
      }
      const mayWrite = Object.values(job.permissions ?? {}).includes("write");
      if (mayWrite && job.if !== "github.ref_type == 'tag'") found.push(`${file}: ${name} may write without a tag`);
      if (!mayWrite && job.steps?.some(({ run }) => / publish\b|gh release/.test(run ?? ""))) {
        found.push(`${file}: ${name} publishes`);
      }
    }
    return found;
  });
}

const reason = inDeno ? "" : " (skipped: it runs no code of kvern, and is run under Deno)";

test(`the workflows read what is there, and only a tag publishes${reason}`, { skip: !inDeno, timeout: 120_000 }, () => {
  assert.deepEqual(
    complaints({
      "a.yml": {
        on: {},
        permissions: { contents: "write" },
        jobs: {
          one: { needs: ["two", "three"], steps: [{ uses: "actions/checkout@v6" }, { uses: "someone/thing@v1" }] },
          two: { needs: "one", permissions: { "id-token": "write" } },
          four: { uses: "./.github/workflows/b.yml", steps: [{ run: "npx -y deno@1.0.0 publish" }] },
        },
      },
      "b.yml": { on: { push: {} }, permissions: { contents: "read" }, jobs: {} },
    }),
    [
      "a.yml may do more than read",
      "a.yml: one needs three, which is no job",
      "a.yml: one uses someone/thing@v1",
      "a.yml: two may write without a tag",
      "a.yml: four calls ./.github/workflows/b.yml, which it cannot",
      "a.yml: four publishes",
    ],
  );

  const all = workflows();
  assert.deepEqual(complaints(all), []);
  const ci = all["ci.yml"]!.jobs.test!.strategy!.matrix.os;
  for (const system of [/^ubuntu-.*\d$/, /^ubuntu-.*-arm$/, /^macos-/, /^windows-/]) {
    assert.ok(ci.some((os) => system.test(os)), `the tests run on ${system}`);
  }
  const release = all["release.yml"]!;
  assert.deepEqual(release.on, { push: { tags: ["v*"] }, workflow_dispatch: null });
  const { build, check } = release.jobs;
  assert.notEqual(build!["runs-on"], check!["runs-on"], "two machines build");
  assert.ok(check!.steps!.some(({ run }) => run === 'diff -r lib "$RUNNER_TEMP/lib"'), "what they built is compared");
  assert.deepEqual(release.jobs.publish!.permissions, { contents: "write", "id-token": "write" });
  const needed = (name: string): string[] =>
    [release.jobs[name]!.needs ?? []].flat().flatMap((other) => [other, ...needed(other)]);
  for (const name of ["test", "build", "check"]) assert.ok(needed("publish").includes(name), `a release needs ${name}`);
});
