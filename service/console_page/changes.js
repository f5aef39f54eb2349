// How two sets of tasks differ: what was added, replaced and removed.

import { element } from "./elements.js";
import { short } from "./format.js";

const ADDED = ["good", "+", "added"];
const REMOVED = ["bad", "−", "removed"];
const REPLACED = ["warn", "±", "replaced"];

/** Changes from one map of task to module digest to another, by task name. */
export function changesBetween(before, after) {
  const names = [...new Set([...Object.keys(before), ...Object.keys(after)])].sort();
  return names
    .filter((task) => before[task] !== after[task])
    .map((task) => ({ task, before: before[task] ?? null, after: after[task] ?? null }));
}

/** Changes as a list: a sign, the task, the digests. */
export function changeList(changes, empty) {
  if (changes.length === 0) return element("p", { class: "muted", text: empty });
  return element("ul", { class: "changes" }, ...changes.map(changeItem));
}

function changeItem({ task, before, after }) {
  const [kind, sign, verb] = before === null ? ADDED : after === null ? REMOVED : REPLACED;
  const digests = [before, after].filter((one) => one !== null).map(short).join(" → ");
  return element(
    "li",
    { class: kind },
    element("span", { class: "sign", "aria-hidden": "true", text: sign }),
    element("span", { class: "changed", text: task }),
    element("span", { class: "muted", text: verb }),
    element("code", { text: digests }),
  );
}
