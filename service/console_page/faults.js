// How a fault is shown: its sentence, and a way to give a key where one is missing.

import { Refusal } from "./api.js";
import { element, notice } from "./elements.js";
import { openKeyDialog } from "./key.js";

/** A box with what went wrong. What is no refusal is a fault of this page, and is thrown on. */
export function faultNotice(error) {
  if (!(error instanceof Refusal)) throw error;
  const more =
    error.status === 401
      ? [" ", element("button", { type: "button", onclick: openKeyDialog, text: "Enter an API key" })]
      : [];
  return notice("bad", error.message, ...more);
}
