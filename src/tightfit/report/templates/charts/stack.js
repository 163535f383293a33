// Memory by category, one on top of the other, with the tensors at each moment.
function stack(host, id, spec, hidden) {
  const parts = frame(host, id);
  const x = [...spec.events, spec.end];
  const rows = spec.rows.map((row) => ({ ...row, y: [...row.y, row.y.at(-1)] }));
  const reserved = spec.reserved && [...spec.reserved, spec.reserved.at(-1)];
  const RESERVED = "reserved";
  let sums = [];

  // Sums from the bottom up; drawn from the highest down, so that each covers the lower part of the one before.
  function stacked() {
    let below = new Array(x.length).fill(0);
    sums = rows.map((row) => {
      if (!hidden.has(row.key)) below = below.map((sum, index) => sum + row.y[index]);
      return below;
    });
    return [x, ...sums.slice().reverse(), ...(reserved ? [reserved] : [])];
  }

  const steps = uPlot.paths.stepped({ align: 1 });
  const data = stacked();
  const series = [{}, ...rows.slice().reverse().map((row) => ({
    label: row.name, fill: colour(row.colour), stroke: colour(row.colour), width: 0.5, paths: steps,
    points: { show: false }, show: !hidden.has(row.key),
  }))];
  if (reserved) {
    series.push({ label: words.reserved, stroke: colour("--ink"), width: 1.25, paths: steps, points: { show: false },
      show: !hidden.has(RESERVED) });
  }
  const legendRows = [...rows.slice().reverse(),
    ...(reserved ? [{ key: RESERVED, name: words.reserved, colour: "--ink", style: "line" }] : [])];
  const outputs = legendOf(parts, legendRows, hidden, () => {
    made.chart.setData(stacked(), false);
    legendRows.forEach((row, index) => made.chart.setSeries(index + 1, { show: !hidden.has(row.key) }));
    made.chart.redraw();
    show(shown, null);
  });

  const total = (at) => (sums.length ? sums.at(-1)[at] : 0);
  const phaseAt = (event) => (spec.phases.findLast(([start]) => start <= event) || ["", "", ""])[2];
  let shown = 0;

  const tensorsAt = (event, key) => {
    const found = [], tensors = spec.tensors;
    for (let index = 0; index < tensors.from.length && tensors.from[index] <= event; index++) {
      const end = tensors.to[index], row = tensors.keys[tensors.category[index]];
      if ((end === null || end > event) && (key ? row === key : !hidden.has(row))) found.push(index);
    }
    return found.sort((a, b) => tensors.bytes[b] - tensors.bytes[a]);
  };

  const nameOf = (key) => rows.find((row) => row.key === key)?.name || key;

  function tensorItem(index) {
    const t = spec.tensors, key = t.keys[t.category[index]];
    const swatch = element("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.setProperty("--swatch", `var(--c-${key.replaceAll(" ", "-")})`);
    const item = element("li", {}, swatch, element("strong", {}, bytes(t.bytes[index])), " ",
      [t.texts[t.what[index]], nameOf(key), t.texts[t.operator[index]]].filter(Boolean).join(" · "));
    if (t.texts[t.place[index]]) item.append(element("br"), element("span", { class: "place" }, t.texts[t.place[index]]));
    if (t.texts[t.source[index]]) item.append(" ", element("code", {}, t.texts[t.source[index]]));
    return item;
  }

  // What is in memory at a moment: in the legend, in the panel, and as lines for the tip.
  function show(at, key) {
    shown = at;
    const event = x[at], phase = phaseAt(event);
    legendRows.forEach((row, index) => {
      outputs[index].textContent = bytes(row.key === RESERVED ? reserved[at] : row.y[at]);
    });
    const where = say("moment", { event: whole.format(event), phase });
    const tensors = tensorsAt(event, key), named = tensors.slice(0, MOST_TENSORS);
    const heading = element("h3", {}, `${where}: ${bytes(total(at))}`);
    const about = key ? say("largest_of", { category: nameOf(key) }) : words.largest;
    parts.panel.replaceChildren(heading, element("p", {}, named.length ? about : words.no_tensor),
      element("ol", {}, ...named.map(tensorItem)));
    const lines = [where, say("total", { bytes: bytes(total(at)) })];
    if (key) {
      lines.push(`${nameOf(key)}: ${bytes(rows.find((row) => row.key === key).y[at])}`);
    }
    if (named.length) {
      const t = spec.tensors, index = named[0];
      lines.push(`${bytes(t.bytes[index])} ${t.texts[t.what[index]]}`, t.texts[t.place[index]]);
    }
    return lines.filter(Boolean);
  }

  // The highest of the moments that share the pointer's few pixels: else a peak of one event could not be met.
  function momentAt(self) {
    const { left } = self.cursor;
    const value = (pixels) => self.posToVal(pixels, "x");
    const from = self.posToIdx(left), low = value(left - 2), high = value(left + 2);
    let best = from;
    for (let index = from; index >= 0 && x[index] >= low; index--) if (total(index) > total(best)) best = index;
    for (let index = from; index < x.length && x[index] <= high; index++) if (total(index) > total(best)) best = index;
    if (best === from && x[from] > value(left) && from > 0) return from - 1;
    return best;
  }

  let under = null;
  const made = plotOf(parts, {
    series, axes: axes("bytes", spec.x_name, parts.plot.clientWidth),
    scales: { y: { range: (_, low, high) => {
      let top = high || 1;
      if (spec.capacity && spec.capacity.bytes <= 2.5 * top) top = Math.max(top, spec.capacity.bytes);
      return [0, top * 1.14];
    } } },
    cursor: { y: false, points: { show: false } },
    hooks: { drawClear: [phaseTints], draw: [overlay] },
  }, data, {
    move: (self, byKey) => {
      const at = byKey ?? momentAt(self);
      const height = self.posToVal(self.cursor.top, "y");
      const row = byKey === null ? rows.find((each, index) => !hidden.has(each.key) && sums[index][at] >= height) : null;
      under = row ? row.key : null;
      return at;
    },
    tip: (_, at) => show(at, under),
    resting: 0,
  });

  function phaseTints(self) {
    const { ctx, bbox } = self;
    ctx.save();
    ctx.globalAlpha = Number(colour("--tint"));
    spec.phases.forEach(([start, slug], index) => {
      const end = index + 1 < spec.phases.length ? spec.phases[index + 1][0] : spec.end;
      const left = Math.max(bbox.left, self.valToPos(start, "x", true));
      const right = Math.min(bbox.left + bbox.width, self.valToPos(end, "x", true));
      ctx.fillStyle = colour(`--p-${slug}`) || "transparent";
      if (right > left) ctx.fillRect(left, bbox.top, right - left, bbox.height);
    });
    ctx.restore();
  }

  function text(ctx, self, label, x0, y0, ink) {
    const ratio = devicePixelRatio, { bbox } = self;
    ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    ctx.textBaseline = "middle";
    ctx.textAlign = "left";
    const width = ctx.measureText(label).width, pad = 4 * ratio;
    const goesRight = x0 + width + 2 * pad < bbox.left + bbox.width;
    const left = goesRight ? x0 + 2 * pad : Math.max(bbox.left, x0 - width - 2 * pad);
    ctx.fillStyle = colour("--paper");
    ctx.globalAlpha = 0.85;
    ctx.fillRect(left - pad, y0 - 9 * ratio, width + 2 * pad, 18 * ratio);
    ctx.globalAlpha = 1;
    ctx.fillStyle = ink;
    ctx.fillText(label, left, y0);
  }

  // Names of phases, the capacity, the failures and the peak, over the areas.
  function overlay(self) {
    const { ctx, bbox } = self, ratio = devicePixelRatio, alarm = colour("--alarm"), ink = colour("--ink");
    const bottom = bbox.top + bbox.height;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.textBaseline = "top";
    ctx.textAlign = "left";
    ctx.font = `${11 * ratio}px system-ui, sans-serif`;
    ctx.fillStyle = colour("--soft");
    spec.phases.forEach(([start, , name], index) => {
      const end = index + 1 < spec.phases.length ? spec.phases[index + 1][0] : spec.end;
      const left = Math.max(bbox.left, self.valToPos(start, "x", true));
      const right = Math.min(bbox.left + bbox.width, self.valToPos(end, "x", true));
      const width = ctx.measureText(name).width;
      if (right - left > width + 6 * ratio) ctx.fillText(name, (left + right - width) / 2, bbox.top + 4 * ratio);
    });
    ctx.lineWidth = 1.5 * ratio;
    ctx.strokeStyle = alarm;
    if (spec.capacity && spec.capacity.bytes <= self.scales.y.max) {
      const y = self.valToPos(spec.capacity.bytes, "y", true);
      ctx.setLineDash([7 * ratio, 4 * ratio]);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      ctx.font = `${12 * ratio}px system-ui, sans-serif`;
      const fits = ctx.measureText(spec.capacity.label).width < bbox.width - 16 * ratio;
      text(ctx, self, fits ? spec.capacity.label : bytes(spec.capacity.bytes), bbox.left, y + 12 * ratio, alarm);
    }
    ctx.setLineDash([2 * ratio, 3 * ratio]);
    for (const each of spec.failures) {
      const px = self.valToPos(each.event, "x", true);
      ctx.beginPath();
      ctx.moveTo(px, bbox.top);
      ctx.lineTo(px, bottom);
      ctx.stroke();
    }
    ctx.setLineDash([]);
    const end = spec.failures.at(-1), at = x.findLastIndex((each) => each <= spec.peak);
    if (spec.failed && end) {
      text(ctx, self, end.label, self.valToPos(end.event, "x", true), bbox.top + bbox.height / 2, alarm);
    } else if (at >= 0 && total(at)) {
      const px = self.valToPos(x[at], "x", true), y = self.valToPos(total(at), "y", true);
      ctx.fillStyle = ink;
      ctx.beginPath();
      ctx.arc(px, y, 3.5 * ratio, 0, 2 * Math.PI);
      ctx.fill();
      text(ctx, self, say("peak", { bytes: bytes(total(at)) }), px, y - 4 * ratio, ink);
    }
    ctx.restore();
  }

  const peak = Math.max(0, x.findLastIndex((each) => each <= spec.mark));
  button(parts, spec.failed ? words.show_failure : words.show_peak, () => made.go(peak));
  if (x.length > 1) show(peak, null);
  return made.chart;
}
