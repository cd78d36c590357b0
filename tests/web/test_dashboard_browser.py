"""The dashboard in a real Chromium: each page at three widths, light and dark, and each act by clicks, on a live system
with real workers. Without Chromium (or Playwright) these are skipped, but not where CI is set. There each act is done
at all three widths, else at one of them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

import pytest
from dashboard_site import PAGES, Look, fill, looking, remember_an_hour
from support import eventually

from mlqueue import State
from mlqueue.testing import temporary_server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

#: How long anything may take in the browser, in milliseconds.
PATIENCE_MS = 20_000

WIDTHS = (390, 1024, 1600)


class Tab(NamedTuple):
    """A page, and what went wrong in it."""

    page: Any
    errors: list[str]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Not looked for here: what serves these tests lives as long as the module."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if os.environ.get("CI"):
        import playwright.sync_api as sync_api

        assert CHROMIUM is not None, "there is no Chromium: apt-get install chromium"
    else:
        sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
        if CHROMIUM is None:
            pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each act is done at one of the widths, and with the fault tests at all."""
    if "site" in metafunc.fixturenames:
        all_widths = [pytest.param(width, marks=pytest.mark.faults) for width in WIDTHS]
        metafunc.parametrize("site", ["one", *(all_widths if "page" in metafunc.fixturenames else [])], scope="module")


@pytest.fixture(scope="module")
def look(chromium: Any, site: str | int) -> Iterator[Look]:
    """A dashboard with workers: another one for each width, since what is done there cannot be done twice.

    Made behind the browser, so that the tests begin at once.
    """
    with temporary_server() as settings, looking(settings, threads=16) as look:
        yield look


@pytest.fixture(scope="module")
def ids(look: Look) -> dict[str, str]:
    """Jobs of all kinds. Those that train last for the time of these tests."""
    return fill(look.mlq)


def opened(chromium: Any, **options: Any) -> Tab:
    context = chromium.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda told: told.type in ("error", "warning") and errors.append(told.text))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    return Tab(page, errors)


@pytest.fixture
def page(chromium: Any, site: str | int, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page, which must be without errors at the end."""
    width = WIDTHS[zlib.crc32(request.node.originalname.encode()) % len(WIDTHS)] if site == "one" else site
    tab = opened(chromium, viewport={"width": width, "height": 900})
    yield tab.page
    tab.page.context.close()
    # That a request is refused is told there, too, and is no error of the page.
    assert [] == [error for error in tab.errors if "Failed to load" not in error]


def becomes(page: Any, condition: str, seconds: float = PATIENCE_MS / 1000) -> None:
    """Waits until a condition of JavaScript holds. Not in the page, whose policy forbids it to evaluate texts."""
    eventually(lambda: page.evaluate(condition), seconds)


def is_the_same_page(page: Any) -> bool:
    """Whether it has not been loaded anew since `mark`."""
    return bool(page.evaluate("window.marked === true"))


def mark(page: Any) -> None:
    page.evaluate("window.marked = true")


# Looks


#: What axe looks at, by width: everything on a telephone; what depends on the colours in the dark.
RULES = {390: None, 1600: ["color-contrast"]}

#: Pages that it need not look at, since others are made of the same parts; and in the dark those that it looks at.
ALIKE = {"job-image", "job-array", "job-queued"}
IN_THE_DARK = {"overview", "job-dead", "queues", "submit-train"}


#: Whether the link to the open page is within the navigation, which scrolls on narrow screens; some pages have none.
HERE_IN_SIGHT = """() => {
  const link = document.querySelector('.side nav [aria-current="page"]')?.getBoundingClientRect();
  return !link || (link.left >= 0 && link.right <= document.documentElement.clientWidth);
}"""


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1024, "light"), (1600, "dark")])
def test_each_page_fits_and_can_be_used_by_everybody(
    chromium: Any, look: Look, ids: dict[str, str], width: int, scheme: str
) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    source = (resources.files("axe_playwright_python") / "axe.min.js").read_text()
    remember_an_hour(look.mlq)
    tab = opened(chromium, viewport={"width": width, "height": 900}, color_scheme=scheme)
    faults = []
    for name, path in PAGES.items():
        # Of the list some rows say as much as fifty.
        few = "?tag=resnet" if name == "jobs" and width == 390 else ""
        tab.page.goto(look.url + path.format(**ids) + few)
        # Nothing but the page itself scrolls sideways.
        wide = tab.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wide > 0:
            faults.append((name, f"{wide} pixels too wide"))
        if not tab.page.evaluate(HERE_IN_SIGHT):
            faults.append((name, "which page it is is out of sight"))
        if (width == 390 and name not in ALIKE) or (scheme == "dark" and name in IN_THE_DARK):
            tab.page.evaluate(source)
            options = {"resultTypes": ["violations"], **({"runOnly": RULES[width]} if RULES[width] else {})}
            for found in tab.page.evaluate("options => axe.run(options)", options)["violations"]:
                faults.append((name, found["id"], [node["target"] for node in found["nodes"]][:3]))
    tab.page.context.close()
    assert "" == "\n".join(map(str, faults))
    assert [] == tab.errors


def test_an_empty_list_offers_nothing_to_do_with_it(look: Look, ids: dict[str, str], page: Any) -> None:
    page.goto(f"{look.url}/jobs?actor=nobody")
    assert page.get_by_text("No job like that").is_visible()
    assert not page.get_by_role("button", name="Cancel selected").is_visible()
    page.goto(f"{look.url}/jobs")
    assert page.get_by_role("button", name="Cancel selected").is_visible()


def test_pages_load_nothing_from_elsewhere_and_little(chromium: Any, look: Look, ids: dict[str, str]) -> None:
    tab = opened(chromium)
    sizes: dict[str, int] = {}
    tab.page.on(
        "response",
        lambda answer: sizes.__setitem__(answer.url, len(answer.body())) if "/events" not in answer.url else None,
    )
    tab.page.goto(f"{look.url}/jobs", wait_until="load")
    assert all(url.startswith(look.url) for url in sizes)
    assert sum(sizes.values()) < 150_000, sizes
    tab.page.context.close()


# Acts


def test_a_job_is_submitted_watched_without_a_reload_and_cancelled(look: Look, page: Any) -> None:
    page.goto(look.url)
    page.click("nav >> text=Submit")
    page.click("text=Echoes")
    page.fill("[name='arg.value']", "<b>said</b>")
    page.click("button:text-is('Submit')")
    page.wait_for_selector(".acts .chip.succeeded")
    assert "<b>said</b>" in page.inner_text("#values")

    page.goto(f"{look.url}/actors/steps")
    page.fill("[name='arg.seconds']", "20")
    page.click("button:text-is('Submit')")
    page.wait_for_selector(".acts .chip.running")
    mark(page)
    becomes(page, "document.querySelector('#how progress')?.value > 0")
    first = page.evaluate("document.querySelector('#how progress').value")
    becomes(page, f"document.querySelector('#how progress').value > {first}")
    assert "step" in page.inner_text("#note")
    becomes(page, "document.getElementById('live').textContent.includes('live')")

    look.cut()
    becomes(page, "document.getElementById('live').classList.contains('off')")
    second = page.evaluate("document.querySelector('#how progress').value")
    becomes(page, f"document.querySelector('#how progress').value > {second}")
    assert is_the_same_page(page)

    page.click("button:text-is('Cancel')")
    page.wait_for_selector(".acts .chip.cancelled")
    assert "Cancelled" in page.inner_text("#how")


def test_a_job_is_followed_where_there_are_no_streams(look: Look, page: Any) -> None:
    page.route("**/events", lambda route: route.fulfill(status=503, body="{}"))
    job = look.mlq.submit("steps", 3.0)
    page.goto(f"{look.url}/jobs/{job.id}")
    mark(page)
    page.wait_for_selector(".acts .chip.succeeded")
    assert is_the_same_page(page)


def test_a_job_is_followed_where_its_stream_does_not_come_back(look: Look, page: Any) -> None:
    job = look.mlq.submit("train", 0.01, 400, 40.0)
    page.goto(f"{look.url}/jobs/{job.id}")
    points = "(document.querySelector('[data-name=loss] .line')?.getAttribute('d') || '').split(' ').length"
    becomes(page, f"{points} > 3")
    # As a proxy answers whose server is started anew.
    with page.expect_response("**/events", timeout=PATIENCE_MS):
        page.route("**/events", functools.partial(refused, 502))
        look.cut()
    drawn = page.evaluate(points)
    becomes(page, f"{points} > {drawn + 30}")
    job.cancel()


def test_the_focus_stays_where_it_is_while_others_come_and_go(look: Look, page: Any) -> None:
    look.mlq.store.pause("b-first")
    look.mlq.store.pause("c-second")
    page.goto(f"{look.url}/queues")
    page.focus("[aria-label='Queue c-second'] button:text-is('Resume')")
    focus = "document.activeElement.closest('section')?.getAttribute('aria-label')"
    look.mlq.store.pause("a-new")
    page.wait_for_selector("[aria-label='Queue a-new']")
    assert "Queue c-second" == page.evaluate(focus)
    for name in ("a-new", "b-first"):
        look.mlq.store.resume(name)
    page.wait_for_selector("[aria-label='Queue b-first']", state="detached")
    assert "Queue c-second" == page.evaluate(focus)
    page.keyboard.press("Enter")
    assert "Resumed." in page.inner_text("[role=status]")
    assert "c-second" not in look.mlq.store.paused()


def test_long_names_make_no_page_wider_than_the_screen(chromium: Any, look: Look) -> None:
    job = look.mlq.submit("n" * 100, 1, {"k" * 120: ["v" * 2000]}, queue_name="q" * 100, tags=["t" * 60])
    tab = opened(chromium, viewport={"width": 390, "height": 900})
    for path in (f"/jobs/{job.id}", "/", "/jobs", "/queues"):
        tab.page.goto(look.url + path)
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert 0 >= tab.page.evaluate(wide), path
    tab.page.context.close()
    job.cancel()


def refused(status: int, route: Any) -> None:
    route.fulfill(status=status, body="")


def test_a_page_says_why_it_is_not_live(look: Look, page: Any) -> None:
    page.goto(f"{look.url}/queues")
    becomes(page, "document.getElementById('live').textContent.includes('live')")
    for status, said in ((502, "no answer"), (404, "gone"), (401, "signed out")):
        page.route("**/queues", functools.partial(refused, status))
        look.cut()
        becomes(page, f"document.getElementById('live').textContent.includes('{said}')")
        page.unroute("**/queues")
        page.reload()
        becomes(page, "document.getElementById('live').textContent.includes('live')")


def test_the_list_moves_in_place_and_keeps_what_was_selected(look: Look, page: Any) -> None:
    job, other = look.mlq.submit("steps", 3.0, tags=["mine"]), look.mlq.submit("later", delay=60, tags=["mine"])
    page.goto(f"{look.url}/jobs?tag=mine")
    mark(page)
    page.check(f"input[value='{other.id}']")
    page.wait_for_selector(f"#row-{job.id} .chip.running")
    page.wait_for_selector(f"#row-{job.id} .chip.succeeded")
    assert is_the_same_page(page)
    assert page.is_checked(f"input[value='{other.id}']")
    page.click("text=Cancel selected")
    assert "Cancelled: 1." in page.inner_text("[role=status]")
    assert State.CANCELLED is other.state
    page.goto(f"{look.url}/jobs?tag=mine&state=cancelled")
    page.check("[data-all]")
    page.click("text=Retry selected")
    assert State.QUEUED is other.state
    look.mlq.store.cancel(other.id)


def test_a_dead_letter_is_mended_and_then_done(look: Look, page: Any) -> None:
    job = look.mlq.submit("embed", " ", 8)
    eventually(lambda: job.state is State.DEAD)
    page.goto(f"{look.url}/jobs/{job.id}")
    assert "text is empty" in page.inner_text(".error-card")
    page.click("text=Mend and requeue")
    page.fill("[name='arg.0']", '"now there is some"')
    page.click("button:text-is('Requeue')")
    page.wait_for_selector(".acts .chip.succeeded")
    page.wait_for_selector(".plot")
    page.click("nav >> text=Changes")
    assert f"{job.id}, with other argument 1" in page.inner_text("tbody tr:first-child")


def test_what_died_of_the_same_is_put_back_and_forgotten(look: Look, page: Any) -> None:
    for number in range(3):
        look.mlq.submit("fails", number)
    eventually(lambda: look.mlq.dead_letters.count(actor="fails") == 3)
    page.goto(f"{look.url}/dead?actor=fails")
    assert "3" == page.inner_text(".groups .n")
    page.click("button:text-is('Requeue')")
    assert "Back in the queue: 3." in page.inner_text("[role=status]")
    eventually(lambda: look.mlq.dead_letters.count(actor="fails") == 3)
    page.goto(f"{look.url}/dead?actor=fails")
    page.click("button:has-text('Purge')")
    page.click("button:text-is('Forget them')")
    assert "Forgotten: 3." in page.inner_text("[role=status]")


def test_a_queue_is_paused_and_resumed(look: Look, page: Any) -> None:
    page.goto(f"{look.url}/queues")
    queue = page.locator("[aria-label='Queue side']")
    queue.locator("button:text-is('Pause')").click()
    page.wait_for_selector("[aria-label='Queue side'] .badge.warn")
    job = look.mlq.submit("aside")
    page.goto(f"{look.url}/jobs/{job.id}")
    assert "queue side is paused" in page.inner_text(".why")
    mark(page)
    other = page.context.new_page()
    other.goto(f"{look.url}/queues")
    other.locator("[aria-label='Queue side'] button:text-is('Resume')").click()
    page.wait_for_selector(".acts .chip.succeeded")
    assert is_the_same_page(page)


def test_the_curves_and_the_log_of_a_job_grow(look: Look, page: Any) -> None:
    job = look.mlq.submit("train", 0.01, 400, 40.0)
    page.goto(f"{look.url}/jobs/{job.id}")
    mark(page)
    points = "(document.querySelector('[data-name=loss] .line')?.getAttribute('d') || '').split(' ').length"
    becomes(page, f"{points} > 3")
    drawn = page.evaluate(points)
    becomes(page, "document.querySelector('#logs-panel pre').textContent.includes('epoch 5: loss')")
    becomes(page, f"{points} > {drawn}")
    page.hover("[data-name=loss] .frame")
    assert "step" in page.inner_text(".tip")

    look.cut()
    becomes(page, "document.getElementById('live').classList.contains('off')")
    drawn, at = page.evaluate(points), look.mlq.store.log(job.id).next
    becomes(page, f"{points} > {drawn + 5}")
    becomes(page, f"document.querySelectorAll('#logs-panel .l').length > {at}")
    # Each line once, in its order, and none is missing.
    epochs = [int(number) for number in re.findall(r"epoch (\d+):", page.inner_text("#logs-panel"))]
    assert list(range(1, len(epochs) + 1)) == epochs
    assert 1 == page.locator("#logs-panel .warn").first.count()
    assert is_the_same_page(page)
    page.click("button:text-is('Cancel')")
    page.wait_for_selector(".acts .chip.cancelled")
    becomes(page, "!document.querySelector('#logs-panel').hidden && !document.querySelector('#metrics-panel').hidden")


def test_without_scripts_curves_and_log_are_there_too(chromium: Any, look: Look) -> None:
    job = look.mlq.submit("train", 0.01, 400, 40.0)
    eventually(lambda: len(look.mlq.store.metrics(job.id).points.get("loss", ())) > 2)
    tab = opened(chromium, java_script_enabled=False)
    tab.page.goto(f"{look.url}/jobs/{job.id}")
    assert tab.page.locator("[data-name=loss] .line").get_attribute("d").count(" ") >= 2
    assert "epoch 1: loss" in tab.page.inner_text("#logs-panel")
    assert "epoch" in tab.page.inner_text("dt:text-is('Checkpoint') + dd")
    tab.page.context.close()
    job.cancel()


def test_a_limit_shows_who_holds_it_and_who_waits_and_is_set(look: Look, ids: dict[str, str], page: Any) -> None:
    page.goto(f"{look.url}/jobs/{ids['parked']}")
    why = page.inner_text(".why")
    assert "It waits for gpu, held by job" in why
    page.click(f".why a[title='{ids['holder']}']")
    assert ids["holder"] in page.inner_text("#job-id")
    page.click("dt:text-is('Holds') + dd a")
    limit = page.locator("[aria-label='Limit gpu']")
    assert "1 of 1 slot in use" in limit.inner_text()
    assert 1 == limit.locator(f"a[title='{ids['holder']}']").count()
    assert "2 jobs" in limit.inner_text()
    assert 1 == limit.locator(f"a[title='{ids['parked']}']").count()
    assert "0 of 4 slots" in page.inner_text("[aria-label='Limit licence']")
    mark(page)
    other = page.context.new_page()
    other.goto(f"{look.url}/limits")
    other.locator("[aria-label='Slots of gpu']").fill("2")
    other.locator("[aria-label='Limit gpu'] button:text-is('Set')").click()
    assert "It has 2 slots now." in other.inner_text("[role=status]")
    becomes(page, "document.querySelector('[aria-label=\"Limit gpu\"]').textContent.includes('2 of 2 slots')")
    becomes(page, f'document.querySelectorAll(\'[aria-label="Limit gpu"] a[title="{ids["parked"]}"]\').length == 1')
    assert "1 job\n" in limit.inner_text() or "1 job " in limit.inner_text()
    assert is_the_same_page(page)
    assert State.RUNNING is look.mlq.store.record(ids["parked"]).state


def test_functions_say_whether_they_are_loaded(look: Look, ids: dict[str, str], page: Any) -> None:
    page.goto(f"{look.url}/functions")
    good, bad = page.locator("tr", has_text="caption"), page.locator("tr", has_text="segment")
    assert "loaded" == good.locator(".chip").inner_text()
    assert "not loaded" == bad.locator(".chip").inner_text()
    assert "No module named 'support'" in bad.inner_text()
    mark(page)
    assert look.mlq.remove_function("caption")
    becomes(page, "!document.querySelector('#functions-list').textContent.includes('caption')")
    assert is_the_same_page(page)


def test_the_overview_is_sent_when_it_changes_and_goes_on_after_a_cut(look: Look, page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.resource_type))
    page.goto(look.url)
    becomes(page, "document.getElementById('live').textContent.includes('live')")
    mark(page)
    queued = "document.querySelector('.numbers .scheduled .n').textContent"
    for cut in (False, True):
        if cut:
            look.cut()
            becomes(page, "document.getElementById('live').classList.contains('off')")
        before = int(page.evaluate(queued).replace(",", ""))
        job = look.mlq.submit("later", delay=600)
        becomes(page, f"{queued} == {before + 1}")
        becomes(page, "!document.getElementById('live').classList.contains('off')")
        look.mlq.store.cancel(job.id)
        becomes(page, f"{queued} == {before}")
    assert is_the_same_page(page)
    # It came over the stream: the page was not fetched.
    assert "fetch" not in asked


def test_the_overview_is_fetched_where_there_are_no_streams(look: Look, page: Any) -> None:
    def refuse(route: Any) -> None:
        if "event-stream" in route.request.headers.get("accept", ""):
            route.fulfill(status=503, body="")
        else:
            route.continue_()

    page.route(f"{look.url}/", refuse)
    page.goto(f"{look.url}/")
    mark(page)
    scheduled = "document.querySelector('.numbers .scheduled .n').textContent"
    before = int(page.evaluate(scheduled).replace(",", ""))
    job = look.mlq.submit("later", delay=600)
    becomes(page, f"{scheduled} == {before + 1}")
    assert is_the_same_page(page)
    look.mlq.store.cancel(job.id)


def test_without_scripts_all_works(chromium: Any, look: Look) -> None:
    tab = opened(chromium, java_script_enabled=False)
    job = look.mlq.submit("later", delay=600, tags=["still"])
    tab.page.goto(f"{look.url}/jobs?tag=still")
    tab.page.click(f"#row-{job.id} a.id")
    tab.page.click("button:text-is('Cancel')")
    assert "cancelled" in tab.page.inner_text(".acts .chip")
    tab.page.goto(look.url)
    assert 4 == tab.page.locator(".chart svg").count()
    tab.page.context.close()


def test_a_worker_is_drained(look: Look, page: Any) -> None:
    page.goto(f"{look.url}/workers")
    pids = set(re.findall(r"pid (\d+)", page.inner_text("table")))
    assert 2 == len(pids)
    idle = next(worker.info["pid"] for worker in look.mlq.store.workers() if worker.info)
    page.locator("tr", has_text=f"pid {idle}").locator("button:text-is('Drain')").click()
    assert "is asked" in page.inner_text("[role=status]")
    mark(page)
    look.mlq.store.cancel(look.mlq.submit("later", delay=60).id)
    eventually(lambda: all("drain" == w.asked or w.info.get("pid") != idle for w in look.mlq.store.workers()))

    def has_ended() -> bool:
        # Before its supervisor has heard of it, it may still take one that waited for those that are cancelled here.
        for record in look.mlq.jobs(state=("queued", "running"), limit=200).jobs:
            look.mlq.store.cancel(record.id)
        return idle not in [worker.info.get("pid") for worker in look.mlq.store.workers()]

    eventually(has_ended, 30)
    eventually(lambda: f"pid {idle}" not in page.inner_text("main"))
    assert is_the_same_page(page)


# What is made to run

EVIL = [
    "<script>fetch('/ran')</script>",
    "\"><img src=/ran onerror=fetch('/ran')>",
    "</textarea></pre></title><svg/onload=fetch('/ran')>",
    "' autofocus onfocus=fetch('/ran') x='",
    "javascript:fetch('/ran')",
]


def test_nothing_that_a_job_carries_runs(chromium: Any, look: Look) -> None:
    for text in EVIL:
        look.mlq.submit("carries", text, tags=[text[:100]], callback="http://127.0.0.1:9/" + text.replace(" ", ""))
        look.mlq.submit("carries", text, fail=False, more={text: [text, {text: text}]})
        look.mlq.submit(text[:100], delay=600, queue_name=text[:100])
        look.mlq.store.note_act(text, text, text)
        look.mlq.limits.set(text.replace("/", "!")[:100], 3)
        look.mlq.register_function(lambda msg, utils: None, text)
    ended = (State.SUCCEEDED, State.DEAD)
    eventually(lambda: len(look.mlq.jobs(actor="carries", state=ended, limit=100).jobs) == 2 * len(EVIL))
    tab = opened(chromium)
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    records = look.mlq.jobs(actor="carries", limit=100).jobs
    paths = [
        "/",
        "/jobs",
        "/jobs?actor=carries",
        "/dead",
        "/dead/letters",
        "/queues",
        "/limits",
        "/functions",
        "/callbacks",
        "/acts",
        "/workers",
    ]
    paths += [f"/jobs/{record.id}" for record in records]
    paths += [f"/dead/{record.id}" for record in records if record.state is State.DEAD]
    for path in paths:
        tab.page.goto(look.url + path)
        if path.endswith(records[0].id):
            # Its metrics and its log as the scripts draw them, too.
            becomes(tab.page, "document.querySelector('#metrics-panel .frame[data-points]') !== null")
            assert records[0].progress in tab.page.inner_text("#logs-panel")
    tab.page.context.close()
    assert [] == tab.errors
    assert [] == [url for url in asked if "/ran" in url and "/jobs/" not in url]
