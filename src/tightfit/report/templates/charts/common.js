// What both kinds of chart share: numbers, legend, axes, pointer, keys, zoom. Text goes in by textContent only.
const { charts, words } = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const whole = new Intl.NumberFormat(root.lang);
const MIB = 2 ** 20, GIB = 2 ** 30;
const UNITS = [[GIB, "GiB"], [MIB, "MiB"], [2 ** 10, "KiB"]];
const MOST_TENSORS = 5;
const NARROW = 480;
const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const say = (key, values) => words[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);

function bytes(count) {
  const [factor, name] = UNITS.find(([each]) => Math.abs(count) >= each) || [1, "bytes"];
  return factor === 1 ? `${count} bytes` : `${(count / factor).toFixed(2)} ${name}`;
}

function number(value) {
  const size = Math.abs(value);
  if (size >= 1000) return whole.format(Math.round(value));
  return size !== 0 && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

const FORMAT = { bytes, number, rate: (value) => `${number(value)} ${words.rate}` };

function axisBytes(splits) {
  const top = Math.max(...splits, 1);
  const [factor, name] = UNITS.find(([each]) => top >= each) || [1, "B"];
  const gap = splits.length > 1 ? (splits[1] - splits[0]) / factor : 1;
  const digits = gap >= 1 ? 0 : Math.min(3, Math.ceil(-Math.log10(gap) + 0.3));
  return splits.map((each) => `${(each / factor).toFixed(digits)} ${name}`);
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The parts around a plot: legend, controls, the plot itself, a tip beside the pointer, a line for screen readers.
function frame(host, id) {
  const parts = {
    legend: element("fieldset", { class: "legend" }, element("legend", {}, words.shown)),
    controls: element("div", { class: "controls" }),
    plot: element("div", {
      class: "plot", tabindex: "0", role: "group", "aria-roledescription": words.chart,
      "aria-label": `${host.dataset.title}. ${words.keys}`, "aria-describedby": `${id}-summary`,
    }),
    tip: element("div", { class: "tip", "aria-hidden": "true", hidden: "" }),
    live: element("p", { class: "unseen", "aria-live": "polite" }),
    panel: element("div", { class: "panel" }),
  };
  const { legend, controls, plot, tip, live, panel } = parts;
  host.replaceChildren(element("div", { class: "bar" }, legend, controls), plot, panel, live);
  plot.append(tip);
  return parts;
}

// A box to tick for each series; the outputs show its value at the pointer.
function legendOf(parts, rows, hidden, onChange) {
  return rows.map((row) => {
    const box = element("input", { type: "checkbox" });
    box.checked = !hidden.has(row.key);
    box.addEventListener("change", () => {
      hidden[box.checked ? "delete" : "add"](row.key);
      onChange();
    });
    const swatch = element("span", { class: `swatch ${row.style || ""}`, "aria-hidden": "true" });
    swatch.style.setProperty("--swatch", `var(${row.colour})`);
    const output = element("output");
    parts.legend.append(element("label", { "data-key": row.key }, box, swatch, element("span", {}, row.name), output));
    return output;
  });
}

function button(parts, text, onClick) {
  const made = element("button", { type: "button" }, text);
  made.addEventListener("click", onClick);
  parts.controls.append(made);
  return made;
}

function axes(unit, xName, width) {
  const ink = colour("--soft"), grid = { stroke: colour("--grid"), width: 1 };
  const font = "12px system-ui, sans-serif";
  const common = { stroke: ink, font, labelFont: font, grid, ticks: { show: false } };
  const tens = [];
  for (let power = 1; power < 1e15; power *= 10) tens.push(power, 2 * power, 5 * power);
  const twos = Array.from({ length: 50 }, (_, power) => 2 ** power);
  const y = unit === "bytes"
    ? { incrs: twos, values: (_, splits) => axisBytes(splits) }
    : { values: (_, splits) => splits.map(number) };
  return [
    { ...common, label: xName, labelSize: 20, size: 32, space: 70, incrs: tens,
      values: (_, splits) => splits.map((each) => whole.format(each)) },
    { ...common, size: width < NARROW ? 56 : 68, space: 36, ...y },
  ];
}

const onPaper = () => root.classList.contains("paper");
const heightFor = (width) => (onPaper() ? 230 : Math.round(Math.min(400, Math.max(240, width * 0.46))));

// What both kinds of chart share: pointer, keys, zoom, size.
function plotOf(parts, options, data, { move, tip, resting }) {
  let byKey = null;
  const reset = button(parts, words.whole_run, () => {
    const x = chart.data[0];
    chart.setScale("x", { min: x[0], max: x.at(-1) });
  });
  reset.hidden = true;
  const width = Math.max(200, parts.plot.clientWidth);
  const chart = new uPlot({
    ...options, width, height: heightFor(width), legend: { show: false },
    padding: [10, width < NARROW ? 12 : 28, 0, 0],
    scales: { x: { time: false }, ...options.scales },
    hooks: {
      ...options.hooks,
      setCursor: [(self) => {
        if (self.cursor.left < 0) parts.tip.hidden = true;
        else showTip(self, move(self, byKey));
      }],
      setScale: [(self, key) => {
        const { min, max } = self.scales.x, x = self.data[0];
        if (key === "x") reset.hidden = min == null || (min <= x[0] && max >= x.at(-1));
      }],
    },
  }, data, parts.plot);
  let current = resting;

  function showTip(self, index) {
    current = index;
    const lines = tip(self, index, byKey !== null);
    parts.tip.replaceChildren(...lines.map((line) => element("div", {}, line)));
    parts.tip.hidden = !lines.length;
    const { left, top } = self.cursor, box = self.over.getBoundingClientRect(), own = parts.tip;
    const over = parts.plot.getBoundingClientRect();
    const x = box.left - over.left + left;
    const fits = x + 14 + own.offsetWidth < over.width;
    own.style.left = `${fits ? x + 14 : Math.max(0, x - 14 - own.offsetWidth)}px`;
    own.style.top = `${Math.max(0, Math.min(box.top - over.top + top + 10, over.height - own.offsetHeight))}px`;
    if (byKey !== null) parts.live.textContent = lines.join(", ");
  }

  function go(index) {
    const x = chart.data[0], last = x.length - 1;
    byKey = Math.max(0, Math.min(last, index));
    const { min, max } = chart.scales.x;
    if (x[byKey] < min || x[byKey] > max) chart.setScale("x", { min: x[0], max: x[last] });
    // The scale is set after this turn, and the pointer's place follows from it.
    queueMicrotask(() => {
      chart.setCursor({ left: chart.valToPos(x[byKey], "x"), top: chart.over.clientHeight / 3 });
      byKey = null;
    });
  }

  parts.plot.addEventListener("keydown", (event) => {
    const far = Math.max(1, Math.round(chart.data[0].length / 20));
    const steps = {
      ArrowLeft: current - 1, ArrowRight: current + 1, PageUp: current - far, PageDown: current + far,
      Home: 0, End: chart.data[0].length - 1,
    };
    if (!(event.key in steps) || event.target !== parts.plot) return;
    event.preventDefault();
    go(steps[event.key]);
  });
  return { chart, go };
}
