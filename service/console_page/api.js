// The service's API, beside the folder that this page came from. A refusal becomes an error with a sentence.

import { sentence } from "./format.js";

const ROOT = new URL("../", import.meta.url);
let key = null; // in memory alone: never stored, never in an address

/** What the service said no to. `status` is 0 when it did not answer. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Send this API key from now on; null sends none. */
export function setKey(value) {
  key = value;
}

export function hasKey() {
  return key !== null;
}

/** The JSON answer to a request. Throws Refusal. */
export async function call(method, path, { query = {}, body = null, headers = {} } = {}) {
  const url = new URL(path, ROOT);
  for (const [name, value] of Object.entries(query)) {
    if (value !== "" && value !== null && value !== false) url.searchParams.set(name, value);
  }
  const sent = new Headers(headers);
  if (key !== null) sent.set("authorization", `Bearer ${key}`);
  if (body !== null && !sent.has("content-type")) sent.set("content-type", "application/octet-stream");
  let response;
  try {
    response = await fetch(url, { method, body, headers: sent, credentials: "omit", cache: "no-store" });
  } catch {
    throw new Refusal(0, "The service does not answer.");
  }
  if (!response.ok) throw await refusal(response);
  return response.json();
}

async function refusal(response) {
  let text = `the service answered ${response.status} ${response.statusText}`;
  if (response.headers.get("content-type")?.startsWith("application/problem+json")) {
    text = (await response.json()).detail;
  }
  const wait = response.headers.get("retry-after");
  const hint = wait === null ? "" : ` Try again in ${wait} s.`;
  return new Refusal(response.status, sentence(text) + hint);
}
