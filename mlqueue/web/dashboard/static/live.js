// Keeps a page up to date. The server sends it again whenever it has changed, over a stream; where there is none to be
// had the page is fetched again and again: one request at a time, less and less often while the server does not answer.
// What has changed in it is changed in place. Nothing goes on while nobody looks.

// After how many milliseconds without a stream it is looked whether there is one by now.
const TRY_AGAIN = 30000;

let every = 0;
let failures = 0;
let timer = 0;
let running = null;
let again = false;
let etag = "";
let source = null;
let streams = false;
let tryAt = 0;

document.addEventListener("visibilitychange", () => {
  if (document.hidden) stop();
  else if (streams) begin();
  else if (every) refresh();
});
addEventListener("pagehide", stop);
addEventListener("pageshow", (event) => { if (event.persisted && streams) begin(); });

// Looks at the page every so many milliseconds; 0 ends that.
export function keepFresh(milliseconds) {
  every = milliseconds;
  if (every) show(true);
  plan();
}

// Has the page sent whenever it has changed; where that cannot be, it is looked at every so many milliseconds.
export function follow(milliseconds) {
  every = milliseconds;
  streams = true;
  show(true);
  if (!document.hidden) begin();
}

function begin() {
  stop();
  const stream = source = new EventSource(location.href);
  stream.addEventListener("open", () => { failures = 0; show(true); });
  stream.addEventListener("page", (event) => apply(JSON.parse(event.data)));
  stream.addEventListener("error", () => {
    if (stream.readyState !== EventSource.CLOSED) return show(false); // it comes again by itself
    if (source === stream) source = null;
    tryAt = Date.now() + TRY_AGAIN;
    refresh();
  });
}

function stop() {
  clearTimeout(timer);
  if (source) source.close();
  source = null;
}

// What is said instead of "live", by the status of the answer; nothing stands for no answer.
const SAID = { 401: "signed out", 403: "not allowed", 404: "gone" };

// Says whether what is seen is as it stands.
export function show(well, status = 0) {
  const sign = document.getElementById("live");
  sign.hidden = false;
  sign.classList.toggle("off", !well);
  sign.querySelector("span").textContent = well ? "live" : SAID[status] || "no answer";
}

function plan() {
  clearTimeout(timer);
  if (!every || document.hidden || source) return;
  timer = setTimeout(streams && Date.now() >= tryAt ? begin : refresh, every * Math.min(2 ** failures, 16));
}

// Fetches the page again; while that goes on already, once more behind it.
export function refresh() {
  if (running) {
    again = true;
    return running;
  }
  running = load().finally(() => {
    running = null;
    if (again) {
      again = false;
      setTimeout(refresh, 150);
    }
    plan();
  });
  return running;
}

async function load() {
  try {
    const headers = { "X-MLQueue-Again": "1", ...(etag ? { "If-None-Match": etag } : {}) };
    const answer = await fetch(location.href, { headers, cache: "no-store", credentials: "same-origin" });
    if (answer.status !== 304) {
      // That to sign in comes instead of a page that asks for a key.
      if (!answer.ok || answer.redirected) return missed(answer.redirected ? 401 : answer.status);
      etag = answer.headers.get("ETag") || "";
      apply(await answer.text());
    }
    failures = 0;
    show(true);
  } catch {
    missed(0);
  }
}

function missed(status) {
  failures += 1;
  show(false, status);
}

function apply(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const other = fresh.getElementById(part.id);
    if (other) become(part, other);
  }
  document.dispatchEvent(new CustomEvent("fresh", { detail: { ...fresh.body.dataset } }));
}

// Makes a part of the page what another one is. What somebody has opened, checked or written stays as he has it.
export function become(old, fresh) {
  if (old.isEqualNode(fresh) || old === document.activeElement && old.matches("input, select, textarea")) return;
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !(name === "open" && old.tagName === "DETAILS")) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (name === "open" && old.tagName === "DETAILS") continue;
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  const wanted = [...fresh.childNodes];
  const stays = new Set(wanted.map((child) => child.id).filter(Boolean));
  for (const child of [...old.children]) if (child.id && !stays.has(child.id)) child.remove();
  const keyed = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let at = old.firstChild;
  for (const next of wanted) {
    let same = next.nodeType === 1 && next.id ? keyed.get(next.id) : null;
    if (!same && at && at.nodeType === next.nodeType && at.nodeName === next.nodeName && !(at.id || next.id)) same = at;
    if (!same) {
      old.insertBefore(document.importNode(next, true), at);
      continue;
    }
    // What has the focus would lose it by being moved: the space that was before it goes instead.
    while (same && next.id && at && at !== same && at.nodeType === 3) {
      const space = at;
      at = at.nextSibling;
      space.remove();
    }
    if (same === at) at = at.nextSibling;
    else old.insertBefore(same, at);
    if (same.nodeType === 1) become(same, next);
    else if (same.nodeValue !== next.nodeValue) same.nodeValue = next.nodeValue;
  }
  while (at) {
    const next = at.nextSibling;
    // The tip of a chart is none of the page's.
    if (!(at.nodeType === 1 && at.hasAttribute("data-own"))) at.remove();
    at = next;
  }
}
