// The metrics that a job has logged, as curves, and its log: where the server tells of them.

const SVG = "http://www.w3.org/2000/svg";
const OFTEN = 1500;

export function drawPanels() {
  const metrics = document.querySelector("[data-metrics]");
  const logs = document.querySelector("[data-logs]");
  if (metrics) repeat(metrics, metrics.dataset.metrics, drawCurves);
  if (logs) repeat(logs, logs.dataset.logs, writeLines);
}

// Asks again and again, until the job has ended.
async function repeat(panel, url, draw) {
  for (;;) {
    const last = !("unfinished" in document.body.dataset) || document.querySelector("#acts .chip.succeeded, #acts .chip.dead, #acts .chip.cancelled");
    try {
      const answer = await fetch(url, { headers: { Accept: "application/json" }, credentials: "same-origin" });
      if (answer.ok && !document.hidden) draw(panel, await answer.json());
    } catch { /* the next time, perhaps */ }
    if (last) return;
    await new Promise((resolve) => setTimeout(resolve, OFTEN));
  }
}

// Points by name, of whatever the answer has them in: an object of lists, or a list of steps with values.
function series(answer) {
  const found = new Map();
  const add = (name, x, y) => {
    if (typeof x !== "number" || typeof y !== "number") return;
    if (!found.has(name)) found.set(name, []);
    found.get(name).push([x, y]);
  };
  const told = answer.metrics ?? answer.points ?? answer;
  if (Array.isArray(told)) {
    told.forEach((row, index) => {
      const values = row.values ?? row.metrics ?? row;
      if ("name" in row && "value" in row) add(row.name, row.step ?? index, row.value);
      else for (const [name, y] of Object.entries(values)) if (name !== "step" && name !== "at" && name !== "time") add(name, row.step ?? index, y);
    });
  } else if (told && typeof told === "object") {
    for (const [name, points] of Object.entries(told)) {
      const list = Array.isArray(points) ? points : points.points ?? [];
      list.forEach((point, index) => {
        if (typeof point === "number") add(name, index, point);
        else if (Array.isArray(point)) add(name, point[0], point[point.length - 1]);
        else add(name, point.step ?? index, point.value);
      });
    }
  }
  return found;
}

function drawCurves(panel, answer) {
  const all = series(answer);
  if (!all.size) return;
  panel.hidden = false;
  const place = panel.querySelector(".curves");
  for (const [name, points] of all) {
    let figure = [...place.children].find((child) => child.dataset.name === name);
    if (!figure) place.append(figure = newCurve(name));
    drawCurve(figure, points);
  }
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
  const top = Object.assign(document.createElement("span"), { className: "top" });
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
  frame.append(top, svg);
  const axis = Object.assign(document.createElement("p"), { className: "axis" });
  axis.append(document.createElement("span"), document.createElement("span"));
  figure.append(caption, frame, axis);
  return figure;
}

function drawCurve(figure, points) {
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const first = xs[0], last = Math.max(...xs);
  const span = last - first || 1;
  const steps = points.map(([x, y]) => `${((x - first) / span * 600).toFixed(1)},${(100 - (y - low) / (high - low) * 100).toFixed(1)}`);
  figure.querySelector(".line").setAttribute("d", `M${steps.join(" ")}${points.length === 1 ? " h1" : ""}`);
  const frame = figure.querySelector(".frame");
  frame.dataset.points = points.map((point) => point.join(",")).join(" ");
  frame.dataset.now = String(last);
  frame.dataset.span = String(span);
  const newest = short(ys[ys.length - 1]);
  figure.querySelector("b").textContent = newest;
  figure.querySelector(".top").textContent = short(high);
  figure.querySelector("svg").setAttribute("aria-label", `${figure.dataset.name}, ${points.length} points; now ${newest}`);
  const [from, to] = figure.querySelectorAll(".axis span");
  from.textContent = String(first);
  to.textContent = String(last);
}

function short(value) {
  return String(Number(value.toPrecision(4)));
}

function writeLines(panel, answer) {
  const lines = answer.lines ?? answer.logs ?? answer.entries ?? answer;
  if (!Array.isArray(lines) || !lines.length) return;
  panel.hidden = false;
  const place = panel.querySelector("pre");
  const below = place.scrollTop + place.clientHeight >= place.scrollHeight - 4;
  place.textContent = lines.map((line) => typeof line === "string" ? line : [line.level, line.message ?? line.text ?? line.line].filter(Boolean).join("  ")).join("\n");
  if (below) place.scrollTop = place.scrollHeight;
}
