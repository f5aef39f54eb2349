// The page: which view is shown, what the service says of itself, and refreshing when its revision changes.

import { call } from "./api.js";
import { byId, element } from "./elements.js";
import { faultNotice } from "./faults.js";
import { ignoreStrayDrops } from "./files.js";
import { count } from "./format.js";
import { installKeyDialog } from "./key.js";
import { installPredict, refreshPredict } from "./predict.js";
import { installRegister } from "./register.js";
import { installRevisions, refreshRevisions } from "./revisions.js";
import { refreshTasks } from "./tasks.js";
import { installTheme } from "./theme.js";

const VIEWS = { predict: refreshPredict, tasks: refreshTasks, revisions: refreshRevisions };
const POLL_MS = 10_000; // while the page can be seen
let revision = null;

async function refreshView() {
  const view = viewNow();
  try {
    await VIEWS[view]();
  } catch (error) {
    byId("ask-notice").replaceChildren(faultNotice(error));
  }
}

function viewNow() {
  const named = location.hash.slice(1);
  return named in VIEWS ? named : "predict";
}

function showView() {
  if (location.hash === "#content") return; // the skip link
  const view = viewNow();
  for (const name of Object.keys(VIEWS)) byId(name).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${view[0].toUpperCase()}${view.slice(1)} · TOSCA Serving`;
  refreshView();
}

async function refreshState() {
  if (document.hidden) return;
  let kind = "good";
  let text;
  try {
    const state = await call("GET", "health/ready");
    text = `revision ${state.revision}, ${count(state.num_tasks, "task")}, ${state.runtime} on ${state.device}`;
    if (state.is_stale) [kind, text] = ["warn", `${text}; stale: ${state.store_fault ?? "store not read"}`];
    if (revision !== null && (state.revision !== revision || isTableIdle())) refreshView();
    revision = state.revision;
  } catch (error) {
    [kind, text] = ["bad", error.status === 0 ? error.message : `Not ready. ${error.message}`];
  }
  const shown = byId("service-state");
  if (shown.textContent !== text || !shown.querySelector(`.${kind}`)) {
    shown.replaceChildren(element("span", { class: `dot ${kind}`, "aria-hidden": "true" }), text);
  }
}

/** Whether the table of tasks, whose traffic moves, is shown and nobody is reading or using a row of it. */
function isTableIdle() {
  const shown = byId("task-table");
  const isUsed = shown.contains(document.activeElement) || shown.querySelector("details[open]") !== null;
  return viewNow() === "tasks" && !isUsed;
}

async function refresh() {
  byId("ask-notice").replaceChildren();
  await Promise.all([refreshState(), refreshView()]);
}

for (const button of document.querySelectorAll("dialog .close")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
installTheme();
installKeyDialog(refresh);
installPredict((answered) => {
  if (answered !== revision) refreshState();
});
installRegister(refresh);
installRevisions(refresh);
ignoreStrayDrops();
addEventListener("hashchange", showView);
document.addEventListener("visibilitychange", refreshState);
setInterval(refreshState, POLL_MS);
showView();
refreshState();
