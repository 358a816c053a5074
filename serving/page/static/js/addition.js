/** The form that adds a behaviour: a scene, and an item found by its title or words of one's own. */

import { searchItems } from "./api.js";
import { Combobox } from "./combobox.js";
import { byId, element } from "./dom.js";

const NUM_SUGGESTIONS = 20;

/**
 * Sets the form up.
 * @param {function({scene: string, title: string, text?: string, item_id?: string})} onAdd
 * @returns {{setScenes: function(string[], string)}} all scenes, and the one that is chosen at first.
 */
export function additionForm(onAdd) {
  const input = byId("add-input");
  const scene = byId("add-scene");
  let chosen = null;

  const combobox = new Combobox(byId("item-combobox"), {
    noun: "item",
    search: async (typed, signal) => {
      const query = typed.trim();
      if (!query) return [];
      const { items } = await searchItems(query, NUM_SUGGESTIONS, signal);
      return items.map(({ item_id, text }) => ({ label: text || item_id, note: item_id, item_id }));
    },
    onChoose: (option) => { chosen = option; },
  });
  input.addEventListener("input", () => { chosen = null; });

  byId("add-form").addEventListener("submit", (event) => {
    event.preventDefault();
    combobox.close();
    const title = input.value.trim();
    if (!title) {
      input.focus();
      return;
    }
    onAdd(chosen
      ? { scene: scene.value, title, item_id: chosen.item_id }
      : { scene: scene.value, title, text: title });
    input.value = "";
    chosen = null;
    input.focus();
  });

  return {
    setScenes(scenes, first) {
      if ([...scene.options].map(({ value }) => value).join() === scenes.join()) return;
      scene.replaceChildren(...scenes.map((name) => element("option", {}, name)));
      scene.value = first;
    },
  };
}
