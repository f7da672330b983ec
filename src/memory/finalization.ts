/**
 * Frees what nobody can reach any more.
 *
 * `using` or `free()` is the way; a cache that is dropped without either is freed here, some time after the garbage
 * collector found it, and counted, because native memory that waits for the collector is a leak in waiting.
 *
 * A collector runs when its own heap has grown, and knows nothing of native memory: a cache of gigabytes is a few small
 * objects to it. So the runtime is told what native memory has grown by, and looks for garbage about as often as if caches
 * were arrays. Finalizers still need a turn of the event loop; `KVERN_MAX_BYTES` bounds what is held where there is none.
 *
 * @module
 */

import { library } from "../ffi/library.ts";
import { adapter } from "../ffi/runtime.ts";

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
  tellCollector();
}

const partRegistry = new FinalizationRegistry<Free>((free) => free());

/** Does what `freeWhenDropped` does for a part of a cache, which is not counted. */
export function freePartWhenDropped(owner: WeakKey, free: Free): void {
  partRegistry.register(owner, free, owner);
  tellCollector();
}

/** What the process had reserved when an object was last made, in MiB. */
let knownMib = 0;

/** Tells the runtime what native memory has grown by since the last object was made. */
function tellCollector(): void {
  const nowMib = library().kv_reserved_mib();
  if (nowMib > knownMib) adapter.noteGrowth(nowMib - knownMib, nowMib);
  knownMib = nowMib;
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
