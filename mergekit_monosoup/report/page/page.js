"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  byId("no-script").hidden = true;
  const data = JSON.parse(document.getElementById("data").textContent);
  const short = (value) => (value === null || value === undefined ? "" : Number(value.toPrecision(4)).toString());

  const draw = (options) => Plot.plot({ ...options, style: { fontSize: "12px" } });

  // Charts are pictures to a screen reader; what they show is in the table below each.
  function put(holder, chart, label) {
    const figure = chart.matches("svg") ? chart : [...chart.children].filter((child) => child.matches("svg")).pop();
    for (const legend of chart.querySelectorAll("svg")) legend.setAttribute("aria-hidden", "true");
    figure.removeAttribute("aria-hidden");
    figure.setAttribute("role", "img");
    figure.setAttribute("aria-label", label);
    // Plot labels groups of marks, which have no role to be read out.
    for (const group of chart.querySelectorAll("g[aria-label]")) {
      group.classList.add(`mark-${group.getAttribute("aria-label").replace(/\W+/g, "-")}`);
      group.removeAttribute("aria-label");
    }
    holder.replaceChildren(chart);
  }

  function fill(holder, caption, heads, rows, textual = 1) {
    const table = document.createElement("table");
    table.createCaption().textContent = caption;
    const head = table.createTHead().insertRow();
    const cell = (row, tag, text, scope, left) => {
      const made = document.createElement(tag);
      made.textContent = text;
      if (scope) made.scope = scope;
      if (left) made.className = "text";
      row.append(made);
    };
    heads.forEach((text, i) => cell(head, "th", text, "col", i < textual));
    const body = table.createTBody();
    for (const values of rows) {
      const row = body.insertRow();
      values.forEach((text, i) => cell(row, i ? "td" : "th", text, i ? "" : "row", i < textual));
    }
    holder.replaceChildren(table);
  }

  // ---- the table of tensors
  const table = byId("table");
  const body = table && table.tBodies[0];
  const rows = [...(body ? body.rows : [])].map((element, i) => ({
    element,
    values: data.values[i],
    groups: data.groups[i],
    name: data.values[i][0],
  }));
  const headings = table ? [...table.tHead.rows[0].cells] : [];
  const collator = new Intl.Collator("en", { numeric: true });

  function sortBy(column) {
    const before = headings[column].getAttribute("aria-sort");
    const numbers = headings[column].classList.contains("number");
    // Numbers: the largest first, which is what one looks for.
    const descending = before === null ? numbers : before === "ascending";
    headings.forEach((heading) => heading.removeAttribute("aria-sort"));
    headings[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
    const sign = descending ? -1 : 1;
    rows.sort((a, b) => {
      const [x, y] = [a.values[column], b.values[column]];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (typeof x === "number" && typeof y === "number" ? x - y : collator.compare(x, y));
    });
    body.append(...rows.map((row) => row.element));
  }
  headings.forEach((heading, i) => heading.firstElementChild.addEventListener("click", () => sortBy(i)));

  const search = byId("search");
  const group = byId("group");
  function filter() {
    const part = search.value.toLowerCase();
    const only = group ? group.value : "";
    let count = 0;
    for (const row of rows) {
      const shown = row.name.toLowerCase().includes(part) && (!only || row.groups.includes(only));
      row.element.hidden = !shown;
      count += shown;
    }
    byId("count").textContent = count === rows.length ? `${count} tensors` : `${count} of ${rows.length} tensors`;
  }
  if (search) {
    search.addEventListener("input", filter);
    search.form.addEventListener("submit", (event) => event.preventDefault());
    // The fields are empty once all who listen have heard.
    search.form.addEventListener("reset", () => setTimeout(filter));
  }
  if (group) group.addEventListener("change", filter);
  for (const link of document.querySelectorAll("a[data-group]")) {
    link.addEventListener("click", () => {
      search.value = "";
      group.value = link.dataset.group;
      filter();
    });
  }

  // ---- the map by layer and module
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

  // ---- the spectrum of one tensor
  function show(name, chosen) {
    const spectrum = data.spectra && data.spectra[name];
    if (!spectrum) return;
    byId("spectrum-of").value = name;
    for (const row of rows) row.element.classList.toggle("chosen", row.name === name);
    const points = spectrum.i.map((i, n) => ({ i, s: spectrum.s[n], e: spectrum.e[n] }));
    const splits = spectrum.splits.filter((split) => split.k >= 1);
    const named = (split) => `${split.name}: k = ${short(split.k)}`;
    const ours = { stroke: "var(--mark)" };
    const dash = (split) => (split.name === "split" ? "none" : "5 4");
    const step = (n) => 12 + 15 * n;
    // `x` places a split, `share` says how far to the right that is.
    const marks = (x, share) => splits.flatMap((split, n) => [
      Plot.ruleX([x(split)], { ...ours, strokeDasharray: dash(split) }),
      Plot.text([named(split)], {
        x: x(split), frameAnchor: "bottom", dy: -step(n), fill: "var(--mark)", stroke: "var(--paper)", strokeWidth: 4,
        // On the side that has room.
        ...(share(split) > 0.5 ? { dx: -4, textAnchor: "end" } : { dx: 4, textAnchor: "start" }),
      }),
    ]);
    const [width, wide] = [520, spectrum.r > 20];
    const positive = points.filter((point) => point.s > 0);
    put(
      byId("spectrum-values"),
      draw({
        width, height: 320, marginLeft: 50, marginBottom: 40,
        x: { type: wide ? "log" : "linear", label: "index i", domain: [1, Math.max(2, spectrum.r)], grid: true, ticks: 5, tickFormat: "~s" },
        y: { type: "log", label: "s_i / s_1", grid: true, ticks: 5, tickFormat: "~g", domain: [Math.min(0.5, ...positive.map((point) => point.s)), 1] },
        marks: [Plot.line(positive, { x: "i", y: "s", strokeWidth: 2, tip: true }), ...marks((split) => split.k, (split) => (wide ? Math.log(split.k) / Math.log(spectrum.r) : split.k / spectrum.r))],
      }),
      `Singular values of ${name}`
    );
    put(
      byId("spectrum-energy"),
      draw({
        width, height: 320, marginLeft: 50, marginBottom: 40,
        x: { label: "rank kept, k / r", domain: [0, 1], grid: true, tickFormat: ".0%" },
        y: { label: "energy kept, P_k", domain: [0, 1], grid: true, tickFormat: ".0%" },
        marks: [
          Plot.line([{ i: 0, e: 0 }, ...points], { x: (point) => point.i / spectrum.r, y: "e", strokeWidth: 2, tip: true }),
          ...marks((split) => split.k / spectrum.r, (split) => split.k / spectrum.r),
        ],
      }),
      `Energy kept against rank in ${name}`
    );
    const said = splits.map((split) =>
      `${named(split)} of r = ${spectrum.r}` +
      (split.p_k === null ? "" : `, P_k = ${short(split.p_k)}`) +
      (split.lambda_high === null ? "" : `, λ_high = ${short(split.lambda_high)}`)
    );
    byId("spectrum-said").textContent =
      `${name}: ${said.join("; ") || "no split"}.` +
      (spectrum.matrices > 1 ? ` The first of its ${spectrum.matrices} matrices; k is their mean.` : "");
    fill(byId("spectrum-table"), name, ["i", "s_i / s_1", "energy up to i"], points.map((p) => [p.i, short(p.s), short(p.e)]));
    if (chosen) byId("spectra").scrollIntoView({ block: "nearest" });
  }
  if (data.spectra) {
    const select = byId("spectrum-of");
    select.addEventListener("change", () => show(select.value));
    for (const row of rows) {
      if (!data.spectra[row.name]) continue;
      row.element.classList.add("has-spectrum");
      row.element.addEventListener("click", () => show(row.name, true));
    }
    show(select.value);
  }

  // ---- several checkpoints
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

  // ---- the front of a search
  if (data.front) {
    const { scores, trials } = data.front;
    const direction = (score) => `${score.name} (${score.lower_is_better ? "lower" : "higher"} is better)`;
    if (scores.length > 1) {
      const points = trials
        .filter((trial) => trial.scores[0] !== null && trial.scores[1] !== null)
        .map((trial) => ({ ...trial, x: trial.scores[0], y: trial.scores[1] }));
      const ends = points.filter((trial) => trial.wise_ft === 0 || trial.wise_ft === 1);
      const plain = points.filter((trial) => trial.wise_ft !== null).sort((a, b) => a.wise_ft - b.wise_ft);
      const at = { x: "x", y: "y" };
      put(
        byId("front-chart"),
        draw({
          width: 760, height: 480, marginLeft: 60, marginTop: 35, marginBottom: 45, marginRight: 60, grid: true, nice: true, inset: 20,
          x: { label: direction(scores[0]) }, y: { label: direction(scores[1]) },
          color: { scheme: "observable10" }, symbol: { legend: true },
          marks: [
            Plot.line(plain, { ...at, stroke: "currentColor", strokeOpacity: 0.45 }),
            Plot.dot(points, { ...at, fill: "kind", symbol: "kind", r: 4.5, title: (trial) => `${trial.name}\n${short(trial.x)}, ${short(trial.y)}`, tip: true }),
            Plot.dot(points.filter((trial) => trial.on_front), { ...at, r: 8.5, stroke: "currentColor", fill: "none" }),
            Plot.dot(points.filter((trial) => trial.chosen), { ...at, symbol: "star", r: 10, fill: "var(--mark)", stroke: "var(--paper)" }),
            Plot.text(points.filter((trial) => trial.chosen), { ...at, text: ["chosen"], dy: 18, fill: "var(--mark)", stroke: "var(--paper)", strokeWidth: 4, fontWeight: 600 }),
            Plot.text(ends, { ...at, text: "name", dy: -14, stroke: "var(--paper)", fill: "currentColor", strokeWidth: 4 }),
          ],
        }),
        `Trials by ${scores[0].name} and ${scores[1].name}; the table below has the values`
      );
    }
    const held = [...new Set(trials.flatMap((trial) => Object.keys(trial.holdout)))];
    fill(
      byId("front-table"),
      `Scores of all trials: ${scores.map(direction).join(", ")}`,
      ["trial", "place", ...scores.map((score) => score.name), ...held.map((name) => `${name} (not seen by the search)`)],
      trials.map((trial) => [
        trial.name,
        [trial.chosen ? "chosen" : "", trial.on_front ? "front" : ""].filter(Boolean).join(", "),
        ...trial.scores.map(short),
        ...held.map((name) => short(trial.holdout[name])),
      ]),
      2
    );
  }
})();
