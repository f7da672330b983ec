/**
 * How `console.log` shows the objects of this library: as one line of facts, where their private fields say nothing.
 *
 * @module
 */

/** Where every runtime looks for it; not a named import, as it must not touch a module of one of them. */
const INSPECT = Symbol.for("nodejs.util.inspect.custom");

/** What is shown of an object, in this order. */
export type Facts = Readonly<Record<string, number | string | boolean>>;

/**
 * Has the objects of a class shown as `Name { fact: 1 }`, or as `Name (freed)` where `factsOf` gives none. `nameOf`
 * tells objects of one class apart.
 *
 * Showing an object never throws, not even the prototype, and needs no permission that its facts do not.
 */
export function showAs<Shown extends object>(
  { name, prototype }: { readonly name: string; readonly prototype: Shown },
  factsOf: (object: Shown) => Facts | undefined,
  nameOf: (object: Shown) => string = () => name,
): void {
  const value = function (this: Shown): string {
    try {
      const facts = factsOf(this);
      if (facts === undefined) return `${nameOf(this)} (freed)`;
      return `${nameOf(this)} { ${
        Object.entries(facts).map(([fact, value]) => `${fact}: ${JSON.stringify(value)}`).join(", ")
      } }`;
    } catch {
      return `${name} {}`;
    }
  };
  Object.defineProperty(prototype, INSPECT, { value, configurable: true });
}
