// The view of the history: who changed what and when, and going back.

import { call } from "./api.js";
import { changeList, changesBetween } from "./changes.js";
import { byId, element, notice } from "./elements.js";
import { faultNotice } from "./faults.js";
import { age, count, date } from "./format.js";

const PAGE = 50;
let shown = PAGE;

export function installRevisions(onChange) {
  byId("older").addEventListener("click", () => {
    shown = Math.min(1000, shown + PAGE);
    refreshRevisions();
  });
  byId("rollback-form").addEventListener("submit", (event) => {
    event.preventDefault();
    rollBack(onChange);
  });
}

export async function refreshRevisions() {
  const list = byId("revision-list");
  try {
    const revisions = await call("GET", "revisions", { query: { limit: Math.min(1000, shown + 1) } });
    const items = revisions.slice(0, shown).map((one, i) => item(one, revisions[i + 1], revisions[0]));
    list.replaceChildren(...items);
    byId("older").hidden = revisions.length <= shown || shown >= 1000;
    byId("revisions-notice").querySelector(".bad")?.remove();
  } catch (error) {
    list.replaceChildren();
    byId("older").hidden = true;
    byId("revisions-notice").replaceChildren(faultNotice(error));
  }
}

function item(revision, parent, newest) {
  const { number, reason, author, created_at: created, tasks } = revision;
  const isNewest = number === newest.number;
  return element(
    "li",
    { class: isNewest ? "panel newest" : "panel" },
    element("p", { class: "revision-number", text: number }),
    element(
      "div",
      {},
      element("h2", { text: reason }),
      element(
        "p",
        { class: "muted" },
        `${author}, `,
        element("time", { datetime: created, title: date(created), text: age(created) }),
        `, ${count(Object.keys(tasks).length, "task")}`,
      ),
      changeList(changesBetween(parent?.tasks ?? {}, tasks), parent ? "No task changed." : "No task yet."),
    ),
    isNewest
      ? element("p", { class: "badge good", text: "newest" })
      : element("button", {
          type: "button",
          "aria-label": `Roll back to revision ${number}`,
          onclick: () => openRollback(revision, newest),
          text: "Roll back…",
        }),
  );
}

function openRollback(target, newest) {
  byId("rollback").dataset.number = target.number;
  byId("rollback-title").textContent = `Roll back to revision ${target.number}?`;
  byId("rollback-diff").replaceChildren(
    changeList(
      changesBetween(newest.tasks, target.tasks),
      `Revision ${newest.number} has the same tasks; nothing would change.`,
    ),
  );
  byId("rollback-notice").replaceChildren();
  byId("rollback-reason").value = "";
  byId("rollback").showModal();
  byId("rollback-reason").focus();
}

async function rollBack(onChange) {
  const { number } = byId("rollback").dataset;
  const button = byId("do-rollback");
  button.disabled = true;
  try {
    const query = { reason: byId("rollback-reason").value };
    const change = await call("POST", `revisions/${number}/rollback`, { query });
    byId("rollback").close();
    const said = change.published
      ? `Revision ${change.revision} serves the tasks of revision ${number}.`
      : `Nothing had to change: revision ${change.revision} has these tasks already.`;
    byId("revisions-notice").replaceChildren(notice("good", said));
    onChange();
  } catch (error) {
    byId("rollback-notice").replaceChildren(faultNotice(error));
  } finally {
    button.disabled = false;
  }
}
