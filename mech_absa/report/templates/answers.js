// ---- answers of an evaluation: every system's answer to an example on one row

function predictionBrowser(run, holder, article) {
  // Rows: data, id, sentence, aspect, gold, [per system: label, right, shares of the labels, text].
  const P = run.predictions, id = article.id, two = P.systems.length > 1;
  const option = (value, words) => make("option", { value }, words);
  const search = make("input", { type: "search", placeholder: "word, aspect or id", "aria-label": "search the answers" });
  const data = make("select", { "aria-label": "data" }, option("-1", "all data"), ...P.sets.map((s, i) => option(i, s)));
  const base = make("select", { "aria-label": "system to compare with" }, ...P.systems.map((s, i) => option(i, s)));
  const edit = make("select", { "aria-label": "system" }, ...P.systems.map((s, i) => option(i, s)));
  edit.value = String(two ? 1 : 0);
  const show = make("select", { "aria-label": "which rows" }, option("wrong", "wrong first"), option("onlywrong", "wrong only"),
    ...(two ? [option("fixed", "fixed"), option("broken", "broken"), option("differ", "answers differ")] : []));
  const count = make("span", { class: "soft" }), body = make("tbody"), more = make("button", { type: "button" }, "more"), tally = make("p", { class: "soft" });
  let room = 50, rows = [];
  const right = a => a && a[1];

  function wanted(r) {
    const asked = search.value.trim().toLowerCase(), a = r[5][Number(base.value)], b = r[5][Number(edit.value)];
    if (Number(data.value) >= 0 && r[0] !== Number(data.value)) return false;
    if (!b || (two && !a)) return false;
    if (asked && ![r[1], r[2], r[3], r[4], a ? a[0] : "", b[0] || ""].join("\n").toLowerCase().includes(asked)) return false;
    return { wrong: true, onlywrong: !right(b), fixed: !right(a) && right(b), broken: right(a) && !right(b), differ: a && a[0] !== b[0] }[show.value];
  }

  function answerCell(a) {
    const shares = P.labels.map((l, i) => a[2][i] === null || a[2][i] === undefined ? null : `${l} ${number(a[2][i], 2)}`).filter(Boolean).join(", ");
    return make("td", {}, make("span", { class: a[1] ? "ok" : "bad" }, a[0] === null ? "no label" : a[0]), make("div", { class: "soft" }, a[3] ? visible(a[3]) : shares));
  }

  function draw() {
    const b = r => r[5][Number(edit.value)];
    rows = P.rows.filter(wanted);
    if (show.value === "wrong") rows = [...rows.filter(r => !right(b(r))), ...rows.filter(r => right(b(r)))];
    count.textContent = `${rows.length} of ${P.rows.length} examples`;
    const both = P.rows.filter(r => r[5][Number(base.value)] && b(r) && (Number(data.value) < 0 || r[0] === Number(data.value)));
    const fixed = both.filter(r => !right(r[5][Number(base.value)]) && right(b(r))).length, broken = both.filter(r => right(r[5][Number(base.value)]) && !right(b(r))).length;
    tally.textContent = two && base.value !== edit.value ? `${P.systems[Number(edit.value)]} fixes ${fixed} answers of ${P.systems[Number(base.value)]} and breaks ${broken}, of the ${both.length} examples in this page that both answered.` : "";
    body.replaceChildren(...rows.slice(0, room).map(r => {
      const start = r[2].indexOf(r[3]);
      const words = start < 0 ? [r[2]] : [r[2].slice(0, start), make("mark", {}, r[3]), r[2].slice(start + r[3].length)];
      return make("tr", {}, make("td", {}, ...words, make("div", { class: "soft" }, `${r[1]} · ${P.sets[r[0]]}`)), make("td", {}, r[3]), make("td", {}, r[4]),
        two ? answerCell(r[5][Number(base.value)]) : null, answerCell(b(r)));
    }));
    head.replaceChildren(...["sentence", "aspect", "gold", ...(two ? [P.systems[Number(base.value)]] : []), P.systems[Number(edit.value)]].map(h => make("th", { scope: "col" }, h)));
    more.hidden = rows.length <= room;
    keep(id + ".show", show.value === "wrong" ? null : show.value);
    keep(id + ".aq", search.value);
    keep(id + ".data", data.value === "-1" ? null : P.sets[Number(data.value)]);
    keep(id + ".base", two && base.value !== "0" ? P.systems[Number(base.value)] : null);
    keep(id + ".edit", two && edit.value !== "1" ? P.systems[Number(edit.value)] : null);
  }

  const head = make("tr");
  const table = () => [["data", "id", "sentence", "aspect", "gold", ...P.systems], ...rows.map(r => [P.sets[r[0]], r[1], r[2], r[3], r[4], ...r[5].map(a => a ? a[0] : "")])];
  more.addEventListener("click", () => { room += 200; draw(); });
  for (const c of [search, data, base, edit, show]) c.addEventListener("input", () => { room = 50; draw(); });
  const given = (select, names, name) => { if (names.includes(kept(name))) select.value = String(names.indexOf(kept(name))); };
  given(data, P.sets, id + ".data");
  given(base, P.systems, id + ".base");
  given(edit, P.systems, id + ".edit");
  if ([...show.options].some(o => o.value === kept(id + ".show"))) show.value = kept(id + ".show");
  search.value = kept(id + ".aq") || "";
  holder.append(make("div", { class: "picker" }, search, P.sets.length > 1 ? data : null, make("label", {}, "show", show), two ? make("label", {}, "base", base) : null, two ? make("label", {}, "edit", edit) : null, count, csvButton("answers", table)),
    tally, make("div", { class: "scroll", tabindex: "0" }, make("table", { class: "answers" }, make("thead", {}, head), body)), more);
  draw();
}

