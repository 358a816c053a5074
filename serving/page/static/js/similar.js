/** Items whose vectors lie near another's, asked for when somebody wants to see them. */

import { getSimilar } from "./api.js";
import { element } from "./dom.js";

const NUM_SIMILAR = 8;

/** A button that becomes the list. */
export function similarItems(itemId, title) {
  const root = element("div", { class: "similar" });
  root.append(element(
    "button",
    {
      type: "button", "data-focus": `similar ${itemId}`,
      on: { click: ({ currentTarget }) => load(root, currentTarget, itemId, title) },
    },
    "Similar items", element("span", { class: "unseen" }, ` to ${title}`),
  ));
  return root;
}

async function load(root, button, itemId, title) {
  button.disabled = true;
  try {
    const { similar } = await getSimilar(itemId, NUM_SIMILAR);
    const heading = element("h4", { tabindex: "-1" }, "Similar items",
      element("span", { class: "unseen" }, ` to ${title}`));
    root.replaceChildren(heading, similar.length
      ? element("ol", {}, ...similar.map(({ item_id: id, text, similarity }) => element(
        "li", {},
        element("span", {}, text || id),
        element("span", { class: "number" },
          element("span", { class: "unseen" }, "similarity "), similarity.toFixed(2)),
      )))
      : element("p", { class: "muted" }, "No other item has a vector."));
    // The button is gone, so the focus would be lost.
    heading.focus({ preventScroll: true });
  } catch (error) {
    button.disabled = false;
    root.querySelector("[role=alert]")?.remove();
    root.append(element("p", { class: "notice error", role: "alert" }, error.message));
  }
}
