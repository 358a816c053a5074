/** A history that might have been: which behaviours are left out, and which come on top. */

/**
 * Gives every behaviour a key that stays when newer ones come: places count from the newest.
 * @param {{scene: string, time: string, text: string}[]} history newest first.
 */
export function keyed(history) {
  const seen = new Map();
  const oldestFirst = history.map((behavior, index) => ({ ...behavior, index })).reverse();
  for (const behavior of oldestFirst) {
    const name = JSON.stringify([behavior.scene, behavior.time, behavior.text]);
    const count = (seen.get(name) ?? 0) + 1;
    seen.set(name, count);
    behavior.key = `${name}#${count}`;
  }
  return oldestFirst.reverse();
}

export class Changes {
  removed = new Set();
  /** Oldest first: {key, scene, title, text?, item_id?}. */
  added = [];
  #count = 0;

  get any() {
    return this.removed.size > 0 || this.added.length > 0;
  }

  /** Leaves behaviours out, or brings them back. */
  setRemoved(keys, removed) {
    for (const key of keys) {
      if (removed) this.removed.add(key);
      else this.removed.delete(key);
    }
  }

  /** Adds a behaviour of just now. */
  add(behavior) {
    this.#count += 1;
    this.added.push({ ...behavior, key: `added#${this.#count}` });
  }

  takeBack(key) {
    this.added = this.added.filter((behavior) => behavior.key !== key);
  }

  clear() {
    this.removed.clear();
    this.added = [];
  }

  /** Forgets removals of behaviours that the history no longer has. */
  keepOnly(history) {
    const there = new Set(history.map((behavior) => behavior.key));
    for (const key of this.removed) if (!there.has(key)) this.removed.delete(key);
  }

  /** What the server is asked with; `history` is the keyed one. */
  toRequest(history) {
    return {
      removed: history.filter(({ key }) => this.removed.has(key)).map(({ index }) => index),
      added: this.added.map(({ scene, text, item_id }) => ({ scene, text, item_id })),
    };
  }

  /** In words, for people. */
  toString() {
    const parts = [];
    if (this.removed.size) parts.push(`${this.removed.size} removed`);
    if (this.added.length) parts.push(`${this.added.length} added`);
    return parts.length ? parts.join(", ") : "Unchanged";
  }
}
