// What the pages do beside what they do without any script: they stay up to date, and spare some clicks.
import { follow, refresh } from "./live.js";
import { followJob } from "./jobs.js";
import { openPanels, scrollDown } from "./panels.js";
import { lookCloser } from "./charts.js";

const body = document.body;

// What was done is told once: not again when the page is loaded anew.
const here = new URL(location.href);
if (here.searchParams.has("told")) {
  here.searchParams.delete("told");
  here.searchParams.delete("n");
  history.replaceState(null, "", here);
}

// On a narrow screen the pages are a row that scrolls: the one that is open is in sight.
document.querySelector('.side nav [aria-current="page"]')?.scrollIntoView({ block: "nearest", inline: "center" });

scrollDown();
if (body.dataset.events) followJob(body.dataset.events, openPanels());
else if (Number(body.dataset.refresh)) follow(Number(body.dataset.refresh));
lookCloser();

// Select all.
for (const form of document.querySelectorAll("[data-select]")) {
  const all = form.querySelector("[data-all]");
  if (!all) continue;
  all.parentElement.hidden = false;
  const boxes = () => [...form.querySelectorAll('input[name="id"]')];
  all.addEventListener("change", () => boxes().forEach((box) => { box.checked = all.checked; }));
  form.addEventListener("change", (event) => {
    if (event.target === all) return;
    const checked = boxes().filter((box) => box.checked).length;
    all.checked = checked > 0 && checked === boxes().length;
    all.indeterminate = checked > 0 && !all.checked;
  });
}

// Copy.
for (const button of document.querySelectorAll("[data-copy]")) {
  if (!navigator.clipboard) break;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

// A key for the search, and one to look again.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(input|textarea|select)$/i.test(event.target.tagName)) return;
  const search = document.querySelector('input[type="search"]');
  if (event.key === "/" && search) {
    event.preventDefault();
    search.focus();
  } else if (event.key === "r") {
    refresh();
  }
});
