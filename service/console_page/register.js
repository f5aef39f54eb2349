// The dialog that registers a module: a dry run first, its impact report, then the change.

import { call } from "./api.js";
import { byId, element, notice, table } from "./elements.js";
import { faultNotice } from "./faults.js";
import { takeFiles } from "./files.js";
import { figure, percent, size } from "./format.js";

let chosen = null; // { module, headers }: what the dry run was about

export function installRegister(onChange) {
  byId("open-register").addEventListener("click", open);
  takeFiles(byId("module"), byId("module-drop"), dryRun);
  byId("force").addEventListener("change", () => {
    byId("do-register").disabled = !byId("force").checked;
  });
  byId("register-form").addEventListener("submit", (event) => {
    event.preventDefault();
    register(onChange);
  });
}

function open() {
  reset();
  byId("register").showModal();
}

function reset() {
  chosen = null;
  byId("impact").replaceChildren();
  byId("confirm-register").hidden = true;
  byId("do-register").disabled = true;
  byId("do-register").textContent = "Register";
  byId("register-reason").value = "";
  byId("force").checked = false;
}

async function dryRun(files) {
  reset();
  const module = files.find((one) => !one.name.endsWith(".sig"));
  const signature = files.find((one) => one.name.endsWith(".sig"));
  if (module === undefined) {
    byId("impact").replaceChildren(notice("bad", "That is a signature alone: choose its module file with it."));
    return;
  }
  byId("impact").replaceChildren(element("p", { class: "muted", text: `Checking ${module.name} …` }));
  try {
    const headers = signature ? { "x-module-signature": (await signature.text()).trim() } : {};
    const [report, { tasks }] = await Promise.all([
      call("POST", "tasks", { query: { dry_run: true }, body: module, headers }),
      call("GET", "tasks"),
    ]);
    showImpact(module, report, tasks);
    if (report.impact.length) chosen = { module, headers };
  } catch (error) {
    byId("impact").replaceChildren(faultNotice(error));
  }
}

function showImpact(module, report, tasks) {
  if (report.impact.length === 0) {
    byId("impact").replaceChildren(notice("plain", "This module is active already; nothing would change."));
    return;
  }
  const replaced = tasks.find((one) => one.module_sha256 === report.replaced_sha256)?.task;
  const name = replaced ?? report.impact.find((one) => one.before === null).task;
  const isHarmful = report.harmed.length > 0;
  byId("impact").replaceChildren(
    element(
      "p",
      {},
      replaced ? "Would replace " : "Would add ",
      element("strong", { text: name }),
      ` (${size(module.size)}).`,
    ),
    isHarmful
      ? notice("warn", `Lowers ${report.harmed.join(", ")} by more than the margin.`)
      : notice("good", "No other task loses more than the margin."),
    table(
      "Impact on every task, measured on its calibration set",
      ["Task", "Right task", "Accuracy", "ECE", "Pictures"],
      report.impact.map((one) => impactRow(one, report.harmed.includes(one.task))),
    ),
  );
  byId("confirm-register").hidden = false;
  byId("force-row").hidden = !isHarmful;
  byId("do-register").disabled = isHarmful;
  byId("do-register").textContent = `${replaced ? "Replace" : "Register"} ${name}`;
}

function impactRow({ task, before, after }, isHarmed) {
  const pair = (name, show) => {
    const [was, is] = [before?.[name], after?.[name]].map((one) => show(one));
    return was === is || before === null
      ? element("span", { class: "number", text: is })
      : element("span", { class: "number", text: `${was} → ${is}` });
  };
  return [
    element("span", { class: isHarmed ? "harmed" : null, text: task }),
    pair("selection_accuracy", percent),
    pair("accuracy", percent),
    pair("ece", figure),
    element("span", { class: "number", text: (after ?? before).num_vectors }),
  ];
}

async function register(onChange) {
  const button = byId("do-register");
  button.disabled = true;
  try {
    const query = { force: byId("force").checked, reason: byId("register-reason").value };
    const change = await call("POST", "tasks", { query, body: chosen.module, headers: chosen.headers });
    byId("register").close();
    const said = change.published ? `Revision ${change.revision} is being served.` : "Nothing had to change.";
    byId("tasks-notice").replaceChildren(notice("good", said));
    onChange();
  } catch (error) {
    byId("impact").append(faultNotice(error));
    button.disabled = false;
  }
}
