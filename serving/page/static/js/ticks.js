/** Where a time axis is labelled: at the starts of hours, days, months or years, UTC. */

const HOUR = 3_600_000;
const DAY = 24 * HOUR;
const MONTH = 30.4375 * DAY;

const named = (options) => new Intl.DateTimeFormat("en-GB", { timeZone: "UTC", ...options });
const HOURS = named({ day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
const DAYS = named({ day: "numeric", month: "short" });
const MONTHS = named({ month: "short", year: "numeric" });
const YEARS = named({ year: "numeric" });

// [length of a step, its parts, label]
const STEPS = [
  ...[1, 3, 6, 12].map((n) => [n * HOUR, { hours: n }, HOURS]),
  ...[1, 2, 7, 14].map((n) => [n * DAY, { days: n }, DAYS]),
  ...[1, 2, 3, 6].map((n) => [n * MONTH, { months: n }, MONTHS]),
  ...[1, 2, 5, 10, 50].map((n) => [n * 12 * MONTH, { months: 12 * n }, YEARS]),
];

/**
 * At most `most` ticks between two moments (epoch milliseconds), the finest round steps that fit.
 * @returns {{time: number, label: string}[]}
 */
export function ticks(start, end, most) {
  const fits = STEPS.find(([size]) => (end - start) / size <= most) ?? STEPS.at(-1);
  const [, step, format] = fits;
  const found = [];
  for (let time = before(start, step); time <= end; time = after(time, step)) {
    if (time >= start) found.push({ time, label: format.format(time) });
  }
  return found;
}

/** The last start of a step at or before `time`. */
function before(time, { hours, days, months }) {
  const date = new Date(time);
  if (months) {
    const count = date.getUTCFullYear() * 12 + date.getUTCMonth();
    return monthStart(count - (count % months));
  }
  const size = hours ? hours * HOUR : days * DAY;
  return Math.floor(time / size) * size;
}

function after(time, step) {
  if (!step.months) return time + (step.hours ? step.hours * HOUR : step.days * DAY);
  const date = new Date(time);
  return monthStart(date.getUTCFullYear() * 12 + date.getUTCMonth() + step.months);
}

function monthStart(count) {
  return Date.UTC(Math.floor(count / 12), count % 12);
}
