// Start a training, and watch it: the page of one that runs is /training#ID.

import { ask, hasEnded, submit, watch } from "./jobs.js";

const byId = (id) => document.getElementById(id);
const { actor, jobs } = byId("training").dataset;
let stop = () => {};
let points = [];

byId("start").addEventListener("submit", async (event) => {
  event.preventDefault();
  byId("problem").hidden = true;
  const kwargs = Object.fromEntries([...new FormData(event.target)].map(([name, value]) => [name, Number(value)]));
  try {
    const record = await submit(actor, JSON.stringify({ kwargs }), { "Content-Type": "application/json" });
    location.hash = record.id;
  } catch (error) {
    byId("problem").textContent = error.message;
    byId("problem").hidden = false;
  }
});

byId("cancel").addEventListener("click", async () => {
  byId("cancel").disabled = true;
  try {
    show(await ask(`${jobs}/${location.hash.slice(1)}/cancel`, { method: "POST" }));
  } catch (error) {
    byId("how").textContent = error.message;
  }
});

function open() {
  stop();
  points = [];
  const id = location.hash.slice(1);
  const valid = /^[\w.-]+$/.test(id);
  byId("run").hidden = !valid;
  byId("none").hidden = valid;
  for (const name of ["result", "error"]) byId(name).hidden = true;
  byId("curve").toggleAttribute("hidden", true);
  if (valid) stop = watch(`${jobs}/${id}`, show, (how) => { byId("how").textContent = how; });
}

function show(record) {
  byId("state").textContent = record.state;
  byId("state").className = `state ${record.state}`;
  byId("note").textContent = record.progress_note ?? (record.position ? `${record.position} jobs are ahead of it` : "");
  const bar = byId("bar");
  if (typeof record.progress === "number") bar.value = record.progress;
  else if (record.state === "running") bar.removeAttribute("value");
  else bar.value = 0;
  draw(record);
  byId("cancel").disabled = hasEnded(record) || record.cancel_requested || record.cancel_requested_at !== null;
  if (!hasEnded(record)) return;
  byId("how").textContent = "";
  if (record.state === "succeeded") {
    byId("short").textContent = record.short_result;
    byId("figure").src = `${record.links.result}.png`;
    byId("result").hidden = false;
  } else if (record.state === "dead") {
    byId("error").textContent = record.error?.message || record.dead_reason;
    byId("error").hidden = false;
  }
}

/** The accuracies that the notes tell, as far as they were heard of. */
function draw(record) {
  const found = /epoch (\d+) of (\d+): .*accuracy ([\d.]+)/.exec(record.progress_note ?? "");
  if (!found) return;
  const [epoch, epochs, accuracy] = found.slice(1).map(Number);
  points = [...points.filter((point) => point.epoch < epoch), { epoch, accuracy }];
  const x = (point) => (300 * point.epoch) / epochs;
  const y = (point) => 118 - 232 * Math.max(point.accuracy - 0.5, 0);
  byId("curve").toggleAttribute("hidden", points.length < 2);
  byId("line").setAttribute("points", points.map((point) => `${x(point)},${y(point)}`).join(" "));
}

window.addEventListener("hashchange", () => {
  open();
  // On a narrow screen it is below.
  byId("run").scrollIntoView({ block: "nearest" });
});
open();
