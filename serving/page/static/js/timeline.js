/**
 * The history as bars on a time axis, one lane per scene.
 *
 * Behaviours that fall on the same few pixels are one bar; its height is their number. A lane is one
 * stop of the Tab key, the arrow keys go from bar to bar and from lane to lane.
 */

import { byId, element, shape } from "./dom.js";
import { counted, day, whole } from "./format.js";
import { ticks } from "./ticks.js";

const SLOT = 10; // px of time axis that one bar stands for
const BAR = 7;
const LANE = 60;
const LABEL = 28;
const AXIS = 24;
const PAD = 6;
const MAX_UNIT = 8; // height of one behaviour, px
const MIN_BAR = 3;
const TICK = 90; // px from tick to tick at least, more than their texts take
const MAX_TEXTS = 5;
// From the bottom of a bar to its top, with what is said of each; the page's legend shows the same.
const STATES = { kept: "", linked: "behind an opened item", added: "added", removed: "removed" };
const HINT = "Point at a bar, or go from bar to bar with the arrow keys, to read what happened. "
  + "Choose one to see only that in the list below.";

export class Timeline {
  #root = byId("timeline");
  #detail = byId("timeline-detail");
  #onSelect;
  #drawn = null;
  #selected = null;
  #width = 0;

  /** @param {function(?{scene: string, from: number, to: number})} onSelect null for "all". */
  constructor(onSelect) {
    this.#onSelect = onSelect;
    this.#detail.textContent = HINT;
    new ResizeObserver(() => {
      if (this.#drawn && this.#root.clientWidth !== this.#width) this.draw(this.#drawn);
    }).observe(this.#root);
    this.#root.addEventListener("keydown", (event) => this.#onKey(event));
    this.#root.addEventListener("pointerleave", () => this.#tell(null));
  }

  /** Shows all of the history in the list again. */
  clearSelection() {
    this.#selected = null;
  }

  /**
   * @param {Object} what
   * @param {{key: string, scene: string, text: string, time: string}[]} what.behaviors
   * @param {Object<string, number>} what.totals scene -> behaviours of all time; one lane each.
   * @param {string} what.at the moment of the ranking; the right end of the axis.
   * @param {function(Object): string} what.stateOf one of "kept", "linked", "added", "removed".
   */
  draw(what) {
    this.#drawn = what;
    this.#width = this.#root.clientWidth;
    const { behaviors, totals, at, stateOf } = what;
    const scenes = Object.keys(totals);
    const focused = this.#root.contains(document.activeElement)
      ? document.activeElement.dataset.bar : null;
    const end = Date.parse(at);
    const times = behaviors.map(({ time }) => Date.parse(time));
    const start = Math.min(...times, end - 86_400_000);
    const inner = Math.max(this.#width - 2 * PAD, SLOT);
    const numSlots = Math.floor(inner / SLOT);
    const slotOf = (time) => Math.min(
      Math.floor(((time - start) / (end - start)) * numSlots), numSlots - 1,
    );
    const bars = this.#bars(behaviors, times, slotOf);
    const most = Math.max(1, ...bars.map(({ all }) => all.length));
    const unit = Math.min(MAX_UNIT, (LANE - 4) / most);
    const height = scenes.length * (LANE + LABEL) + AXIS;
    const drawing = shape(
      "svg",
      {
        width: "100%", height, role: "group",
        "aria-label": `Timeline of ${counted(behaviors.length, "behaviour")}`,
      },
      ...ticks(start, end, Math.max(2, Math.floor(inner / TICK))).map(({ time, label }) => tick(
        PAD + ((time - start) / (end - start)) * inner, label, { height, inner },
      )),
      ...scenes.flatMap((scene, lane) => this.#lane(
        scene, lane, bars.filter((bar) => bar.scene === scene),
        { unit, stateOf, inner, total: totals[scene] },
      )),
    );
    this.#root.replaceChildren(drawing);
    if (focused) this.#root.querySelector(`[data-bar=${CSS.escape(focused)}]`)?.focus();
  }

  #bars(behaviors, times, slotOf) {
    const bars = new Map();
    behaviors.forEach((behavior, i) => {
      const slot = slotOf(times[i]);
      const id = `${behavior.scene}-${slot}`;
      const bar = bars.get(id)
        ?? { id, slot, scene: behavior.scene, all: [], from: times[i], to: times[i] };
      bar.all.push(behavior);
      bar.from = Math.min(bar.from, times[i]);
      bar.to = Math.max(bar.to, times[i]);
      bars.set(id, bar);
    });
    return [...bars.values()].sort((a, b) => a.slot - b.slot);
  }

  #lane(scene, lane, bars, { unit, stateOf, inner, total }) {
    const top = lane * (LANE + LABEL);
    const base = top + LABEL + LANE;
    const shown = bars.reduce((sum, bar) => sum + bar.all.length, 0);
    // Of the longest histories only the newest behaviours are kept.
    const count = total > shown ? `newest ${whole(shown)} of ${whole(total)}` : whole(shown);
    return [
      shape("text", { class: "lane-label", x: PAD, y: top + 19 }, `${scene} `,
        shape("tspan", { class: "lane-count" }, count)),
      shape("line", { class: "lane-line", x1: PAD, x2: PAD + inner, y1: base, y2: base }),
      // The Tab key comes to the newest.
      ...bars.map((bar, i) => this.#bar(bar, lane, i === bars.length - 1, { base, unit, stateOf })),
    ];
  }

  #bar(bar, lane, isStop, { base, unit, stateOf }) {
    const x = PAD + bar.slot * SLOT;
    const scale = Math.max(unit, MIN_BAR / bar.all.length);
    const pieces = [];
    const special = [];
    let y = base;
    for (const [state, words] of Object.entries(STATES)) {
      const count = bar.all.filter((behavior) => stateOf(behavior) === state).length;
      if (count && words) special.push(`${count} ${words}`);
      // Where there is room every behaviour is a block of its own, else they are one.
      const blocks = scale >= 4 ? Array(count).fill(scale) : count ? [count * scale] : [];
      for (const size of blocks) {
        y -= size;
        pieces.push(shape("rect", {
          class: `block ${state}`, x: x + (SLOT - BAR) / 2, y, width: BAR,
          height: Math.max(size - (scale >= 4 ? 1.5 : 0), 1), rx: 1,
        }));
      }
    }
    return shape(
      "g",
      {
        class: "bar", role: "button", tabindex: isStop ? 0 : -1, "data-bar": bar.id,
        "data-lane": lane, "data-count": bar.all.length, "aria-label": description(bar, special),
        "aria-pressed": String(this.#isSelected(bar)),
        on: {
          pointerenter: () => this.#tell(bar),
          focus: () => this.#tell(bar),
          blur: () => this.#tell(null),
          click: () => this.#toggle(bar),
        },
      },
      shape("rect", { class: "hit", x, y: base - LANE, width: SLOT, height: LANE, rx: 2 }),
      ...pieces,
    );
  }

  #isSelected({ scene, from, to }) {
    const chosen = this.#selected;
    return chosen?.scene === scene && from <= chosen.to && to >= chosen.from;
  }

  #toggle(bar) {
    this.#selected = this.#isSelected(bar) ? null : { scene: bar.scene, from: bar.from, to: bar.to };
    this.#onSelect(this.#selected);
  }

  #tell(bar) {
    if (!bar) {
      this.#detail.textContent = HINT;
      return;
    }
    this.#detail.replaceChildren(
      element("strong", {}, `${span(bar)} · ${counted(bar.all.length, bar.scene)}`),
      ` ${texts(bar, MAX_TEXTS)}`,
    );
  }

  #onKey(event) {
    const bar = event.target.closest?.(".bar");
    if (!bar) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      bar.dispatchEvent(new MouseEvent("click"));
      return;
    }
    const next = this.#neighbour(bar, event.key);
    if (!next) return;
    event.preventDefault();
    for (const one of this.#laneBars(next.dataset.lane)) one.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  }

  #neighbour(bar, key) {
    const own = this.#laneBars(bar.dataset.lane);
    const place = own.indexOf(bar);
    if (key === "ArrowLeft") return own[place - 1];
    if (key === "ArrowRight") return own[place + 1];
    if (key === "Home") return own[0];
    if (key === "End") return own.at(-1);
    const step = { ArrowUp: -1, ArrowDown: 1 }[key];
    if (!step) return null;
    const lanes = [...new Set([...this.#root.querySelectorAll(".bar")].map((one) => one.dataset.lane))];
    const lane = lanes[lanes.indexOf(bar.dataset.lane) + step];
    return lane && this.#laneBars(lane).find((one) => one.getAttribute("tabindex") === "0");
  }

  #laneBars(lane) {
    return [...this.#root.querySelectorAll(`.bar[data-lane="${lane}"]`)];
  }
}

function tick(x, label, { height, inner }) {
  // On the left of its line where the text would leave the drawing.
  const place = x > inner - TICK ? { x: x - 4, "text-anchor": "end" } : { x: x + 4 };
  return shape(
    "g", { class: "tick", "aria-hidden": "true" },
    shape("line", { x1: x, x2: x, y1: LABEL, y2: height - AXIS + 5 }),
    shape("text", { ...place, y: height - 6 }, label),
  );
}

function span({ from, to }) {
  const [first, last] = [day(from), day(to)];
  return first === last ? first : `${first} to ${last}`;
}

function texts(bar, most) {
  const named = [...new Set(bar.all.map(({ text }) => text))];
  const rest = named.length - most;
  return named.slice(0, most).join("; ") + (rest > 0 ? `; and ${rest} more` : "");
}

function description(bar, special) {
  const parts = [span(bar), bar.scene, counted(bar.all.length, "behaviour"), ...special];
  return `${parts.join(", ")}: ${texts(bar, MAX_TEXTS)}`;
}
