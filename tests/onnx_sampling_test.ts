/** Choosing tokens by logits: the likeliest, by temperature, among the likeliest, and never by chance alone. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { sampler, type SamplingOptions } from "../src/onnx.ts";

/** How often each token is drawn. */
function counts(logits: readonly number[], options: SamplingOptions, draws: number = 20_000): number[] {
  const sample = sampler(options);
  const counts = logits.map(() => 0);
  for (let i = 0; i < draws; i++) counts[sample(Float32Array.from(logits))]! += 1;
  return counts;
}

/** The probabilities that logits and a temperature mean. */
function probabilities(logits: readonly number[], temperature: number): number[] {
  const terms = logits.map((logit) => Math.exp(logit / temperature));
  const sum = terms.reduce((sum, term) => sum + term, 0);
  return terms.map((term) => term / sum);
}

const LOGITS = [0, 2, 1, -1, 2.5];

test("without a temperature the likeliest token is chosen, the first of them on a tie", () => {
  const sample = sampler();
  assert.equal(sample(Float32Array.of(1, 3, 2, 3)), 1);
  assert.equal(sample(Float32Array.of(-Infinity, -5, -Infinity)), 1);
  assert.equal(sampler({ temperature: 0, topP: 0.1, seed: 3 })(Float32Array.of(1, 3, 2)), 1);
});

test("tokens are drawn as often as their probabilities say", () => {
  for (const temperature of [0.5, 1, 3]) {
    const draws = 20_000;
    const drawn = counts(LOGITS, { temperature, seed: 7 }, draws);
    for (const [token, p] of probabilities(LOGITS, temperature).entries()) {
      const deviation = Math.sqrt(draws * p * (1 - p)); // of a binomial distribution
      assert.ok(Math.abs(drawn[token]! - draws * p) < 5 * deviation, `${token}: ${drawn[token]}, not ${draws * p}`);
    }
  }
});

test("topP leaves the fewest likeliest tokens that are as much together, as often as before among each other", () => {
  const all = probabilities(LOGITS, 1);
  const cases: [number, number[]][] = [[0.01, [4]], [all[4]! + all[1]! - 0.01, [1, 4]], [
    all[4]! + all[1]! + 0.01,
    [1, 2, 4],
  ]];
  for (const [topP, kept] of cases) {
    const draws = 20_000;
    const drawn = counts(LOGITS, { temperature: 1, topP, seed: 5 }, draws);
    assert.deepEqual([...drawn.keys()].filter((token) => drawn[token]! > 0), kept, `${topP}`);
    const sum = kept.reduce((sum, token) => sum + all[token]!, 0);
    for (const token of kept) {
      const p = all[token]! / sum;
      const deviation = Math.sqrt(draws * p * (1 - p));
      assert.ok(Math.abs(drawn[token]! - draws * p) <= 5 * deviation, `${token} of ${kept}: ${drawn[token]}`);
    }
  }
});

test("a token that is impossible is never drawn, and one that alone is possible always", () => {
  assert.deepEqual(counts([-Infinity, 1, -Infinity, 1], { temperature: 2, seed: 1 }, 100).map((n) => n > 0), [
    ...[false, true],
    ...[false, true],
  ]);
  assert.deepEqual(counts([-Infinity, -30, -Infinity], { temperature: 0.01, topP: 0.5 }, 100), [0, 100, 0]);
});

test("a seed gives the same tokens, and without one they differ", () => {
  const logits = new Float32Array(1000);
  const draw = (options: SamplingOptions) => {
    const sample = sampler({ temperature: 1, ...options });
    return Array.from({ length: 20 }, () => sample(logits.slice()));
  };
  assert.deepEqual(draw({ seed: 0 }), draw({ seed: 0 }));
  assert.notDeepEqual(draw({ seed: 0 }), draw({ seed: 1 }));
  assert.notDeepEqual(draw({}), draw({})); // equal once in 10^60
});

test("logits that are no numbers and options out of range are refused", () => {
  for (const temperature of [0, 1]) {
    const sample = sampler({ temperature });
    for (const logits of [[1, NaN], [NaN, 1], [Infinity, 1], [-Infinity, -Infinity], []]) {
      assert.throws(() => sample(Float32Array.from(logits)), { code: "not_finite" }, `${logits}`);
    }
  }
  for (const options of [{ temperature: -1 }, { topP: 0 }, { topP: 1.1 }]) {
    assert.throws(() => sampler(options), { code: "invalid_config" });
  }
  assert.throws(() => sampler({ temperature: NaN }), RangeError);
  assert.throws(() => sampler({ seed: -1 }), RangeError);
  assert.throws(() => sampler({ topP: "0.5" as unknown as number }), TypeError);
  assert.throws(() => sampler({ topK: 5 } as object), { code: "invalid_config" });
});
