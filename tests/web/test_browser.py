"""In a real Chromium: the reference app, as its Procfile starts it, and results that are made to run.

Without Chromium (or Playwright, which drives it) the tests that need it are skipped; CI installs both.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import flask
import httpx
import numpy as np
import pytest
from hosting import PREFIX, ROOT, free_port, mounted
from PIL import Image
from support import StartWorker, eventually
from werkzeug.serving import WSGIRequestHandler, make_server

from mlqueue import MLQ, Result
from mlqueue.testing import temporary_server

#: Where browsers are, by name.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

#: How long anything may take in the browser, in milliseconds.
PATIENCE_MS = 30_000


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as driver:
        # Its sandbox needs what containers and root do not have; what is opened here is ours.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page, which must be without errors at the end."""
    context = chromium.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    # That a request is refused is told there, too, and is no error of the page.
    page.on(
        "console", lambda told: told.type == "error" and "Failed to load" not in told.text and errors.append(told.text)
    )
    yield page
    context.close()
    assert [] == errors


def becomes(page: Any, condition: str) -> None:
    """Waits until a condition of JavaScript holds. Not in the page, whose policy forbids it to evaluate texts."""
    eventually(lambda: page.evaluate(condition), PATIENCE_MS / 1000)


# The reference app


class Site(NamedTuple):
    url: str
    log: Path


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """The lines of the Procfile, run by honcho as a platform runs them: with PORT and REDIS_URL."""
    with temporary_server() as settings, contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlq-site-")))
        port = free_port()
        log = folder / "log"
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("MLQUEUE_", "DIGITS_"))}
        environ = kept | {
            "HOME": str(folder),
            "PATH": f"{programs(folder)}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "REDIS_URL": str(settings.url),
            "PORT": str(port),
            # Of the tests, not of the platform: fewer processes, and callbacks to this machine.
            "MLQUEUE_PROCESSES": "1",
            "MLQUEUE_CALLBACK_ALLOW": "loopback",
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "honcho", "-f", str(ROOT / "Procfile"), "-d", str(ROOT), "start"],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        found = Site(f"http://localhost:{port}", log)
        try:
            eventually(
                lambda: process.poll() is None and "is ready after" in log.read_text() and answers(found.url), 60
            )
            yield found
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def programs(folder: Path) -> Path:
    """A folder with the programs that an installation would put on the PATH."""
    path = folder / "bin"
    path.mkdir()
    for name, code in {
        "mlqueue": "import sys; from mlqueue.cli import main; sys.exit(main())",
        "gunicorn": "import sys; from gunicorn.app.wsgiapp import run; sys.exit(run())",
    }.items():
        script = path / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"\n')
        script.chmod(0o755)
    return path


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/api/healthz").text == "ok"
    return False


def picture_of(label: int) -> bytes:
    """A PNG of a digit of the data set, as somebody would upload it."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    image = digits.images[np.flatnonzero(digits.target == label)[3]] / 16
    large = Image.fromarray((255 * (1 - image)).astype(np.uint8)).resize((200, 200))
    paper = Image.new("L", (320, 280), 255)
    paper.paste(large, (70, 40))
    file = io.BytesIO()
    paper.save(file, "PNG")
    return file.getvalue()


def test_each_line_of_the_procfile_runs_under_honcho(site: Site) -> None:
    eventually(lambda: "jobs of digits that run for longer than" in site.log.read_text())
    text = site.log.read_text()
    for line in (ROOT / "Procfile").read_text().splitlines():
        name = line.partition(":")[0]
        assert re.search(rf"{name}\.1 +\| ", text), name
    assert httpx.get(f"{site.url}/").status_code == 200
    assert {"classify_digit", "train_digits", "predict_digits"} == {
        actor["name"] for actor in httpx.get(f"{site.url}/api/actors").json()["actors"]
    }


def test_a_training_is_started_and_watched_and_an_uploaded_digit_is_recognized(site: Site, page: Any) -> None:
    page.goto(f"{site.url}/training")
    page.fill("#epochs", "6")
    page.fill("#hidden", "64")
    page.click("#start button")
    page.wait_for_selector("#state.running")
    becomes(page, "document.getElementById('how').textContent === 'live'")
    becomes(page, "document.getElementById('bar').value > 0 && document.getElementById('bar').value < 100")
    page.wait_for_selector("#state.succeeded")
    assert re.fullmatch(r"accuracy 0\.9\d+", page.inner_text("#short"))
    becomes(page, "document.getElementById('figure').naturalWidth === 1100")
    points = page.get_attribute("#line", "points").split()
    assert len(points) >= 2

    page.click("nav >> text=Classify")
    for label in (0, 3):
        page.set_input_files("#file", {"name": "digit.png", "mimeType": "image/png", "buffer": picture_of(label)})
        page.wait_for_selector("#digit:visible")
        assert str(label) == page.inner_text("#digit")
        assert "% sure" in page.inner_text("#confidence")
    assert 10 == page.locator("#bars tr").count()

    draw_nought(page)
    page.click("#classify-drawing")
    becomes(page, "document.getElementById('digit').textContent === '0'")


def draw_nought(page: Any) -> None:
    """With the mouse: an oval, which every model takes for what it is."""
    box = page.locator("#canvas").bounding_box()
    for step in range(25):
        angle = step * math.tau / 24
        x, y = 0.5 + 0.22 * math.sin(angle), 0.5 + 0.35 * math.cos(angle)
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        if step == 0:
            page.mouse.down()
    page.mouse.up()


def test_a_picture_that_is_none_is_refused_in_words(site: Site, page: Any) -> None:
    page.goto(site.url)
    page.set_input_files("#file", {"name": "digit.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("#status.bad")
    assert "these 10 bytes are no picture" in page.inner_text("#status")
    page.click("#clear")
    page.click("#classify-drawing")
    assert "Draw a digit first." == page.inner_text("#status")


def test_a_training_is_cancelled_and_one_of_another_page_is_found_again(site: Site, page: Any) -> None:
    page.goto(f"{site.url}/training")
    page.fill("#epochs", "200")
    page.click("#start button")
    page.wait_for_selector("#state.running")
    page.reload()
    page.wait_for_selector("#state.running")
    page.click("#cancel")
    page.wait_for_selector("#state.cancelled")
    assert page.is_disabled("#cancel")


def test_a_training_is_watched_where_there_are_no_streams(site: Site, page: Any) -> None:
    page.route("**/events", lambda route: route.fulfill(status=503, body="{}"))
    page.goto(f"{site.url}/training")
    page.fill("#epochs", "3")
    page.fill("#hidden", "16")
    page.click("#start button")
    becomes(page, "document.getElementById('how').textContent.startsWith('by asking')")
    page.wait_for_selector("#state.succeeded")


def test_an_order_is_processed_and_done_when_the_worker_has_called_back(site: Site, page: Any) -> None:
    page.goto(f"{site.url}/orders")
    page.fill("#name", "<i>Mine</i>")
    page.fill("#epochs", "2")
    page.click("form button")
    assert "<i>Mine</i>" == page.inner_text("h1")
    assert "processing" == page.inner_text("#state")
    page.wait_for_selector("#state.done")
    assert page.inner_text("#short").startswith("accuracy ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_narrow_screen_and_can_be_read_in_either_light(site: Site, chromium: Any, scheme: str) -> None:
    context = chromium.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    for path in ("/", "/training", "/orders"):
        page.goto(site.url + path)
        assert 360 == page.evaluate("document.documentElement.scrollWidth"), path
        for selector in ("h1", ".lead", "label", "nav a"):
            assert contrast(page, selector) >= 4.5, (path, selector)
    context.close()


def contrast(page: Any, selector: str) -> float:
    """The contrast of a text with what is behind it (WCAG 2.2, 1.4.3)."""
    colours = page.evaluate(
        """selector => {
          let element = document.querySelector(selector);
          const text = getComputedStyle(element).color;
          let behind = 'rgba(0, 0, 0, 0)';
          while (element && /, 0\\)$/.test(behind)) {
            behind = getComputedStyle(element).backgroundColor;
            element = element.parentElement;
          }
          return [text, behind];
        }""",
        selector,
    )
    one, other = sorted(map(luminance, colours))
    return (other + 0.05) / (one + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# Results that would run

#: What each of them does if it runs: it asks for a path, which the server counts.
RUN = "new Image().src='/ran?'+(document.currentScript?'script':'other');fetch('/ran')"
HTML = f"<!doctype html><title>x</title><script>{RUN}</script><img src=x onerror=\"fetch('/ran')\">"
SVG = f'<svg xmlns="http://www.w3.org/2000/svg" onload="fetch(\'/ran\')"><script>{RUN}</script></svg>'
XHTML = f'<html xmlns="http://www.w3.org/1999/xhtml"><body><script>{RUN}</script></body></html>'
STYLED = (
    '<?xml version="1.0"?><?xml-stylesheet type="text/xsl" href="#s"?><!DOCTYPE x [<!ATTLIST xsl:stylesheet id ID '
    '#REQUIRED>]><x><xsl:stylesheet id="s" version="1.0" xmlns:xsl="http://www.w3.org/1999/XSL/Transform">'
    f'<xsl:template match="/"><html><script>{RUN}</script></html></xsl:template></xsl:stylesheet></x>'
)
PDF = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R/OpenAction<</S/JavaScript/JS(app.alert\\(1\\);"
    b"this.submitForm\\('/ran'\\))>>>>endobj 2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\ntrailer<</Root 1 0 R>>"
)
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def png_with(text: bytes) -> bytes:
    """A PNG of one pixel with a text in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = chunk(b"IHDR", b"\0\0\0\1\0\0\0\1\x08\0\0\0\0")
    return (
        PNG_HEAD
        + head
        + chunk(b"tEXt", b"Comment\0" + text)
        + chunk(b"IDAT", zlib.compress(b"\0\0"))
        + chunk(b"IEND", b"")
    )


def jpeg_with(text: bytes) -> bytes:
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "JPEG", comment=text)
    return file.getvalue()


HTML_BYTES = HTML.encode()

#: Name, extension that its maker claims, what its job says that it is, and the result.
CORPUS: list[tuple[str, str, str | None, Any]] = [
    ("html", "html", None, HTML_BYTES),
    ("html that says so", "html", "text/html; charset=utf-8", HTML_BYTES),
    ("html behind a BOM", "htm", "text/html", b"\xef\xbb\xbf" + HTML_BYTES),
    ("html behind blanks", "jpg", "image/jpeg", b" \n\t" * 300 + HTML_BYTES),
    ("html in UTF-16", "txt", "text/plain; charset=utf-16", HTML.encode("utf-16")),
    ("html in UTF-7", "html", "text/html; charset=utf-7", b"+ADw-script+AD4-fetch('/ran')+ADw-/script+AD4-"),
    ("html as a picture", "jpg", "image/jpeg", HTML_BYTES),
    ("html as sound", "mp3", "audio/mpeg", b"ID3" + HTML_BYTES),
    ("html as a film", "mp4", "video/mp4", b"\0\0\0\x18ftypmp42" + HTML_BYTES),
    ("html as csv", "csv", "text/csv", HTML_BYTES),
    ("html as text", "txt", "text/plain", HTML_BYTES),
    ("html as markdown", "md", "text/markdown", HTML_BYTES),
    ("html as json", "json", "application/json", HTML_BYTES),
    ("html that is a str", "html", None, HTML),
    ("html in a dict", "html", None, {HTML: [HTML]}),
    ("xhtml", "xhtml", "application/xhtml+xml", XHTML.encode()),
    ("xml with a script", "xml", "application/xml", XHTML.encode()),
    ("xml with a style sheet", "xml", "text/xml", STYLED.encode()),
    ("svg", "svg", "image/svg+xml", SVG.encode()),
    ("svg that says png", "png", "image/png", SVG.encode()),
    ("svg that is packed", "svgz", "image/svg+xml", gzip.compress(SVG.encode())),
    ("svg as an avatar", "avif", "image/svg+xml;x=image/avif", SVG.encode()),
    ("mathml", "mml", "application/mathml+xml", f"<math>{XHTML}</math>".encode()),
    ("pdf", "pdf", "application/pdf", PDF),
    ("pdf as a picture", "gif", "image/gif", PDF),
    ("javascript", "js", "text/javascript", RUN.encode()),
    (
        "javascript that is a gif",
        "gif",
        "image/gif",
        b"GIF89a=1;" + RUN.replace("document.currentScript", "1").encode(),
    ),
    ("javascript that is a bmp", "bmp", "image/bmp", b"BM=1;" + RUN.encode()),
    ("javascript module", "mjs", "application/javascript", b"import('/ran')"),
    ("css", "css", "text/css", b"@import '/ran';body{background:url(/ran)}"),
    ("png with html in it", "png", "image/png", png_with(HTML_BYTES)),
    ("jpeg with html in it", "jpg", "image/jpeg", jpeg_with(HTML_BYTES)),
    (
        "mail archive",
        "mhtml",
        "multipart/related; boundary=b",
        b"--b\r\nContent-Type: text/html\r\n\r\n" + HTML_BYTES + b"--b--",
    ),
    ("flash", "swf", "application/x-shockwave-flash", b"FWS\x0a" + HTML_BYTES),
    ("wasm", "wasm", "application/wasm", b"\0asm\1\0\0\0"),
    ("feed", "rss", "application/rss+xml", f"<rss>{XHTML}</rss>".encode()),
]

#: What a browser may show or play.
INLINE = re.compile(r"(image/(?!svg)|audio/|video/|text/plain|text/csv|application/json)")


class Persistent(WSGIRequestHandler):
    """Keeps connections: pages with a hundred parts take a while otherwise."""

    protocol_version = "HTTP/1.1"


@pytest.fixture
def polyglots(mlq: MLQ, start_worker: StartWorker) -> Iterator[Polyglots]:
    """The results of the corpus, of real jobs, behind a real server."""

    @mlq.actor
    def makes(number: int) -> Any:
        _, _, kind, value = CORPUS[number]
        return Result(full=value, content_type=kind) if kind else value

    start_worker()
    jobs = makes.submit_many([(number,) for number in range(len(CORPUS))])
    eventually(lambda: all(job.done for job in jobs))
    app = mounted(mlq, allow_anonymous=True)
    found = Polyglots(app, [job.id for job in jobs])
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Persistent)
    server.daemon_threads = True  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    found.url = f"http://localhost:{server.server_port}"
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Polyglots:
    """Beside the routes: results as an app without care would serve them, pages that embed them, and what ran."""

    def __init__(self, app: flask.Flask, ids: list[str]) -> None:
        self.url = ""
        self.ids = ids
        self.ran: list[str] = []
        app.add_url_rule("/ran", "ran", self._note)
        app.add_url_rule("/naive/<int:number>", "naive", self._serve)
        app.add_url_rule("/embeds", "embeds", self._embed)

    def _note(self) -> flask.Response:
        self.ran.append(flask.request.referrer or "?")
        return flask.Response(status=204)

    def _serve(self, number: int) -> flask.Response:
        _, extension, kind, value = CORPUS[number]
        value = value if isinstance(value, bytes | str) else json.dumps(value)
        return flask.Response(value, content_type="text/html" if extension == "html" or kind is None else kind)

    def _embed(self) -> str:
        """A page of this very site in which somebody has put results wherever that can be done."""
        return "<!doctype html>" + "".join(
            f"<iframe src='{url}'></iframe><object data='{url}'></object><img src='{url}'>"
            f"<link rel=stylesheet href='{url}'><script src='{url}'></script><script type=module src='{url}'></script>"
            for url in flask.request.args.getlist("url")
        )

    def embeds(self, *paths: str) -> str:
        """The address of such a page."""
        return f"{self.url}/embeds?{urlencode([('url', path) for path in paths])}"

    def paths(self, number: int) -> list[str]:
        """The addresses of a result: as it is, with its maker's extension, and as a page or a drawing."""
        path = f"{PREFIX}/jobs/{self.ids[number]}/result"
        extensions = dict.fromkeys([CORPUS[number][1], "html" if number % 2 else "svg"])
        return [path, *(f"{path}.{extension}" for extension in extensions)]

    def path(self, number: int) -> str:
        """One of them, of each kind in turn."""
        paths = self.paths(number)
        return paths[number % len(paths)]


#: Each result at one of its addresses; at all of them with the fault tests.
EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.faults)], ids=["one", "every"])


@EVERY
def test_no_result_runs_and_nothing_is_shown_but_what_cannot(polyglots: Polyglots, chromium: Any, every: bool) -> None:
    context = chromium.new_context(accept_downloads=False)
    page = context.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    client = httpx.Client(base_url=polyglots.url, headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    shown = saved = 0
    for number in range(len(CORPUS)):
        for path in polyglots.paths(number):
            answer = client.get(path)
            assert "nosniff" == answer.headers["X-Content-Type-Options"]
            assert "sandbox" in answer.headers["Content-Security-Policy"]
            disposition = answer.headers["Content-Disposition"]
            if disposition == "inline":
                assert INLINE.match(answer.headers["Content-Type"]), (CORPUS[number][0], path, answer.headers)
            if not every and path != polyglots.path(number):
                continue
            shows = opens(page, polyglots.url + path)
            if shows:
                assert "inline" == disposition, (CORPUS[number][0], path)
                shown += 1
                kind = page.evaluate("document.contentType")
                assert INLINE.match(kind), (CORPUS[number][0], path, kind)
            else:
                saved += 1
            assert ([], []) == (polyglots.ran, dialogs), (CORPUS[number][0], path)
    client.close()
    assert shown > (20 if every else 8)
    assert saved > (40 if every else 12)
    context.close()


def opens(page: Any, url: str) -> bool:
    """Whether a browser shows what is there; else it offers to save it."""
    try:
        page.goto(url)
        return True
    except Exception as error:
        if "Download is starting" not in str(error) and "ERR_ABORTED" not in str(error):
            raise
        return False


@EVERY
def test_no_result_runs_in_a_page_that_embeds_it(polyglots: Polyglots, chromium: Any, every: bool) -> None:
    context = chromium.new_context(accept_downloads=False)
    page = context.new_page()
    for start in range(0, len(CORPUS), 6):
        numbers = range(start, min(start + 6, len(CORPUS)))
        paths = [polyglots.paths(number)[:2] if every else [polyglots.path(number)] for number in numbers]
        page.goto(polyglots.embeds(*itertools.chain(*paths)))
        assert [] == polyglots.ran, [CORPUS[number][0] for number in numbers]
    context.close()


def test_the_same_results_do_run_where_nobody_takes_care(polyglots: Polyglots, chromium: Any) -> None:
    """So that the two tests above can fail."""
    context = chromium.new_context(accept_downloads=False)
    page = context.new_page()
    opened = {
        "html",
        "html that says so",
        "html behind a BOM",
        "html that is a str",
        "xhtml",
        "xml with a script",
        "svg",
    }
    embedded = {"html", "svg", "javascript", "javascript module", "css"}
    for number, (name, *_) in enumerate(CORPUS):
        addresses = [f"{polyglots.url}/naive/{number}"] if name in opened else []
        addresses += [polyglots.embeds(f"/naive/{number}")] if name in embedded else []
        for address in addresses:
            polyglots.ran.clear()
            page.goto(address)
            eventually(lambda: polyglots.ran)
    context.close()
