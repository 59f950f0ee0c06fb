// The front of a search.
"use strict";

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
        width: 760, height: 480, marginLeft: 60, marginTop: 35, marginBottom: 45, marginRight: 60, grid: true, nice: true, inset: 20, insetLeft: 44,
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
