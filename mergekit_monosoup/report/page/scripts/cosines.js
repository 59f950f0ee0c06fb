// How the updates of several checkpoints lie to each other.
"use strict";

if (data.averages) {
  const { names, values } = data.averages;
  const cells = values.flatMap((row, i) => row.map((value, j) => ({ a: names[i], b: names[j], value })));
  const margin = Math.min(260, 20 + 7 * Math.max(...names.map((name) => name.length)));
  const slanted = 25 + 0.65 * margin;
  const dark = (value) => Math.abs(value) > 0.6;
  put(
    byId("averages-chart"),
    draw({
      marginLeft: margin, marginBottom: slanted, width: margin + 60 + 64 * names.length,
      height: slanted + 40 + 44 * names.length,
      x: { domain: names, label: null, tickRotate: -40, tickSize: 0 }, y: { domain: names, label: null, tickSize: 0 },
      color: { type: "diverging", scheme: "RdBu", reverse: true, domain: [-1, 1], legend: true, label: "average cosine" },
      marks: [
        Plot.cell(cells.filter((cell) => cell.value !== null), { x: "b", y: "a", fill: "value", inset: 0.5 }),
        Plot.text(cells, {
          x: "b", y: "a", text: (cell) => (cell.value === null ? "none" : cell.value.toFixed(2)),
          fill: (cell) => (cell.value === null ? "currentColor" : dark(cell.value) ? "#fff" : "#000"),
        }),
      ],
    }),
    "Average cosines of the updates"
  );
  fill(byId("averages-table"), "Average cosine of each pair", ["", ...names], values.map((row, i) => [names[i], ...row.map((value) => (value === null ? "none" : value.toFixed(4)))]));
}
if (data.cosines) {
  const pairs = Object.keys(data.cosines);
  const points = pairs.flatMap((pair) => data.cosines[pair].map((cosine) => ({ pair, cosine })));
  const every = points.map((point) => point.cosine);
  const middle = (d3.min(every) + d3.max(every)) / 2;
  const half = Math.max(0.05, (d3.max(every) - d3.min(every)) / 2 + 0.01);
  const [low, high] = [Math.max(-1, middle - half), Math.min(1, middle + half)];
  const bins = d3.range(31).map((i) => low + (i * (high - low)) / 30);
  const longest = Math.max(...pairs.map((pair) => pair.length));
  put(
    byId("cosines-chart"),
    draw({
      width: 760, height: 60 + 70 * Math.min(pairs.length, 40), marginRight: Math.min(320, 20 + 7 * longest), marginBottom: 40,
      x: { label: "cosine of two updates of one tensor", domain: [low, high] },
      // There are no halves of tensors.
      y: { label: "tensors", ticks: 3, tickFormat: (count) => (Number.isInteger(count) ? count : "") }, fy: { label: null, domain: pairs },
      marks: [Plot.rectY(points, Plot.binX({ y: "count" }, { x: { value: "cosine", thresholds: bins }, fy: "pair", fill: "currentColor", fillOpacity: 0.6 })), Plot.ruleY([0])],
    }),
    "Histogram of the cosines of each pair"
  );
  fill(
    byId("cosines-table"), "Cosines by pair", ["pair", "tensors", "lowest", "median", "highest", "mean"],
    pairs.map((pair) => {
      const held = data.cosines[pair];
      return [pair, held.length, ...[d3.min, d3.median, d3.max, d3.mean].map((of) => short(of(held)))];
    })
  );
}
