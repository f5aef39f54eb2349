// One answer as a card: what, how sure, how typical, what else, what answered, and where the time went.

import { bar, element } from "./elements.js";
import { count, figure, percent, short } from "./format.js";

const STAGES = ["decode", "queue", "backbone", "selection"];

/** The answer in a sentence, for those who hear the page. */
export function summary(picture, answer) {
  const doubt = answer.abstained ? " The service abstains: do not rely on it." : "";
  return `${picture.name || "Picture"}: ${answer.task}, ${answer.label}, ${percent(answer.confidence)}.${doubt}`;
}

/** The card of `answer` to `picture`; `elapsedMs` is what the whole request took here. */
export function answerCard(picture, answer, timings, elapsedMs, response) {
  return element(
    "article",
    { class: "panel answer", "aria-label": summary(picture, answer) },
    thumbnail(picture),
    element(
      "div",
      { class: "answer-body" },
      headline(answer),
      pairs("Most probable", [{ ...answer, probability: answer.confidence }, ...answer.alternatives]),
      element(
        "dl",
        { class: "facts" },
        ...fact("In-distribution p-value", typicality(answer)),
        ...fact("Task probability", percent(answer.task_probability)),
        ...(answer.prediction_set ? fact("Prediction set", predictionSet(answer.prediction_set)) : []),
      ),
      time(timings, elapsedMs),
      receipt(answer.receipt, response),
    ),
  );
}

function thumbnail(picture) {
  const image = element("img", { class: "thumbnail", alt: picture.name || "pasted picture" });
  image.src = URL.createObjectURL(picture);
  return image;
}

function headline(answer) {
  return element(
    "header",
    { class: "headline" },
    element(
      "div",
      {},
      element("p", { class: "eyebrow", text: answer.task }, badge(answer)),
      element("h2", { text: answer.label }),
    ),
    element("p", { class: "big", text: percent(answer.confidence) }, element("span", { text: "confidence" })),
  );
}

function badge({ abstained }) {
  const [kind, text] = abstained ? ["warn", "abstains"] : ["good", "answers"];
  return element("span", { class: `badge ${kind}`, text });
}

function pairs(title, choices) {
  const rows = choices.map(({ task, label, probability }, i) =>
    element(
      "li",
      { class: i === 0 ? "first" : null },
      element("span", { class: "pair" }, element("span", { class: "muted", text: `${task} / ` }), label),
      bar(probability),
      element("span", { class: "number", text: percent(probability) }),
    ),
  );
  return element("ol", { class: "pairs", "aria-label": title }, ...rows);
}

function fact(name, ...values) {
  return [element("dt", { text: name }), element("dd", {}, ...values)];
}

function typicality({ p_value: p, abstained }) {
  const meaning = abstained
    ? "at or below the abstain level"
    : `${Math.round(100 * p)} % of its known pictures are no more typical`;
  return element(
    "span",
    { class: "typicality" },
    element("span", { class: "number", text: figure(p) }),
    bar(p, abstained ? "warn" : "good"),
    element("span", { class: "muted", text: meaning }),
  );
}

function predictionSet(choices) {
  if (choices.length === 0) return element("span", { class: "muted", text: "empty: every label is ruled out" });
  return element(
    "span",
    { class: "chips" },
    ...choices.map(({ task, label }) => element("span", { class: "chip", text: `${task} / ${label}` })),
  );
}

function time(timings, elapsedMs) {
  const spent = STAGES.map((stage) => [stage, timings[`${stage}_ms`]]);
  const total = spent.reduce((sum, [, ms]) => sum + ms, 0) || 1;
  const how = timings.batch_size
    ? `batch of ${timings.batch_size}, ${count(timings.modules_evaluated, "module")} evaluated`
    : `CLS vector known already, ${count(timings.modules_evaluated, "module")} evaluated`;
  return element(
    "div",
    { class: "time" },
    element(
      "div",
      { class: "stack", "aria-hidden": "true" },
      ...spent.map(([stage, ms]) => element("span", { class: stage, vars: { share: ms / total } })),
    ),
    element(
      "p",
      { class: "legend" },
      ...spent.map(([stage, ms]) => element("span", { class: `key ${stage}`, text: `${stage} ${ms.toFixed(1)} ms` })),
      element("span", { text: `${how}; ${elapsedMs.toFixed(0)} ms to this page` }),
    ),
  );
}

function receipt(of, response) {
  const parts = [
    `revision ${of.revision}`,
    `module ${short(of.module_sha256)}`,
    `backbone ${short(of.backbone_fingerprint)}`,
    of.signer ? `signed by ${of.signer}` : null,
  ];
  const json = JSON.stringify(response, null, 2);
  return element(
    "details",
    { class: "receipt" },
    element("summary", {}, "Receipt ", element("code", { text: parts.filter(Boolean).join(" · ") })),
    element("p", {
      class: "muted",
      text: "The whole answer. Kept in a file, `tosca replay answer.json picture.jpg` computes it again.",
    }),
    element("pre", { tabindex: "0", "aria-label": "The whole answer as JSON", text: json }),
  );
}
