// What all parts of the page use.
"use strict";

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
