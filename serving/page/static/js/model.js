/** The model card: what ranks here, what it was trained on, and how good it was. */

import { getModel } from "./api.js";
import { byId, element } from "./dom.js";
import { day, moment, whole } from "./format.js";

const METRICS = {
  auc: ["AUC", "higher is better; 0.5 is chance"],
  gauc: ["AUC per user", "higher is better; mean over users, by impressions"],
  logloss: ["Log loss", "lower is better"],
  ne: ["Normalised entropy", "lower is better; 1 knows the click rate alone"],
  calibration_error: ["Calibration error", "lower is better"],
  num_rows: ["Impressions", null],
  num_clicked: ["Clicked", null],
  num_users: ["Users", null],
};
const SPLITS = { test: "Test", valid: "Validation", train: "Training" };

export class ModelCard {
  /** Name of the run that the card tells of; null before the first reading. */
  run = null;

  /** Reads the card and shows it. */
  async load() {
    const model = await getModel();
    this.run = model.run;
    byId("model").replaceChildren(facts(model), metrics(model.metrics));
  }
}

function facts(model) {
  const rows = [
    ["Run", model.run],
    ["Recipe", model.recipe],
    ["Data set", model.dataset],
    ["Encoder", model.encoder_fingerprint],
    ["Made", `${moment(model.created)} UTC`],
    ["Trained on", `${day(model.train_start)} to ${day(model.train_end)}`],
    ["Scenes", model.scenes.join(", ")],
    ["Items", whole(model.num_items)],
    ["Calibration", model.calibration],
    ["Shadow", model.shadow],
  ];
  return element("dl", { class: "facts" }, ...rows.map(([name, value]) => element(
    "div", {}, element("dt", {}, name), element("dd", {}, value ?? "none"),
  )));
}

/** One row per metric, one column per split; an interval stands under its value. */
function metrics(bySplit) {
  const splits = Object.keys(bySplit);
  const names = [...new Set(splits.flatMap((split) => Object.keys(bySplit[split])))]
    .filter((name) => !/_(low|high)$/.test(name))
    .filter((name) => splits.some((split) => typeof bySplit[split][name] === "number"))
    .sort((a, b) => order(a) - order(b));
  if (!names.length) return element("p", { class: "muted" }, "No metrics were kept.");
  return element(
    "table", { class: "metrics" },
    element("caption", {}, "Metrics, with 95% intervals over users where they were taken"),
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Metric"),
      ...splits.map((split) => element("th", { scope: "col" }, SPLITS[split] ?? split)))),
    element("tbody", {}, ...names.map((name) => element(
      "tr", {}, title(name), ...splits.map((split) => value(bySplit[split], name)),
    ))),
  );
}

function order(name) {
  const place = Object.keys(METRICS).indexOf(name);
  return place < 0 ? Infinity : place;
}

function title(name) {
  const [label, note] = METRICS[name] ?? [name, null];
  return element("th", { scope: "row" }, label,
    note ? element("span", { class: "metric-note" }, note) : null);
}

function value(of, name) {
  const number = of[name];
  if (typeof number !== "number") return element("td", {}, "–");
  const [low, high] = [of[`${name}_low`], of[`${name}_high`]];
  return element("td", {}, figure(number), typeof low === "number" && typeof high === "number"
    ? element("span", { class: "interval" }, `${figure(low)}–${figure(high)}`) : null);
}

/** Counts as they are, everything else with four decimals, so that splits can be compared. */
function figure(number) {
  return Number.isInteger(number) ? whole(number) : number.toFixed(4);
}
