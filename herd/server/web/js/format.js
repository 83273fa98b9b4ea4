// Numbers for people.

const whole = new Intl.NumberFormat("en");

/** 1,234 */
export const count = (n) => (Number.isFinite(n) ? whole.format(Math.round(n)) : "–");

/** "1 token", "2 tokens" */
export const counted = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** 38.2, 412 */
export const rate = (n) => (!Number.isFinite(n) ? "–" : n >= 100 ? count(n) : n.toFixed(1));

/** 250 ms, 1.4 s, 3 min, 2 h */
export function time(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  const hours = Math.floor(seconds / 3600);
  return hours < 48 ? `${hours} h` : `${Math.floor(hours / 24)} days`;
}

/** 512 MB, 1.3 GB */
export function bytes(n) {
  if (!Number.isFinite(n)) return "–";
  const mega = n / 2 ** 20;
  return mega < 1024 ? `${Math.round(mega)} MB` : `${(mega / 1024).toFixed(1)} GB`;
}

/** 5.5 M, 8.0 B parameters */
export function parameters(n) {
  if (!Number.isFinite(n)) return "–";
  return n >= 1e9 ? `${(n / 1e9).toFixed(1)} B` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} M` : count(n);
}

/** today 14:05, 3 Nov, 3 Nov 2025 */
export function day(ms, now = Date.now()) {
  const date = new Date(ms);
  const today = new Date(now);
  if (date.toDateString() === today.toDateString()) return date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  const year = date.getFullYear() === today.getFullYear() ? undefined : "numeric";
  return date.toLocaleDateString("en-GB", { day: "numeric", month: "short", year });
}
