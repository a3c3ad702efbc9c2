"""Opens every page of the built site in a browser, as a phone with a dark theme and as a desktop with a light one show it.

    python docs/check_pages.py docs/_build/html                 # all pages
    python docs/check_pages.py docs/_build/html index hardware  # some

Prints a line for each page, width and rule that fails: errors in the console; content wider than the window; pictures that did not load
or have no alternative text; figures with text of less than 10 pixels; violations of WCAG 2.1 A and AA that axe-core calls serious or
critical. Then it searches by keyboard alone. Where there is no chromium, it says so and passes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SCREENS = {390: "dark", 1280: "light"}  # the width in pixels, and the theme
BROWSERS = 2
SMALLEST_TEXT = 10  # pixels
STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
FLAGS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
CHECKS = (Path(__file__).parent / "check_pages.js").read_text(encoding="utf-8")
CALL = "const [name, argument, done] = arguments; Promise.resolve(checks[name](argument)).then(done, (e) => done([['script', String(e)]]));"


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and keeps no log."""

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address at which the site is served while the context is open."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def browser() -> Iterator[Any]:
    """A chromium of which nothing remains."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in [*FLAGS.split(), f"user-data-dir={profile}"]:
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        driver.set_script_timeout(120)
        try:
            yield driver
        finally:
            driver.quit()


def show(driver: Any, width: int) -> None:
    """Sets the window's width, and the theme that belongs to it."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": SCREENS[width]}, {"name": "prefers-reduced-motion", "value": "reduce"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def prepare(driver: Any) -> None:
    """Every page that the browser opens from now on has the checks and axe-core."""
    from selenium_axe_python import Axe

    for script in (CHECKS, Path(Axe(driver).script_url).read_text(encoding="utf-8")):
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})


def check(driver: Any, address: str, page: str) -> list[str]:
    """Returns what is wrong with a page, a line for each finding; the browser has been prepared."""

    def ask(name: str, argument: object = None) -> list[list[str]]:
        return driver.execute_async_script(CALL, name, argument)

    found = []
    driver.get(f"{address}/{page}")
    for width in SCREENS:
        show(driver, width)
        ask("loaded")
        lines = [*ask("width", width), *ask("pictures", SMALLEST_TEXT), *ask("standards", STANDARDS)]
        found += [f"{page} at {width}: {rule}: {text}" for rule, text in lines]
    found += [f"{page}: console: {entry['message']}" for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    return found


def tabs(driver: Any, wanted: set[str]) -> set[str]:
    """Presses Tab until all of the wanted selectors have had the focus, at most 40 times; returns those that had not."""
    from selenium.webdriver.common.keys import Keys

    for _ in range(40):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        script = "const e = document.activeElement; return e.checkVisibility() && arguments[0].filter((s) => e.matches(s))"
        wanted = wanted - set(driver.execute_script(script, list(wanted)) or [])
        if not wanted:
            break
    return wanted


def check_keyboard(driver: Any, address: str) -> list[str]:
    """Tab must reach the way past the navigation, the search and the navigation, and the search must lead to a page."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    found = []
    for width in SCREENS:
        show(driver, width)
        driver.get(f"{address}/index.html")
        wanted = {".skip-to-content", ".theme-toggle", "article a"}
        wanted |= {"#__navigation"} if width < 500 else {".sidebar-search", ".sidebar-tree a"}
        found += [f"index.html at {width}: keyboard: Tab does not reach {selector}" for selector in tabs(driver, wanted)]
        driver.get(f"{address}/index.html")
        driver.switch_to.active_element.send_keys("/")
        driver.switch_to.active_element.send_keys("dagger", Keys.ENTER)
        try:
            WebDriverWait(driver, 20).until(lambda d: d.find_elements("css selector", "#search-results li a"))
        except TimeoutException:
            found.append(f"index.html at {width}: keyboard: / and a word find no page")
    return found


def check_site(site: Path, pages: list[str], keyboard: bool = True) -> list[str]:
    """Returns what is wrong with pages of the site; browsers share them."""
    rest = iter(pages)

    def work(address: str) -> list[str]:
        with browser() as driver:
            prepare(driver)
            return [line for page in rest for line in check(driver, address, page)]

    with served(site) as address, ThreadPoolExecutor(BROWSERS) as pool:
        found = [line for lines in pool.map(work, [address] * min(BROWSERS, len(pages))) for line in lines]
        if keyboard:
            with browser() as driver:
                found += check_keyboard(driver, address)
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("pages", nargs="*", help="paths in the site, without .html; default: all, and the keyboard")
    arguments = parser.parse_args()
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        print("the pages were not opened: no chromium or chromedriver here; apt-get install chromium chromium-driver")
        return
    start = time.perf_counter()
    longest_first = sorted(arguments.site.rglob("*.html"), key=lambda path: -path.stat().st_size)
    pages = [f"{page}.html" for page in arguments.pages] or [path.relative_to(arguments.site).as_posix() for path in longest_first]
    found = check_site(arguments.site, pages, keyboard=not arguments.pages)
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{len(found)} faults on {len(pages)} pages, in {time.perf_counter() - start:.0f} s")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
