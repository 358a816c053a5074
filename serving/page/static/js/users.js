/** Choosing a user: by id, from suggestions, or one of a few examples. */

import { searchUsers } from "./api.js";
import { Combobox } from "./combobox.js";
import { byId, element } from "./dom.js";

const NUM_SUGGESTIONS = 20;
const NUM_EXAMPLES = 8;

/**
 * Sets the field and the examples up.
 * @param {function(string)} onChoose gets the user id.
 * @returns {{show: function(string), loadExamples: function(): Promise<void>}}
 */
export function userChooser(onChoose) {
  const input = byId("user-input");
  const combobox = new Combobox(byId("user-combobox"), {
    noun: "user",
    search: async (typed, signal) => {
      const prefix = typed.trim();
      if (!prefix) return [];
      const { users } = await searchUsers(prefix, NUM_SUGGESTIONS, signal);
      return users.map((label) => ({ label }));
    },
    onChoose: ({ label }) => onChoose(label),
  });
  byId("user-form").addEventListener("submit", (event) => {
    event.preventDefault();
    combobox.close();
    // Anybody may be asked for: the model ranks for users whom nobody knows as well.
    const userId = input.value.trim();
    if (userId) onChoose(userId);
    else input.focus();
  });

  return {
    show(userId) {
      input.value = userId;
      for (const button of byId("example-list").querySelectorAll("button")) {
        button.setAttribute("aria-pressed", String(button.textContent === userId));
      }
    },
    async loadExamples() {
      const { users } = await searchUsers("", NUM_EXAMPLES);
      byId("example-list").replaceChildren(...users.map((userId) => element("li", {}, element(
        "button",
        {
          type: "button", class: "chip", "aria-pressed": String(userId === input.value),
          on: { click: () => onChoose(userId) },
        },
        userId,
      ))));
      byId("examples").hidden = !users.length;
    },
  };
}
