// ---- theme

function theme(name) {
  root.dataset.theme = name;
  const button = document.getElementById("theme");
  if (button) button.setAttribute("aria-pressed", String(name === "dark"));
}
(function () {
  const asked = new URLSearchParams(location.search).get("theme"), button = document.getElementById("theme");
  let chosen = null;
  try { chosen = localStorage.getItem("mech-absa-theme"); } catch { /* no storage for this page */ }
  const system = matchMedia("(prefers-color-scheme: dark)");
  theme(asked || chosen || (system.matches ? "dark" : "light"));
  system.addEventListener("change", e => { if (!asked && !chosen) theme(e.matches ? "dark" : "light"); });
  if (button) button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    theme(chosen);
    try { localStorage.setItem("mech-absa-theme", chosen); } catch { /* nor here */ }
  });
  addEventListener("beforeprint", () => { root.dataset.before = root.dataset.theme; theme("light"); });
  addEventListener("afterprint", () => theme(root.dataset.before || "light"));
})();

// ---- begin: what is far down the page is drawn when it comes near; with ?all, and when it is printed, at once

const AT_ONCE = new URLSearchParams(location.search).has("all") || !("IntersectionObserver" in window);

function near(holder, draw) {
  let result;
  if (AT_ONCE || STATE.size || holder.getBoundingClientRect().top < innerHeight + 600) { result = draw(); return () => result; }
  let done = false;
  const once = () => { if (!done) { done = true; seen.disconnect(); result = draw(); } return result; };
  const seen = new IntersectionObserver(entries => { if (entries.some(e => e.isIntersecting)) once(); }, { rootMargin: "600px" });
  seen.observe(holder);
  addEventListener("beforeprint", once);
  return once;
}

document.querySelectorAll("[data-run]").forEach(article => {
  const run = DATA.runs[Number(article.dataset.run)];
  for (const [name, draw] of [["average", averages], ["examples", exampleBrowser], ["predictions", predictionBrowser]]) {
    const holder = article.querySelector(`[data-${name}]`);
    if (!holder) continue;
    const started = near(holder, () => draw(run, holder, article));
    if (name === "examples") article.addEventListener("cell", e => { const open = started(); if (open) open(e.detail); });
  }
});
document.querySelectorAll("[data-compare]").forEach(holder => sideBySide(DATA.runs, holder));

// A picture of every chart, and the numbers of every table, in the page.
document.querySelectorAll("figure > .chart").forEach(svg => {
  const name = fileName(svg.getAttribute("aria-label") || "chart");
  svg.after(make("div", { class: "gets" }, pngButton(name, done => chartPicture(svg, done))));
});
document.querySelectorAll("main .scroll > table:not(.grid):not(.answers)").forEach(table => {
  const rows = () => [...table.rows].map(r => [...r.cells].map(c => c.textContent.trim().replace(/−/g, "-")));
  table.parentNode.after(make("div", { class: "gets" }, csvButton(fileName(table.closest("section") ? table.closest("section").id : "table"), rows)));
});

// What is scrolled to ends below the bar, whose title may take two lines.
(function () {
  const bar = document.querySelector("header");
  if (!bar) return;
  const below = () => { root.style.scrollPaddingTop = `${bar.offsetHeight + 8}px`; };
  below();
  new ResizeObserver(below).observe(bar);
})();
(function () {
  const link = document.getElementById("link");
  if (!link) return;
  link.addEventListener("click", async () => {
    let copied = true;
    try { await navigator.clipboard.writeText(location.href); } catch { copied = false; }
    link.textContent = copied ? "copied" : "see address";
    setTimeout(() => { link.textContent = "copy link"; }, 1500);
  });
  // A link that opens a state begins at its section, once the maps above it have their height.
  const section = location.hash.split("?")[0];
  if (section.length > 1 && section !== "#main" && location.hash.includes("?")) {
    const target = document.getElementById(decodeURIComponent(section.slice(1)));
    if (target) requestAnimationFrame(() => target.scrollIntoView());
  }
  // Links to sections keep the state of the page.
  document.querySelectorAll('a[href^="#"]').forEach(a => a.addEventListener("click", e => {
    const target = document.getElementById(a.getAttribute("href").slice(1));
    if (!target) return;
    e.preventDefault();
    const text = STATE.toString();
    try { history.pushState(null, "", a.getAttribute("href") + (text ? "?" + text : "")); } catch { /* inside another page */ }
    target.scrollIntoView();
    target.setAttribute("tabindex", "-1");
    target.focus({ preventScroll: true });
  }));
})();
root.dataset.ready = "";
