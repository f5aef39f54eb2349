// Elements from data. Text goes in as text nodes and nothing is parsed, so what strangers wrote stays text.

/** An element with attributes, `on…` listeners, `class`, `text`, custom properties in `vars`, and children. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") made.textContent = value;
    else if (name === "vars") setVariables(made, value);
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** The element with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** A sentence in a box: `kind` is "bad", "warn", "good" or "plain". */
export function notice(kind, sentence, ...more) {
  return element("p", { class: `notice ${kind}` }, sentence, ...more);
}

/** A horizontal bar for a share in [0, 1]; its number stands beside it as text. */
export function bar(share, kind = "") {
  return element("span", { class: `meter ${kind}`, "aria-hidden": "true", vars: { share } });
}

/** A table whose cells carry their column's name, for narrow screens. Rows are arrays of nodes or texts. */
export function table(caption, columns, rows) {
  const head = element("tr", {}, ...columns.map((one) => element("th", { scope: "col", text: one })));
  const body = rows.map((cells) =>
    element(
      "tr",
      {},
      ...cells.map((cell, i) =>
        element(i === 0 ? "th" : "td", { scope: i === 0 ? "row" : null, "data-column": columns[i] }, cell),
      ),
    ),
  );
  return element(
    "table",
    {},
    element("caption", { class: "sr-only", text: caption }),
    element("thead", {}, head),
    element("tbody", {}, ...body),
  );
}

function setVariables(made, values) {
  for (const [name, value] of Object.entries(values)) made.style.setProperty(`--${name}`, value);
}
