// Write figures: three digits that count, in the unit that fits.

const digits = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));

export function time(microseconds) {
  if (microseconds == null) return "–";
  if (microseconds < 1000) return `${microseconds < 10 ? microseconds.toFixed(1) : microseconds.toFixed(0)} µs`;
  return microseconds < 1e6 ? `${digits(microseconds / 1e3)} ms` : `${digits(microseconds / 1e6)} s`;
}

export function bytes(count) {
  if (count == null) return "–";
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (count < 1024 || unit === "GiB") return `${unit === "B" ? count.toFixed(0) : digits(count)} ${unit}`;
    count /= 1024;
  }
}

// NaN and infinity arrive as null.
export const fixed = (value, digits) => (value === undefined ? "–" : value === null ? "NaN" : value.toFixed(digits));
export const rate = (value) => (value == null ? "–" : value >= 100 ? value.toFixed(0) : value.toFixed(1));
export const share = (value) => (value == null ? "–" : `${(100 * value).toFixed(0)} %`);
export const ms = (milliseconds) => time(1e3 * milliseconds);
