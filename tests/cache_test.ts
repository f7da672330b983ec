/** The conformance suite over every cache there is. */

import { ContiguousCache, type KvCache } from "../mod.ts";
import { cacheCases } from "./cache_cases.ts";

// Sequence 1 of 3, so that a wrong stride meets a neighbour.
cacheCases({
  name: "contiguous",
  create: (options) => {
    const cache = new ContiguousCache({ ...options, sequenceCount: 3 });
    return { cache: cache.sequence(1) satisfies KvCache, free: () => cache.free() };
  },
  skip: [],
});
