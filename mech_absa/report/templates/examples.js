// ---- single examples

function decoded(values) {
  if (values instanceof Float64Array) return values;
  const [step, text] = values;
  const bytes = atob(text);
  return Float64Array.from({ length: bytes.length }, (_, i) => { const b = bytes.charCodeAt(i) << 24 >> 24; return b === -128 ? NaN : b * step; });
}

function placesOf(E, e) { return E.byRole ? [...new Set(e.r)].sort((a, b) => a - b) : e.r.map((_, i) => i); }

// The effect of one example at a cell of the average map: the mean over the tokens of its role.
function effectAt(E, e, cell) {
  const k = E.kinds.indexOf(cell.kind), j = E.layers.indexOf(cell.layer), width = E.layers.length;
  if (k < 0 || j < 0) return NaN;
  const values = decoded(e.m[k]), places = placesOf(E, e);
  const wanted = places.map((p, i) => [E.roles[E.byRole ? p : e.r[p]], i]).filter(([role]) => role === cell.place).map(([, i]) => values[i * width + j]).filter(v => !Number.isNaN(v));
  return wanted.length ? wanted.reduce((a, b) => a + b, 0) / wanted.length : NaN;
}

function meter(v, look) { return make("span", { class: "meter " + look, style: { "--v": String(Math.max(0, Math.min(1, v || 0))) }, "aria-hidden": "true" }); }

function probabilities(run, e) {
  const E = run.examples, rows = [];
  E.labels.forEach((label, i) => {
    const gold = label.trim() === e.g ? "gold" : null;
    if (e.pc) rows.push(make("tr", { class: gold }, make("th", { scope: "row" }, label), make("td", {}, "clean"), make("td", { class: "n" }, number(e.pc[i])), make("td", {}, meter(e.pc[i], ""))));
    if (e.px) rows.push(make("tr", { class: gold }, e.pc ? make("td", {}) : make("th", { scope: "row" }, label), make("td", {}, "corrupted"), make("td", { class: "n" }, number(e.px[i])), make("td", {}, meter(e.px[i], "x"))));
  });
  const caption = words => make("caption", { class: "soft" }, words);
  const parts = [rows.length ? make("table", { class: "probs" }, caption("Probability of the labels"), make("tbody", {}, ...rows)) : null];
  if (e.b) {
    const [k, l, h, p, r, patched, effect] = e.b;
    const noun = run.direction === "denoise" ? "Best restored" : "Worst broken";
    const where = `L${l}.${E.kinds[k]}${h >= 0 ? h : ""}@${p >= 0 ? `${E.roles[r]} (${bare(E.words[e.t[p]])})` : E.roles[r]}`;
    const bar = run.metric.startsWith("prob");
    const line = (name, v, look) => make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "n" }, number(v)), make("td", {}, bar ? meter(v, look) : ""));
    parts.push(make("table", { class: "probs" }, caption("Metric: " + run.unit),
      make("tbody", {}, line("clean run", e.c, ""), e.d === null ? null : line("corrupted run", e.d, "x"), line(noun.toLowerCase(), patched, "b"))),
      make("p", {}, `${noun}: `, make("code", {}, where), `, effect ${number(effect)}`));
  }
  return make("div", {}, ...parts);
}

// The text of the corrupted run, with the tokens that differ marked; noise and ablations leave the text as it is.
function corruptedText(run, e) {
  const E = run.examples, same = i => E.words[e.x[i]].trim() === E.words[e.t[i]].trim();
  if (!e.x) return make("p", { class: "soft" }, "Corrupted run: the same text, " + run.corruption + ".");
  const changed = e.x.map((_, i) => i).filter(i => !same(i)).length;
  const spans = e.x.map((w, i) => {
    if (same(i)) return visible(E.words[e.t[i]]);
    const blank = E.words[e.t[i]] ? /^\s*/.exec(E.words[e.t[i]])[0] : "";
    return make("span", {}, blank, make("mark", { title: `clean run: ${bare(E.words[e.t[i]] || "")}` }, visible(E.words[w]).trim() || "␣"));
  });
  return make("div", {}, make("p", { class: "label" }, `Corrupted run: ${changed} of ${e.x.length} tokens differ`), make("div", { class: "tokens plain" }, ...spans));
}

function tokenText(run, e, layer, kind) {
  const E = run.examples, width = E.layers.length, values = decoded(e.m[kind]), places = placesOf(E, e);
  const rowOf = i => E.byRole ? places.indexOf(e.r[i]) : i;
  const at = (i, j) => values[rowOf(i) * width + j];
  const limit = Array.from(values).reduce((m, v) => Number.isNaN(v) ? m : Math.max(m, Math.abs(v)), 0) || 1;
  const tokens = e.t.map(t => E.words[t]);
  const strongest = i => {
    if (layer >= 0) return at(i, layer);
    let best = 0;
    for (let j = 0; j < width; j++) if (Math.abs(at(i, j)) > Math.abs(best)) best = at(i, j);
    return best;
  };
  const text = make("div", { class: "tokens" }, ...tokens.map((t, i) => {
    const v = strongest(i), differs = e.x && E.words[e.x[i]] !== undefined && E.words[e.x[i]].trim() !== t.trim();
    const span = make("span", { class: [v < 0 ? "neg" : "", differs ? "differs" : "", ROLE_CLASS(E.roles[e.r[i]])].join(" ").trim() || null }, visible(t));
    span.style.setProperty("--v", (Number.isNaN(v) ? 0 : Math.abs(v) / limit).toFixed(3));
    const words = `${bare(t)} (${E.roles[e.r[i]]})\n${layer < 0 ? "largest effect" : "effect in layer " + E.layers[layer]}: ${number(v)}` + (differs ? `\ncorrupted run: ${bare(E.words[e.x[i]])}` : "");
    span.addEventListener("pointerenter", () => say(words, span.getBoundingClientRect()));
    span.addEventListener("pointerleave", hush);
    return span;
  }));
  return { text, at, limit, tokens };
}

// more: what a click opens, and which cell is chosen.
function exampleMap(run, e, kind, parts, room, more) {
  const E = run.examples, name = E.kinds[kind];
  const map = grid({
    columns: E.layers, rows: parts.tokens.map(bare), rowClass: i => ROLE_CLASS(E.roles[e.r[i]]), limit: parts.limit, room,
    label: `${name}: effects of one example, token by layer`, corner: "token", open: more && more.open,
    cell: (i, j) => ({ value: parts.at(i, j), chosen: more ? more.chosen(i, j) : false, text: `${bare(parts.tokens[i])} (${E.roles[e.r[i]]}), layer ${E.layers[j]}\neffect ${number(parts.at(i, j))}` }),
  });
  const file = fileName(`${e.id}-${name}`);
  const rows = () => [["token", "role", ...E.layers.map(l => "layer " + l)], ...parts.tokens.map((t, i) => [bare(t), E.roles[e.r[i]], ...E.layers.map((_, j) => parts.at(i, j))])];
  const ends = () => scale(typeof parts.limit === "function" ? parts.limit() : parts.limit, run.unit);
  let bar = ends();
  const box = make("div", { class: "map" }, make("h3", {}, name), make("p", { class: "about" }, KIND_WORDS[name] || ""), bar, map,
    make("div", { class: "gets" }, csvButton(file, rows), pngButton(file, done => done(pictureOf(map.firstChild, `${e.a}: ${e.g} (${name})`)))));
  box.repaint = () => { const now = ends(); bar.replaceWith(now); bar = now; map.repaint(); };
  return box;
}

function exampleBrowser(run, holder, article) {
  const E = run.examples, id = article.id;
  if (!E.list.length) { holder.append("There are no pairs."); return; }
  const search = make("input", { type: "search", placeholder: "word, aspect or id", "aria-label": "search the examples" });
  const select = make("select", { class: "which", "aria-label": "example" });
  const kind = make("select", { "aria-label": "kind of state" }, ...E.kinds.map((k, i) => make("option", { value: i }, k)));
  const layer = make("select", { "aria-label": "layer that colours the tokens" }, make("option", { value: "-1" }, "largest over layers"),
    ...E.layers.map((l, i) => make("option", { value: i }, "layer " + l)));
  const back = make("button", { type: "button", "aria-label": "previous example" }, "←");
  const on = make("button", { type: "button", "aria-label": "next example" }, "→");
  const slide = make("input", { type: "range", min: 1, value: 1, "aria-label": "slide through the examples" });
  const count = make("span", { class: "soft" }), sorted = make("div", { class: "sorted", hidden: true }), view = make("div", { class: "example" });
  let matches = [], cell = null;

  function list(chosen) {
    const asked = search.value.trim().toLowerCase();
    matches = E.list.map((_, i) => i).filter(i => !asked || [E.list[i].s, E.list[i].a, E.list[i].id, E.list[i].g].join("\n").toLowerCase().includes(asked));
    const size = cell ? E.list.map(e => effectAt(E, e, cell)) : null;
    if (cell) matches = matches.filter(i => !Number.isNaN(size[i])).sort((a, b) => size[b] - size[a]);
    select.replaceChildren(...matches.map(i => make("option", { value: i }, `${cell ? number(size[i], 2) + " · " : ""}${E.list[i].a}: ${E.list[i].g} · ${E.list[i].s.slice(0, 90)}`)));
    if (chosen !== undefined && matches.includes(chosen)) select.value = String(chosen);
    draw();
  }

  function draw() {
    const at = select.selectedIndex;
    back.disabled = at <= 0;
    on.disabled = at >= matches.length - 1;
    slide.max = Math.max(1, matches.length);
    slide.value = at + 1;
    slide.disabled = matches.length < 2;
    count.textContent = matches.length ? `${at + 1} of ${matches.length}${matches.length < E.list.length ? ` (${E.list.length} in all)` : ""}` : `0 of ${E.list.length}`;
    if (!matches.length) { view.replaceChildren(make("p", {}, "No example has that.")); return; }
    const e = E.list[Number(select.value)], k = Number(kind.value);
    const parts = tokenText(run, e, Number(layer.value), k);
    const room = holder.clientWidth > 760 ? holder.clientWidth * 0.5 : holder.clientWidth || 400;
    view.replaceChildren(
      make("div", {}, make("p", { class: "label" }, "Clean run"), parts.text, corruptedText(run, e),
        make("p", { class: "soft" }, `${e.id}: what is said of `, make("b", {}, e.a), "? gold: ", make("b", {}, e.g)), probabilities(run, e)),
      exampleMap(run, e, k, parts, room));
    keep(id + ".ex", matches[0] === Number(select.value) && !search.value && !cell ? null : e.id);
    keep(id + ".kind", k ? E.kinds[k] : null);
    keep(id + ".layer", layer.value === "-1" ? null : String(E.layers[Number(layer.value)]));
    keep(id + ".q", search.value);
    keep(id + ".cell", cell ? cell.name : null);
  }

  function openCell(detail, chosen) {
    cell = detail;
    if (cell) {
      kind.value = String(Math.max(0, E.kinds.indexOf(cell.kind)));
      layer.value = String(E.layers.indexOf(cell.layer));
      search.value = "";
    }
    const clear = make("button", { type: "button", onclick: () => openCell(null) }, "all examples");
    sorted.hidden = !cell;
    sorted.replaceChildren(...(cell ? [make("span", {}, "Sorted by their effect at ", make("code", {}, cell.name), cell.head >= 0 ? " (largest head of the layer)" : "", ", largest first "), clear] : []));
    list(chosen);
  }

  const move = step => { select.selectedIndex = Math.min(matches.length - 1, Math.max(0, select.selectedIndex + step)); draw(); };
  back.addEventListener("click", () => move(-1));
  on.addEventListener("click", () => move(1));
  slide.addEventListener("input", () => { select.selectedIndex = Number(slide.value) - 1; draw(); });
  for (const c of [select, kind, layer]) c.addEventListener("change", draw);
  search.addEventListener("input", () => list());
  holder.append(make("div", { class: "picker" }, search, select, back, slide, on, count), sorted,
    make("div", { class: "picker" }, make("label", {}, "state", kind), make("label", {}, "colour by", layer)), view);
  const wanted = kept(id + ".ex"), named = cellNamed(run, kept(id + ".cell"));
  if (E.kinds.includes(kept(id + ".kind"))) kind.value = String(E.kinds.indexOf(kept(id + ".kind")));
  if (kept(id + ".layer") !== null && E.layers.includes(Number(kept(id + ".layer")))) layer.value = String(E.layers.indexOf(Number(kept(id + ".layer"))));
  search.value = kept(id + ".q") || "";
  const start = wanted === null ? undefined : E.list.findIndex(e => e.id === wanted);
  if (named) openCell(named, start); else list(start);
  return detail => { openCell(detail); holder.closest("section").scrollIntoView({ block: "start" }); };
}

function cellNamed(run, name) {
  if (!name) return null;
  for (const k of run.average.kinds) for (const c of k.cells) {
    if (siteName(k.kind, HEADS.has(k.kind), c[0], c[1], k.places[c[2]]) === name) return { kind: k.kind, layer: c[0], head: HEADS.has(k.kind) ? c[1] : -1, place: k.places[c[2]], name };
  }
  return null;
}

