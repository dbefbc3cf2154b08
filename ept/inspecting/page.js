"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

function element(name, text, properties = {}) {
  const made = Object.assign(document.createElement(name), properties);
  made.textContent = text;
  return made;
}

// A table of values from 0 to the highest; `cell(row, column)` gives {value, text, reading, unused} or null.
function drawGrid(key, caption, rows, columns, cell) {
  const place = document.getElementById(key);
  if (!place) return;
  const reading = document.getElementById(key + "-reading");
  const cells = rows.map((_, r) => columns.map((_, c) => cell(r, c)));
  const highest = Math.max(1e-12, ...cells.map((line) => Math.max(0, ...line.map((one) => (one ? one.value : 0)))));
  const table = element("table", "", { className: "grid" });
  table.append(element("caption", caption));
  const head = table.createTHead().insertRow();
  head.append(element("td", ""), ...columns.map((name) => element("th", name, { scope: "col" })));
  const body = table.createTBody();
  cells.forEach((line, r) => {
    const row = body.insertRow();
    row.append(element("th", "\u200e" + rows[r], { scope: "row", title: rows[r] }));
    line.forEach((one, c) => {
      const share = one ? one.value / highest : 0;
      const made = element("td", one ? one.text : "", { tabIndex: -1, className: "heat" });
      if (one) made.title = one.reading;
      made.classList.toggle("none", share === 0);
      made.classList.toggle("unused", Boolean(one && one.unused));
      made.style.setProperty("--v", share.toFixed(3));
      made.dataset.row = r;
      made.dataset.column = c;
      row.append(made);
    });
  });
  const at = (r, c) => body.rows[r] && body.rows[r].cells[c + 1];
  const read = (target) => {
    const one = target && target.dataset.row !== undefined && cells[target.dataset.row][target.dataset.column];
    if (one) reading.textContent = one.reading;
  };
  table.addEventListener("mouseover", (event) => read(event.target.closest("td")));
  table.addEventListener("focusin", (event) => {
    table.querySelectorAll('td[tabindex="0"]').forEach((other) => (other.tabIndex = -1));
    event.target.tabIndex = 0;
    read(event.target);
  });
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  table.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step || event.target.dataset.row === undefined) return;
    const next = at(Number(event.target.dataset.row) + step[0], Number(event.target.dataset.column) + step[1]);
    if (next && next.dataset.row !== undefined) {
      event.preventDefault();
      next.focus();
    }
  });
  if (at(0, 0)) at(0, 0).tabIndex = 0;
  place.replaceChildren(table);
  reading.textContent = "\u00a0";
}

function chosen(name) {
  const radio = document.querySelector(`input[name="${name}"]:checked`);
  return radio ? Number(radio.value) : 0;
}

function drawGates() {
  const layers = data.layers.filter((layer) => layer.labels.length);
  const count = Math.max(0, ...layers.map((layer) => layer.labels.length));
  const alike = layers.every((layer) => String(layer.labels) === String(layers[0].labels));
  const columns = Array.from({ length: count }, (_, c) => (alike ? String(layers[0].labels[c]) : `#${c + 1}`));
  const task = chosen("task");
  const rows = layers.map((layer) => layer.name);
  drawGrid("gate-grid", `Gates of the task ${data.tasks[task]}`, rows, columns, (r, c) => {
    const layer = layers[r];
    if (c >= layer.labels.length) return null;
    const value = layer.gates[task][c];
    const users = data.tasks.filter((_, t) => layer.gates[t][c] > 0);
    const expert = layer.experts[c];
    const rank = expert ? `, effective rank ${expert[0]}, kernel norm ${expert[1]}` : "";
    const used = users.length ? `used by ${users.join(", ")}` : "not used by the tasks shown";
    return {
      value,
      text: value > 0 ? value.toFixed(2) : "\u00b7",
      unused: layer.dead.includes(c),
      reading: `${layer.name}, expert ${c + 1} (${data.kind} ${layer.labels[c]}): weight ${value.toFixed(4)}${rank}; ${used}`,
    };
  });
}

function drawRanks() {
  const layers = data.layers.filter((layer) => layer.updates.length);
  const measure = chosen("measure");
  const place = [2, 1, 0, 3][measure];
  const rows = layers.map((layer) => layer.name);
  drawGrid("rank-grid", "Update of each task", rows, data.tasks, (r, c) => {
    const [rank, stable, entropy, norm] = layers[r].updates[c];
    const value = layers[r].updates[c][place];
    return {
      value,
      text: place === 0 ? String(value) : value.toFixed(place === 3 ? 2 : 1),
      reading: `${layers[r].name}, task ${data.tasks[c]}: rank ${rank}, stable ${stable}, entropy ${entropy}, norm ${norm}`,
    };
  });
}

function sortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  const number = (text) => Number(text.replaceAll(",", ""));
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const compare = (one, two) => {
        const [a, b] = [one, two].map((row) => row.cells[column].textContent);
        const order = Number.isNaN(number(a) + number(b)) ? a.localeCompare(b, "en", { numeric: true }) : number(a) - number(b);
        return down ? -order : order;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    });
  });
}

function filterable(input, table, shown) {
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    const rows = [...table.tBodies[0].rows];
    rows.forEach((row) => (row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted)));
    shown.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  });
}

const table = document.querySelector("table.sortable");
if (table) {
  sortable(table);
  filterable(document.getElementById("filter"), table, document.getElementById("shown"));
}
document.querySelectorAll('input[name="task"]').forEach((radio) => radio.addEventListener("change", drawGates));
document.querySelectorAll('input[name="measure"]').forEach((radio) => radio.addEventListener("change", drawRanks));
drawGates();
drawRanks();
