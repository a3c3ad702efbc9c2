"""Takes the numbered pictures of docs/evaluate/report.md from docs/four_agents/report.html, each for a light and a dark page.

    python docs/report_figures.py                 # all of them; needs chromium and chromedriver
    python docs/report_figures.py scores viewer   # some

The page is shown 430 pixels wide, so that text stays above 10 pixels where a phone shows the picture.
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path
from typing import Any, NamedTuple

from check_pages import browser
from PIL import Image
from selenium.webdriver.common.keys import Keys

PAGE = Path(__file__).parent / "four_agents" / "report.html"
WIDTH, MARGIN, DENSITY = 430, 20, 2  # pixels, pixels, pixels of a picture for a pixel of the page


class Part(NamedTuple):
    """A stretch of the page, from the first to the last of the selected elements, and what is numbered in it."""

    stretch: str
    numbered: tuple[str, ...]


PARTS = {
    "header": Part("header, nav", ("header .lead", "header .note", "nav")),
    "scores": Part(
        "[aria-labelledby=scores] h3, [aria-labelledby=scores] > details",
        ("tbody.references", "tbody.references + tbody", "h4 ~ .scroll table", "[aria-labelledby=scores] > details"),
    ),
    "quality": Part(
        "[aria-labelledby=quality] .legend, [aria-labelledby=quality] figure:first-child",
        tuple(f"[aria-labelledby=quality] {name}" for name in (".legend", "figure svg", "figure details")),
    ),
    "steps": Part("#errors-own", ("#errors-own figcaption", "#errors-own svg")),
    "samples": Part("#samples, [aria-labelledby=samples] .grid", ("[aria-labelledby=samples] .strip",)),
    "viewer": Part(
        "#player fieldset, #player .card:nth-child(4)",
        ("#player fieldset", "#player .controls", *(f"#player .card:nth-child(4) {name}" for name in (".acts", ".pair", ".error"))),
    ),
}

# Names the figure of errors, which has no name of its own; numbers elements; returns where the stretch begins and ends.
MARK = """
const [stretch, numbered, first, margin] = arguments;
document.documentElement.style.scrollbarWidth = "none"; // a scroll bar would narrow the page, but not its picture
const titles = [...document.querySelectorAll("figcaption b")];
titles.find((title) => title.textContent === "Error on the model's own states").closest("figure").id = "errors-own";
document.querySelectorAll(".mark").forEach((mark) => mark.remove());
const place = (e) => {
  const {left, top, width, bottom} = e.getBoundingClientRect();
  return {left, width, top: top + scrollY, bottom: bottom + scrollY};
};
const colour = "light-dark(#b3261e, #ff8a80)", ground = "light-dark(#fff, #16181b)";
numbered.forEach((selector, i) => {
  const {left, top, width, bottom} = place(document.querySelector(selector)), right = Math.min(left + width, innerWidth - 8);
  const frame = document.createElement("div"), number = document.createElement("b");
  frame.className = number.className = "mark";
  frame.style = `position: absolute; left: ${left - 5}px; top: ${top - 2}px; width: ${right - left + 8}px; height: ${bottom - top + 4}px;
    border: 2px solid ${colour}; border-radius: 6px`;
  number.textContent = first + i;
  number.style = `position: absolute; right: -10px; top: -17px; width: 22px; height: 22px; border-radius: 11px; background: ${colour};
    color: ${ground}; font: 700 14px/22px sans-serif; text-align: center`;
  frame.append(number);
  document.body.append(frame);
});
const all = [...document.querySelectorAll(stretch)].map(place);
const top = Math.min(...all.map((p) => p.top)) - margin, bottom = Math.max(...all.map((p) => p.bottom)) + margin;
return [Math.max(0, top), bottom];
"""


def take(driver: Any, part: Part, first: int) -> Image.Image:
    """A picture of a part, whose elements are numbered from `first` on."""
    top, bottom = driver.execute_script(MARK, part.stretch, part.numbered, first, MARGIN)
    clip = {"x": 0, "y": top, "width": WIDTH, "height": bottom - top, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    return picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=5, dither=Image.Dither.NONE)  # half the bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *PARTS], help="which pictures; default: all")
    names = parser.parse_args().names or list(PARTS)
    with browser() as driver:
        screen = {"width": WIDTH, "height": 900, "deviceScaleFactor": DENSITY, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        for theme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": theme}, {"name": "prefers-reduced-motion", "value": "reduce"}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            driver.get(PAGE.as_uri())
            driver.find_element("id", "step").send_keys(Keys.ARROW_RIGHT)
            first = 1
            for name, part in PARTS.items():
                if name in names:
                    path = PAGE.parent / f"{name}-{theme}.png"
                    take(driver, part, first).save(path, optimize=True)
                    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
                first += len(part.numbered)


if __name__ == "__main__":
    main()
