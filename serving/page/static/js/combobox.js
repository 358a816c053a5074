/**
 * A text field with a list of suggestions.
 *
 * Source: ARIA Authoring Practices Guide, "Editable combobox with list autocomplete": the focus
 * stays in the field, aria-activedescendant names the active option.
 */

import { element } from "./dom.js";
import { counted } from "./format.js";

const PAUSE_MS = 120; // between two letters of a fast typist, so that a word is one request

export class Combobox {
  #input;
  #list;
  #status;
  #search;
  #onChoose;
  #noun;
  #options = [];
  #active = -1;
  #timer = 0;
  #running = null;

  /**
   * @param {HTMLElement} root holds the input, the list and the status.
   * @param {Object} how
   * @param {function(string, AbortSignal): Promise<{label: string, note?: string}[]>} how.search
   * @param {function(Object)} how.onChoose gets one of the objects that `search` returned.
   * @param {string} how.noun what is found, in the singular.
   */
  constructor(root, { search, onChoose, noun }) {
    this.#input = root.querySelector("input");
    this.#list = root.querySelector("[role=listbox]");
    this.#status = root.querySelector("[role=status]");
    this.#search = search;
    this.#onChoose = onChoose;
    this.#noun = noun;
    this.#input.addEventListener("input", () => this.#later());
    this.#input.addEventListener("keydown", (event) => this.#onKey(event));
    this.#input.addEventListener("blur", () => this.close());
  }

  /** Hides the list, and forgets what is still being searched. */
  close() {
    clearTimeout(this.#timer);
    this.#running?.abort();
    this.#options = [];
    this.#show();
  }

  #later() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#find(), PAUSE_MS);
  }

  async #find() {
    clearTimeout(this.#timer);
    this.#running?.abort();
    this.#running = new AbortController();
    const { signal } = this.#running;
    try {
      const options = await this.#search(this.#input.value, signal);
      if (signal.aborted) return;
      this.#options = options;
      this.#show();
      this.#status.textContent = options.length
        ? `${counted(options.length, this.#noun)} found`
        : `no ${this.#noun} found`;
    } catch (error) {
      // Suggestions are a help: without them the field still takes what is typed.
      if (signal.aborted) return;
      this.close();
      this.#status.textContent = error.message;
    }
  }

  #show() {
    const open = this.#options.length > 0;
    this.#active = -1;
    this.#list.replaceChildren(...this.#options.map((option, i) => element(
      "li",
      {
        role: "option", id: `${this.#list.id}-${i}`, "aria-selected": "false",
        on: {
          // The focus stays in the field, or its blur would close the list before the click.
          pointerdown: (event) => event.preventDefault(),
          click: () => this.#choose(option),
        },
      },
      element("span", {}, option.label),
      option.note ? element("span", { class: "option-note" }, option.note) : null,
    )));
    this.#list.hidden = !open;
    this.#input.setAttribute("aria-expanded", String(open));
    this.#input.removeAttribute("aria-activedescendant");
    this.#status.textContent = "";
  }

  #onKey(event) {
    const open = this.#options.length > 0;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (open) this.#move(event.key === "ArrowDown" ? 1 : -1);
      else this.#find();
    } else if (event.key === "Enter" && this.#active >= 0) {
      event.preventDefault();
      this.#choose(this.#options[this.#active]);
    } else if (event.key === "Escape" && open) {
      event.preventDefault();
      this.close();
    }
  }

  /** One step, around the ends through "none", where the field holds what was typed. */
  #move(step) {
    const places = this.#options.length + 1;
    this.#active = (this.#active + 1 + step + places) % places - 1;
    for (const [i, node] of [...this.#list.children].entries()) {
      node.setAttribute("aria-selected", String(i === this.#active));
    }
    const node = this.#list.children[this.#active];
    if (node) {
      this.#input.setAttribute("aria-activedescendant", node.id);
      node.scrollIntoView({ block: "nearest" });
    } else {
      this.#input.removeAttribute("aria-activedescendant");
    }
  }

  #choose(option) {
    this.#input.value = option.label;
    this.close();
    this.#onChoose(option);
  }
}
