/** Asking for an API key: it is kept in this tab's session storage and nowhere else. */

import { onKeyNeeded, useKey } from "./api.js";
import { byId } from "./dom.js";

/** Asks whenever the server wants a key; afterwards a button in the head of the page changes it. */
export function setUpKey(onChanged) {
  const button = byId("key-button");
  onKeyNeeded(() => {
    button.hidden = false;
    return ask();
  });
  button.addEventListener("click", async () => {
    if (await ask()) onChanged();
  });
}

/** Resolves to whether a key was given. */
function ask() {
  const dialog = byId("key-dialog");
  const input = byId("key-input");
  dialog.returnValue = "";
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "use" && input.value.trim();
      if (given) useKey(given);
      input.value = "";
      resolve(Boolean(given));
    }, { once: true });
  });
}
