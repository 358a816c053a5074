/** The ranked items: score, reason, the behaviours behind it, and how far each one moved. */

import { byId, element } from "./dom.js";
import { ago, percent, signed } from "./format.js";
import { similarItems } from "./similar.js";

const NUM_IN_SHORT = 2; // contributions that are told without opening the item
const MOVE_MS = 350;

export class RankingList {
  #root = byId("ranking");
  #onLinked;
  #open = new Set();

  /** @param {function(Object[])} onLinked gets the contributions of the items that are open. */
  constructor(onLinked) {
    this.#onLinked = onLinked;
  }

  /** Closes all items: those of another user mean something else. */
  restart() {
    this.#open.clear();
    this.#root.replaceChildren();
  }

  /**
   * @param {Object} ranking the answer of the server.
   * @param {?Map<string, number>} before item id -> place for the unchanged history, from 1; null
   *   where nothing is changed.
   */
  draw(ranking, before) {
    const focused = this.#root.contains(document.activeElement)
      ? document.activeElement.dataset.focus : null;
    const places = this.#places();
    const scale = Math.max(
      1e-9, ...ranking.ranked.flatMap((item) => shares(item).map(({ logits }) => Math.abs(logits))),
    );
    this.#root.replaceChildren(ranking.ranked.length
      ? element("ol", { class: "ranked", "aria-label": "Ranked items" },
        ...ranking.ranked.map((item, i) => this.#item(item, i + 1, { ranking, before, scale })))
      : element("p", { class: "muted" }, "Nothing to rank."));
    if (focused) {
      this.#root.querySelector(`[data-focus=${CSS.escape(focused)}]`)?.focus({ preventScroll: true });
    }
    this.#animate(places);
    const there = new Set(ranking.ranked.map(({ item_id }) => item_id));
    for (const itemId of this.#open) if (!there.has(itemId)) this.#open.delete(itemId);
    this.#link(ranking);
  }

  #item(item, place, { ranking, before, scale }) {
    const { item_id: itemId, text, score, reason } = item;
    const details = element(
      "details",
      {
        class: "why", open: this.#open.has(itemId),
        on: {
          toggle: () => {
            if (details.open) this.#open.add(itemId);
            else this.#open.delete(itemId);
            this.#link(ranking);
          },
        },
      },
      element("summary", { "data-focus": `why ${itemId}` },
        "Why, and what is similar", element("span", { class: "unseen" }, `: ${text || itemId}`)),
      contributionTable(item, ranking.at, scale),
      similarItems(itemId, text || itemId),
    );
    const bar = element("span", { class: "score-bar", "aria-hidden": "true" }, element("span"));
    bar.firstChild.style.width = `${100 * score}%`;
    return element(
      "li", { class: "ranked-item", "data-item": itemId },
      element("div", { class: "place" }, element("span", { class: "place-number" }, String(place)),
        before ? moved(place, before.get(itemId), before.size) : null),
      element(
        "div", { class: "item" },
        element("h3", {}, text || itemId, text ? element("span", { class: "item-id" }, itemId) : null),
        element("p", { class: "reason" }, reason),
        inShort(item),
      ),
      element("div", { class: "score" },
        element("span", { class: "score-number" },
          element("span", { class: "unseen" }, "Score "), percent(score)),
        bar),
      details,
    );
  }

  #link(ranking) {
    const open = ranking.ranked.filter(({ item_id }) => this.#open.has(item_id));
    this.#onLinked(open.flatMap(shares));
  }

  /** Where every item is now: item id -> pixels from the top of the list. */
  #places() {
    return new Map([...this.#root.querySelectorAll("[data-item]")].map(
      (node) => [node.dataset.item, node.offsetTop],
    ));
  }

  /** Lets every item glide from where it was; new ones fade in. */
  #animate(places) {
    if (!places.size || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    for (const node of this.#root.querySelectorAll("[data-item]")) {
      const was = places.get(node.dataset.item);
      const from = was === undefined
        ? { opacity: 0 } : { transform: `translateY(${was - node.offsetTop}px)` };
      if (was !== node.offsetTop) node.animate([from, {}], { duration: MOVE_MS, easing: "ease" });
    }
  }
}

/**
 * The difference to the unchanged ranking in a sentence.
 * @param {Object[]} ranked as shown now.
 * @param {Map<string, number>} before item id -> place, from 1.
 * @param {string[]} titles of the unchanged ranking, by place.
 */
export function movesInWords(ranked, before, titles) {
  const moves = ranked.map((item, i) => {
    const was = before.get(item.item_id) ?? before.size + 1;
    return { title: item.text || item.item_id, to: i + 1, step: was - i - 1 };
  }).filter(({ step }) => step !== 0);
  if (!moves.length) return "The ranking stays the same.";
  moves.sort((a, b) => Math.abs(b.step) - Math.abs(a.step));
  const told = moves.slice(0, 5).map(
    ({ title, to, step }) => `${title} ${step > 0 ? "up" : "down"} to ${to}`,
  );
  const shown = new Set(ranked.map(({ item_id }) => item_id));
  const gone = [...before].filter(([id, place]) => place <= ranked.length && !shown.has(id));
  for (const [, place] of gone.slice(0, 3)) told.push(`${titles[place - 1]} left the list`);
  return `The ranking changed: ${told.join("; ")}.`;
}

function shares(item) {
  return item.contributions ?? [];
}

function moved(place, was, deepest) {
  if (was === place) return element("span", { class: "move same" }, "same");
  const from = was ?? `below ${deepest}`;
  const up = was === undefined || was > place;
  const words = was === undefined ? `from ${from}` : String(Math.abs(was - place));
  return element(
    "span", { class: `move ${up ? "up" : "down"}`, title: `Was ${from} with the unchanged history` },
    element("span", { "aria-hidden": "true" }, up ? "▲ " : "▼ "), `${up ? "up" : "down"} ${words}`,
  );
}

function inShort(item) {
  const strongest = shares(item).slice(0, NUM_IN_SHORT);
  if (!strongest.length) return null;
  return element("p", { class: "in-short" }, ...strongest.map(({ text, logits }) => element(
    "span", { class: `share ${sign(logits)}` },
    element("span", { class: "share-number" }, signed(logits)), ` ${text}`,
  )));
}

/** All contributions with bars to the right (for) or to the left (against) of one line. */
function contributionTable(item, at, scale) {
  const all = shares(item);
  if (!all.length) {
    return element("p", { class: "muted" }, "No behaviour speaks for this item or against it.");
  }
  return element(
    "table", { class: "contributions" },
    element("caption", {}, "What behaviours add to the score, in logits"),
    element("thead", { class: "unseen" }, element("tr", {},
      ...["Behaviour", "Effect", "Bar"].map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...all.map(({ text, scene, time, count, logits }) => {
      const bar = element("span", { class: `effect-bar ${sign(logits)}` }, element("span"));
      bar.firstChild.style.width = `${50 * Math.abs(logits) / scale}%`;
      return element(
        "tr", {},
        element("th", { scope: "row" }, text || "a behaviour without text",
          element("span", { class: "share-facts" },
            `${scene}${count > 1 ? `, ${count} times, last` : ","} ${ago(time, at)}`)),
        element("td", { class: "effect" },
          element("span", { class: "share-number" }, signed(logits)),
          element("span", { class: "share-facts" }, WORDS[sign(logits)])),
        element("td", { class: "effect-cell", "aria-hidden": "true" }, bar),
      );
    })),
  );
}

const WORDS = { for: "pulls up", against: "pushes down" };

function sign(logits) {
  return logits >= 0 ? "for" : "against";
}
