// The table of tensors: sorted and filtered.
"use strict";

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
