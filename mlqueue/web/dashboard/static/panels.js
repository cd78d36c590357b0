// The metrics that a job has logged, as curves, and its log: what the page began with is gone on with.

const SVG = "http://www.w3.org/2000/svg";

// How long to wait between two readings, in milliseconds.
const PAUSE = 300;

// How many lines of a log a page holds, and how many points of a curve it draws at most.
const LINES = 2000;
const DRAWN = 600;

// `read(kind)` reads what is new of "metrics" or "logs", of both where nothing is said.
export function openPanels() {
  const readers = {};
  const metrics = document.querySelector("[data-metrics]"), logs = document.querySelector("[data-logs]");
  if (metrics) readers.metrics = reader(curvesOf(metrics));
  if (logs) readers.logs = reader(linesOf(logs));
  return { read: (kind) => { for (const [name, read] of Object.entries(readers)) if (!kind || kind === name) read(); } };
}

// One request at a time; whoever asks meanwhile is heard behind it.
function reader(part) {
  let running = false, again = false, over = false;
  return async function read() {
    if (over) return;
    again = running;
    if (running) return;
    running = true;
    let more = false;
    try {
      const answer = await fetch(part.url(), { headers: { Accept: "application/json" }, credentials: "same-origin" });
      if (answer.ok) {
        const told = await answer.json();
        more = part.take(told);
        over = told.ended && !more;
      }
    } catch { /* the next event, or the next look, has it read again */ }
    setTimeout(() => {
      running = false;
      if (again || more) read();
    }, PAUSE);
  };
}

// Curves

function curvesOf(panel) {
  const known = new Map();
  let place = "";
  return {
    url: () => panel.dataset.metrics + (place ? `?after=${encodeURIComponent(place)}` : ""),
    take(told) {
      place = told.next;
      if (told.whole) known.clear();
      for (const [name, points] of Object.entries(told.metrics)) {
        // What is no number (NaN) has no place on a curve.
        const numbers = points.filter(([, value]) => typeof value === "number").map(([step, value]) => [step, value]);
        known.set(name, [...(known.get(name) || []), ...numbers]);
        if (known.get(name).length) draw(panel, name, known.get(name));
      }
      return false;
    },
  };
}

function draw(panel, name, points) {
  panel.hidden = false;
  const place = panel.querySelector(".curves");
  let figure = [...place.children].find((child) => child.dataset.name === name);
  if (!figure) place.append(figure = newCurve(name));
  drawCurve(figure, points);
}

function newCurve(name) {
  const figure = document.createElement("figure");
  figure.className = "chart";
  figure.dataset.name = name;
  const caption = document.createElement("figcaption");
  caption.append(Object.assign(document.createElement("span"), { className: "name", textContent: name }));
  const value = Object.assign(document.createElement("span"), { className: "value" });
  value.append(document.createElement("b"));
  caption.append(value);
  const frame = Object.assign(document.createElement("div"), { className: "frame" });
  frame.dataset.steps = "";
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 600 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  for (const [kind, d] of [["grid", "M0,0H600M0,50H600M0,100H600"], ["line", ""]]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", kind);
    path.setAttribute("d", d);
    svg.append(path);
  }
  frame.append(svg);
  const axis = Object.assign(document.createElement("p"), { className: "axis" });
  for (let part = 0; part < 3; part += 1) axis.append(document.createElement("span"));
  figure.append(caption, frame, axis);
  return figure;
}

function drawCurve(figure, all) {
  const each = Math.ceil(all.length / DRAWN);
  const points = all.filter((_, index) => index % each === 0 || index === all.length - 1);
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const first = Math.min(...xs), last = Math.max(...xs);
  const span = last - first || 1;
  const steps = points.map(([x, y]) => `${((x - first) / span * 600).toFixed(1)},${(100 - (y - low) / (high - low) * 100).toFixed(1)}`);
  figure.querySelector(".line").setAttribute("d", `M${steps.join(" ")}${points.length === 1 ? " h1" : ""}`);
  const frame = figure.querySelector(".frame");
  frame.dataset.points = points.map((point) => point.join(",")).join(" ");
  frame.dataset.now = String(last);
  frame.dataset.span = String(span);
  const newest = short(ys[ys.length - 1]);
  figure.querySelector("b").textContent = newest;
  figure.querySelector("svg").setAttribute("aria-label", `${figure.dataset.name}, ${all.length} points; now ${newest}`);
  const told = [String(first), `from ${short(low)} to ${short(high)}`, String(last)];
  figure.querySelectorAll(".axis span").forEach((part, index) => { part.textContent = told[index]; });
}

function short(value) {
  return String(Number(value.toPrecision(4)));
}

// The log

const KINDS = { WARNING: "warn", ERROR: "bad", CRITICAL: "bad" };

function linesOf(panel) {
  const place = panel.querySelector("pre");
  let next = Number(panel.dataset.next);
  return {
    url: () => `${panel.dataset.logs}?first=${next}`,
    take(told) {
      next = told.next;
      if (!told.lines.length) return false;
      panel.hidden = false;
      const below = place.scrollTop + place.clientHeight >= place.scrollHeight - 4;
      place.append(...told.lines.map(newLine));
      while (place.childElementCount > LINES) place.firstElementChild.remove();
      if (below) place.scrollTop = place.scrollHeight;
      return true; // there may be more: an answer has a bounded number of them
    },
  };
}

function newLine(line) {
  const row = document.createElement("span");
  row.className = `l ${KINDS[line.level] || (line.stream === "stderr" ? "err" : "")}`;
  const at = Object.assign(document.createElement("span"), { className: "at" });
  at.textContent = new Date(line.at * 1000).toISOString().slice(11, 19);
  row.append(at, ` ${line.level ? `${line.level} ` : ""}${line.text}\n`);
  return row;
}

// A log is read from its end.
export function scrollDown() {
  for (const place of document.querySelectorAll("pre.log")) place.scrollTop = place.scrollHeight;
}
