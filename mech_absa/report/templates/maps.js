// ---- maps: a table whose cells are coloured by value / limit; one tab stop, then arrow keys

function grid({ columns, rows, rowClass, cell, limit, label, corner, open, room }) {
  const body = make("tbody");
  const every = columns.length > 24 ? 4 : columns.length > 14 ? 2 : 1;
  const head = make("tr", {}, make("th", { scope: "col" }, corner || ""),
    ...columns.map((c, j) => make("th", { scope: "col" }, j % every ? "" : String(c))));
  const cells = [];
  function paint(td, i, j) {
    const { value, marked, chosen } = cell(i, j), most = typeof limit === "function" ? limit() : limit;
    const none = value === null || value === undefined || Number.isNaN(value);
    const strength = none ? 0 : Math.min(1, Math.abs(value) / (most || 1));
    td.className = [none ? "none" : value < 0 ? "neg" : "", marked ? (strength > 0.55 ? "marked strong" : "marked") : "", chosen ? "chosen" : ""].join(" ").trim();
    td.style.setProperty("--v", strength.toFixed(3));
  }
  rows.forEach((name, i) => {
    const line = make("tr", {}, make("th", { scope: "row", class: rowClass ? rowClass(i) : null, title: name }, name));
    cells.push(columns.map((_, j) => {
      const td = make("td", { tabindex: i || j ? -1 : 0 });
      td.dataset.at = i + "," + j;
      paint(td, i, j);
      line.append(td);
      return td;
    }));
    body.append(line);
  });
  const table = make("table", { class: "grid" + (open ? " opens" : ""), "aria-label": label, style: { "--w": cellWidth(columns.length, room) + "px" } }, make("thead", {}, head), body);
  const words = td => { const [i, j] = td.dataset.at.split(",").map(Number); return cell(i, j).text; };
  const show = td => { const text = words(td); td.setAttribute("aria-label", text); say(text, td.getBoundingClientRect()); };
  table.addEventListener("pointerover", e => { const td = e.target.closest("td"); if (td) show(td); });
  table.addEventListener("pointerout", hush);
  table.addEventListener("focusin", e => { const td = e.target.closest("td"); if (td) show(td); });
  table.addEventListener("focusout", hush);
  table.addEventListener("keydown", e => {
    const td = e.target.closest("td");
    if (td && open && (e.key === "Enter" || e.key === " ")) { e.preventDefault(); hush(); open(...td.dataset.at.split(",").map(Number)); return; }
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -1e9], End: [0, 1e9] }[e.key];
    if (!td || !step) return;
    e.preventDefault();
    const [i, j] = td.dataset.at.split(",").map(Number);
    const to = cells[Math.min(rows.length - 1, Math.max(0, i + step[0]))][Math.min(columns.length - 1, Math.max(0, j + step[1]))];
    td.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
  if (open) table.addEventListener("click", e => { const td = e.target.closest("td"); if (td) { hush(); open(...td.dataset.at.split(",").map(Number)); } });
  const box = make("div", { class: "scroll" }, table);
  box.repaint = () => cells.forEach((row, i) => row.forEach((td, j) => paint(td, i, j)));
  return box;
}

// Cells grow with the page: a map of few layers uses the room it has.
function cellWidth(columns, room) {
  const names = innerWidth < 760 ? 112 : 150;
  return Math.max(innerWidth < 760 ? 13 : 16, Math.min(46, Math.floor(((room || 420) - names) / columns) - 1));
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

function siteName(kind, heads, layer, head, place) { return `L${layer}.${kind}${heads ? head : ""}@${place}`; }

function averageMap(kind, by, limit, place, room, open) {
  // Cells: layer, head, place, aie, low, high, p, n, chosen.
  const heads = HEADS.has(kind.kind);
  const at = new Map();
  for (const c of kind.cells) if (!heads || c[2] === place) at.set((heads ? c[1] : c[2]) + "," + c[0], c);
  const rows = heads ? kind.heads.map(String) : kind.places;
  const tested = kind.cells.some(c => c[6] !== null);
  const here = (i, j) => at.get((heads ? kind.heads[i] : i) + "," + kind.layers[j]);
  const name = (i, j) => siteName(kind.kind, heads, kind.layers[j], heads ? kind.heads[i] : -1, kind.places[heads ? place : i]);
  const map = grid({
    columns: kind.layers, rows, corner: heads ? "head" : by, limit, label: "AIE of " + kind.kind, room,
    open: open ? (i, j) => open({ kind: kind.kind, layer: kind.layers[j], head: heads ? kind.heads[i] : -1, place: kind.places[heads ? place : i], name: name(i, j) }) : null,
    cell(i, j) {
      const c = here(i, j);
      if (!c) return { value: null, text: name(i, j) + "\nnot measured" };
      const marked = tested ? c[6] !== null && c[6] < 0.05 : c[4] !== null && c[5] !== null && (c[4] > 0 || c[5] < 0);
      return {
        value: c[3], marked, chosen: c[8] === 1,
        text: `${name(i, j)}${c[8] ? " (selected)" : ""}\nAIE ${number(c[3], 4)} [${number(c[4])}, ${number(c[5])}]\n${c[6] === null ? "no test" : "p " + number(c[6], 2) + " (adjusted)"}, n = ${c[7]}`,
      };
    },
  });
  const file = fileName(`aie-${kind.kind}${heads ? "-" + kind.places[place] : ""}`);
  const table = () => [["kind", "layer", "head", by, "aie", "ci_low", "ci_high", "p_adjusted", "n", "selected"],
    ...kind.cells.filter(c => !heads || c[2] === place).map(c => [kind.kind, c[0], c[1] < 0 ? "" : c[1], kind.places[c[2]], ...c.slice(3)])];
  return make("div", {}, map, make("div", { class: "gets" }, csvButton(file, table), pngButton(file, done => done(pictureOf(map.firstChild, "AIE of " + kind.kind + (heads ? " at " + kind.places[place] : ""))))));
}

function headMaps(kind, by, limit, room, open) {
  const box = make("div");
  const peak = kind.places.map((_, p) => largest(kind.cells.filter(c => c[2] === p)));
  const select = make("select", { "aria-label": "role of the token" });
  kind.places.forEach((p, i) => select.append(make("option", { value: i }, p)));
  select.value = String(peak.indexOf(Math.max(...peak)));
  const draw = () => box.replaceChildren(averageMap(kind, by, limit, Number(select.value), room, open));
  select.addEventListener("change", draw);
  draw();
  return [make("div", { class: "picker" }, make("label", {}, "at ", select)), box];
}

function roomFor(holder, maps) {
  const width = holder.clientWidth || 900;
  return width > 1000 ? (width - 32 * (Math.min(maps, 3) - 1)) / Math.min(maps, 3) : width > 700 && maps > 1 ? (width - 32) / 2 : width;
}

function averages(run, holder, article) {
  const { kinds, by } = run.average;
  const states = kinds.filter(k => !HEADS.has(k.kind));
  const limit = Math.max(...states.map(k => largest(k.cells)), 0);
  const room = roomFor(holder, kinds.length);
  const open = run.examples && run.examples.list.length ? cell => article.dispatchEvent(new CustomEvent("cell", { detail: cell })) : null;
  if (states.length) holder.append(scale(limit, run.unit));
  for (const kind of kinds) {
    const heads = HEADS.has(kind.kind);
    const own = heads ? largest(kind.cells) : limit;
    holder.append(make("div", { class: "map" }, make("h3", {}, kind.kind), make("p", { class: "about" }, KIND_WORDS[kind.kind] || ""),
      ...(heads ? [scale(own, run.unit), ...headMaps(kind, by, own, room, open)] : [averageMap(kind, by, own, undefined, room, open)])));
  }
}

// ---- several traces: side by side on one scale, and the difference of two

function differenceOf(a, b, kind) {
  const x = a.average.kinds.find(k => k.kind === kind), y = b.average.kinds.find(k => k.kind === kind);
  if (!x || !y) return null;
  const key = (k, c) => [c[0], c[1], k.places[c[2]]].join("|");
  const other = new Map(y.cells.map(c => [key(y, c), c]));
  const cells = x.cells.map(c => [c, other.get(key(x, c))]).filter(([, d]) => d && d[3] !== null)
    .map(([c, d]) => [c[0], c[1], c[2], c[3] === null ? null : c[3] - d[3], c, d]);
  return cells.length ? { ...x, cells } : null;
}

function differenceMap(a, b, kind, room) {
  const d = differenceOf(a, b, kind);
  if (!d) return make("p", { class: "soft" }, "These two runs share no cell of this kind.");
  const at = new Map(d.cells.map(c => [c[2] + "," + c[0], c]));
  const limit = largest(d.cells);
  const map = grid({
    columns: d.layers, rows: d.places, corner: a.average.by, limit, label: `difference of ${a.name} and ${b.name}`, room,
    cell(i, j) {
      const c = at.get(i + "," + d.layers[j]);
      const name = siteName(kind, false, d.layers[j], -1, d.places[i]);
      if (!c) return { value: null, text: name + "\nnot in both runs" };
      const apart = c[4][4] !== null && c[5][5] !== null && (c[4][4] > c[5][5] || c[4][5] < c[5][4]);
      return { value: c[3], marked: apart, text: `${name}\n${number(c[3], 4)} = ${number(c[4][3])} − ${number(c[5][3])}\nintervals [${number(c[4][4])}, ${number(c[4][5])}] and [${number(c[5][4])}, ${number(c[5][5])}]${apart ? " do not overlap" : ""}` };
    },
  });
  const file = fileName(`difference-${kind}`);
  const rows = () => [["kind", "layer", "place", "difference", a.name, b.name], ...d.cells.map(c => [kind, c[0], d.places[c[2]], c[3], c[4][3], c[5][3]])];
  return make("div", { class: "map" }, make("h4", {}, `${a.name} − ${b.name}`), make("p", { class: "about" }, "Difference of the averages. A dot marks cells whose two intervals do not overlap."),
    scale(limit, a.unit === b.unit ? a.unit : "(units differ between runs)"), map, make("div", { class: "gets" }, csvButton(file, rows), pngButton(file, done => done(pictureOf(map.firstChild, `${a.name} − ${b.name}: ${kind}`)))));
}

function sideBySide(runs, holder) {
  const traces = runs.filter(r => r.kind === "trace");
  const kinds = [...new Set(traces.flatMap(r => r.average.kinds.map(k => k.kind)))].filter(k => !HEADS.has(k));
  if (!kinds.length) return;
  const select = make("select", { "aria-label": "kind of state" }, ...kinds.map(k => make("option", {}, k)));
  const together = make("input", { type: "checkbox", checked: true });
  const pick = (label, value) => { const s = make("select", { "aria-label": label }, ...traces.map((r, i) => make("option", { value: i }, r.name))); s.value = String(value); return s; };
  const first = pick("first run of the difference", 0), second = pick("run that is subtracted", Math.min(1, traces.length - 1));
  const box = make("div", { class: "maps" }), apart = make("div", { class: "maps" });
  const draw = () => {
    const shown = traces.map(r => [r, r.average.kinds.find(k => k.kind === select.value)]).filter(([, k]) => k);
    const limit = Math.max(...shown.map(([, k]) => largest(k.cells))), room = roomFor(holder, shown.length);
    box.replaceChildren(...(together.checked ? [scale(limit, new Set(shown.map(([r]) => r.unit)).size === 1 ? shown[0][0].unit : "(units differ between runs)")] : []),
      ...shown.map(([r, k]) => {
        const own = together.checked ? limit : largest(k.cells);
        return make("div", { class: "map" }, make("h4", {}, r.name), together.checked ? null : scale(own, r.unit), averageMap(k, r.average.by, own, undefined, room));
      }));
    if (traces.length > 1) apart.replaceChildren(differenceMap(traces[Number(first.value)], traces[Number(second.value)], select.value, room));
    keep("compare.kind", select.value === kinds[0] ? null : select.value);
    keep("compare.a", first.value === "0" ? null : first.value);
    keep("compare.b", second.value === "1" ? null : second.value);
  };
  if (kinds.includes(kept("compare.kind"))) select.value = kept("compare.kind");
  for (const [s, name] of [[first, "compare.a"], [second, "compare.b"]]) if (kept(name) !== null && Number(kept(name)) < traces.length) s.value = kept(name);
  for (const c of [select, together, first, second]) c.addEventListener("change", draw);
  holder.append(make("div", { class: "picker", style: { "flex-basis": "100%" } }, make("label", {}, "state", select), make("label", {}, together, "one scale for all")), box);
  if (traces.length > 1) holder.append(make("div", { class: "picker", style: { "flex-basis": "100%" } }, make("label", {}, "difference of", first), make("label", {}, "minus", second)), apart);
  draw();
}

