// A job as it goes on, by server-sent events; where there are no streams, by looking again.
import { keepFresh, refresh, show } from "./live.js";

// How often a page looks again where there are no streams, and after how long it is looked whether there is one by now,
// in milliseconds.
const INSTEAD = 2000;
const TRY_AGAIN = 30000;

const ENDED = ["succeeded", "dead", "cancelled"];

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

// The page of a job: what it reports is written at once, of its curves and its log what is new is read, and any other
// change has the page looked at again. What no event tells of (why it waits, what it uses) is looked at now and then.
export function followJob(url, panels) {
  const job = document.body.dataset.job;
  let wait = Number(document.body.dataset.refresh || 0);
  panels.read();
  if (!("unfinished" in document.body.dataset)) return;
  let streams = true, over = false, source = null, tryAt = 0;
  const open = () => {
    if (source || over || document.hidden) return;
    source = new EventSource(url);
    source.addEventListener("open", () => {
      streams = true;
      show(true);
      panels.read();
      keepFresh(pace());
    });
    source.addEventListener("snapshot", (event) => changed(JSON.parse(event.data)));
    source.addEventListener("state", (event) => changed(JSON.parse(event.data)));
    source.addEventListener("progress", (event) => {
      const told = JSON.parse(event.data);
      report(job, told.progress, told.progress_note);
      remaining(told.progress);
    });
    for (const kind of ["logs", "metrics"]) source.addEventListener(kind, () => panels.read(kind));
    for (const kind of ["gap", "callback", "removed"]) source.addEventListener(kind, refresh);
    source.addEventListener("error", () => {
      if (source.readyState !== EventSource.CLOSED) return show(false);
      source = null;
      // 204: it has ended. Anything else: there are no streams here, or too many, or a proxy whose server is away.
      streams = false;
      tryAt = Date.now() + TRY_AGAIN;
      if (!over) keepFresh(pace());
      refresh();
    });
  };
  const close = () => {
    if (source) source.close();
    source = null;
  };
  const pace = () => (over ? 0 : streams ? wait : Math.min(wait || INSTEAD, INSTEAD));
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => { if (event.persisted) open(); });
  document.addEventListener("fresh", ({ detail }) => {
    wait = Number(detail.refresh || 0);
    over = over || !("unfinished" in detail);
    if (over) close();
    if (over || !streams) panels.read();
    keepFresh(pace());
    if (!streams && Date.now() >= tryAt) open();
  });
  keepFresh(pace());
  open();

  let state = "";
  function changed(told) {
    if (told.state !== state) refresh();
    state = told.state;
    if (ENDED.includes(told.state)) close();
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
