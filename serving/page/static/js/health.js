/** Whether the server can rank, in the head of the page; asked again while somebody looks. */

import { getReadiness } from "./api.js";
import { byId } from "./dom.js";

const EVERY_MS = 20_000;

/** Shows the health now and from time to time. */
export function watchHealth() {
  show();
  setInterval(() => { if (!document.hidden) show(); }, EVERY_MS);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) show(); });
}

async function show() {
  const { ready, notes } = await getReadiness();
  byId("health").dataset.state = ready ? "ready" : "away";
  byId("health-text").textContent = [ready ? "Ready" : "Not ready", ...notes].join(": ");
}
