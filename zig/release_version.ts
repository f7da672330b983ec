/**
 * The version of a release: `deno.json` says it, and `build.zig.zon`, the changelog and the tag must say the same.
 *
 * @module
 */

/** A version as the changelog has it. */
export interface ChangelogEntry {
  readonly version: string;
  /** The day of the release; undefined while it is `unreleased`. */
  readonly date: string | undefined;
  /** What is written about it. */
  readonly notes: string;
}

/** The newest entry of a changelog: its first heading that reads `## 1.2.3, 2026-12-31` or `## 1.2.3, unreleased`. */
export function newestEntry(changelog: string): ChangelogEntry | undefined {
  const heading = /^## (\d+\.\d+\.\d+), (?:(\d{4}-\d\d-\d\d)|unreleased)\n([\s\S]*?)(?=^## |$(?![\s\S]))/m;
  const [, version, date, notes] = heading.exec(changelog.replaceAll("\r\n", "\n")) ?? [];
  return version === undefined ? undefined : { version, date, notes: notes!.trim() };
}

/** What names the version. */
export interface VersionPlaces {
  readonly denoJson: string;
  readonly buildZigZon: string;
  readonly changelog: string;
  /** The tag that is released, where there is one. */
  readonly tag: string | undefined;
}

/** Places that say another version than `deno.json`, and a tag of a version that the changelog has no day for. */
export function versionComplaints({ denoJson, buildZigZon, changelog, tag }: VersionPlaces): string[] {
  const version: string = JSON.parse(denoJson).version;
  const entry = newestEntry(changelog);
  const others: [place: string, version: string | undefined][] = [
    ["build.zig.zon", /^ *\.version = "([^"]*)",$/m.exec(buildZigZon)?.[1]],
    ["the newest entry of CHANGELOG.md", entry?.version],
    ...(tag === undefined ? [] : [["the tag without its v", /^v(.*)$/.exec(tag)?.[1]] as [string, string | undefined]]),
  ];
  const complaints = others.filter(([, other]) => other !== version)
    .map(([place, other]) => `${place} must be of version ${version}, as deno.json is: it is of ${other ?? "none"}`);
  if (tag !== undefined && entry !== undefined && entry.date === undefined) {
    complaints.push(`CHANGELOG.md must have the day of ${entry.version} before it is tagged: it says unreleased`);
  }
  return complaints;
}
