// Stacked bars, one for each second of the last two minutes.

import { element, whole } from "./text.js";

const SECONDS = 120;
const WIDTH = 600;
const HEIGHT = 80;
const SVG = "http://www.w3.org/2000/svg";

const SERIES = [
  ["success", "Success"],
  ["failure", "Failure"],
  ["unknown", "Unknown"],
  ["refused", "Refused"],
];

export class Chart {
  constructor(place, legend) {
    this.seconds = new Map(); // [success, failure, unknown, refused] by second
    this.svg = svgElement("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.paths = SERIES.map(([name]) => svgElement("path", { class: name }));
    this.svg.append(svgElement("path", { class: "axis", d: `M0 ${HEIGHT - 0.5}H${WIDTH}` }), ...this.paths);
    this.top = element("span", { class: "top", "aria-hidden": "true" });
    place.append(this.svg, this.top);
    this.figures = SERIES.map(([name, label]) => {
      const figure = element("strong");
      legend.append(element("li", { class: name }, element("span", { class: "swatch" }), `${label} `, figure));
      return figure;
    });
  }

  update(seconds) {
    for (const [second, ...counts] of seconds) {
      this.seconds.set(second, counts);
    }
  }

  /** Draw the two minutes before a second, which is not over yet. */
  draw(now) {
    for (const second of this.seconds.keys()) {
      if (second <= now - SECONDS) {
        this.seconds.delete(second);
      }
    }
    const most = Math.max(1, ...[...this.seconds.values()].map((counts) => counts.reduce((sum, each) => sum + each, 0)));
    const width = WIDTH / SECONDS;
    const parts = SERIES.map(() => []);
    const sums = SERIES.map(() => 0);
    for (const [second, counts] of this.seconds) {
      const left = WIDTH - (now - second + 1) * width;
      let base = HEIGHT;
      counts.forEach((count, index) => {
        sums[index] += count;
        const height = (count / most) * (HEIGHT - 2);
        if (count > 0) {
          base -= height;
          parts[index].push(`M${left.toFixed(1)} ${base.toFixed(1)}h${width - 0.6}v${height.toFixed(1)}h${0.6 - width}z`);
        }
      });
    }
    this.paths.forEach((path, index) => path.setAttribute("d", parts[index].join("")));
    this.figures.forEach((figure, index) => (figure.textContent = whole(sums[index])));
    this.top.textContent = `${whole(most)}/s`;
    const figures = SERIES.map(([, label], index) => `${label} ${whole(sums[index])}`).join(", ");
    this.svg.setAttribute("aria-label", `Records in the last two minutes: ${figures}. At most ${whole(most)} in one second.`);
  }
}

function svgElement(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    made.setAttribute(key, value);
  }
  return made;
}
