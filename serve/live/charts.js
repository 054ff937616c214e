// Small charts of the last two minutes, as SVG whose colours follow the theme.

const SPACE = "http://www.w3.org/2000/svg";
const WIDTH = 240;
const HEIGHT = 100;

export const colour = (index) => `var(--c${index % 8})`;

/** A bar of parts: `[{ index, part, title }]`, parts of 1. */
export function drawBar(element, parts) {
  while (element.children.length > parts.length) element.lastChild.remove();
  while (element.children.length < parts.length) element.append(document.createElement("i"));
  parts.forEach(({ index, part, title }, place) => {
    const piece = element.children[place];
    piece.style.width = `${100 * Math.max(0, part)}%`;
    piece.style.background = colour(index);
    piece.title = title;
  });
  element.setAttribute("aria-label", parts.map((part) => part.title).join(", ") || "nothing");
}

/** A chart in a `figure`: areas on each other, or lines. */
export class Chart {
  constructor(figure, { stacked, top, format }) {
    this.stacked = stacked;
    this.top = top; // a fixed maximum, or null: the largest value
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

  /** `series` is a list of lists of numbers, oldest first; `ages` the seconds before now of each. */
  draw(series, ages, seconds) {
    const sums = ages.map((_, at) => series.reduce((sum, one) => sum + one[at], 0));
    const peaks = this.stacked ? sums : series.map((one) => Math.max(0, ...one));
    const top = this.top ?? nice(Math.max(0, ...peaks));
    this.scale.replaceChildren(text(this.format(top)), text(`last ${seconds} s`));
    const x = (at) => (WIDTH * (1 - ages[at] / seconds)).toFixed(2);
    const y = (value) => (HEIGHT * (1 - Math.min(1, value / top))).toFixed(2);
    while (this.paths.length < series.length) {
      this.paths.push(this.svg.appendChild(document.createElementNS(SPACE, "path")));
    }
    let below = ages.map(() => 0);
    series.forEach((one, index) => {
      const path = this.paths[index];
      const above = this.stacked ? one.map((value, at) => value + below[at]) : one;
      const line = above.map((value, at) => `${x(at)},${y(value)}`);
      if (this.stacked) {
        const back = below.map((value, at) => `${x(at)},${y(value)}`).reverse();
        path.setAttribute("d", line.length ? `M${line.join("L")}L${back.join("L")}Z` : "");
        Object.assign(path.style, { fill: colour(index), fillOpacity: 0.75 });
        below = above;
      } else {
        path.setAttribute("d", line.length ? `M${line.join("L")}` : "");
        Object.assign(path.style, { fill: "none", stroke: colour(index), strokeWidth: 2 });
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

/** The next of 1, 2, 5, 10, 20, ... */
function nice(value) {
  if (value <= 1) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value);
}
