/** The page: a user, the history, what is changed in it, and the ranking that follows. */

import { getUser, postRank } from "./api.js";
import { additionForm } from "./addition.js";
import { Changes, keyed } from "./changes.js";
import { byId, element } from "./dom.js";
import { age, counted, short, whole } from "./format.js";
import { watchHealth } from "./health.js";
import { HistoryList } from "./history.js";
import { setUpKey } from "./key.js";
import { ModelCard } from "./model.js";
import { movesInWords, RankingList } from "./ranking.js";
import { Timeline } from "./timeline.js";
import { userChooser } from "./users.js";

const DEPTH = 200; // places of the unchanged ranking to which moves are told exactly
const PATHS = {
  cached: "user vector from the feature store",
  live: "user vector computed just now",
  whole: "whole model computed just now",
};

const changes = new Changes();
const person = { id: null, view: null, behaviors: [], selected: null, linked: new Set() };
let running = new AbortController();

const chooser = userChooser((userId) => {
  const url = new URL(location.href);
  url.searchParams.set("user", userId);
  history.pushState(null, "", url);
  choose(userId);
});
const timeline = new Timeline((selected) => {
  person.selected = selected;
  drawHistory();
});
const list = new HistoryList({
  remove: (keys, removed) => { changes.setRemoved(keys, removed); changed(); },
  takeBack: (key) => { changes.takeBack(key); changed(); },
  showAll: () => { clearSelection(); drawHistory(); byId("history-title").focus(); },
});
const ranked = new RankingList((contributions) => {
  person.linked = new Set(contributions.map(linkName));
  drawTimeline();
});
const addition = additionForm((behavior) => { changes.add(behavior); changed(); });
const card = new ModelCard();

byId("reset").addEventListener("click", () => { changes.clear(); changed(); });
byId("top-k").addEventListener("change", () => rank());
window.addEventListener("popstate", chooseFromAddress);
setUpKey(() => {
  start();
  if (person.id) rank();
});
watchHealth();
start();

/** Everything that needs no user; again when there is a key. */
async function start() {
  chooseFromAddress();
  for (const load of [() => chooser.loadExamples(), () => card.load()]) {
    try {
      await load();
    } catch (error) {
      fail(error);
    }
  }
}

function chooseFromAddress() {
  const userId = new URL(location.href).searchParams.get("user");
  if (userId && userId !== person.id) choose(userId);
}

async function choose(userId) {
  Object.assign(person, { id: userId, view: null, behaviors: [] });
  changes.clear();
  clearSelection();
  list.restart();
  ranked.restart();
  chooser.show(userId);
  document.title = `${userId} · Longtrail`;
  await rank();
}

function changed() {
  drawHistory();
  rank();
}

/** Reads the user and ranks for them, as changed; the last call wins. */
async function rank() {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  byId("error").hidden = true;
  byId("ranking").ariaBusy = "true";
  try {
    await readUser(signal);
    const wanted = { user_id: person.id, top_k: Number(byId("top-k").value), explain: true };
    const asked = changes.any
      ? [{ ...wanted, changes: changes.toRequest(person.behaviors) },
        { user_id: person.id, top_k: Math.max(DEPTH, wanted.top_k) }]
      : [wanted];
    const [ranking, unchanged] = await Promise.all(asked.map((body) => postRank(body, signal)));
    drawRanking(ranking, unchanged);
    if (card.run && card.run !== ranking.model) await card.load();
  } catch (error) {
    fail(error);
  } finally {
    if (!signal.aborted) byId("ranking").ariaBusy = "false";
  }
}

/**
 * The history is read for every ranking: places in it count from the newest, and new behaviours may
 * have come. Where it cannot be read, the server may still rank.
 */
async function readUser(signal) {
  try {
    person.view = await getUser(person.id, signal);
    person.behaviors = keyed(person.view.history);
    changes.keepOnly(person.behaviors);
  } catch (error) {
    if (signal.aborted) throw error;
    fail(error);
  }
  byId("introduction").hidden = true;
  byId("person").hidden = false;
  const totals = person.view?.totals ?? {};
  addition.setScenes(scenes(), scenes().sort((a, b) => totals[b] - totals[a])[0]);
  drawFacts();
  drawHistory();
}

function scenes() {
  return Object.keys(person.view?.totals ?? {});
}

function drawFacts() {
  const { view } = person;
  byId("timeline-title").textContent = `History of ${person.id}`;
  if (!view) {
    byId("user-facts").textContent = "It cannot be read now.";
    byId("features").hidden = true;
    return;
  }
  const kept = counted(view.history.length, "behaviour");
  const total = Object.values(view.totals).reduce((sum, count) => sum + count, 0);
  byId("user-facts").textContent = [
    view.known ? null : "The feature store does not know this user",
    total > view.history.length ? `the newest ${kept} of ${whole(total)}` : kept,
    view.feature_age_s === null ? null : `the newest ${age(view.feature_age_s)} old`,
  ].filter(Boolean).join(" · ");
  drawFeatures(view.features);
}

function drawFeatures(features) {
  const rows = Object.entries(features);
  byId("features").hidden = !rows.length;
  byId("feature-table").replaceChildren(element(
    "dl", {},
    ...rows.map(([name, value]) => element(
      "div", {}, element("dt", {}, name),
      element("dd", { class: "number" }, value === null ? "missing" : short(value)),
    )),
  ));
}

function drawHistory() {
  drawTimeline();
  list.draw({
    behaviors: person.behaviors, changes, at: person.view?.at, selected: person.selected,
  });
  byId("change-summary").textContent = String(changes);
  byId("reset").disabled = !changes.any;
}

function drawTimeline() {
  const at = person.view?.at ?? new Date().toISOString();
  const added = changes.added.map(({ key, scene, title }) => ({ key, scene, text: title, time: at }));
  timeline.draw({
    behaviors: [...person.behaviors, ...added],
    totals: person.view?.totals ?? {},
    at,
    stateOf: (behavior) => {
      if (changes.removed.has(behavior.key)) return "removed";
      if (behavior.key.startsWith("added#")) return "added";
      return person.linked.has(linkName(behavior)) ? "linked" : "kept";
    },
  });
}

function drawRanking(ranking, unchanged) {
  const before = unchanged
    && new Map(unchanged.ranked.map(({ item_id }, i) => [item_id, i + 1]));
  ranked.draw(ranking, before ?? null);
  byId("ranking-facts").textContent = PATHS[ranking.path] ?? ranking.path;
  byId("remarks").replaceChildren(
    ...ranking.degraded.map((text) => element("li", { class: "degraded" }, `Degraded: ${text}`)),
    ...ranking.notes.map((text) => element("li", {}, text)),
  );
  byId("remarks").hidden = !ranking.degraded.length && !ranking.notes.length;
  announce([
    unchanged
      ? movesInWords(ranking.ranked, before, unchanged.ranked.map((item) => item.text || item.item_id))
      : `${counted(ranking.ranked.length, "item")} ranked for ${ranking.user_id}.`,
    ...ranking.degraded,
  ].join(" "));
}

function clearSelection() {
  person.selected = null;
  timeline.clearSelection();
}

function linkName({ scene, text }) {
  return JSON.stringify([scene, text]);
}

function announce(sentence) {
  byId("announcement").textContent = sentence;
}

function fail(error) {
  if (error.name === "AbortError") return;
  byId("error").textContent = error.message;
  byId("error").hidden = false;
}
