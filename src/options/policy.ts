/**
 * Policies: which rows of a paged cache stay in floats, and what becomes of the others.
 *
 *     0        sinkTokens        seqLen - tail.tokens      seqLen
 *     | tail   | store store store store | tail  tail  tail  ta|        blocks
 *
 * Rows are written to the tail, in floats. At a commit, while the tail holds `tail.tokens` rows and a block more, its
 * oldest block migrates to the store: it is quantized, once, in every layer of its shape. The blocks of the first
 * `sinkTokens` rows never migrate, and come on top of `tail.tokens`; so does a stored block that was rewound into, from the
 * next append on: it is in floats then, and no row is rounded twice.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { ENUMS, VALUES } from "../ffi/exports.ts";
import type { Values } from "../ffi/record.ts";
import { checkCount } from "./counts.ts";
import { dtypeCode, dtypeOf } from "./dtype.ts";
import { checkFits, type KvFormat, type Sides, sidesOf } from "./format.ts";
import { checkOptions, type OptionNames, optionNames } from "./option_names.ts";

/**
 * How far off a score may be because the keys of a block are quantized, which a {@linkcode PagedCache} with
 * `measureFidelity` acts on as blocks migrate.
 *
 * Both numbers are kept in 32 bits, and read back as `Math.fround` of what was given.
 */
export interface LogitErrorOptions {
  /**
   * A block with which a score of some head could be off by more takes a wider format for its keys, at last that of the
   * tail: `i2`, `i4`, `i8`, tail, and `q4_0`, `q8_0`, tail. Values keep their format, and so do blocks that migrated
   * before. Above 0; no limit by default. Needs `measureFidelity`.
   */
  readonly maxLogitError?: number;
  /**
   * The largest norm of a query that is to be expected, as it is given to `attend`, with a `softmaxScale` of
   * `1 / sqrt(headDim)`. By default the largest `softmaxScale * |q|` that each head has seen so far counts, and before the
   * first query nothing is too far off. Above 0; needs `maxLogitError`.
   */
  readonly queryNorm?: number;
}

/** A {@linkcode Policy} under which nothing migrates. */
export interface TailOnlyPolicy {
  /** Nothing migrates. */
  readonly kind: "tail-only";
}

/** A {@linkcode Policy} under which each block migrates as soon as it is full. */
export interface StoreOnlyPolicy extends LogitErrorOptions {
  /** Each block migrates as soon as it is full. */
  readonly kind: "store-only";
  /** The format of rows that have migrated. */
  readonly store?: KvFormat;
  /** First rows whose blocks never migrate; 0 by default. */
  readonly sinkTokens?: number;
}

/** A {@linkcode Policy} under which the newest rows stay in the tail and older ones migrate. */
export interface HybridPolicy extends LogitErrorOptions {
  /** The newest rows stay in the tail, older ones migrate. */
  readonly kind: "hybrid";
  /** What stays. */
  readonly tail: {
    /** Newest rows that stay, a multiple of `blockSize`; up to `blockSize - 1` more stay until their block is full. */
    readonly tokens: number;
    /** First rows whose blocks never migrate; 0 by default. */
    readonly sinkTokens?: number;
  };
  /** The format of rows that have migrated. */
  readonly store?: KvFormat;
}

/**
 * What becomes of the rows of a {@linkcode PagedCache} as they grow old.
 *
 * `store` is the format they migrate to; layers with a `store` of their own do not ask it, and it may be absent where
 * every layer that is to migrate has one. Plain data: `JSON.parse(JSON.stringify(policy))` says the same.
 */
export type Policy = TailOnlyPolicy | StoreOnlyPolicy | HybridPolicy;

/** The names of every kind of policy together. */
const POLICY_NAMES: OptionNames = optionNames<HybridPolicy & Omit<StoreOnlyPolicy, "kind">>({
  kind: true,
  tail: true,
  store: true,
  sinkTokens: true,
  maxLogitError: true,
  queryNorm: true,
});

const POLICY_TAIL_NAMES: OptionNames = optionNames<HybridPolicy["tail"]>({
  tokens: true,
  sinkTokens: true,
});

/** What a policy must agree with. */
export interface PolicyRules {
  /** Begins the text of a refusal. */
  readonly action: string;
  readonly blockSize: number;
  /** 0 keeps all rows. */
  readonly retentionTokens: number;
  /** Limits need it. */
  readonly measuresFidelity: boolean;
  readonly layers: readonly { readonly headDim: number; readonly store?: Sides }[];
}

/** Nothing migrates. */
const TAIL_ONLY: Values<"policy"> = {
  policyKind: ENUMS.policyKind.tailOnly,
  policyStoreK: 0,
  policyStoreV: 0,
  policyTailTokens: 0,
  policySinkTokens: 0,
  policyMaxLogitError: 0,
  policyQueryNorm: 0,
};

/** The properties of any policy but `kind`. */
const PROPERTIES = ["tail", "store", "sinkTokens", "maxLogitError", "queryNorm"] as const;

/** The checked values of a policy; each of its properties is read once. */
export function policyValues(policy: Policy, rules: PolicyRules): Values<"policy"> {
  checkOptions(policy, POLICY_NAMES, rules.action, "policy");
  // As it may come from JSON: a name this version does not know must not pass for one it does.
  const properties: { readonly [Name in "kind" | typeof PROPERTIES[number]]?: unknown } = policy;
  const { kind, tail, store, sinkTokens, maxLogitError, queryNorm } = properties;
  const limits = { maxLogitError, queryNorm };
  const given = { tail, store, sinkTokens, ...limits };
  switch (kind) {
    case "tail-only":
      checkAbsent(kind, given, PROPERTIES, rules);
      return TAIL_ONLY;
    case "store-only":
      checkAbsent(kind, given, ["tail"], rules);
      return tieredValues({ tokens: 0, sinkTokens, store, limits }, rules);
    case "hybrid": {
      checkAbsent(kind, given, ["sinkTokens"], rules);
      checkOptions(tail, POLICY_TAIL_NAMES, rules.action, "policy.tail");
      const { tokens, sinkTokens: sinks }: { readonly tokens?: unknown; readonly sinkTokens?: unknown } = tail;
      return tieredValues({ tokens, sinkTokens: sinks, store, limits }, rules);
    }
  }
  if (typeof kind !== "string") throw new TypeError(`policy.kind must be a string: ${typeof kind}`);
  throw refuse(rules, `policy.kind must be tail-only, store-only or hybrid: kind is ${kind}`);
}

function checkAbsent(
  kind: string,
  given: Readonly<Record<string, unknown>>,
  names: readonly string[],
  rules: PolicyRules,
): void {
  const name = names.find((name) => given[name] !== undefined);
  if (name !== undefined) throw refuse(rules, `a policy that is ${kind} has no ${name}: it is given`);
}

/** The checked values of a tail, a store and limits. */
function tieredValues(
  { tokens, sinkTokens = 0, store, limits }: {
    readonly tokens: unknown;
    readonly sinkTokens: unknown;
    readonly store: unknown;
    readonly limits: GivenLimits;
  },
  rules: PolicyRules,
): Values<"policy"> {
  const { blockSize, retentionTokens, layers } = rules;
  checkCount("tail.tokens", tokens);
  checkCount("sinkTokens", sinkTokens);
  if (sinkTokens > VALUES.maxSeqLenMax) {
    throw refuse(rules, `sinkTokens must be at most ${VALUES.maxSeqLenMax}: sinkTokens is ${sinkTokens}`);
  }
  const tailTokens = tokens;
  if (tailTokens % blockSize !== 0) {
    throw refuse(rules, `tail.tokens must be a multiple of blockSize ${blockSize}: tail.tokens is ${tailTokens}`);
  }
  if (retentionTokens !== 0 && tailTokens > retentionTokens) {
    throw refuse(
      rules,
      `tail.tokens must be at most retention.tokens ${retentionTokens}: tail.tokens is ${tailTokens}`,
    );
  }
  const sides = store === undefined ? undefined : sidesOf("store", store as KvFormat, rules.action);
  if (sides === undefined && layers.every((layer) => layer.store === undefined)) {
    throw refuse(rules, "store must be given where no layer has its own: store is undefined");
  }
  for (const [i, { headDim, store: own }] of layers.entries()) {
    const format = own ?? sides;
    const name = own === undefined ? "store" : `layers[${i}].store`;
    if (format !== undefined) checkFits(name, format, headDim, blockSize, rules.action);
  }
  const [policyStoreK, policyStoreV] = storeWords(sides);
  return {
    policyKind: ENUMS.policyKind.tiered,
    policyStoreK,
    policyStoreV,
    policyTailTokens: tailTokens,
    policySinkTokens: sinkTokens,
    ...limitValues(limits, rules),
  };
}

type GivenLimits = { readonly [Name in keyof LogitErrorOptions]-?: unknown };

/** The checked values of limits: 0 for what is not given. */
function limitValues(
  { maxLogitError, queryNorm }: GivenLimits,
  rules: PolicyRules,
): Pick<Values<"policy">, "policyMaxLogitError" | "policyQueryNorm"> {
  const values = {
    policyMaxLogitError: limitValue("maxLogitError", maxLogitError, rules),
    policyQueryNorm: limitValue("queryNorm", queryNorm, rules),
  };
  if (maxLogitError !== undefined && !rules.measuresFidelity) {
    throw refuse(rules, `maxLogitError needs measureFidelity: maxLogitError is ${maxLogitError}`);
  }
  if (queryNorm !== undefined && maxLogitError === undefined) {
    throw refuse(rules, `queryNorm needs maxLogitError: queryNorm is ${queryNorm}`);
  }
  return values;
}

/** The value crosses as an f32, so it must be a limit as one: what rounds to 0 would pass for none. */
function limitValue(name: string, value: unknown, rules: PolicyRules): number {
  if (value === undefined) return 0;
  if (typeof value !== "number") throw new TypeError(`${name} must be a number: ${typeof value}`);
  const word = Math.fround(value);
  if (!(word > 0 && word < Infinity)) {
    throw refuse(rules, `${name} must be above 0 and finite as an f32: ${name} is ${value}`);
  }
  return word;
}

/** A store as words: one more than the numbers of its dtypes, 0 for none. */
export function storeWords(store: Sides | undefined): [k: number, v: number] {
  if (store === undefined) return [0, 0];
  return [dtypeCode("store.k", store.k) + 1, dtypeCode("store.v", store.v) + 1];
}

/** The store that words say. */
export function storeOf(k: number, v: number): Sides | undefined {
  return k === 0 ? undefined : { k: dtypeOf(k - 1), v: dtypeOf(v - 1) };
}

/** The policy that a record says. */
export function policyOf(values: Values<"policy">): Policy {
  if (values.policyKind === ENUMS.policyKind.tailOnly) return { kind: "tail-only" };
  const { policyTailTokens: tokens, policySinkTokens: sinkTokens } = values;
  const { policyMaxLogitError: maxLogitError, policyQueryNorm: queryNorm } = values;
  const sides = storeOf(values.policyStoreK, values.policyStoreV);
  const rest = {
    ...(sides === undefined ? {} : { store: sides }),
    ...(maxLogitError === 0 ? {} : { maxLogitError }),
    ...(queryNorm === 0 ? {} : { queryNorm }),
  };
  if (tokens === 0) return { kind: "store-only", sinkTokens, ...rest };
  return { kind: "hybrid", tail: { tokens, sinkTokens }, ...rest };
}

function refuse({ action }: PolicyRules, rule: string): KvError {
  return new KvError("invalid_config", `Cannot ${action} as ${rule}`);
}
