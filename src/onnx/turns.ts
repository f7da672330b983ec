/**
 * Turns: work that waits for each other, in the order in which it was asked for.
 *
 * @module
 */

/** A queue of one worker. */
export class Turns {
  #last: Promise<unknown> = Promise.resolve();

  /** Does `work` once all that was asked for before it has ended, however that ended. */
  take<Result>(work: () => Promise<Result>): Promise<Result> {
    const turn = this.#last.then(work);
    this.#last = turn.catch(() => {}); // whoever asked for it gets the error
    return turn;
  }
}
