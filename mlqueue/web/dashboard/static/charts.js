// What a chart says at a point, where the pointer is.

export function lookCloser() {
  document.addEventListener("pointermove", (event) => {
    const frame = event.target.closest ? event.target.closest(".frame") : null;
    for (const mark of document.querySelectorAll("[data-own]")) {
      if (!frame || mark.parentElement !== frame) mark.remove();
    }
    if (frame) tell(frame, event);
  });
}

function tell(frame, event) {
  const points = (frame.dataset.points || "").split(" ").filter(Boolean).map((point) => point.split(",").map(Number));
  if (!points.length) return;
  const box = frame.getBoundingClientRect();
  const last = Number(frame.dataset.now), first = last - Number(frame.dataset.span);
  const wanted = first + (event.clientX - box.left) / box.width * (last - first);
  const [at, value] = points.reduce((best, point) => Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best);
  const x = (at - first) / (last - first) * box.width;
  const rule = mark(frame, "rule"), tip = mark(frame, "tip");
  rule.style.left = `${x}px`;
  const when = "steps" in frame.dataset ? `step ${at}` : new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  tip.textContent = `${Number(value.toPrecision(4)).toLocaleString()} ${frame.dataset.unit || ""} · ${when}`;
  tip.style.left = `${Math.max(0, Math.min(x - tip.offsetWidth / 2, box.width - tip.offsetWidth))}px`;
}

function mark(frame, kind) {
  let found = frame.querySelector(`.${kind}`);
  if (!found) {
    found = document.createElement("span");
    found.className = kind;
    found.dataset.own = "";
    found.setAttribute("aria-hidden", "true");
    frame.append(found);
  }
  return found;
}
