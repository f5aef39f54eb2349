// Numbers, times and digests as people read them.

const DIVISIONS = [
  [60, "second"],
  [60, "minute"],
  [24, "hour"],
  [30, "day"],
  [12, "month"],
  [Infinity, "year"],
];
const ago = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
const moment = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

/** A share in [0, 1] in percent, with one digit; "–" when it is not known. */
export function percent(share) {
  return share === null || share === undefined ? "–" : `${(100 * share).toFixed(1)} %`;
}

/** A p-value or ECE: three significant digits, "–" when it is not known. */
export function figure(value) {
  return value === null || value === undefined ? "–" : String(Number(value.toPrecision(3)));
}

/** Bytes in kB or MB. */
export function size(bytes) {
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/** How long ago an ISO date was: "3 hours ago". */
export function age(date, now = Date.now()) {
  let value = (Date.parse(date) - now) / 1000;
  for (const [length, unit] of DIVISIONS) {
    if (Math.abs(value) < length) return ago.format(Math.round(value), unit);
    value /= length;
  }
  return "";
}

/** An ISO date in full, in the reader's time zone. */
export function date(text) {
  return moment.format(new Date(text));
}

/** The beginning of a digest. */
export function short(sha256) {
  return sha256.slice(0, 10);
}

/** "1 task", "2 tasks". */
export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** A fault's message as a sentence. */
export function sentence(text) {
  const trimmed = text.trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}
