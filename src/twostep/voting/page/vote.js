// The booth: a prompt, two pictures, an answer by key or by touch.

const $ = (id) => document.getElementById(id);
const KEYS = {
  ArrowLeft: "left", 1: "left", a: "left",
  ArrowRight: "right", 2: "right", d: "right",
  ArrowDown: "same", ArrowUp: "same", 0: "same", "=": "same",
  s: "skip",
};
const TAKES_BACK = ["Backspace", "z", "u"];
const invitation = location.hash.slice(1);
const pictures = new Map(); // address -> promise of a blob's address
let voter = localStorage.getItem("voter") ?? "";
let current = null; // the pair on the screen
let shownAt = 0;
let busy = false;
let beyond = false; // past the goal, and going on

function headers(more) {
  return invitation ? { ...more, "X-Invitation": invitation } : more;
}

async function ask(path, body) {
  const answer = await fetch(path, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify({ voter, ...body }),
  });
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(found.error ?? `HTTP ${answer.status}`), { status: answer.status });
  return found;
}

function fetchPicture(address) {
  if (!pictures.has(address)) {
    const found = fetch(address, { headers: headers({}) }).then(async (answer) => {
      if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? "a picture is missing");
      return URL.createObjectURL(await answer.blob());
    });
    found.catch(() => pictures.delete(address));
    pictures.set(address, found);
  }
  return pictures.get(address);
}

// What is neither on the screen nor next is let go.
async function forget(kept) {
  for (const [address, found] of pictures) {
    if (kept.has(address)) continue;
    pictures.delete(address);
    found.then(URL.revokeObjectURL, () => {});
  }
}

function trouble(text) {
  $("trouble").textContent = text ?? "";
  $("trouble").hidden = !text;
}

function only(id) {
  for (const part of ["welcome", "booth", "end"]) $(part).hidden = part !== id;
}

async function show(page) {
  const { pairs, done, goal, total, undo } = page;
  $("progress").value = Math.min(1, done / (beyond ? total : goal));
  $("count").textContent = `${done} of ${beyond ? total : goal}`;
  $("undo").disabled = $("undo-last").disabled = !undo;
  if (!pairs.length || (done >= goal && !beyond)) {
    current = null;
    $("thanks").textContent = pairs.length
      ? `${done} answers are kept. There are ${total - done} more pairs, if you like.`
      : "You have seen every pair. Your answers are kept.";
    $("more").hidden = !pairs.length;
    return only("end");
  }
  const [pair] = pairs;
  only("booth");
  $("pair").classList.add("waiting");
  const [left, right] = await Promise.all([fetchPicture(pair.left), fetchPicture(pair.right)]);
  $("left").src = left;
  $("right").src = right;
  await Promise.all([$("left").decode(), $("right").decode()]);
  $("prompt").textContent = pair.prompt;
  $("pair").classList.remove("waiting");
  for (const button of document.querySelectorAll(".chosen")) button.classList.remove("chosen");
  current = pair;
  shownAt = performance.now();
  document.body.dataset.task = pair.task;
  const next = pairs.slice(1).flatMap((each) => [each.left, each.right]);
  forget(new Set([pair.left, pair.right, ...next]));
  for (const address of next) fetchPicture(address).catch(() => {});
}

// One request at a time: a key held down is one vote.
async function step(path, body) {
  if (busy) return;
  busy = true;
  try {
    await show(await ask(path, body));
    trouble("");
  } catch (error) {
    if (error.status === 409) {
      // The pictures were exchanged meanwhile: what is there now is asked for.
      await ask("/api/next", {}).then(show).catch((again) => trouble(again.message));
    } else {
      trouble(error instanceof TypeError ? "The server does not answer; your earlier votes are kept." : error.message);
    }
  } finally {
    busy = false;
  }
}

function vote(answer) {
  if (!current || busy) return;
  document.querySelector(`.answers [data-answer="${answer}"]`)?.classList.add("chosen");
  const seconds = Math.min(86400, (performance.now() - shownAt) / 1000);
  step("/api/vote", { task: current.task, answer, seconds: Math.round(seconds * 100) / 100 });
}

function enter() {
  $("who").textContent = voter;
  step("/api/next", {});
}

$("welcome").addEventListener("submit", (event) => {
  event.preventDefault();
  voter = $("name").value.trim();
  if (!voter) return;
  localStorage.setItem("voter", voter);
  enter();
});
$("leave").addEventListener("click", () => {
  localStorage.removeItem("voter");
  $("name").value = "";
  only("welcome");
  $("name").focus();
});
$("more").addEventListener("click", () => {
  beyond = true;
  step("/api/next", {});
});
for (const id of ["undo", "undo-last"]) $(id).addEventListener("click", () => step("/api/undo", {}));
for (const button of document.querySelectorAll("[data-answer]")) {
  button.addEventListener("click", () => vote(button.dataset.answer));
}
for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => {
    $("large").src = $(button.dataset.zoom).src;
    $("zoom").showModal();
  });
}
$("zoom").addEventListener("click", () => $("zoom").close());
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (!$("welcome").hidden) return;
  if ($("zoom").open) return event.key !== "Escape" && $("zoom").close();
  if (TAKES_BACK.includes(event.key)) {
    event.preventDefault();
    return step("/api/undo", {});
  }
  if (KEYS[event.key] && !$("booth").hidden) {
    event.preventDefault();
    vote(KEYS[event.key]);
  }
});

if (voter) enter();
else {
  only("welcome");
  $("name").focus();
}
