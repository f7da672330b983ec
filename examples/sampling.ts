/** From logits to a token, and to a probability: everything that turns the model's output into a choice. */

/**
 * Seeded random numbers (mulberry32): the same seed gives the same text in one runtime. Not for secrets.
 *
 * Across runtimes a text may part ways, as `Math.exp` does not give the same last bit everywhere.
 */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed >>> 0;
  }

  /** A number in [0, 1), in steps of 2^-32. */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(this.#state ^ (this.#state >>> 15), this.#state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  }
}

/** Draws a token with probability softmax(logits / temperature); temperature 0 takes the most likely one. */
export function sample(logits: Float32Array, temperature: number, random: Random): number {
  const best = argmax(logits);
  if (temperature === 0) return best;

  // The largest logit is subtracted first, so that the largest term is 1 whatever the temperature.
  const terms = new Float64Array(logits.length); // [vocab]
  let sum = 0;
  for (let token = 0; token < logits.length; token++) {
    terms[token] = token === best ? 1 : Math.exp((logits[token]! - logits[best]!) / temperature);
    sum += terms[token]!;
  }
  let rest = random.next() * sum;
  for (let token = 0; token < logits.length; token++) {
    rest -= terms[token]!;
    if (rest < 0) return token;
  }
  return best; // the sum and the subtractions round differently
}

/** The token of the largest logit, the first of them on a tie. */
export function argmax(logits: Float32Array): number {
  let best = 0;
  for (let token = 1; token < logits.length; token++) {
    if (logits[token]! > logits[best]!) best = token;
  }
  return best;
}

/** The natural log of the sum of e^logit: `logits[token] - logSumExp(logits)` is the log-probability of a token. */
export function logSumExp(logits: Float32Array): number {
  const largest = logits[argmax(logits)]!;
  let sum = 0;
  for (let token = 0; token < logits.length; token++) sum += Math.exp(logits[token]! - largest);
  return largest + Math.log(sum);
}
