"use strict";
// Nothing here loads anything, and text from the data is only ever set as text.

const DATA = JSON.parse(document.getElementById("data").textContent);
const ROLE_CLASS = role => role.startsWith("aspect") ? "a" : role.startsWith("query") ? "q" : role === "opinion" ? "o" : role === "template" ? "t" : "";
const root = document.documentElement;
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

// ---- state of the page in its address: #section?run0.ex=ID&run0.kind=mlp_out

const STATE = new URLSearchParams(location.hash.split("?")[1] || "");
function keep(name, value) {
  if (value === null || value === undefined || value === "") STATE.delete(name); else STATE.set(name, value);
  const section = location.hash.split("?")[0], text = STATE.toString();
  // A page that loads scrolls to the section of its address, so a fresh one gets none.
  const place = text ? `${section || "#main"}?${text}` : section || location.href.split("#")[0];
  try { history.replaceState(null, "", place); } catch { /* a page inside another has no address of its own */ }
}
function kept(name) { return STATE.get(name); }

// ---- downloads: text and pictures of what is shown, made here

function download(name, blob) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
function csvOf(rows) {
  // A text that a spreadsheet would take for a formula gets a quote in front; numbers keep their sign.
  const cell = x => {
    const text = x === null || x === undefined ? "" : String(x);
    const safe = /^[=+@\t\r]/.test(text) || (/^-/.test(text) && Number.isNaN(Number(text))) ? "'" + text : text;
    return /[",\n\r]/.test(safe) ? '"' + safe.replace(/"/g, '""') + '"' : safe;
  };
  return rows.map(r => r.map(cell).join(",")).join("\n") + "\n";
}
function csvButton(name, rows) {
  return make("button", { type: "button", class: "get", onclick: () => download(name + ".csv", new Blob([csvOf(rows())], { type: "text/csv" })) }, "CSV");
}
function fileName(text) { return text.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^-+|-+$/g, "") || "mech-absa"; }

// A table of coloured cells as a picture: the colours and words on the screen, drawn again on a canvas.
function pictureOf(table, title) {
  const box = table.getBoundingClientRect(), ratio = 2, pad = 14, top = 34;
  const canvas = make("canvas", {});
  canvas.width = (box.width + 2 * pad) * ratio;
  canvas.height = (box.height + pad + top) * ratio;
  const draw = canvas.getContext("2d");
  draw.scale(ratio, ratio);
  const style = getComputedStyle(document.body);
  draw.fillStyle = getComputedStyle(root).getPropertyValue("--paper");
  draw.fillRect(0, 0, canvas.width, canvas.height);
  draw.textBaseline = "middle";
  draw.fillStyle = style.color;
  draw.font = "600 13px " + style.fontFamily;
  draw.fillText(title, pad, 18);
  for (const td of table.querySelectorAll("td, th")) {
    const r = td.getBoundingClientRect(), x = r.left - box.left + pad, y = r.top - box.top + top, look = getComputedStyle(td);
    if (td.tagName === "TD") {
      draw.fillStyle = look.backgroundColor;
      draw.fillRect(x, y, r.width, r.height);
      draw.strokeStyle = getComputedStyle(root).getPropertyValue("--rule");
      draw.lineWidth = 0.5;
      draw.strokeRect(x, y, r.width, r.height);
    }
    if (td.classList.contains("marked")) { draw.fillStyle = getComputedStyle(td, "::after").backgroundColor; draw.beginPath(); draw.arc(x + r.width / 2, y + r.height / 2, 2, 0, 7); draw.fill(); }
    if (td.classList.contains("chosen")) { draw.strokeStyle = style.color; draw.lineWidth = 2; draw.strokeRect(x, y, r.width, r.height); }
    if (td.textContent) {
      draw.fillStyle = look.color;
      draw.font = look.fontWeight + " " + look.fontSize + " " + look.fontFamily;
      draw.textAlign = td.tagName === "TH" && td.scope === "row" ? "right" : "center";
      draw.fillText(td.textContent, draw.textAlign === "right" ? x + r.width - 4 : x + r.width / 2, y + r.height / 2);
      draw.textAlign = "left";
    }
  }
  return canvas;
}
// A chart of the page as a picture: its elements with the colours they have on the screen.
function chartPicture(svg, done) {
  const copy = svg.cloneNode(true), size = svg.getBoundingClientRect();
  const pairs = [[svg, copy], ...[...svg.querySelectorAll("*")].map((node, i) => [node, copy.querySelectorAll("*")[i]])];
  for (const [from, to] of pairs) {
    const look = getComputedStyle(from);
    for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-family"]) to.style.setProperty(name, look.getPropertyValue(name));
  }
  copy.setAttribute("xmlns", "http" + "://www.w3.org/2000/svg");
  copy.setAttribute("width", size.width);
  copy.setAttribute("height", size.height);
  const image = new Image();
  image.onload = () => {
    const canvas = make("canvas", { width: size.width * 2, height: size.height * 2 });
    const draw = canvas.getContext("2d");
    draw.fillStyle = getComputedStyle(root).getPropertyValue("--paper");
    draw.fillRect(0, 0, canvas.width, canvas.height);
    draw.drawImage(image, 0, 0, canvas.width, canvas.height);
    done(canvas);
  };
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(copy));
}
function pngButton(name, canvasOf) {
  return make("button", { type: "button", class: "get", onclick: () => canvasOf(canvas => canvas.toBlob(blob => download(name + ".png", blob))) }, "PNG");
}

