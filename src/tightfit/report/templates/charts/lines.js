// Curves over steps, each perhaps with a band of its lowest and highest values.
function nearest(values, index) {
  for (let away = 0; away < values.length; away++) {
    if (values[index - away] != null) return index - away;
    if (values[index + away] != null) return index + away;
  }
  return null;
}

function lines(host, id, spec, hidden) {
  const parts = frame(host, id);
  const format = FORMAT[spec.unit];
  const data = uPlot.join(spec.series.map((s) => (s.low ? [s.x, s.y, s.low, s.high] : [s.x, s.y])));
  const series = [{}], bands = [], first = [];
  for (const each of spec.series) {
    const ink = colour(each.colour), few = each.x.length <= 40;
    first.push(series.length);
    series.push({
      label: each.name, stroke: ink, width: each.style === "dash" ? 2 : 1.75, spanGaps: true,
      show: !hidden.has(each.key), dash: each.style === "dash" ? [7, 5] : undefined,
      points: { show: each.style !== "dash" && few, size: 5, fill: ink },
      paths: each.style === "dash" ? uPlot.paths.stepped({ align: 1 }) : undefined,
    });
    if (each.low) {
      const edge = { stroke: ink + "70", width: 1, spanGaps: true, points: { show: false }, show: !hidden.has(each.key) };
      series.push({ ...edge }, { ...edge });
      bands.push({ series: [series.length - 1, series.length - 2], fill: ink + "38" });
    }
  }
  const outputs = legendOf(parts, spec.series, hidden, () => {
    spec.series.forEach((each, index) => {
      for (let part = 0; part < (each.low ? 3 : 1); part++) {
        made.chart.setSeries(first[index] + part, { show: !hidden.has(each.key) });
      }
    });
  });
  const value = (index, at) => {
    const each = spec.series[index], place = nearest(data[first[index]], at);
    if (place === null) return "";
    const text = format(data[first[index]][place]);
    if (!each.low) return text;
    return `${text} (${format(data[first[index] + 1][place])} – ${format(data[first[index] + 2][place])})`;
  };
  const show = (at) => {
    outputs.forEach((output, index) => { output.textContent = value(index, at); });
    return [`${spec.x_name} ${whole.format(data[0][at])}`,
      ...spec.series.flatMap((s, i) => (hidden.has(s.key) ? [] : [`${s.name}: ${value(i, at)}`]))];
  };
  const made = plotOf(parts, {
    series, bands, axes: axes(spec.unit, spec.x_name, parts.plot.clientWidth),
    scales: { y: { range: (_, low, high) => rangeOf(spec, low, high) } },
    cursor: {
      y: false, points: { size: 8 },
      dataIdx: (self, index, at) => (index === 0 || at == null ? at : nearest(self.data[index], at) ?? at),
    },
    hooks: { draw: [(self) => marks(self, spec.marks || [])] },
  }, data, {
    move: (self, byKey) => byKey ?? self.posToIdx(self.cursor.left),
    tip: (_, at) => show(at),
    resting: data[0].length - 1,
  });
  show(data[0].length - 1);
  return made.chart;
}

function rangeOf(spec, low, high) {
  if (low == null) return [0, 1];
  if (spec.unit === "number") return uPlot.rangeNum(low, high, 0.08, true);
  return [0, Math.max(high * 1.1, 1)];
}

// Vertical lines where something happened.
function marks(self, found) {
  const { ctx, bbox } = self, ratio = devicePixelRatio;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  ctx.strokeStyle = colour("--alarm");
  ctx.lineWidth = 1.5 * ratio;
  ctx.setLineDash([3 * ratio, 3 * ratio]);
  for (const each of found) {
    const x = self.valToPos(each, "x", true);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}
