// The page: form, stage, gallery.

import { Card } from "/page/cards.js";
import { Refused, listModels, streamPicture } from "/page/client.js";
import { readFacts } from "/page/png.js";
import { current, examples, setLanguage, word } from "/page/words.js";

const $ = (id) => document.getElementById(id);
const MAX_SEED = 2 ** 31;
let models = [];
let running = null; // AbortController of what is being made

const about = (name) => models.find((model) => model.id === name);
const sizeOf = (model) => model.twostep.size.split("x").map(Number);
const student = () => models.find((model) => model.twostep.kind !== "teacher");
const teacher = () => models.find((model) => model.twostep.kind === "teacher");
const mode = () => document.querySelector("input[name=mode]:checked").value;

function say(text) {
  $("status").textContent = text;
}

function trouble(text) {
  $("trouble").textContent = text ?? "";
  $("trouble").hidden = !text;
}

function explain(error) {
  if (error.name === "AbortError") return say(word("cancelled"));
  if (!(error instanceof Refused)) return trouble(word("unreachable"));
  if (error.status === 401) {
    $("key-row").hidden = false;
    $("key").focus();
    return trouble(word("needKey"));
  }
  if (error.status === 429) return trouble(word("full", { seconds: error.retryAfter ?? 1 }));
  return trouble(error.message);
}

function chip(parent, text, onClick) {
  const button = parent.appendChild(document.createElement("button"));
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", onClick);
  return button;
}

function presets() {
  const [width, height] = sizeOf(about($("model").value) ?? models[0]);
  const long = (side) => (side * 3) / 2;
  return {
    square: [width, height, 1],
    wide: [long(width), height, 1],
    tall: [width, long(height), 1],
    large: [long(width), long(height), 1],
    four: [width, height, 4],
  };
}

function usePreset(name) {
  const [width, height, count] = presets()[name];
  $("width").value = width;
  $("height").value = height;
  $("count").value = count;
  $("counted").value = count;
}

function roll() {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % MAX_SEED;
}

function translate() {
  document.documentElement.lang = current() === "zh" ? "zh-CN" : "en";
  $("language").textContent = current() === "zh" ? "English" : "中文";
  const steps = { fast: student()?.twostep.steps ?? 2, slow: teacher()?.twostep.steps ?? 8 };
  for (const element of document.querySelectorAll("[data-word]")) {
    element.textContent = word(element.dataset.word, steps);
  }
  for (const id of ["width", "height", "dice", "share"]) $(id).ariaLabel = word(id);
  $("dice").title = word("dice");
  $("examples").replaceChildren();
  const toy = models.some((model) => model.twostep.embedded);
  for (const text of examples(toy)) chip($("examples"), text, () => ($("prompt").value = text));
  if (!$("prompt").value) $("prompt").value = examples(toy)[current() === "zh" ? 2 : 0];
  for (const button of $("presets").querySelectorAll("button")) button.remove();
  for (const name of Object.keys(models.length ? presets() : {})) {
    chip($("presets"), word(name), () => usePreset(name)).dataset.preset = name;
  }
  drawGallery();
}

function showMode() {
  const pair = mode() === "pair";
  $("model-row").hidden = pair || models.length < 2;
  $("count-row").hidden = pair;
}

async function connect() {
  try {
    models = await listModels($("key").value);
  } catch (error) {
    translate();
    return explain(error);
  }
  trouble("");
  $("model").replaceChildren(
    ...models.map(({ id, twostep }) => new Option(`${id} · ${word("steps", twostep.steps)}`, id)),
  );
  $("toy").hidden = !models.some((model) => model.twostep.embedded);
  $("pair-mode").hidden = !(student() && teacher());
  translate();
  usePreset("square");
  showMode();
}

// What the form asks for: a picture a line, and which of them wait for each other.
function wanted() {
  const width = Number($("width").value);
  const height = Number($("height").value);
  const base = { prompt: $("prompt").value, size: `${width}x${height}` };
  const seed = Number($("seed").value);
  const pair = mode() === "pair";
  const tasks = pair
    ? [student(), teacher()].map((model) => ({ ...base, model: model.id, seed }))
    : Array.from({ length: Number($("count").value) }, (_, index) => ({
        ...base,
        model: $("model").value,
        seed: seed + index,
      }));
  return { tasks, pair, width, height };
}

async function make() {
  if (running) return;
  if ($("fresh").checked || $("seed").value === "") roll();
  const { tasks, pair, width, height } = wanted();
  running = new AbortController();
  const started = performance.now();
  trouble("");
  $("cancel").disabled = false;
  $("go").disabled = true;
  $("slider").hidden = true;
  $("cards").replaceChildren();
  $("progress").value = 0;
  let done = 0;
  say(word("working", { done, all: tasks.length }));
  const cards = tasks.map((task) => {
    const title = `${task.model} · ${word("steps", about(task.model).twostep.steps)}`;
    return new Card($("cards"), { title, width, height });
  });

  async function one(task, card) {
    card.start();
    const { signal } = running;
    const onEvent = (event) => {
      card.show(event, task.prompt);
      if (!event.type.endsWith("completed")) {
        $("progress").value = (done + 0.5) / tasks.length;
        return;
      }
      done += 1;
      $("progress").value = done / tasks.length;
      say(word("working", { done, all: tasks.length }));
      gallery.unshift({ ...task, url: card.result.src });
    };
    await streamPicture(task, { key: $("key").value, signal, onEvent });
  }

  try {
    if (pair) {
      // One after the other, so that each has the machine to itself and its clock is its own.
      for (const [index, task] of tasks.entries()) await one(task, cards[index]);
      compare(cards);
    } else {
      const all = tasks.map((task, index) => one(task, cards[index]));
      const results = await Promise.allSettled(all);
      const wrong = results.find((result) => result.status === "rejected");
      if (wrong) throw wrong.reason;
    }
    const time = ((performance.now() - started) / 1000).toFixed(2);
    say(word("finished", { all: done, seconds: time }));
  } catch (error) {
    explain(error);
  } finally {
    for (const card of cards) card.end("cancelled");
    running = null;
    $("cancel").disabled = true;
    $("go").disabled = false;
    drawGallery();
  }
}

function compare([fast, slow]) {
  $("over-picture").src = fast.result.src;
  $("under-picture").src = slow.result.src;
  $("slider").hidden = false;
}

const gallery = [];

function drawGallery() {
  $("gallery").replaceChildren(
    ...gallery.map((picture, index) => {
      const item = document.createElement("li");
      const image = item.appendChild(new Image());
      image.src = picture.url;
      image.alt = picture.prompt;
      const text = item.appendChild(document.createElement("p"));
      text.textContent = picture.prompt;
      text.appendChild(document.createElement("small")).textContent =
        `${picture.model} · ${picture.size} · ${word("seed")} ${picture.seed}`;
      const actions = item.appendChild(document.createElement("div"));
      chip(actions, word("restore"), () => restore(picture));
      chip(actions, word("download"), () => {
        const link = document.createElement("a");
        link.href = picture.url;
        link.download = `twostep-${picture.seed}-${gallery.length - index}.png`;
        link.click();
      });
      return item;
    }),
  );
}

function restore(facts) {
  const [width, height] = facts.size.split("x");
  $("prompt").value = facts.prompt;
  $("seed").value = facts.seed;
  $("width").value = width;
  $("height").value = height;
  $("fresh").checked = false;
  if (about(facts.model)) $("model").value = facts.model;
  say(word("restored"));
  $("prompt").focus();
}

async function open(file) {
  const facts = file && (await readFacts(file));
  if (!facts) return say(word("foreign"));
  restore({ size: `${$("width").value}x${$("height").value}`, ...facts });
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  make();
});
$("cancel").addEventListener("click", () => running?.abort());
$("dice").addEventListener("click", roll);
$("count").addEventListener("input", () => ($("counted").value = $("count").value));
$("key").addEventListener("change", connect);
$("model").addEventListener("change", () => usePreset("square"));
$("share").addEventListener("input", () =>
  $("over").style.setProperty("--share", `${$("share").value}%`),
);
for (const radio of document.querySelectorAll("input[name=mode]")) {
  radio.addEventListener("change", showMode);
}
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
$("file").addEventListener("change", () => open($("file").files[0]));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  if (event.key === "Escape") running?.abort();
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop") open(event.dataTransfer.files[0]);
  });
}
roll();
connect();
