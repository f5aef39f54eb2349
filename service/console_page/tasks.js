// The view of the active tasks: how good, how large, how old, how much asked, and whether pictures drift.

import { call } from "./api.js";
import { bar, byId, element, table } from "./elements.js";
import { faultNotice } from "./faults.js";
import { age, count, date, figure, percent, short, size } from "./format.js";

const HISTORY = 200; // revisions looked through for the age of a task

export async function refreshTasks() {
  try {
    const { tasks, revision } = await call("GET", "tasks");
    const [traffic, since] = await Promise.all([orNull(call("GET", "traffic")), orNull(activeSince(tasks))]);
    const total = tasks.reduce((sum, one) => sum + one.size_bytes, 0);
    byId("tasks-summary").textContent =
      `Revision ${revision}: ${count(tasks.length, "task")} in ${size(total)}` +
      (traffic ? `; ${count(traffic.images, "picture")} since ${date(traffic.since)}.` : ".");
    const empty = element("p", { class: "empty", text: "No task is active yet." });
    byId("task-table").replaceChildren(tasks.length ? taskTable(tasks, traffic, since) : empty);
  } catch (error) {
    byId("task-table").replaceChildren(faultNotice(error));
  }
}

/** What a key without the scope may not read is left out of the table. */
async function orNull(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.status === 401 || error.status === 403) return null;
    throw error;
  }
}

/** By task, when its module became active; tasks older than the history looked through are left out. */
async function activeSince(tasks) {
  const revisions = await call("GET", "revisions", { query: { limit: HISTORY } });
  const since = {};
  for (const { task, module_sha256: sha256 } of tasks) {
    const end = revisions.findIndex((one) => one.tasks[task] !== sha256);
    if (end > 0) since[task] = revisions[end - 1].created_at;
  }
  return since;
}

function taskTable(tasks, traffic, since) {
  const columns = ["Task", "Accuracy", "ECE", "Size", "Active"];
  const withTraffic = traffic !== null;
  if (withTraffic) columns.push("Traffic", "Abstained", "Drift");
  columns.push("Module");
  const byTask = new Map((traffic?.tasks ?? []).map((one) => [one.task, one]));
  return table(
    "Active tasks",
    columns,
    tasks.map((one) => [
      name(one),
      number(percent(one.metrics.accuracy)),
      number(figure(one.metrics.ece)),
      number(size(one.size_bytes)),
      activeAge(since?.[one.task]),
      ...(withTraffic ? trafficCells(byTask.get(one.task)) : []),
      digest(one),
    ]),
  );
}

function digest({ module_sha256: sha256, signer }) {
  return element("code", { title: sha256, text: signer ? `${short(sha256)} by ${signer}` : short(sha256) });
}

function number(text) {
  return element("span", { class: "number", text });
}

function name(one) {
  const about = [
    one.label_space ? `label space ${one.label_space}` : null,
    one.abstain_level !== null && one.abstain_level !== undefined ? `abstains at ${one.abstain_level}` : null,
  ].filter(Boolean);
  const labels = element("span", { class: "muted", text: ` ${count(one.labels.length, "label")}` });
  return element(
    "details",
    {},
    element("summary", {}, one.task, labels),
    element("p", { class: "chips" }, ...one.labels.map((text) => element("span", { class: "chip", text }))),
    about.length ? element("p", { class: "muted", text: about.join(", ") }) : null,
    element("p", { class: "muted", text: origin(one) }),
  );
}

function origin({ provenance, training }) {
  const parts = [
    provenance.data ? `trained on ${provenance.data}` : null,
    training.num_images ? count(training.num_images, "picture") : null,
    provenance.held_out ? `measured on its ${provenance.held_out}` : null,
  ];
  return parts.filter(Boolean).join(", ");
}

function activeAge(created) {
  return created
    ? element("time", { datetime: created, title: date(created), text: age(created) })
    : element("span", { class: "muted", text: "–" });
}

function trafficCells(one) {
  if (one === undefined) return [number("–"), number("–"), number("–")];
  const share = element("span", { class: "share" }, bar(one.share), number(percent(one.share)));
  const abstained = number(one.images ? percent(one.abstained / one.images) : "–");
  return [share, abstained, driftBadge(one.drift)];
}

function driftBadge(drift) {
  if (!drift || drift.samples === 0 || drift.p_value === null) {
    return element("span", { class: "muted", text: "too few" });
  }
  const title = `${count(drift.samples, "picture")}, statistic ${figure(drift.statistic)}`;
  return drift.drifting
    ? element("span", { class: "badge bad", title, text: `drifting, p ${figure(drift.p_value)}` })
    : element("span", { class: "badge good", title, text: `steady, p ${figure(drift.p_value)}` });
}
