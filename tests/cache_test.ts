/** The conformance suite over every cache there is. */

import { ContiguousCache, type KvCache, PagedCache } from "../mod.ts";
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

// Between two other sequences, so that blocks of the same slab meet a neighbour.
for (const blockSize of [1, 4, 64]) {
  cacheCases({
    name: `paged, blocks of ${blockSize}`,
    create: (options) => {
      const cache = new PagedCache({ ...options, blockSize });
      const [before, sequence, after] = [cache.sequence(), cache.sequence(), cache.sequence()];
      const row = new Float32Array(sequence.kvDim).fill(9);
      for (const other of [before, after]) other.append(0, row, row);
      return { cache: sequence satisfies KvCache, free: () => cache.free() };
    },
    skip: [],
  });
}

// Rows that left the tail for wider floats, which hold what f16 and bf16 say: whatever the tier, what is read is the same.
for (const blockSize of [1, 4]) {
  cacheCases({
    name: `paged, blocks of ${blockSize}, older rows in f32`,
    create: (options) => {
      const cache = new PagedCache({ ...options, blockSize, store: "f32" });
      return { cache: cache.sequence() satisfies KvCache, free: () => cache.free() };
    },
    skip: [],
  });
}
