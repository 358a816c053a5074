/** The history as a list, newest first: everything that the timeline shows, and what changes it. */

import { byId, element } from "./dom.js";
import { ago, counted, moment, whole } from "./format.js";

const FIRST_SHOWN = 120; // behaviours; the others come with a button, the longest have thousands

export class HistoryList {
  #root = byId("history");
  #on;
  #all = false;
  #drawn = null;

  /**
   * @param {Object} on
   * @param {function(string[], boolean)} on.remove keys of behaviours, and whether they are left out.
   * @param {function(string)} on.takeBack key of an added behaviour.
   * @param {function()} on.showAll ends the selection of one bar.
   */
  constructor(on) {
    this.#on = on;
  }

  /** Begins with the newest behaviours again. */
  restart() {
    this.#all = false;
    this.#root.scrollTop = 0;
  }

  /**
   * @param {Object} what
   * @param {Object[]} what.behaviors keyed, newest first.
   * @param {import("./changes.js").Changes} what.changes
   * @param {string} what.at the moment that ages refer to.
   * @param {?{scene: string, from: number, to: number}} what.selected only these; null for all.
   */
  draw(what) {
    this.#drawn = what;
    const focused = this.#root.contains(document.activeElement)
      ? document.activeElement.dataset.focus : null;
    const { behaviors, changes, selected } = what;
    const wanted = selected ? behaviors.filter((one) => isIn(one, selected)) : behaviors;
    const shown = this.#all || selected ? wanted : wanted.slice(0, FIRST_SHOWN);
    const rest = wanted.length - shown.length;
    this.#root.replaceChildren(...[
      selected ? this.#selection(wanted.length, behaviors.length) : null,
      changes.added.length && !selected ? this.#added(changes.added) : null,
      shown.length
        ? element("ol", { class: "moments", "aria-label": "Behaviours, newest first" },
          ...byMoment(shown).map((behaviorsThen) => this.#moment(behaviorsThen)))
        : element("p", { class: "muted" }, "No behaviours are kept of this user."),
      rest ? element("button", {
        type: "button", "data-focus": "rest", on: { click: () => this.#showRest() },
      }, `Show the other ${counted(rest, "behaviour")}`) : null,
    ].filter(Boolean));
    if (focused) {
      this.#root.querySelector(`[data-focus=${CSS.escape(focused)}]`)?.focus({ preventScroll: true });
    }
  }

  #showRest() {
    this.#all = true;
    this.draw(this.#drawn);
    // The button is gone: go on where the list went on.
    this.#root.querySelectorAll(".behavior button")[FIRST_SHOWN]?.focus({ preventScroll: true });
  }

  #selection(count, total) {
    return element(
      "p", { class: "selection" },
      `${counted(count, "behaviour")} of the chosen bar `,
      element("button", { type: "button", class: "link", on: { click: this.#on.showAll } },
        `Show all ${whole(total)}`),
    );
  }

  #added(added) {
    return element(
      "ul", { class: "behaviors added", "aria-label": "Added behaviours, newest first" },
      ...[...added].reverse().map((behavior) => element(
        "li", { class: "behavior added" },
        element("span", { class: "behavior-text" }, behavior.title),
        element("span", { class: "tag" }, `${behavior.scene}, added just now`),
        this.#button("Take back", behavior.key, behavior.title,
          () => this.#on.takeBack(behavior.key)),
      )),
    );
  }

  #moment(behaviors) {
    const { at, changes } = this.#drawn;
    const [{ scene, time, key }] = behaviors;
    const keys = behaviors.map((one) => one.key);
    const gone = keys.every((one) => changes.removed.has(one));
    const title = `${moment(time)}, ${scene}`;
    return element(
      "li", { class: "moment" },
      element(
        "div", { class: "moment-head" },
        element("span", { class: "moment-time" }, element("time", { datetime: time }, moment(time))),
        element("span", { class: "muted" }, `${scene} · ${ago(time, at)}`),
        behaviors.length > 1 ? this.#button(
          gone ? `Put all ${behaviors.length} back` : `Remove all ${behaviors.length}`,
          `all ${key}`, title, () => this.#on.remove(keys, !gone),
        ) : null,
      ),
      element("ul", { class: "behaviors", "aria-label": title },
        ...behaviors.map((one) => this.#behavior(one))),
    );
  }

  #behavior({ key, text, scene, time }) {
    const removed = this.#drawn.changes.removed.has(key);
    const name = text || "a behaviour without text";
    return element(
      "li", { class: removed ? "behavior removed" : "behavior" },
      element("span", { class: "behavior-text" }, removed ? element("s", {}, name) : name),
      removed ? element("span", { class: "tag" }, "removed") : null,
      this.#button(removed ? "Put back" : "Remove", key, `${name}, ${scene}, ${moment(time)}`,
        () => this.#on.remove([key], !removed)),
    );
  }

  #button(label, focus, what, click) {
    return element(
      "button", { type: "button", class: "link", "data-focus": focus, on: { click } },
      label, element("span", { class: "unseen" }, ` ${what}`),
    );
  }
}

function isIn({ scene, time }, selected) {
  const at = Date.parse(time);
  return scene === selected.scene && at >= selected.from && at <= selected.to;
}

function byMoment(behaviors) {
  const moments = [];
  for (const behavior of behaviors) {
    const last = moments.at(-1)?.[0];
    if (last && last.time === behavior.time && last.scene === behavior.scene) {
      moments.at(-1).push(behavior);
    } else {
      moments.push([behavior]);
    }
  }
  return moments;
}
