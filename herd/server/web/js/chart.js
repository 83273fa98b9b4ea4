// Small charts as SVG elements: a line over time, and blocks of memory.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 100;

function s(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Lines over time: `series` are lists of numbers (the same length, newest last), drawn over `most` points from 0 to `top`. */
export function lineChart(series, { top, most, label }) {
  const svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  svg.append(s("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT / 2, y2: HEIGHT / 2 }), s("line", { class: "base", x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }));
  series.forEach((values, i) => {
    if (values.length < 2) return;
    const x = (k) => WIDTH - ((values.length - 1 - k) * WIDTH) / (most - 1);
    const y = (value) => HEIGHT - (Math.min(value, top) / (top || 1)) * (HEIGHT - 4);
    const points = values.map((value, k) => `${x(k).toFixed(1)},${y(value).toFixed(1)}`);
    if (i === 0) svg.append(s("path", { class: "area", d: `M${x(0).toFixed(1)},${HEIGHT}L${points.join("L")}L${WIDTH},${HEIGHT}Z` }));
    svg.append(s("path", { class: i ? "line second" : "line", d: `M${points.join("L")}` }));
  });
  return svg;
}

/** Squares for blocks: each stands for one, or for as many as must be when there are thousands. */
export function blockChart({ used, cached, total }, label) {
  const [columns, rows] = [48, 14];
  const cells = Math.min(total, columns * rows);
  const per = total / cells;
  const width = Math.max(12, Math.ceil(Math.sqrt((cells * columns) / rows)));
  const high = Math.ceil(cells / width);
  const side = Math.min(WIDTH / width, HEIGHT / Math.max(high, 1), 16);
  const svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "xMinYMin meet", role: "img", "aria-label": label });
  const paths = { used: "", cached: "", free: "" };
  for (let i = 0; i < cells; i += 1) {
    // the last block of a square decides; one block of anything is seen
    const kind = i * per < used ? "used" : i * per < used + cached ? "cached" : "free";
    const [x, y, inside] = [(i % width) * side, Math.floor(i / width) * side, side * 0.82];
    paths[kind] += `M${x.toFixed(2)},${y.toFixed(2)}h${inside.toFixed(2)}v${inside.toFixed(2)}h${(-inside).toFixed(2)}z`;
  }
  for (const [kind, d] of Object.entries(paths)) if (d) svg.append(s("path", { class: kind, d }));
  return { svg, per };
}

/** A round number at or above `value`: 1, 2, 5, 10, 20, 50, ... */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}
