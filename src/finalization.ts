/**
 * Frees what nobody can reach any more.
 *
 * `using` or `free()` is the way; a cache that is dropped without either is freed here, some time after the garbage
 * collector found it, and counted, because native memory that waits for the collector is a leak in waiting.
 *
 * @module
 */

/** What is needed to free an object after it is gone; it must not refer to the object. */
type Free = () => void;

let finalizedCount = 0;

const registry = new FinalizationRegistry<Free>((free) => {
  finalizedCount += 1;
  free();
});

/** Calls `free` once `owner` is unreachable, unless `unwatch(owner)` comes first. */
export function freeWhenDropped(owner: WeakKey, free: Free): void {
  registry.register(owner, free, owner);
}

const partRegistry = new FinalizationRegistry<Free>((free) => free());

/** As `freeWhenDropped`, for a part of a cache: it is freed and not counted. */
export function freePartWhenDropped(owner: WeakKey, free: Free): void {
  partRegistry.register(owner, free, owner);
}

/** Ends the watch: `owner` was freed by its user. */
export function unwatch(owner: WeakKey): void {
  registry.unregister(owner);
  partRegistry.unregister(owner);
}

/** How many caches this thread has freed because they were dropped. */
export function finalizedCaches(): number {
  return finalizedCount;
}
