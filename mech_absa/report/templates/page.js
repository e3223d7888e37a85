"use strict";
// Nothing here loads anything, and text from the data is only ever set as text.

const DATA = JSON.parse(document.getElementById("data").textContent);
const ROLE_CLASS = role => role.startsWith("aspect") ? "a" : role.startsWith("query") ? "q" : role === "opinion" ? "o" : role === "template" ? "t" : "";
const HEADS = new Set(["head", "q", "k", "v"]);

// ---- small tools

function make(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") node.className = value;
    else if (key === "style") for (const [name, v] of Object.entries(value)) node.style.setProperty(name, v);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter(c => c !== null && c !== undefined));
  return node;
}

function number(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x === 0) return "0";
  const text = Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5 ? x.toExponential(digits - 1) : String(Number(x.toPrecision(digits)));
  return text.replace("-", "−");
}

function visible(token) {
  return token.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
}

function bare(token) {
  return visible(token).replace(/^[ ▁Ġ]+/, "") || "␣";
}

// ---- theme

const root = document.documentElement;
function theme(name) {
  root.dataset.theme = name;
  document.getElementById("theme").setAttribute("aria-pressed", String(name === "dark"));
}
(function () {
  const asked = new URLSearchParams(location.search).get("theme");
  let kept = null;
  try { kept = localStorage.getItem("mech-absa-theme"); } catch { /* no storage for this page */ }
  const system = matchMedia("(prefers-color-scheme: dark)");
  theme(asked || kept || (system.matches ? "dark" : "light"));
  system.addEventListener("change", e => { if (!asked && !kept) theme(e.matches ? "dark" : "light"); });
  document.getElementById("theme").addEventListener("click", () => {
    kept = root.dataset.theme === "dark" ? "light" : "dark";
    theme(kept);
    try { localStorage.setItem("mech-absa-theme", kept); } catch { /* nor here */ }
  });
  addEventListener("beforeprint", () => { root.dataset.before = root.dataset.theme; theme("light"); });
  addEventListener("afterprint", () => theme(root.dataset.before || "light"));
})();

// ---- what a cell says

const tip = document.getElementById("tip");
function say(text, box) {
  tip.textContent = text;
  tip.hidden = false;
  const own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(6, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 6);
  const above = box.top - own.height - 8;
  tip.style.left = left + "px";
  tip.style.top = (above > 4 ? above : box.bottom + 8) + "px";
}
function hush() { tip.hidden = true; }
addEventListener("scroll", hush, { passive: true });
addEventListener("keydown", e => { if (e.key === "Escape") hush(); });

// ---- maps: a table whose cells are coloured by value / limit; one tab stop, then arrow keys

function grid({ columns, rows, rowClass, cell, limit, label, corner }) {
  const body = make("tbody");
  const every = columns.length > 24 ? 4 : columns.length > 14 ? 2 : 1;
  const head = make("tr", {}, make("th", { scope: "col" }, corner || ""),
    ...columns.map((c, j) => make("th", { scope: "col" }, j % every ? "" : String(c))));
  const cells = [];
  rows.forEach((name, i) => {
    const line = make("tr", {}, make("th", { scope: "row", class: rowClass ? rowClass(i) : null, title: name }, name));
    cells.push(columns.map((_, j) => {
      const { value, sure, chosen } = cell(i, j);
      const none = value === null || value === undefined || Number.isNaN(value);
      const strength = none ? 0 : Math.min(1, Math.abs(value) / (limit || 1));
      const td = make("td", { tabindex: i || j ? -1 : 0, class: [none ? "none" : value < 0 ? "neg" : "", sure ? "sure0" : "", chosen ? "chosen" : ""].join(" ").trim() || null });
      td.style.setProperty("--v", strength.toFixed(3));
      td.dataset.at = i + "," + j;
      line.append(td);
      return td;
    }));
    body.append(line);
  });
  const table = make("table", { class: "grid", "aria-label": label }, make("thead", {}, head), body);
  const words = td => { const [i, j] = td.dataset.at.split(",").map(Number); return cell(i, j).text; };
  const show = td => { const text = words(td); td.setAttribute("aria-label", text); say(text, td.getBoundingClientRect()); };
  table.addEventListener("pointerover", e => { const td = e.target.closest("td"); if (td) show(td); });
  table.addEventListener("pointerout", hush);
  table.addEventListener("focusin", e => { const td = e.target.closest("td"); if (td) show(td); });
  table.addEventListener("focusout", hush);
  table.addEventListener("keydown", e => {
    const td = e.target.closest("td");
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -1e9], End: [0, 1e9] }[e.key];
    if (!td || !step) return;
    e.preventDefault();
    const [i, j] = td.dataset.at.split(",").map(Number);
    const to = cells[Math.min(rows.length - 1, Math.max(0, i + step[0]))][Math.min(columns.length - 1, Math.max(0, j + step[1]))];
    td.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
  return make("div", { class: "scroll" }, table);
}

function scale(limit, unit) {
  return make("div", { class: "scale" }, number(-limit), make("i", { "aria-hidden": "true" }), number(limit), " " + unit);
}

const KIND_WORDS = {
  resid_pre: "residual stream before the layer", resid_mid: "residual stream between attention and MLP", resid_post: "residual stream after the layer",
  attn_out: "attention output", mlp_out: "MLP output", head: "attention heads (z)", q: "queries", k: "keys", v: "values",
};

function largest(cells) {
  return cells.reduce((m, c) => Math.max(m, Math.abs(c[3] ?? 0)), 0) || 1;
}

function averageMap(kind, by, limit, place) {
  // Cells: layer, head, place, aie, low, high, p, n, chosen.
  const heads = HEADS.has(kind.kind);
  const at = new Map();
  for (const c of kind.cells) if (!heads || c[2] === place) at.set((heads ? c[1] : c[2]) + "," + c[0], c);
  const rows = heads ? kind.heads.map(String) : kind.places;
  const key = (i, j) => (heads ? kind.heads[i] : i) + "," + kind.layers[j];
  return grid({
    columns: kind.layers, rows, corner: heads ? "head" : by, limit, label: "AIE of " + kind.kind,
    cell(i, j) {
      const c = at.get(key(i, j));
      const name = `L${kind.layers[j]}.${kind.kind}${heads ? kind.heads[i] : ""}@${kind.places[heads ? place : i]}`;
      if (!c) return { value: null, text: name + "\nnot measured" };
      const covers = c[4] !== null && c[5] !== null && c[4] <= 0 && c[5] >= 0;
      return {
        value: c[3], sure: covers, chosen: c[8] === 1,
        text: `${name}${c[8] ? " (selected)" : ""}\nAIE ${number(c[3], 4)} [${number(c[4])}, ${number(c[5])}]\n${c[6] === null ? "no test: 0 in every pair" : "p " + number(c[6], 2) + " (adjusted)"}, n = ${c[7]}`,
      };
    },
  });
}

function headMaps(kind, by, limit) {
  const box = make("div");
  const peak = kind.places.map((_, p) => largest(kind.cells.filter(c => c[2] === p)));
  const select = make("select", { "aria-label": "role of the token" });
  kind.places.forEach((p, i) => select.append(make("option", { value: i }, p)));
  select.value = String(peak.indexOf(Math.max(...peak)));
  const draw = () => box.replaceChildren(averageMap(kind, by, limit, Number(select.value)));
  select.addEventListener("change", draw);
  draw();
  return [make("div", { class: "picker" }, make("label", {}, "at ", select)), box];
}

function averages(run, holder) {
  const { kinds, by } = run.average;
  const states = kinds.filter(k => !HEADS.has(k.kind));
  const limit = Math.max(...states.map(k => largest(k.cells)), 0);
  if (states.length) holder.append(scale(limit, run.unit));
  for (const kind of kinds) {
    const heads = HEADS.has(kind.kind);
    const own = heads ? largest(kind.cells) : limit;
    holder.append(make("div", { class: "map" }, make("h4", {}, kind.kind), make("p", { class: "about" }, KIND_WORDS[kind.kind] || ""),
      ...(heads ? [scale(own, run.unit), ...headMaps(kind, by, own)] : [averageMap(kind, by, own)])));
  }
}

// ---- single examples

function decoded([step, text], n) {
  const bytes = atob(text);
  return Float64Array.from({ length: bytes.length }, (_, i) => { const b = bytes.charCodeAt(i) << 24 >> 24; return b === -128 ? NaN : b * step; });
}

function exampleBrowser(run, holder) {
  const E = run.examples;
  if (!E.list.length) { holder.append("There are no pairs."); return; }
  const search = make("input", { type: "search", placeholder: "word, aspect or id", "aria-label": "search the examples" });
  const select = make("select", { class: "which", "aria-label": "example" });
  const kind = make("select", { "aria-label": "kind of state" });
  const layer = make("select", { "aria-label": "layer that colours the tokens" }, make("option", { value: "-1" }, "largest over layers"));
  E.kinds.forEach((k, i) => kind.append(make("option", { value: i }, k)));
  E.layers.forEach((l, i) => layer.append(make("option", { value: i }, "layer " + l)));
  const back = make("button", { type: "button", "aria-label": "previous example" }, "←");
  const on = make("button", { type: "button", "aria-label": "next example" }, "→");
  const count = make("span", { class: "soft" });
  const view = make("div", { class: "example" });
  let found = [];

  function list() {
    const asked = search.value.trim().toLowerCase();
    found = E.list.map((e, i) => i).filter(i => !asked || [E.list[i].s, E.list[i].a, E.list[i].id, E.list[i].g].join("\n").toLowerCase().includes(asked));
    select.replaceChildren(...found.map(i => make("option", { value: i }, `${E.list[i].a}: ${E.list[i].g} · ${E.list[i].s.slice(0, 90)}`)));
    count.textContent = `${found.length} of ${E.list.length}`;
    draw();
  }

  function draw() {
    back.disabled = select.selectedIndex <= 0;
    on.disabled = select.selectedIndex >= found.length - 1;
    if (!found.length) { view.replaceChildren(make("p", {}, "No example has that.")); return; }
    const e = E.list[Number(select.value)];
    const width = E.layers.length;
    const values = decoded(e.m[Number(kind.value)]);
    const places = E.byRole ? [...new Set(e.r)].sort((a, b) => a - b) : e.r.map((_, i) => i);
    const rowOf = i => E.byRole ? places.indexOf(e.r[i]) : i;
    const at = (i, j) => values[rowOf(i) * width + j];
    const known = Array.from(values).filter(v => !Number.isNaN(v));
    const limit = known.reduce((m, v) => Math.max(m, Math.abs(v)), 0) || 1;
    const tokens = e.t.map(t => E.words[t]);
    const strongest = i => {
      if (Number(layer.value) >= 0) return at(i, Number(layer.value));
      let best = 0;
      for (let j = 0; j < width; j++) if (Math.abs(at(i, j)) > Math.abs(best)) best = at(i, j);
      return best;
    };
    const spoken = make("div", { class: "tokens" }, ...tokens.map((t, i) => {
      const v = strongest(i);
      const span = make("span", { class: [v < 0 ? "neg" : "", ROLE_CLASS(E.roles[e.r[i]])].join(" ").trim() || null }, visible(t));
      span.style.setProperty("--v", (Number.isNaN(v) ? 0 : Math.abs(v) / limit).toFixed(3));
      const text = `${bare(t)} (${E.roles[e.r[i]]})\n${Number(layer.value) < 0 ? "largest effect" : "effect in layer " + E.layers[Number(layer.value)]}: ${number(v)}` + (e.x && e.x[i] !== e.t[i] ? `\ncorrupted run: ${bare(E.words[e.x[i]])}` : "");
      span.addEventListener("pointerenter", () => say(text, span.getBoundingClientRect()));
      span.addEventListener("pointerleave", hush);
      return span;
    }));
    const map = grid({
      columns: E.layers, rows: tokens.map(bare), rowClass: i => ROLE_CLASS(E.roles[e.r[i]]), limit, label: "effects of one example, token by layer", corner: "token",
      cell: (i, j) => ({ value: at(i, j), text: `${bare(tokens[i])} (${E.roles[e.r[i]]}), layer ${E.layers[j]}\neffect ${number(at(i, j))}` }),
    });
    view.replaceChildren(
      make("div", {}, spoken, make("p", { class: "soft" }, `${e.id}: what is said of `, make("b", {}, e.a), "? gold: ", make("b", {}, e.g)), probabilities(e)),
      make("div", { class: "map" }, make("h4", {}, E.kinds[Number(kind.value)]), make("p", { class: "about" }, KIND_WORDS[E.kinds[Number(kind.value)]] || ""), scale(limit, run.unit), map));
  }

  function probabilities(e) {
    const rows = [];
    const meter = (v, look) => make("span", { class: "meter " + look, style: { "--v": String(Math.max(0, Math.min(1, v || 0))) }, "aria-hidden": "true" });
    E.labels.forEach((label, i) => {
      const gold = label.trim() === e.g ? "gold" : null;
      if (e.pc) rows.push(make("tr", { class: gold }, make("th", { scope: "row" }, label), make("td", {}, "clean"), make("td", { class: "n" }, number(e.pc[i])), make("td", {}, meter(e.pc[i], ""))));
      if (e.px) rows.push(make("tr", { class: gold }, make("th", { scope: "row" }, e.pc ? "" : label), make("td", {}, "corrupted"), make("td", { class: "n" }, number(e.px[i])), make("td", {}, meter(e.px[i], "x"))));
    });
    const table = make("table", { class: "probs" }, make("caption", { class: "soft", style: { "text-align": "left" } }, "Probability of the labels"), make("tbody", {}, ...rows));
    const parts = [rows.length ? table : null];
    if (e.b) {
      const [k, l, h, p, r, patched, effect] = e.b;
      const noun = run.direction === "denoise" ? "Best restored" : "Worst broken";
      const where = `L${l}.${E.kinds[k]}${h >= 0 ? h : ""}@${p >= 0 ? `${E.roles[r]} (${bare(E.words[e.t[p]])})` : E.roles[r]}`;
      const bar = run.metric.startsWith("prob");
      const line = (name, v, look) => make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "n" }, number(v)), make("td", {}, bar ? meter(v, look) : ""));
      parts.push(make("table", { class: "probs" }, make("caption", { class: "soft", style: { "text-align": "left" } }, "Metric: " + run.unit),
        make("tbody", {}, line("clean run", e.c, ""), e.d === null ? null : line("corrupted run", e.d, "x"), line(noun.toLowerCase(), patched, "b"))),
        make("p", {}, `${noun}: `, make("code", {}, where), `, effect ${number(effect)}`));
    }
    return make("div", {}, ...parts);
  }

  const move = step => { select.selectedIndex = Math.min(found.length - 1, Math.max(0, select.selectedIndex + step)); draw(); };
  back.addEventListener("click", () => move(-1));
  on.addEventListener("click", () => move(1));
  for (const c of [select, kind, layer]) c.addEventListener("change", draw);
  search.addEventListener("input", list);
  holder.append(make("div", { class: "picker" }, search, select, back, on, count),
    make("div", { class: "picker" }, make("label", {}, "state", kind), make("label", {}, "colour by", layer)), view);
  list();
}

// ---- answers of an evaluation

function predictionBrowser(run, holder) {
  const P = run.predictions;
  const search = make("input", { type: "search", placeholder: "word, aspect or id", "aria-label": "search the answers" });
  const system = make("select", { "aria-label": "system and data" }, make("option", { value: "-1" }, "all systems"));
  P.systems.forEach((s, i) => system.append(make("option", { value: i }, s)));
  const wrong = make("input", { type: "checkbox" });
  const count = make("span", { class: "soft" });
  const body = make("tbody");
  const more = make("button", { type: "button" }, "more");
  let room = 50;

  function draw() {
    const asked = search.value.trim().toLowerCase();
    const rows = P.rows.filter(r => (Number(system.value) < 0 || r[0] === Number(system.value)) && (!wrong.checked || !r[6])
      && (!asked || [r[1], r[2], r[3], r[4], r[5] || ""].join("\n").toLowerCase().includes(asked)));
    count.textContent = `${rows.length} of ${P.rows.length}`;
    body.replaceChildren(...rows.slice(0, room).map(r => {
      const start = r[2].indexOf(r[3]);
      const words = start < 0 ? [r[2]] : [r[2].slice(0, start), make("mark", {}, r[3]), r[2].slice(start + r[3].length)];
      const shares = P.labels.map((l, i) => r[7][i] === null ? null : `${l} ${number(r[7][i], 2)}`).filter(Boolean).join(", ");
      return make("tr", {}, make("td", {}, ...words, make("div", { class: "soft" }, `${r[1]} · ${P.systems[r[0]]}`)), make("td", {}, r[3]), make("td", {}, r[4]),
        make("td", { class: r[6] ? "ok" : "bad" }, r[5] === null ? "no label" : r[5]), make("td", { class: "soft" }, r[8] ? visible(r[8]) : shares));
    }));
    more.hidden = rows.length <= room;
  }
  more.addEventListener("click", () => { room += 200; draw(); });
  for (const c of [search, system, wrong]) c.addEventListener("input", () => { room = 50; draw(); });
  const head = ["sentence", "aspect", "gold", "answer", "probabilities"].map(h => make("th", { scope: "col" }, h));
  holder.append(make("div", { class: "picker" }, search, system, make("label", {}, wrong, "wrong only"), count),
    make("div", { class: "scroll", tabindex: "0" }, make("table", { class: "answers" }, make("thead", {}, make("tr", {}, ...head)), body)), more);
  draw();
}

// ---- several traces on one scale

function sideBySide(runs, holder) {
  const traces = runs.map((r, i) => [r, i]).filter(([r]) => r.kind === "trace");
  const kinds = [...new Set(traces.flatMap(([r]) => r.average.kinds.map(k => k.kind)))].filter(k => !HEADS.has(k));
  if (!kinds.length) return;
  const select = make("select", { "aria-label": "kind of state" }, ...kinds.map(k => make("option", {}, k)));
  const together = make("input", { type: "checkbox", checked: true });
  const box = make("div", { class: "maps" });
  const draw = () => {
    const shown = traces.map(([r, i]) => [r, i, r.average.kinds.find(k => k.kind === select.value)]).filter(([, , k]) => k);
    const limit = Math.max(...shown.map(([, , k]) => largest(k.cells)));
    box.replaceChildren(...(together.checked ? [scale(limit, new Set(shown.map(([r]) => r.unit)).size === 1 ? shown[0][0].unit : "(units differ between runs)")] : []),
      ...shown.map(([r, i, k]) => {
        const own = together.checked ? limit : largest(k.cells);
        const title = document.querySelector(`#run${i} > h2`);
        return make("div", { class: "map" }, make("h4", {}, title ? title.textContent : "run " + (i + 1)), together.checked ? null : scale(own, r.unit), averageMap(k, r.average.by, own));
      }));
  };
  select.addEventListener("change", draw);
  together.addEventListener("change", draw);
  holder.append(make("div", { class: "picker", style: { "flex-basis": "100%" } }, make("label", {}, "state", select), make("label", {}, together, "one scale for all")), box);
  draw();
}

// ---- begin: what is far down the page is drawn when it comes near; with ?all, and when it is printed, at once

const AT_ONCE = new URLSearchParams(location.search).has("all") || !("IntersectionObserver" in window);

function near(holder, draw) {
  if (AT_ONCE || holder.getBoundingClientRect().top < innerHeight + 600) { draw(); return; }
  let done = false;
  const once = () => { if (!done) { done = true; seen.disconnect(); draw(); } };
  const seen = new IntersectionObserver(entries => { if (entries.some(e => e.isIntersecting)) once(); }, { rootMargin: "600px" });
  seen.observe(holder);
  addEventListener("beforeprint", once);
}

document.querySelectorAll("[data-run]").forEach(article => {
  const run = DATA.runs[Number(article.dataset.run)];
  for (const [name, draw] of [["average", averages], ["examples", exampleBrowser], ["predictions", predictionBrowser]]) {
    const holder = article.querySelector(`[data-${name}]`);
    if (holder) near(holder, () => draw(run, holder));
  }
});
document.querySelectorAll("[data-compare]").forEach(holder => sideBySide(DATA.runs, holder));
root.dataset.ready = "";
