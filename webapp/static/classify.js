// Draw or choose a picture of a digit, and have it recognized.

import { ask, hasEnded, submit, watch } from "./jobs.js";

const byId = (id) => document.getElementById(id);
const actor = byId("classify").dataset.actor;
const canvas = byId("canvas");
const context = canvas.getContext("2d");
let drawn = false;

// Drawing

function clear() {
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  drawn = false;
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

function begin(event) {
  canvas.setPointerCapture(event.pointerId);
  context.lineWidth = canvas.width / 9;
  context.lineCap = context.lineJoin = "round";
  context.strokeStyle = "#000000";
  context.beginPath();
  context.moveTo(...place(event));
  move(event);
}

function move(event) {
  if (!canvas.hasPointerCapture(event.pointerId)) return;
  context.lineTo(...place(event));
  context.stroke();
  drawn = true;
}

canvas.addEventListener("pointerdown", begin);
canvas.addEventListener("pointermove", move);
byId("clear").addEventListener("click", clear);
clear();

byId("classify-drawing").addEventListener("click", () => {
  if (drawn) canvas.toBlob((picture) => recognize(picture), "image/png");
  else say("Draw a digit first.", true);
});
byId("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) recognize(file);
  event.target.value = "";
});

// Recognizing

function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").className = bad ? "bad" : "quiet";
  byId("status").hidden = !text;
}

async function recognize(picture) {
  for (const id of ["digit", "confidence", "details"]) byId(id).hidden = true;
  byId("answer").ariaBusy = "true";
  say("Asking a worker …");
  try {
    const form = new FormData();
    form.append("picture", picture, "picture");
    show(await submit(actor, form, { Prefer: "wait=5" }));
  } catch (error) {
    say(error.message, true);
    byId("answer").ariaBusy = "false";
  }
}

async function show(record) {
  if (!hasEnded(record)) {
    const ahead = record.position ? ` ${record.position} jobs are ahead of it.` : "";
    say(`No worker has taken it yet.${ahead} Is one running?`);
    watch(record.links.self, (later) => hasEnded(later) && show(later));
    return;
  }
  byId("answer").ariaBusy = "false";
  if (record.state !== "succeeded") {
    say(record.error?.message || `The job is ${record.state}.`, true);
    return;
  }
  const found = record.result ?? (await ask(record.links.result));
  say("");
  byId("digit").textContent = found.digit;
  byId("confidence").textContent = `It is ${(100 * found.confidence).toFixed(1)} % sure.`;
  byId("bars").replaceChildren(...found.probabilities.map((value, digit) => bar(digit, value, digit === found.digit)));
  drawSeen(found.image);
  for (const id of ["digit", "confidence", "details"]) byId(id).hidden = false;
}

function bar(digit, probability, best) {
  const row = document.createElement("tr");
  row.className = best ? "best" : "";
  const name = document.createElement("th");
  name.scope = "row";
  name.textContent = digit;
  const meter = document.createElement("meter");
  meter.value = probability;
  meter.setAttribute("aria-hidden", "true");
  const middle = document.createElement("td");
  middle.append(meter);
  const number = document.createElement("td");
  number.className = "number";
  number.textContent = `${(100 * probability).toFixed(1)} %`;
  row.append(name, middle, number);
  return row;
}

function drawSeen(rows) {
  const seen = byId("seen").getContext("2d");
  rows.forEach((row, y) => row.forEach((ink, x) => {
    const shade = Math.round(255 * (1 - ink));
    seen.fillStyle = `rgb(${shade}, ${shade}, ${shade})`;
    seen.fillRect(x, y, 1, 1);
  }));
}
