/**
 * What a runtime may have to be allowed before the native library can be found and opened: Deno's permissions.
 *
 * @module
 */

/** One thing that a runtime allows or denies. */
export type Permission =
  | { readonly name: "ffi" | "read" | "write"; readonly path: string }
  | { readonly name: "net"; readonly host: string }
  | { readonly name: "env"; readonly variable: string }
  | { readonly name: "sys"; readonly kind: "uid" };

/** The flags of the command line that allow all of these, the variables of the environment in one. */
export function flagsOf(permissions: readonly Permission[]): string {
  const flags = new Map<string, string[]>();
  for (const permission of permissions) {
    const values = flags.get(permission.name) ?? [];
    values.push(valueOf(permission));
    flags.set(permission.name, values);
  }
  return [...flags].map(([name, values]) => `--allow-${name}=${[...new Set(values)].join(",")}`).join(" ");
}

function valueOf(permission: Permission): string {
  switch (permission.name) {
    case "net":
      return permission.host;
    case "env":
      return permission.variable;
    case "sys":
      return permission.kind;
    default:
      return permission.path;
  }
}
