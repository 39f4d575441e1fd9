// The runs page: curves and sample sheets of a training, asked for anew every two seconds.

import { Refused, ask } from "/page/client.js";
import { current, setLanguage, word } from "/page/words.js";

const $ = (id) => document.getElementById(id);
const PAUSE = 2000;
const SVG = "http://www.w3.org/2000/svg";
// Keys of the records with the names of their lines; a chart without data is not drawn.
const CHARTS = [
  ["distance", { "validation/kernel_distance": "final", "validation/step1_distance": "first" }],
  ["diversity", { "validation/diversity": "final" }],
  ["matching", { "final/distribution_matching": "final", "step1/distribution_matching": "first" }],
  ["critic", { "critic/accuracy_final": "final", "critic/accuracy_step1": "first" }],
  ["gradient", { "gradient_norm/first": "first", "gradient_norm/second": "final" }],
  ["loss", { loss: "all" }],
  ["fakes", { "fake/final": "final", "fake/step1": "first" }],
  ["spread", { "latents/std": "final" }],
];
const BOX = { width: 340, height: 190, left: 48, right: 10, top: 10, bottom: 24 };
let shown = { stamp: "", series: {}, sheets: [], turn: 0 };
let follow = true; // the newest sheet, until an older one is chosen

function draw(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
}

const short = (value) => Number(value.toPrecision(3)).toString();

function chart(title, lines) {
  const figure = document.createElement("figure");
  figure.className = "chart";
  figure.appendChild(document.createElement("figcaption")).textContent = title;
  const svg = draw(figure, "svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img" });
  draw(svg, "title", {}, title);
  const points = lines.flatMap(([, values]) => values);
  const turns = points.map(([turn]) => turn);
  let [low, high] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
  const logarithmic = low > 0 && high > 50 * low;
  const scale = logarithmic ? Math.log10 : Number;
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
  const [first, last] = [Math.min(...turns), Math.max(...turns)];
  const across = BOX.width - BOX.left - BOX.right;
  const down = BOX.height - BOX.top - BOX.bottom;
  const x = (turn) => BOX.left + (across * (turn - first)) / (last - first || 1);
  const y = (value) => BOX.top + (down * (scale(high) - scale(value))) / (scale(high) - scale(low));
  const middle = logarithmic ? Math.sqrt(low * high) : (low + high) / 2;
  for (const value of [low, middle, high]) {
    draw(svg, "line", { x1: BOX.left, x2: BOX.width - BOX.right, y1: y(value), y2: y(value), class: "grid" });
    draw(svg, "text", { x: BOX.left - 5, y: y(value) + 4, "text-anchor": "end" }, short(value));
  }
  draw(svg, "text", { x: BOX.left, y: BOX.height - 6 }, String(first));
  draw(svg, "text", { x: BOX.width - BOX.right, y: BOX.height - 6, "text-anchor": "end" }, String(last));
  const legend = document.createElement("p");
  lines.forEach(([name, values], index) => {
    const path = values.map(([turn, value]) => `${x(turn).toFixed(1)},${y(value).toFixed(1)}`);
    draw(svg, "polyline", { points: path.join(" "), class: `line line-${index}` });
    const entry = legend.appendChild(document.createElement("span"));
    entry.className = `name line-${index}`;
    entry.textContent = `${word(`line_${name}`)} ${short(values.at(-1)[1])}`;
  });
  figure.appendChild(legend);
  return figure;
}

function drawAll() {
  const charts = [];
  for (const [title, keys] of CHARTS) {
    const lines = Object.entries(keys)
      .map(([key, name]) => [name, shown.series[key] ?? []])
      .filter(([, values]) => values.length > 1);
    if (lines.length) charts.push(chart(word(`chart_${title}`), lines));
  }
  $("charts").replaceChildren(...charts);
  $("state").textContent = charts.length ? word("atTurn", shown.turn) : word("noRecords");
}

async function showSheet() {
  const turn = shown.sheets[Number($("turn").value)];
  $("sheet-part").hidden = turn === undefined;
  if (turn === undefined) return;
  $("turned").value = turn;
  const name = `${$("run").value}/${turn}`;
  if ($("sheet").dataset.name === name) return;
  const picture = await (await ask(`/runs/data/${encodeURIComponent($("run").value)}/${turn}`, $("key").value)).blob();
  URL.revokeObjectURL($("sheet").src);
  $("sheet").src = URL.createObjectURL(picture);
  $("sheet").alt = word("turn") + ` ${turn}`;
  $("sheet").dataset.name = name;
}

async function showRun() {
  const name = $("run").value;
  if (!name) return;
  const path = `/runs/data/${encodeURIComponent(name)}?seen=${shown.stamp}`;
  const found = await (await ask(path, $("key").value)).json();
  if (found.stamp === shown.stamp || name !== $("run").value) return;
  shown = found;
  drawAll();
  $("turn").max = Math.max(0, shown.sheets.length - 1);
  if (follow) $("turn").value = $("turn").max;
  await showSheet();
}

async function refresh() {
  try {
    const { runs } = await (await ask("/runs/data", $("key").value)).json();
    const names = runs.map((run) => run.name);
    const old = [...$("run").options].map((option) => option.value);
    if (names.length !== old.length || names.some((name) => !old.includes(name))) {
      const chosen = $("run").value;
      $("run").replaceChildren(...names.map((name) => new Option(name, name)));
      if (names.includes(chosen)) $("run").value = chosen;
    }
    if (!names.length) $("state").textContent = word("noRuns");
    $("trouble").hidden = true;
    await showRun();
  } catch (error) {
    const wrong = error instanceof Refused && error.status === 401;
    if (wrong) $("key-row").hidden = false;
    $("trouble").textContent = word(wrong ? "needKey" : "unreachable");
    $("trouble").hidden = false;
  }
}

function translate() {
  document.documentElement.lang = current() === "zh" ? "zh-CN" : "en";
  $("language").textContent = current() === "zh" ? "English" : "中文";
  for (const element of document.querySelectorAll("[data-word]")) {
    element.textContent = word(element.dataset.word);
  }
  if (shown.stamp) drawAll();
}

async function again() {
  await refresh();
  setTimeout(again, PAUSE);
}

$("run").addEventListener("change", () => {
  shown = { stamp: "", series: {}, sheets: [], turn: 0 };
  follow = true;
  refresh();
});
$("turn").addEventListener("input", () => {
  follow = $("turn").value === $("turn").max;
  showSheet();
});
$("key").addEventListener("change", refresh);
$("language").addEventListener("click", () => {
  setLanguage(current() === "zh" ? "en" : "zh");
  translate();
});
$("theme").addEventListener("click", () => {
  const root = document.documentElement.classList;
  const dark = root.contains("dark") || (!root.contains("light") && matchMedia("(prefers-color-scheme: dark)").matches);
  root.remove("light", "dark");
  root.add(dark ? "light" : "dark");
});
translate();
again();
