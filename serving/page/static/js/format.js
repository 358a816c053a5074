/** Numbers, moments and ages as people read them; moments are UTC. */

const UTC = { timeZone: "UTC" };
const dayFormat = new Intl.DateTimeFormat("en-GB", {
  day: "numeric", month: "short", year: "numeric", ...UTC,
});
const momentFormat = new Intl.DateTimeFormat("en-GB", {
  day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit", ...UTC,
});
const percentFormat = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1 });
const countFormat = new Intl.NumberFormat("en");
const signedFormat = new Intl.NumberFormat("en", {
  signDisplay: "always", minimumFractionDigits: 2, maximumFractionDigits: 2,
});

const UNITS = [[365.25 * 86400, "year"], [30.4375 * 86400, "month"], [86400, "day"],
  [3600, "hour"], [60, "minute"]];

/** 0.4137 -> "41.4%"; what would read as nothing is "<0.1%". */
export function percent(share) {
  return share > 0 && share < 0.0005 ? "<0.1%" : percentFormat.format(share);
}

/** 0.424 -> "+0.42", with a true minus sign; what would read as nothing is "±0.00". */
export function signed(number) {
  if (Math.abs(number) < 0.005) return "±0.00";
  return signedFormat.format(number).replace("-", "−");
}

/** 1070 -> "1,070". */
export function whole(number) {
  return countFormat.format(number);
}

/** (3, "behaviour") -> "3 behaviours". */
export function counted(number, noun) {
  return `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;
}

/** Up to four significant digits, tiny and huge numbers with an exponent. */
export function short(number) {
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return number.toExponential(2);
  return Number.isInteger(number) ? whole(number) : String(Number(number.toPrecision(4)));
}

/** "8 Dec 2011" */
export function day(time) {
  return dayFormat.format(new Date(time));
}

/** "8 Dec 2011, 12:50" */
export function moment(time) {
  return momentFormat.format(new Date(time));
}

/** An age in words, in the largest unit of which there is at least one. */
export function age(seconds) {
  for (const [size, unit] of UNITS) {
    if (seconds >= size) return counted(Math.floor(seconds / size), unit);
  }
  return "less than a minute";
}

/** How long before `now` something was, both ISO texts. */
export function ago(time, now) {
  return `${age((new Date(now) - new Date(time)) / 1000)} ago`;
}
