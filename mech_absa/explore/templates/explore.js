// ---- the explorer: the state of the page, what the server is asked, and what is drawn from its answers

const $ = id => document.getElementById(id);
const TEXTS = ["sentence", "aspect", "gold", "edited", "other", "foil", "scale", "draws", "span", "metric", "direction", "epochs", "examples", "layer"];
const NUMBERS = ["scale", "draws", "epochs", "examples"];
const DEFAULTS = { start: "-1", gold: "auto", corruption: "edit", foil: "auto", scale: "3.0", draws: "4", span: "all", kinds: "resid_post,attn_out,mlp_out", metric: "prob", direction: "denoise", seed: "0", epochs: "4", examples: "200", layer: "-1" };
const CLIENT = Array.from(crypto.getRandomValues(new Uint8Array(12)), b => b.toString(16).padStart(2, "0")).join("");
const get = name => kept(name) ?? DEFAULTS[name] ?? "";
const set = (name, value) => keep(name, value === DEFAULTS[name] ? null : value);

function state(more) { return { ...Object.fromEntries(STATE), ...more }; }

async function ask(path, body, signal) {
  const send = () => fetch(path, {
    method: "POST", signal, headers: { "content-type": "application/json", authorization: "Bearer " + DATA.token },
    body: JSON.stringify({ client: CLIENT, ...body }),
  });
  // A connection that was idle may be closed at the moment it is used again: the second try opens a new one.
  const answer = await send().catch(error => { if (error.name === "AbortError") throw error; return send(); })
    .catch(error => { throw error.name === "AbortError" ? error : new Error("the explorer does not answer; is it still running?"); });
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
    throw new Error(told.error);
  }
  return answer;
}

// Server-sent events of a POST: calls told[name](data) for each; ends when the server does.
async function follow(path, body, signal, told) {
  const reader = (await ask(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const name = /^event: (.*)$/m.exec(part), data = /^data: (.*)$/m.exec(part);
      if (name && told[name[1]]) told[name[1]](JSON.parse(data[1]));
    }
  }
}

function problem(text) { $("problem").textContent = text || ""; $("problem").hidden = !text; }

// ---- the form and the address hold the same state

function fillForm() {
  for (const name of TEXTS) $(name).value = get(name);
  for (const box of document.querySelectorAll("[name=corruption]")) box.checked = box.value === get("corruption");
  const kinds = get("kinds").split(",");
  for (const box of document.querySelectorAll("[name=kinds]")) box.checked = kinds.includes(box.value);
  for (const part of document.querySelectorAll("[data-for]")) part.hidden = !part.dataset.for.split(" ").includes(get("corruption"));
  drawSites();
}

function readForm() {
  for (const name of TEXTS) if (!NUMBERS.includes(name) || $(name).value !== "") set(name, $(name).value);
  set("corruption", document.querySelector("[name=corruption]:checked").value);
  const kinds = [...document.querySelectorAll("[name=kinds]:checked")].map(b => b.value).join(",");
  if (kinds) set("kinds", kinds); else fillForm();
  for (const part of document.querySelectorAll("[data-for]")) part.hidden = !part.dataset.for.split(" ").includes(get("corruption"));
}

function options(select, pairs) { select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text))); }

function startForm() {
  const polarities = DATA.polarities.map(p => [p, p]);
  options($("gold"), [["auto", "the model's own"], ...polarities]);
  options($("foil"), [["auto", "the model's best other"], ...polarities]);
  options($("metric"), Object.entries(DATA.metrics));
  options($("layer"), [["-1", "hidden"], ...Array.from({ length: DATA.layers }, (_, i) => [i, "layer " + i])]);
  $("layer").addEventListener("change", () => { set("layer", $("layer").value); patterns(); });
  options($("pick"), [["", "your own"], ...DATA.reviews.map((r, i) => [i, `${r.aspect}: ${r.gold} · ${r.sentence.slice(0, 90)}`])]);
  $("pick").addEventListener("change", () => {
    const r = DATA.reviews[Number($("pick").value)];
    if (!r || $("pick").value === "") return;
    for (const [name, value] of Object.entries({ sentence: r.sentence, aspect: r.aspect, start: String(r.start), gold: r.gold, edited: r.edited || r.sentence, other: "", foil: null, cell: null })) set(name, value);
    if (!r.edited && get("corruption") === "edit") set("corruption", "noise");
    fillForm();
    changed();
  });
  $("mark").addEventListener("click", () => {
    const box = $("sentence"), words = box.value.slice(box.selectionStart, box.selectionEnd), lead = words.length - words.trimStart().length;
    if (!words.trim()) { problem("select words of the review first, then mark them"); box.focus(); return; }
    $("aspect").value = words.trim();
    set("start", String(box.selectionStart + lead));
    $("aspect").dispatchEvent(new Event("input", { bubbles: true }));
  });
  $("sentence").addEventListener("input", () => {
    const before = get("sentence");
    if (!get("edited") || get("edited") === before) $("edited").value = $("sentence").value;
    $("pick").value = "";
  });
  $("aspect").addEventListener("input", e => { if (e.isTrusted) set("start", null); });
  let timer = 0;
  document.querySelectorAll("#review .form, #corrupted .form, #trace .form, #epochs, #examples").forEach(form => form.addEventListener("input", e => {
    if (e.target === $("pick")) return;
    readForm();
    clearTimeout(timer);
    timer = setTimeout(changed, 200);
  }));
  document.addEventListener("keydown", e => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); trace(); } });
  $("go").addEventListener("click", trace);
  $("stop").addEventListener("click", () => { if (running) running.abort(); });
  $("add").addEventListener("click", () => addSites([$("site").value.trim()]));
  $("site").addEventListener("keydown", e => { if (e.key === "Enter" && !e.ctrlKey) { e.preventDefault(); addSites([$("site").value.trim()]); } });
  $("rule").addEventListener("click", ruled);
  $("train").addEventListener("click", train);
  $("halt").addEventListener("click", () => { if (running) running.abort(); });
  fillForm();
}

// ---- the two runs, at once

let seen = null, asking = 0;

function example(s) {
  // One review as the report's views take it.
  const words = [...new Set([...s.tokens, ...(s.other || [])])], number = new Map(words.map((w, i) => [w, i]));
  const roles = [...new Set(s.roles)];
  const E = { kinds: [], layers: Array.from({ length: DATA.layers }, (_, i) => i), byRole: false, roles, labels: DATA.labels, words, list: [] };
  const same = s.other && s.other.length === s.tokens.length;
  const e = { id: "review", s: get("sentence"), a: get("aspect"), g: s.gold, t: s.tokens.map(w => number.get(w)), r: s.roles.map(r => roles.indexOf(r)), pc: s.clean, px: s.corrupted, x: same ? s.other.map(w => number.get(w)) : null, c: null, d: null, b: null, m: [] };
  E.list.push(e);
  return { run: { kind: "trace", name: DATA.model, unit: DATA.metrics[get("metric")], metric: get("metric"), direction: get("direction"), corruption: get("corruption") === "noise" ? `noise of ${get("scale")} standard deviations` : "other words", examples: E }, e };
}

function plainTokens(e, E) {
  return make("div", { class: "tokens" }, ...e.t.map((t, i) => make("span", { class: ROLE_CLASS(E.roles[e.r[i]]) || null, title: E.roles[e.r[i]], style: { "--v": "0" } }, visible(E.words[t]))));
}

function shares(title, labels, values, gold, look) {
  return make("table", { class: "probs" }, make("caption", { class: "soft" }, title), make("tbody", {}, ...labels.map((label, i) => make("tr", { class: DATA.polarities[i] === gold ? "gold" : null },
    make("th", { scope: "row" }, label), make("td", { class: "n" }, number(values[i])), make("td", {}, meter(values[i], look))))));
}

function aligned(s) {
  const differs = i => s.other[i] === undefined || s.tokens[i] === undefined || s.other[i].trim() !== s.tokens[i].trim();
  const n = Math.max(s.tokens.length, s.other.length), at = Array.from({ length: n }, (_, i) => i);
  const line = (name, words) => make("tr", {}, make("th", { scope: "row" }, name), ...at.map(i => make("td", { class: differs(i) ? "differs" : null }, words[i] === undefined ? "" : bare(words[i]))));
  return make("details", { open: s.problem !== "" }, make("summary", {}, "Alignment, token by token"), make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "alignment of both runs" }, make("table", { class: "aligned" }, make("tbody", {},
    make("tr", {}, make("th", { scope: "row" }, "token"), ...at.map(i => make("td", { class: "soft" }, String(i)))), line("clean", s.tokens), line("corrupted", s.other)))));
}

async function changed() {
  const turn = ++asking;
  if (!get("sentence").trim() || !get("aspect").trim()) { $("clean").replaceChildren(make("p", { class: "soft" }, get("sentence").trim() ? "Mark the aspect: words of the review." : "No review yet.")); $("pair").replaceChildren(); seen = null; enable(); return; }
  try {
    const s = await (await ask("api/look", { state: state() })).json();
    if (turn !== asking) return;
    problem("");
    seen = s;
    const { run, e } = example(s);
    $("clean").replaceChildren(make("p", { class: "label" }, "As the model reads it"), plainTokens(e, run.examples),
      shares(`Clean run; right: ${s.gold}`, DATA.labels, s.clean, s.gold, ""), ...(s.edited ? [shares("Clean run with the edit", DATA.labels, s.edited, s.gold, "b")] : []));
    $("pair").replaceChildren(...(s.problem ? [make("p", { class: "note" }, s.problem)] : []), ...(s.other && s.corrupted ? [corruptedText(run, e)] : []),
      ...(s.corrupted ? [shares("Corrupted run" + (s.foil ? `; right: ${s.foil}` : ", mean of the draws"), DATA.labels, s.corrupted, s.foil, "x")] : []), ...(s.other ? [aligned(s)] : []));
  } catch (error) {
    if (turn !== asking) return;
    seen = null;
    problem(error.message);
  }
  enable();
  patterns();
  if (traced) recipe();
}

// ---- attention, by CircuitsVis, in a frame of its own that can reach nothing

let framed = "";

function patterns() {
  const layer = get("layer"), link = new URLSearchParams({ sentence: get("sentence"), aspect: get("aspect"), start: get("start"), gold: get("gold"), layer });
  const wanted = layer === "-1" || !seen ? "" : link.toString();
  if (wanted === framed) return;
  framed = wanted;
  $("patterns").replaceChildren(...(wanted ? [make("iframe", { title: `attention of layer ${layer}`, sandbox: "allow-scripts", src: "attention?" + new URLSearchParams({ token: DATA.token, state: wanted }) })] : []));
}

// ---- the map

let running = null, busy = "", traced = null;

function enable() {
  $("go").disabled = Boolean(running) || !seen || seen.problem !== "";
  $("stop").disabled = !running || busy !== "trace";
  $("rule").disabled = Boolean(running);
  $("train").disabled = Boolean(running) || !kept("sites");
  $("halt").disabled = !running || busy === "trace";
}

// A long job: one at a time; told answers its events. Returns "stopped", "failed" or "done".
async function long(what, path, body, told) {
  running = new AbortController();
  busy = what;
  enable();
  problem("");
  let outcome = "stopped";
  try {
    await follow(path, body, running.signal, { ...told, error: d => { outcome = "failed"; problem(d.sentence); } });
    if (outcome !== "failed") outcome = "done";
  } catch (error) { if (error.name !== "AbortError") { outcome = "failed"; problem(error.message); } }
  running.abort();  // a page that failed leaves no job behind
  running = null;
  busy = "";
  enable();
  return outcome;
}

function empty(start, s) {
  const kinds = [...new Set(start.components.map(c => c[0]))], ways = get("direction") === "both" ? ["denoise", "noise"] : [get("direction")];
  const at = new Map(start.components.map(([kind, layer, head], i) => [`${kind}|${layer}|${head}`, i])), n = s.tokens.length;
  const fresh = () => Object.fromEntries(ways.map(w => [w, new Float64Array(start.components.length * n).fill(NaN)]));
  return { ...example(s), s, state: state(), kinds, ways, at, n, effect: fresh(), p: Object.fromEntries(ways.map(w => [w, new Map()])), base: {}, heads: [...new Set(start.components.map(c => c[2]))].filter(h => h >= 0), components: start.components, unit: start.unit, whole: false, way: ways[0], head: -1 };
}

async function trace() {
  if (running || $("go").disabled) return;
  const s = seen, asked = state();
  let said = "";
  $("progress").value = 0;
  $("status").textContent = "starting …";
  const outcome = await long("trace", "api/trace", { state: asked }, {
    waiting: d => { $("status").textContent = `${d.ahead} before you`; },
    start: d => { traced = empty(d, s); traced.state = asked; drawMaps(); },
    base: d => { traced.base[d.direction] = d; },
    cells: d => { take(d); repaint(); tellProgress(d); },
    done: d => { traced.whole = true; said = `${d.cells.toLocaleString("en")} cells in ${number(d.seconds, 2)} s`; $("progress").value = 1; },
  });
  $("status").textContent = outcome === "stopped" ? `stopped; ${Math.round(100 * $("progress").value)} % is here` : said;
  if (traced) { drawMaps(); openNamed(); recipe(); }
}

function tellProgress(d) {
  $("progress").value = d.done / d.total;
  const left = d.seconds / d.done * (d.total - d.done);
  $("status").textContent = `${d.done.toLocaleString("en")} of ${d.total.toLocaleString("en")} cells, ${left < 1 ? "under a second" : number(left, 2) + " s"} left`;
}

function take(d) {
  for (const [c, at, effect, ...p] of d.cells) { traced.effect[d.direction][c * traced.n + at] = effect; traced.p[d.direction].set(c * traced.n + at, p); }
}

function valueAt(T, kind, layer, at) {
  const one = way => {
    const of = head => { const c = T.at.get(`${kind}|${layer}|${head}`); return c === undefined ? NaN : T.effect[way][c * T.n + at]; };
    if (!HEADS.has(kind)) return of(-1);
    if (T.head >= 0) return of(T.head);
    return T.heads.map(of).reduce((a, b) => Number.isNaN(a) || Math.abs(b) > Math.abs(a) ? b : a, NaN);
  };
  return T.way === "difference" ? one("denoise") - one("noise") : one(T.way);
}

function peak(T, kind) {
  let most = 0;
  for (let l = 0; l < DATA.layers; l++) for (let i = 0; i < T.n; i++) { const v = Math.abs(valueAt(T, kind, l, i)); if (v > most) most = v; }
  return most || 1;
}

let drawn = [];

function drawMaps() {
  const T = traced;
  T.run.examples.kinds = T.kinds;
  T.run.unit = T.unit;
  const choice = (label, value, pairs, turn) => { const box = make("select", {}); options(box, pairs); box.value = value; box.addEventListener("change", () => { turn(box.value); drawMaps(); }); return make("label", { class: "soft" }, label + " ", box); };
  const views = [];
  if (T.ways.length > 1) views.push(choice("show", T.way, [["denoise", "denoise"], ["noise", "noise"], ["difference", "denoise − noise"]], v => { T.way = v; }));
  if (T.kinds.some(k => HEADS.has(k))) views.push(choice("head", String(T.head), [["-1", "largest of each layer"], ...T.heads.map(h => [h, "head " + h])], v => { T.head = Number(v); }));
  views.push(make("button", { type: "button", class: "get", onclick: () => download("map.json", new Blob([JSON.stringify(record(), null, 1)], { type: "application/json" })) }, "JSON"));
  views.push(make("button", { type: "button", class: "get", onclick: () => download("map.csv", new Blob([csvOf(cellRows())], { type: "text/csv" })) }, "CSV of all cells"));
  $("views").replaceChildren(...views);
  $("views").hidden = $("maps-title").hidden = false;
  const room = roomFor($("maps"), T.kinds.length);
  drawn = T.kinds.map((kind, k) => exampleMap(T.run, T.e, k, { at: (i, j) => valueAt(T, kind, j, i), limit: () => peak(T, kind), tokens: T.s.tokens }, room,
    { open: (i, j) => openCell(kind, j, i), chosen: (i, j) => get("cell") === cellName(kind, j, i) }));
  $("maps").replaceChildren(...drawn);
}

function repaint() { drawn.forEach(d => d.repaint()); }

// ---- one cell: what restoring it does to every label

function cellHead(kind, layer, at) {
  if (!HEADS.has(kind)) return -1;
  if (traced.head >= 0) return traced.head;
  const way = traced.way === "difference" ? "denoise" : traced.way;
  const size = h => Math.abs(traced.effect[way][traced.at.get(`${kind}|${layer}|${h}`) * traced.n + at]);
  return traced.heads.reduce((a, b) => size(b) > size(a) ? b : a, traced.heads[0]);
}

function cellName(kind, layer, at) { const h = cellHead(kind, layer, at); return `L${layer}.${kind}${h >= 0 ? h : ""}@${at}`; }

function openCell(kind, layer, at) {
  const T = traced, head = cellHead(kind, layer, at), name = cellName(kind, layer, at);
  keep("cell", name);
  const index = T.at.get(`${kind}|${layer}|${head}`) * T.n + at;
  const parts = T.ways.map(way => {
    const p = T.p[way].get(index), base = T.base[way];
    if (!p || !base) return make("p", { class: "soft" }, "This cell is not traced yet.");
    const rows = DATA.labels.map((label, i) => make("tr", { class: DATA.polarities[i] === T.s.gold ? "gold" : null }, make("th", { scope: "row" }, label),
      make("td", { class: "n" }, number(base.p[i])), make("td", { class: "n" }, number(p[i])), make("td", { class: "n" }, (p[i] - base.p[i] > 0 ? "+" : "") + number(p[i] - base.p[i])), make("td", {}, meter(base.p[i], "x"), meter(p[i], "b"))));
    const words = way === "denoise" ? ["corrupted run", "with the clean state here"] : ["clean run", "with the corrupted state here"];
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "label probabilities, " + way }, make("table", { class: "probs cellprobs" }, make("caption", { class: "soft" }, `Probability of the labels, ${way}; effect ${number(T.effect[way][index], 4)} (${T.unit})`),
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "label"), make("th", { scope: "col", class: "n" }, words[0]), make("th", { scope: "col", class: "n" }, words[1]), make("th", { scope: "col", class: "n" }, "change"), make("td", {}))), make("tbody", {}, ...rows)));
  });
  const site = `L${layer}.${kind}${head >= 0 ? head : ""}@${T.s.roles[at]}`;
  $("cell").replaceChildren(make("h3", {}, `${name}: ${KIND_WORDS[kind]}, layer ${layer}${head >= 0 ? ", head " + head : ""}, at `, make("b", {}, bare(T.s.tokens[at])), ` (${T.s.roles[at]})`), ...parts,
    make("button", { type: "button", onclick: () => addSites([site]) }, `edit at ${site}`));
  repaint();
}

function openNamed() {
  const m = /^L(\d+)\.([a-z_]+?)(\d+)?@(\d+)$/.exec(get("cell"));
  if (!m || !traced.kinds.includes(m[2]) || Number(m[1]) >= DATA.layers || Number(m[4]) >= traced.n) { $("cell").replaceChildren(); return; }
  if (m[3] !== undefined && Number(m[3]) < traced.heads.length) { traced.head = Number(m[3]); drawMaps(); }
  openCell(m[2], Number(m[1]), Number(m[4]));
}

// ---- what is on the screen, as files

function cellRows() {
  const T = traced, head = ["direction", "kind", "layer", "head", "position", "token", "role", "effect", ...DATA.labels.map(l => "p_" + l)], rows = [];
  for (const way of T.ways) T.components.forEach(([kind, layer, h], c) => { for (let i = 0; i < T.n; i++) { const at = c * T.n + i; if (T.p[way].has(at)) rows.push([way, kind, layer, h < 0 ? "" : h, i, bare(T.s.tokens[i]), T.s.roles[i], T.effect[way][at], ...T.p[way].get(at)]); } });
  return [head, ...rows];
}

function record() {
  const [columns, ...rows] = cellRows();
  return { model: DATA.model, state: traced.state, whole: traced.whole, unit: traced.unit, labels: DATA.labels, tokens: traced.s.tokens, roles: traced.s.roles, clean: traced.s.clean, corrupted: traced.s.corrupted, base: traced.base, columns, rows };
}

async function recipe() {
  const box = $("recipe");
  let told;
  try { told = await (await ask("api/again", { state: traced.state.sentence === get("sentence") ? { ...traced.state, ...Object.fromEntries(["sites", "epochs", "examples"].filter(n => kept(n)).map(n => [n, kept(n)])) } : traced.state })).json(); } catch { return; }
  const block = (title, text, name, file) => [make("h3", {}, title), make("pre", { tabindex: "0" }, text), make("div", { class: "gets" },
    make("button", { type: "button", class: "get", "aria-label": "copy: " + title, onclick: e => { navigator.clipboard.writeText(text).then(() => { e.target.textContent = "copied"; }, () => {}); } }, "copy"),
    file ? make("button", { type: "button", class: "get", onclick: () => download(file, new Blob([text], { type: name })) }, "save " + file) : null)];
  box.replaceChildren(
    ...(told.command ? [...block("Command", told.command, "text/plain", null), ...block("Its data", told.data, "application/x-ndjson", told.file)] : []),
    ...(told.train ? block("Training of the edit", told.train, "text/plain", null) : []), ...block("Python", told.python, "text/x-python", "review.py"));
}

// ---- sites and a small edit

function sites() { return get("sites").split(",").filter(Boolean); }

function drawSites() {
  $("sites").replaceChildren(...sites().map(site => make("li", {}, make("code", {}, site), " ", make("button", { type: "button", class: "get", "aria-label": "remove " + site, onclick: () => setSites(sites().filter(s => s !== site)) }, "×"))));
  if (!sites().length) $("sites").replaceChildren(make("li", { class: "soft" }, "No sites yet: click a cell of the map, type one, or let the rule choose."));
}

function setSites(list) { keep("sites", [...new Set(list)].join(",")); drawSites(); enable(); if (traced) recipe(); }

function addSites(list) {
  const bad = list.find(s => !/^L\d+\.[a-z_]+?\d*@[a-z.]+$/.test(s));
  if (bad !== undefined) { problem(`${bad || "nothing"} is no site with a role; sites look like L3.resid_post@query.last`); return; }
  problem("");
  $("site").value = "";
  setSites([...sites(), ...list]);
}

async function ruled() {
  let found = null;
  $("trained").value = 0;
  $("training").textContent = "tracing training reviews …";
  const outcome = await long("rule", "api/rule", { state: state() }, {
    waiting: d => { $("training").textContent = `${d.ahead} before you`; },
    progress: d => { $("trained").value = d.done / d.total; },
    chosen: d => { found = d; },
  });
  $("training").textContent = outcome === "done" ? "" : outcome;
  if (!found) return;
  setSites(found.sites);
  $("ruled").textContent = `Mean effect ${number(found.aie)} [${number(found.low)}, ${number(found.high)}] over ${found.pairs} pairs of ${found.sentences} training sentences; ${found.clear ? "clear" : "not clear"}. Rule: ${found.rule}. ${found.warnings.join(". ")}`;
}

function curve(history, steps) {
  // The loss of every step, and its mean over the last ten.
  const W = 640, H = 200, L = 44, B = 26, top = Math.max(...history) * 1.05 || 1;
  const x = i => L + (W - L - 8) * (i + 1) / Math.max(steps, 1), y = v => 8 + (H - B - 8) * (1 - v / top);
  const svg = (tag, props, text) => { const node = document.createElementNS("http" + "://www.w3.org/2000/svg", tag); for (const [k, v] of Object.entries(props)) node.setAttribute(k, v); if (text !== undefined) node.textContent = text; return node; };
  const smooth = history.map((_, i) => { const part = history.slice(Math.max(0, i - 9), i + 1); return part.reduce((a, b) => a + b, 0) / part.length; });
  const path = values => values.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`).join(" ");
  const chart = svg("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "loss by step" });
  for (const v of [0, top / 2, top]) chart.append(svg("line", { class: "rule", x1: L, x2: W - 8, y1: y(v), y2: y(v) }), svg("text", { class: "axis", x: L - 6, y: y(v) + 4, "text-anchor": "end" }, number(v, 2)));
  chart.append(svg("text", { class: "axis", x: L, y: H - 6 }, "step 1"), svg("text", { class: "axis", x: W - 8, y: H - 6, "text-anchor": "end" }, `step ${steps}`));
  const line = (values, look) => { const part = svg("polyline", { class: "line " + look, points: path(values) }); chart.append(part); };
  line(history, "quiet");
  line(smooth, "c0");
  return make("figure", {}, make("figcaption", {}, "Loss: -log of the right label's share; the line is the mean of ten steps"), chart);
}

async function train() {
  const history = [];
  let steps = 1, tested = null, drawnAt = 0;
  $("trained").value = 0;
  $("training").textContent = "starting …";
  $("tested").replaceChildren();
  const outcome = await long("train", "api/train", { state: state() }, {
    waiting: d => { $("training").textContent = `${d.ahead} before you`; },
    plan: d => { steps = d.steps; },
    step: d => {
      history.push(d.loss);
      $("trained").value = d.step / steps;
      $("training").textContent = `step ${d.step} of ${steps}, loss ${number(d.loss)}`;
      if (performance.now() - drawnAt > 80) { drawnAt = performance.now(); $("curve").replaceChildren(curve(history, steps)); }
    },
    tested: d => { tested = d; },
  });
  if (history.length) $("curve").replaceChildren(curve(history, steps), make("div", { class: "gets" }, csvButton("loss", () => [["step", "loss"], ...history.map((v, i) => [i + 1, v])]), pngButton("loss", done => chartPicture($("curve").querySelector("svg"), done))));
  $("training").textContent = outcome === "done" ? `${steps} steps` : outcome === "stopped" ? `stopped after ${history.length} steps; no edit is kept` : "";
  if (!tested) return;
  showTested(tested);
  changed();
}

function showTested(d) {
  const between = name => `${number(100 * d.intervals[name][0], 3)} to ${number(100 * d.intervals[name][1], 3)} %`;
  const share = n => `${n} of ${d.n} (${number(100 * n / d.n, 3)} %)`, mark = (r, name) => make("td", { class: r[name] === r.gold ? "ok" : "bad" }, r[name]);
  const filters = { all: () => true, fixed: r => r.base !== r.gold && r.edited === r.gold, broken: r => r.base === r.gold && r.edited !== r.gold };
  const body = make("tbody", {}), draw = name => body.replaceChildren(...d.rows.filter(filters[name]).map(r => make("tr", {}, make("td", { class: "wide" }, r.sentence), make("td", {}, r.aspect), make("td", {}, r.gold), mark(r, "base"), mark(r, "edited"))));
  const select = make("select", { "aria-label": "rows" }, ...Object.keys(filters).map(name => make("option", { value: name }, `${name} (${d.rows.filter(filters[name]).length})`)));
  select.addEventListener("change", () => draw(select.value));
  draw("all");
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...["review", "aspect", "right", "base", "edited"].map(t => make("th", { scope: "col" }, t)))), body);
  $("tested").replaceChildren(make("h3", {}, `Held-out reviews: base ${share(d.right.base)} right, edited ${share(d.right.edited)}`),
    make("p", { class: "soft" }, `${d.parameters.toLocaleString("en")} parameters. ${d.left_out ? d.left_out + " reviews that stand in the training data were left out. " : ""}An edit changes other answers too: mech-absa evaluate --side-effects measures how much. 95 % intervals: base ${between("base")}, edited ${between("edited")}.`),
    make("div", { class: "picker" }, make("label", {}, "show ", select), csvButton("held-out", () => [["review", "aspect", "right", "base", "edited"], ...d.rows.map(r => [r.sentence, r.aspect, r.gold, r.base, r.edited])])), make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "held-out reviews" }, table));
}

// ---- begin

startForm();
if (!STATE.size && DATA.reviews.length) {
  const first = Math.max(0, DATA.reviews.findIndex(r => r.edited));
  $("pick").value = String(first);
  $("pick").dispatchEvent(new Event("change"));
} else changed().then(() => { if (kept("cell")) trace(); });
