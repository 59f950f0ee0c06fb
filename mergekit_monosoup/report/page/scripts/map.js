// The map by layer and module.
"use strict";

const OUTSIDE = "outside";
function domainOf(name, values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (name === "relative_update") {
    if (low > 0 && high / low > 20) return { type: "log", domain: [low, high] };
    return { domain: [0, high || 1] };
  }
  if (name === "rounding_share") return { domain: [0, Math.max(high, 1 / 3)] };
  if (name === "edit_survival") return { domain: [Math.min(0, low), Math.max(1, high)] };
  // A hair's breadth must not look like a chasm.
  const missing = Math.max(0, 0.1 - (high - low));
  const start = Math.max(0, Math.min(low - missing / 2, 1 - 0.1));
  return { domain: [start, Math.max(high, start + 0.1)] };
}

function drawMap(name) {
  const metric = data.map[name];
  byId("metric-title").textContent = metric.title;
  const cells = metric.cells.map((cell) => ({ ...cell, layer: cell.layer === null ? OUTSIDE : cell.layer }));
  const layers = [...new Set(cells.map((cell) => cell.layer))].sort((a, b) =>
    a === OUTSIDE ? 1 : b === OUTSIDE ? -1 : a - b
  );
  const inside = (cell) => cell.layer !== OUTSIDE;
  const modules = [...new Set([...cells.filter(inside), ...cells].map((cell) => cell.module))];
  const longest = Math.max(...modules.map((module) => module.length));
  const margin = Math.min(320, 20 + 6.6 * longest);
  const side = Math.max(14, Math.min(56, 900 / layers.length));
  const scale = domainOf(name, cells.map((cell) => cell.value));
  const label = `${metric.name}${scale.type ? " (logarithmic)" : ""}`;
  const chart = draw({
    marginLeft: margin,
    marginBottom: 40,
    width: Math.max(420, margin + 30 + side * layers.length),
    height: 60 + 24 * modules.length,
    x: { label: "layer", domain: layers, tickSize: 0, ticks: layers.filter((l, i) => l === OUTSIDE || layers.length < 30 || i % 5 === 0) },
    y: { label: null, domain: modules, tickSize: 0 },
    color: { ...scale, scheme: "viridis", legend: true, label, tickFormat: metric.share ? ".2~p" : ".2~f" },
    marks: [
      Plot.cell(cells, {
        x: "layer", y: "module", fill: "value", inset: 0.5, className: "clickable",
        title: (cell) => `${cell.module}, layer ${cell.layer}: ${short(cell.value)}`, tip: true,
      }),
      ...(side > 38
        ? [Plot.text(cells, {
            x: "layer", y: "module", text: (cell) => (metric.share ? d3.format(".2~p")(cell.value) : cell.value.toFixed(2)),
            fill: (cell) => cell.value, pointerEvents: "none", fontSize: 10,
          })]
        : []),
    ],
  });
  // Text on a cell: whatever is read on its colour.
  const onCell = chart.scale("color");
  const texts = chart.querySelectorAll("g[aria-label='text'] text");
  texts.forEach((text, i) => {
    text.setAttribute("fill", d3.lab(onCell.apply(cells[i].value)).l > 55 ? "#000" : "#fff");
  });
  chart.addEventListener("click", () => {
    const [cell] = [chart.value].flat();
    if (cell) show(cell.tensor, true);
  });
  put(byId("map-chart"), chart, `${label} by layer (${layers.length}) and module (${modules.length}); the table below has the values`);
  const held = new Map(cells.map((cell) => [`${cell.module}\n${cell.layer}`, cell.value]));
  fill(
    byId("map-table"),
    `${metric.name}: ${metric.title}`,
    ["module", ...layers.map((layer) => (layer === OUTSIDE ? "outside the layers" : `layer ${layer}`))],
    modules.map((module) => [module, ...layers.map((layer) => short(held.get(`${module}\n${layer}`)))])
  );
}
if (data.map) {
  for (const radio of document.querySelectorAll("input[name=metric]")) {
    radio.addEventListener("change", () => drawMap(radio.value));
    if (radio.checked) drawMap(radio.value);
  }
}
