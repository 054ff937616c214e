// Small SVG charts of the last two minutes; their colors follow the theme.

const SPACE = "http://www.w3.org/2000/svg";
const WIDTH = 240;
const HEIGHT = 100;

export const color = (index) => `var(--c${index % 8})`;

/** Draws a bar of `[{ index, part, title }]`; each `part` is a fraction of 1. */
export function drawBar(element, parts) {
  while (element.children.length > parts.length) element.lastChild.remove();
  while (element.children.length < parts.length) element.append(document.createElement("i"));
  parts.forEach(({ index, part, title }, position) => {
    const piece = element.children[position];
    piece.style.width = `${100 * Math.max(0, part)}%`;
    piece.style.background = color(index);
    piece.title = title;
  });
  element.setAttribute("aria-label", parts.map((part) => part.title).join(", ") || "no models");
}

/** A chart in a `figure`: stacked areas or lines. */
export class Chart {
  constructor(figure, { stacked, top, format }) {
    this.stacked = stacked;
    this.top = top; // maximum of the y axis; null for the largest value
    this.format = format;
    this.svg = document.createElementNS(SPACE, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    for (const y of [0, 50, 100]) {
      const line = this.svg.appendChild(document.createElementNS(SPACE, "line"));
      line.setAttribute("class", "grid");
      for (const [name, value] of [["x1", 0], ["x2", WIDTH], ["y1", y], ["y2", y]]) line.setAttribute(name, value);
    }
    this.scale = document.createElement("div");
    this.scale.className = "scale";
    figure.prepend(this.scale, this.svg);
    this.label = figure.querySelector("figcaption").textContent;
    this.paths = [];
  }

  /** Draws `series`, lists of numbers with the oldest first; `ages` are their ages in seconds. */
  draw(series, ages, seconds) {
    const sums = ages.map((_, at) => series.reduce((sum, values) => sum + values[at], 0));
    const peaks = this.stacked ? sums : series.map((values) => Math.max(0, ...values));
    const top = this.top ?? roundUp(Math.max(0, ...peaks));
    this.scale.replaceChildren(text(this.format(top)), text(`last ${seconds} s`));
    const x = (at) => (WIDTH * (1 - ages[at] / seconds)).toFixed(2);
    const y = (value) => (HEIGHT * (1 - Math.min(1, value / top))).toFixed(2);
    while (this.paths.length < series.length) {
      this.paths.push(this.svg.appendChild(document.createElementNS(SPACE, "path")));
    }
    let below = ages.map(() => 0);
    series.forEach((values, index) => {
      const path = this.paths[index];
      const above = this.stacked ? values.map((value, at) => value + below[at]) : values;
      const line = above.map((value, at) => `${x(at)},${y(value)}`);
      if (this.stacked) {
        const back = below.map((value, at) => `${x(at)},${y(value)}`).reverse();
        path.setAttribute("d", line.length ? `M${line.join("L")}L${back.join("L")}Z` : "");
        Object.assign(path.style, { fill: color(index), fillOpacity: 0.75 });
        below = above;
      } else {
        path.setAttribute("d", line.length ? `M${line.join("L")}` : "");
        Object.assign(path.style, { fill: "none", stroke: color(index), strokeWidth: 2 });
      }
    });
    this.svg.setAttribute("aria-label", `${this.label}; now ${this.format(sums.at(-1) ?? 0)}`);
  }
}

function text(words) {
  const span = document.createElement("span");
  span.textContent = words;
  return span;
}

/** Rounds up to the next of 1, 2, 5, 10, 20, ... */
function roundUp(value) {
  if (value <= 1) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value);
}
