// Draws every chart of the page, and again where its width or its colours change.
const KINDS = { lines, stack };
const drawn = [...document.querySelectorAll(".chart")].map((host) => ({
  host, id: host.dataset.chart, spec: charts[host.dataset.chart], hidden: new Set(), chart: null,
}));

function draw() {
  for (const each of drawn) {
    each.chart?.destroy();
    each.chart = KINDS[each.spec.kind](each.host, each.id, each.spec, each.hidden);
  }
}

draw();
let width = innerWidth, waiting = 0;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => drawn.forEach(({ chart, host }) => {
    const wide = Math.max(200, host.querySelector(".plot").clientWidth);
    chart.setSize({ width: wide, height: heightFor(wide) });
  }));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("beforeprint", () => {
  root.classList.add("paper");
  draw();
});
addEventListener("afterprint", () => {
  root.classList.remove("paper");
  draw();
});
