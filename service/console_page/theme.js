// Light, dark, or (auto) as the system has it. The choice is kept for the next visit; it is no secret.

import { byId } from "./elements.js";

const THEMES = ["auto", "light", "dark"];
const STORED = "tosca-theme";

/** Apply the kept theme and let the button go on to the next. */
export function installTheme() {
  let theme = THEMES.includes(localStorage.getItem(STORED)) ? localStorage.getItem(STORED) : "auto";
  const apply = () => {
    document.documentElement.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
  };
  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    localStorage.setItem(STORED, theme);
    apply();
  });
  apply();
}
