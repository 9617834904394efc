"use strict";
(() => {
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (id) => document.getElementById(id);
const parsed = {};  // each once, and not before it is needed
const data = () => parsed.data ??= JSON.parse(one("data").textContent);
const unpacked = (id) => parsed[id] ??= new Response(new Blob([Uint8Array.from(atob(one(id).textContent), (letter) => letter.charCodeAt())])
  .stream().pipeThrough(new DecompressionStream("gzip"))).json();

/* Makers of elements; children are elements and texts, which are never read as HTML. */
const maker = (namespace) => (tag, attributes = {}, ...children) => {
  const made = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) made.setAttribute(name, value);
  made.append(...children.flat().filter((child) => child != null && child !== ""));
  return made;
};
const make = maker("http://www.w3.org/1999/xhtml"), draw = maker("http://www.w3.org/2000/svg");

/* --- sorting: a column's button sorts, once more turns round; what has no number comes last --- */
function valueOf(row, column) {
  const cell = row.cells[column];
  const text = (cell.dataset.v ?? cell.textContent).trim();
  const number = Number.parseFloat(text.replace("−", "-"));
  return cell.classList.contains("none") ? null : Number.isNaN(number) || cell.classList.contains("text")
    || cell.tagName === "TH" ? text : number;
}
function sort(button) {
  const head = button.closest("th"), table = button.closest("table"), column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
  rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null)
    : (down ? -1 : 1) * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b))));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("[aria-sort] button");
  if (button) sort(button);
});

/* --- filters: by part of a recipe's name, by family, by base --- */
const filters = document.querySelector("form.filters");
const wanted = { name: "", family: "", base: "" };
const fits = (recipe, family) => recipe.toLowerCase().includes(wanted.name) && (!wanted.family || family === wanted.family);
function filter() {
  wanted.name = one("find").value.trim().toLowerCase();
  wanted.family = one("family").value;
  wanted.base = one("base").value;
  for (const subject of all(".subject")) subject.hidden = Boolean(wanted.base) && subject.dataset.base !== wanted.base;
  for (const each of all("[data-recipe]")) {
    const fit = fits(each.dataset.recipe, familyOf[each.dataset.recipe]);
    if (each.closest("svg")) each.classList.toggle("dim", !fit); else each.hidden = !fit;
  }
  for (const each of all(".paper")) each.hidden = Boolean(wanted.family) && wanted.family !== "uncompressed" && each.dataset.family !== wanted.family;
  const recipes = Object.keys(familyOf), shown = recipes.filter((recipe) => fits(recipe, familyOf[recipe])).length;
  one("shown").textContent = shown === recipes.length ? "" : `${shown} of ${recipes.length} recipes`;
  if (historyIsDrawn) {
    if (wanted.base && places()[place.value][1] !== wanted.base) {
      const at = places().findIndex(([, base]) => base === wanted.base);
      if (at >= 0) { place.value = at; listKeys(); }
    }
    drawHistory();
  }
}
const familyOf = Object.fromEntries(all(".card").map((card) => [card.dataset.recipe, card.dataset.family]));
filters.hidden = false;
filters.addEventListener("input", filter);
filters.addEventListener("submit", (event) => event.preventDefault());
if (one("base").options.length < 3) one("base").closest("label").hidden = true;
if (one("family").options.length < 3) one("family").closest("label").hidden = true;

/* --- fronts: one measure of quality at a time --- */
for (const choice of all("fieldset.choice")) {
  const show = () => {
    const chosen = choice.querySelector("input:checked").value;
    for (const charts of all("[data-choice]", choice.parentElement)) charts.hidden = charts.dataset.choice !== chosen;
  };
  choice.hidden = false;
  choice.addEventListener("change", show);
  show();
}

/* --- cards --- */
const head = (label, kind) => make("th", { scope: "col", class: kind, "aria-sort": "none" }, make("button", { type: "button" }, label));
function table(label, heads, lines) {
  return make("div", { class: "scroll", role: "region", "aria-label": label, tabindex: 0 },
    make("table", { class: "sort" }, make("thead", {}, make("tr", {}, heads)), make("tbody", {}, lines)));
}
function verdict(row) {
  const [sign, kind] = data().marks[row.verdict] ?? ["", "mute"];
  return row.verdict ? make("span", { class: `mark ${kind}` }, make("span", { "aria-hidden": "true" }, sign), ` ${row.verdict.replaceAll("_", " ")}`) : "";
}
function metricLine(row) {
  const value = row.text === undefined
    ? make("td", { class: "none" }, row.status.replaceAll("_", " "))
    : make("td", { "data-v": row.value }, row.text, row.status === "estimated" ? " est." : "");
  const apart = row.apart && `difference to the base, item by item: ${row.apart}`;
  const said = [apart, row.reason, row.words].filter(Boolean).join("; ");
  return make("tr", { "data-metric": row.metric },
    make("th", { scope: "row" }, row.metric.split(".")[1].replaceAll("_", " ")),
    value, make("td", { class: "text" }, row.unit), make("td", {}, row.ratio ?? ""),
    make("td", { class: "text" }, verdict(row)),
    make("td", { class: "text wrap params" }, said));
}
const digits = (value) => value == null ? "" : String(Number(value.toPrecision(4)));
function layerLine(layer, most) {
  const error = layer.error == null ? make("td", { class: "none" }, "not said")
    : make("td", { class: "barred", "data-v": layer.error }, digits(layer.error),
      make("span", { class: "bar", style: `width:${(6 * layer.error / most).toFixed(2)}em` }));
  return make("tr", {}, make("th", { scope: "row" }, layer.name.replace("model.layers.", "")),
    make("td", { "data-v": layer.bits }, layer.bits == null ? "" : digits(layer.bits)), error, make("td", { class: "text" }, layer.of ?? ""),
    make("td", { class: "text" }, layer.outcome), make("td", { class: "text wrap params" }, layer.detail));
}
async function fill(card) {
  const inside = card.querySelector(".inside"), { subject, line, recipe: name } = card.dataset;
  if (inside.childElementCount) return;
  const rows = data().subjects[subject].recipes[name];
  const groups = new Map();  // efficiency, quality ...: what was measured with the same parameters stands together
  for (const row of rows) {
    const group = row.metric.split(".")[0], conditions = groups.get(group) ?? groups.set(group, new Map()).get(group);
    conditions.set(row.params ?? "", [...(conditions.get(row.params ?? "") ?? []), row]);
  }
  for (const [group, conditions] of groups) {
    inside.append(make("h4", {}, group));
    for (const [params, alike] of conditions) {
      const heads = [head("Metric", "text"), head("Value"), head("Unit", "text"), head("Ratio"), head("Verdict", "text"), head("In words", "text wrap")];
      inside.append(params && make("h5", {}, params), table(`${name}: ${group} ${params}`, heads, alike.map(metricLine)));
    }
  }
  if (!rows.length) inside.append(make("p", { class: "note" }, "Measured beside the recipes only: its values stand in the overview."));
  const known = (await unpacked("layers"))[subject][line];
  if (known.executed?.length) {
    const steps = known.executed.map((step, i) => step + (known.seconds[i] == null ? "" : ` (${digits(known.seconds[i])} s)`));
    const kernels = Object.entries(known.kernels).map(([kernel, n]) => `${n} x ${kernel}`);
    inside.prepend(make("dl", { class: "facts" },
      make("div", {}, make("dt", {}, "steps"), make("dd", {}, steps.join(", "))),
      kernels.length ? make("div", {}, make("dt", {}, "kernels"), make("dd", {}, kernels.join(", "))) : ""));
  }
  for (const note of known.notes ?? []) inside.prepend(make("p", { class: "note" }, note));
  if (known.layers?.length) {
    const most = Math.max(...known.layers.map((layer) => layer.error ?? 0)) || 1;
    const heads = [head("Layer", "text"), head("Bits per weight"), head("Error"), head("Error of", "text"), head("Outcome", "text"), head("What became of it", "text wrap")];
    inside.append(make("h4", {}, "layers"), table(`${name}: layers`, heads, known.layers.map((layer) => layerLine(layer, most))));
  }
}
for (const card of all(".card")) card.addEventListener("toggle", () => card.open && fill(card));
function opened() {  // a link to a card opens it
  const target = location.hash.length > 1 && one(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") { target.open = true; target.querySelector("summary").focus({ preventScroll: true }); }
}
addEventListener("hashchange", opened);
opened();

/* --- history: drawn when it comes into sight --- */
let historyIsDrawn = false;
const place = one("history-place"), key = one("history-key");
function unpack(text) {  // see `packed` in bench/report/past.py
  const values = [];
  for (const word of text.split(" ")) {
    const count = Number(word.slice(1));
    if (word[0] === "_") for (let i = 0; i < count; i++) values.push(null);
    else if (word[0] === "=") for (let i = 0; i < count; i++) values.push(values[values.length - 1]);
    else values.push(word);
  }
  return values;
}
let past;
function places() {
  const found = [];
  for (const [source, { values }] of Object.entries(past))
    for (const [base, devices] of Object.entries(values))
      for (const device of Object.keys(devices)) found.push([source, base, device]);
  return found;
}
function chart(recipe, values, runs) {
  const known = values.map((text, i) => [i, text]).filter(([, text]) => text !== null);
  const numbers = known.map(([, text]) => Number(text));
  let low = numbers[0], high = numbers[0];
  for (const each of numbers) { low = Math.min(low, each); high = Math.max(high, each); }
  const least = known[numbers.indexOf(low)][1], most = known[numbers.indexOf(high)][1];
  const x = (i) => (4 + 232 * (runs.length > 1 ? i / (runs.length - 1) : .5)).toFixed(1);
  const y = (value) => (high > low ? 56 - 48 * (value - low) / (high - low) : 32).toFixed(1);
  const lines = [];
  known.forEach(([i, text], n) => {
    if (!n || known[n - 1][0] !== i - 1) lines.push([]);
    lines.at(-1).push(`${x(i)},${y(Number(text))}`);
  });
  const [lastPlace, last] = known.at(-1);
  const said = known.length === 1 ? `one run: ${last}` : low === high ? `${last} in all ${known.length} runs`
    : `${known.length} runs, ${least} to ${most}, last ${last}`;
  const parts = lines.map((points) => points.length > 1 ? draw("polyline", { class: "line", points: points.join(" ") })
    : draw("circle", { class: "last", r: 1.5, cx: points[0].split(",")[0], cy: points[0].split(",")[1] }));
  const svg = draw("svg", { viewBox: "0 0 240 64", role: "img", "aria-label": `${recipe}: ${said}` },
    draw("line", { class: "grid", x1: 4, x2: 236, y1: 60, y2: 60 }), parts,
    draw("circle", { class: "last", r: 3, cx: x(lastPlace), cy: y(Number(last)) }));
  const more = make("details", {}, make("summary", {}, said));
  more.addEventListener("toggle", () => {
    if (more.open && more.childElementCount === 1) more.append(table(`${recipe}, run by run`, [head("Run", "text"), head("Value")],
      known.map(([i, text]) => make("tr", {}, make("th", { scope: "row", title: runs[i].run }, `${runs[i].time} ${runs[i].commit ?? ""}`), make("td", {}, text)))));
  });
  return make("figure", { "data-series": recipe, "data-family": familyOf[recipe] }, make("figcaption", {}, recipe), svg, more);
}
function chosen() {
  const [source, base, device] = places()[place.value] ?? [];
  return source ? { runs: past[source].runs, recipes: past[source].values[base][device] } : { runs: [], recipes: {} };
}
function listKeys() {
  const before = key.value;
  const keys = [...new Set(Object.values(chosen().recipes).flatMap(Object.keys))].sort();
  key.replaceChildren(...keys.map((each) => make("option", { value: each }, each)));
  key.value = keys.includes(before) ? before : keys.find((each) => each.startsWith("quality.perplexity")) ?? keys[0];
}
function drawHistory() {
  const { runs, recipes } = chosen(), charts = [];
  for (const [recipe, series] of Object.entries(recipes))
    if (series[key.value] && fits(recipe, familyOf[recipe] ?? "")) charts.push(chart(recipe, unpack(series[key.value]), runs));
  one("history-charts").replaceChildren(...charts);
  one("history-runs").textContent = charts.length ? `From ${runs[0].time} (left) to ${runs.at(-1).time} (right), one place for each run.` : "No recipe with this metric is shown.";
  historyIsDrawn = true;
}
async function startHistory() {
  if (past) return;
  past = await unpacked("past");
  place.replaceChildren(...places().map(([source, base, device], i) => make("option", { value: i }, `${base} on ${device}${source === "journal" ? "" : `, ${source}`}`)));
  listKeys();
  drawHistory();
  document.querySelector(".history-choice").hidden = false;
  place.addEventListener("change", () => { listKeys(); drawHistory(); });
  key.addEventListener("change", drawHistory);
}
new IntersectionObserver((seen, observer) => {
  if (seen.some((each) => each.isIntersecting)) { observer.disconnect(); startHistory(); }
}, { rootMargin: "400px" }).observe(one("history"));
addEventListener("beforeprint", startHistory);
})();
