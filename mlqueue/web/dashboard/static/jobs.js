// Jobs as they go on, by server-sent events; where there are no streams, by looking again.
import { keepFresh, refresh, show } from "./live.js";

// How often a page looks again where there are no streams, in milliseconds.
const INSTEAD = 2000;

// Writes what a job has reported wherever it is shown.
function report(id, progress, note) {
  for (const place of document.querySelectorAll(`[data-job="${CSS.escape(id)}"]`)) {
    const bar = place.querySelector("progress");
    const share = typeof progress === "number" && progress >= 0 && progress <= 100;
    if (bar && share) bar.value = progress;
    const text = place.querySelector(".note");
    const value = typeof progress === "number" ? `${Number(progress.toPrecision(3))} %` : progress;
    if (text) text.textContent = [value, note].filter((part) => part !== null && part !== "").join(" · ");
  }
}

// The page of a job: what it reports is written at once, any other change has the page looked at again.
export function followJob(url) {
  const job = document.body.dataset.job;
  if (!("unfinished" in document.body.dataset)) return;
  const source = new EventSource(url);
  let heard = false;
  source.addEventListener("open", () => { heard = true; show(true); });
  source.addEventListener("snapshot", (event) => changed(JSON.parse(event.data)));
  source.addEventListener("state", (event) => changed(JSON.parse(event.data)));
  source.addEventListener("progress", (event) => {
    const told = JSON.parse(event.data);
    report(job, told.progress, told.progress_note);
    document.body.dataset.reported = String(told.progress);
    remaining(told.progress);
  });
  for (const kind of ["gap", "callback", "removed"]) source.addEventListener(kind, refresh);
  source.addEventListener("error", () => {
    if (source.readyState !== EventSource.CLOSED) return show(false);
    // 204: it has ended. Anything else: there are no streams here, or too many.
    if (!heard) keepFresh(INSTEAD);
    refresh();
  });

  let state = "";
  function changed(told) {
    if (told.state !== state) refresh();
    state = told.state;
    if (["succeeded", "dead", "cancelled"].includes(told.state)) source.close();
  }

  // How long it has to go: at the pace since this page has seen it move.
  let first = null;
  function remaining(progress) {
    const place = document.getElementById("eta");
    if (typeof progress !== "number" || progress > 100) return;
    if (!document.querySelector("#how progress")) refresh();
    first = first && first.progress <= progress ? first : { progress, at: Date.now() };
    const gone = progress - first.progress;
    if (!place || gone <= 0) return;
    const seconds = (Date.now() - first.at) / 1000 * (100 - progress) / gone;
    place.textContent = `about ${inWords(seconds)} to go`;
  }
}

function inWords(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round(seconds % 3600 / 60)} min`;
}

// The list: while a job of it runs, the page is looked at often; else now and then.
export function followList() {
  const soon = () => {
    const busy = document.querySelector("#list progress, #list .chip.queued, #list .chip.running");
    const here = new URL(location.href).searchParams;
    if (!here.has("cursor") && !here.get("text")) keepFreshAt(busy ? 1000 : 5000);
  };
  let now = 0;
  function keepFreshAt(milliseconds) {
    if (milliseconds !== now) keepFresh(milliseconds);
    now = milliseconds;
  }
  document.addEventListener("fresh", soon);
  soon();
}
