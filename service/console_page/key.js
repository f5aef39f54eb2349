// The API key: asked for in a dialog, handed to api.js, kept nowhere else.

import { hasKey, setKey } from "./api.js";
import { byId } from "./elements.js";

/** Let people give a key; `onChange` runs when they gave or took one. */
export function installKeyDialog(onChange) {
  const change = (value) => {
    setKey(value);
    byId("open-key").textContent = hasKey() ? "API key in use" : "API key";
    byId("key-dialog").close();
    onChange();
  };
  byId("open-key").addEventListener("click", openKeyDialog);
  byId("forget-key").addEventListener("click", () => change(null));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = byId("key").value.trim();
    if (given) change(given);
  });
  byId("key-dialog").addEventListener("close", () => {
    byId("key").value = "";
  });
}

export function openKeyDialog() {
  byId("forget-key").hidden = !hasKey();
  byId("key-dialog").showModal();
  byId("key").focus();
}
