// Plots the figures of the page: views, sliders, themes, numbers. Data come from the <script> of each <figure>.
"use strict";

const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false };

// --- numbers -------------------------------------------------------------------------------------------

// An array as plotly writes it, float32 in base64 -> list of numbers, or of rows where it has two dimensions.
function unpack(value) {
  if (!value || value.bdata === undefined) return value;
  const bytes = Uint8Array.from(atob(value.bdata), (c) => c.charCodeAt(0));
  const types = { f4: Float32Array, f8: Float64Array, i1: Int8Array, u1: Uint8Array, i2: Int16Array, u2: Uint16Array,
    i4: Int32Array, u4: Uint32Array };
  const numbers = Array.from(new types[value.dtype](bytes.buffer));
  return value.shape === undefined ? numbers : shaped(numbers, String(value.shape).split(",").map(Number));
}

// Rows of rows ... of a flat list.
function shaped(numbers, shape) {
  if (shape.length < 2) return numbers;
  const rest = shape.slice(1), size = rest.reduce((a, b) => a * b, 1);
  return Array.from({ length: shape[0] }, (_, i) => shaped(numbers.slice(i * size, (i + 1) * size), rest));
}

// {array: k} -> arrays[k] wherever it stands: the page holds every array once.
function placed(value, arrays) {
  if (Array.isArray(value)) return value.map((part) => placed(part, arrays));
  if (value === null || typeof value !== "object") return value;
  if (Number.isInteger(value.array)) return arrays[value.array];
  return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, placed(part, arrays)]));
}

function word(value) {
  return typeof value === "number" ? (Number.isNaN(value) ? "" : String(Number(value.toPrecision(6)))) : String(value);
}

// The numbers of a trace as lines of CSV, with a header; of maps and lines alike.
function lines(trace) {
  const { axes, columns } = trace.meta, name = (trace.name || "").replaceAll(",", ";");
  if (trace.type === "heatmap") {
    const rows = trace.z, labels = trace.text;
    const found = [axes.join(",")];
    rows.forEach((row, i) => Array.from(row).forEach((value, j) => {
      if (!Number.isNaN(value)) found.push([labels ? labels[i][j] : word(trace.x[j]), word(trace.y[i]), word(value)].join(","));
    }));
    return found;
  }
  const found = [["line", ...axes, ...columns].join(",")];
  for (let i = 0; i < trace.x.length; i++) {
    const more = columns.map((_, k) => word(trace.customdata[i][k]));
    found.push([name, word(trace.x[i]), word(trace.y[i]), ...more].join(","));
  }
  return found;
}

// --- themes --------------------------------------------------------------------------------------------

function template() {
  const style = getComputedStyle(document.documentElement), color = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: color("--grid"), linecolor: color("--muted"), zerolinecolor: color("--grid"), ticks: "outside",
    tickcolor: color("--muted"), showline: true, automargin: true, exponentformat: "power", title: { standoff: 6, font: { size: 12 } }, ticklen: 4 };
  return { layout: {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: color("--text"), size: 12, family: getComputedStyle(document.body).fontFamily },
    margin: { l: 50, r: 12, t: 8, b: 42 }, hoverlabel: { bgcolor: color("--note"), bordercolor: color("--muted"),
      font: { color: color("--text") } }, xaxis: axis, yaxis: axis, hovermode: "closest",
  } };
}

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function retheme() {
  document.getElementById("theme").textContent = dark() ? "Light theme" : "Dark theme";
  document.querySelectorAll(".plot").forEach((plot) => Plotly.relayout(plot, { template: template() }));
}

// --- figures -------------------------------------------------------------------------------------------

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

class Figure {
  constructor(root) {
    this.root = root;
    const { views, arrays } = JSON.parse(root.querySelector("script").textContent);
    this.views = placed(views, arrays);
    this.range = root.querySelector("input[type=range]");
    this.numbers = root.querySelector(".numbers");
    const choice = root.querySelector("select");
    if (choice) choice.addEventListener("change", () => this.show(Number(choice.value)));
    this.range.addEventListener("input", () => this.move(Number(this.range.value)));
    this.numbers.addEventListener("toggle", () => this.list());
    this.show(0);
  }

  // Draw a view in place of the one that is there.
  show(index) {
    const view = this.views[index], blocks = this.root.querySelector(".blocks");
    blocks.querySelectorAll(".plot").forEach((plot) => Plotly.purge(plot));
    this.panels = [];
    blocks.replaceChildren(...view.blocks.map((block) => this.block(block)));
    for (const { plot, panel } of this.panels) {
      const { data, layout } = structuredClone(panel.figure);
      Plotly.newPlot(plot, data, { ...layout, template: template() }, CONFIG);
      plot.querySelectorAll("svg").forEach((svg) => svg.setAttribute("aria-hidden", "true"));
    }
    this.slide(view.slider);
    this.list();
  }

  block(block) {
    const panels = element("div", { className: "panels" });
    for (const panel of block.panels) {
      const plot = element("div", { className: "plot" });
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", panel.alt);
      plot.style.height = `${panel.height}px`;
      const title = panel.title ? [element("p", { textContent: panel.title }, ...this.scale(panel.scale))] : [];
      panels.append(element("div", { className: panel.wide ? "panel wide" : "panel" }, ...title, plot));
      const moves = panel.moves.map((move) => ({ ...move, rows: unpack(move.rows) }));
      const marks = panel.marks.map((mark) => ({ ...mark, low: unpack(mark.low), high: unpack(mark.high) }));
      this.panels.push({ plot, panel, moves, marks });
    }
    const title = block.title ? [element("h3", { textContent: block.title })] : [];
    const note = block.note ? [element("p", { className: "note", textContent: block.note })] : [];
    return element("div", { className: block.wide ? "block wide" : "block" }, ...title, ...note, panels);
  }

  // The colours of a map with its ends, for its title.
  scale(scale) {
    if (!scale) return [];
    const bar = element("span", { className: "scale" });
    bar.style.background = `linear-gradient(to right, ${scale.colors.join(", ")})`;
    const [low, high] = scale.ends.map((text) => element("span", { className: "ends", textContent: text }));
    return [element("span", { className: "scale-line" }, low, bar, high)];
  }

  // Set the slider up for a view, or hide it.
  slide(slider) {
    const label = this.root.querySelector(".slider");
    label.hidden = !slider;
    this.slider = slider;
    if (!slider) return;
    label.querySelector("span").textContent = slider.label;
    this.range.setAttribute("aria-label", slider.label);
    this.range.max = slider.texts.length - 1;
    this.range.value = slider.start;
    this.move(slider.start);
  }

  // Show step k of the slider in every panel.
  move(k) {
    const text = this.slider.texts[k];
    this.root.querySelector("output").textContent = text;
    this.range.setAttribute("aria-valuetext", text);
    for (const { plot, moves, marks } of this.panels) {
      for (const { trace, path, rows } of moves) Plotly.restyle(plot, { [path]: [rows[k]] }, [trace]);
      const places = {};
      for (const { shape, axis, low, high } of marks) {
        places[`shapes[${shape}].${axis}0`] = low[k];
        places[`shapes[${shape}].${axis}1`] = high[k];
      }
      if (marks.length) Plotly.relayout(plot, places);
    }
    this.list();
  }

  // What hovering shows, as text: for keyboards and for copying. Only while it is open.
  list() {
    if (!this.numbers.open) return;
    const text = this.panels.map(({ plot, panel }) => {
      const traces = plot.data.filter((trace) => !trace.meta.band);
      const decoded = traces.map((trace) => Object.fromEntries(Object.entries(trace).map(([k, v]) => [k, unpack(v)])));
      return [`# ${panel.title || panel.alt}`, ...decoded.flatMap(lines)].join("\n");
    });
    this.numbers.querySelector("pre").textContent = text.join("\n\n");
  }
}

document.querySelectorAll("figure[data-figure]").forEach((root) => new Figure(root));
document.getElementById("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  retheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", retheme);
retheme();
