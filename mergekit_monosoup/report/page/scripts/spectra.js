// The spectrum of one tensor.
"use strict";

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
