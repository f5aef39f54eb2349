// The view that asks: pictures chosen, dropped or pasted, one request each.

import { answerCard, summary } from "./answer.js";
import { call } from "./api.js";
import { byId, element } from "./elements.js";
import { faultNotice } from "./faults.js";
import { takeFiles } from "./files.js";

const MAX_ANSWERS = 24; // on the page; older ones leave

let onAnswer = () => {};

/** `seen` is told the revision of every answer. */
export function installPredict(seen) {
  onAnswer = seen;
  takeFiles(byId("pictures"), byId("predict"), askAll);
  document.addEventListener("paste", (event) => {
    const pictures = [...event.clipboardData.files].filter((one) => one.type.startsWith("image/"));
    if (byId("predict").hidden || pictures.length === 0) return;
    event.preventDefault();
    askAll(pictures);
  });
}

/** Offer the active tasks to answer by name. */
export async function refreshPredict() {
  const select = byId("task");
  const { tasks } = await call("GET", "tasks");
  const chosen = select.value;
  select.replaceChildren(
    element("option", { value: "", text: "chosen by the service" }),
    ...tasks.map(({ task }) => element("option", { value: task, text: task, selected: task === chosen })),
  );
}

async function askAll(pictures) {
  byId("ask-notice").replaceChildren();
  for (const picture of pictures) await ask(picture);
}

async function ask(picture) {
  const query = {
    timings: true,
    task: byId("task").value,
    coverage: byId("coverage").value,
    selection: byId("selection").value,
  };
  const started = performance.now();
  try {
    byId("predict").setAttribute("aria-busy", "true");
    const answer = await call("POST", "predict", {
      query,
      body: picture,
      headers: picture.type ? { "content-type": picture.type } : {},
    });
    show(picture, answer, performance.now() - started);
  } catch (error) {
    const name = element("strong", { text: `${picture.name || "Picture"}: ` });
    const shown = faultNotice(error);
    shown.prepend(name);
    byId("ask-notice").append(shown);
  } finally {
    byId("predict").removeAttribute("aria-busy");
  }
}

function show(picture, response, elapsedMs) {
  const [answer] = response.predictions;
  const list = byId("answers");
  list.prepend(element("li", {}, answerCard(picture, answer, response.timings[0], elapsedMs, response)));
  list.firstElementChild.scrollIntoView({ block: "nearest" });
  while (list.children.length > MAX_ANSWERS) {
    URL.revokeObjectURL(list.lastElementChild.querySelector("img").src);
    list.lastElementChild.remove();
  }
  byId("no-answers").hidden = true;
  byId("answer-announcement").textContent = summary(picture, answer);
  onAnswer(answer.receipt.revision);
}
