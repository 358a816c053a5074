/** Light or dark: as the system says, until the button was used; runs before the first paint. */

const STORED = "longtrail-theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const root = document.documentElement;

apply();
system.addEventListener("change", apply);
document.addEventListener("DOMContentLoaded", () => {
  const button = document.getElementById("theme-button");
  button.addEventListener("click", () => {
    const wanted = shown() === "dark" ? "light" : "dark";
    // What the system wants anyway is not kept, so that the page follows the system again.
    if (wanted === systemTheme()) localStorage.removeItem(STORED);
    else localStorage.setItem(STORED, wanted);
    apply();
  });
  apply();
});

function systemTheme() {
  return system.matches ? "dark" : "light";
}

function shown() {
  return localStorage.getItem(STORED) ?? systemTheme();
}

function apply() {
  root.dataset.theme = shown();
  const button = document.getElementById("theme-button");
  if (button) button.textContent = shown() === "dark" ? "Light" : "Dark";
}
