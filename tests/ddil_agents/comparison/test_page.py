"""The page of a comparison: what it says, that it stands alone, and that it works in a browser."""

import base64
import contextlib
import copy
import hashlib
import importlib
import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT
from PIL import Image

from ddil_agents import compare
from ddil_agents.comparison import runs as runner
from ddil_agents.comparison.animation import animate_arms
from ddil_agents.comparison.page import write_page
from ddil_agents.comparison.page.figures import ARM_STYLES, PLACEHOLDER, Line, format_number, inline_svg, line_figure
from ddil_agents.comparison.page.plots import bin_rows, count_states, quality_figures, step_figures, step_values, training_figures
from ddil_agents.comparison.page.tables import conclusions, score_tables
from ddil_agents.comparison.page.viewer import load_expert, read_trajectories, sprite_sheet
from ddil_agents.comparison.tables import summary_line
from ddil_agents.evaluation.animation import GAP, HEIGHT
from ddil_agents.evaluation.trajectories import Trajectories

HOSTILE = "<script>alert(\"1\")</script> & 'x'"
SHORT = {"num_updates": 4, "num_steps": 2, "teacher_steps": 4, "batch_size": 8, "collect_size": 8, "log_every": 2}
SMALL = {"evaluate": {"n": 20, "n_action": 4, "n_episodes": 4}}


def in_process(command, stdout, **_):
    """What `python -m module …` does, without starting another Python."""
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
        code = 0
        try:
            importlib.import_module(command[2]).main(command[3:])
        except SystemExit as error:
            code = error.code
    stdout.flush()
    return subprocess.CompletedProcess(command, code)


def compared(out, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.subprocess, "run", in_process)
        result = compare.compare(compare.Comparison(shared=SHORT | SMALL, **settings), out, jobs=1, command=f"compare {HOSTILE}")
    write_page(result, out)
    return result, out


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Pictures; one arm fails."""
    arms = {"bc": {"agent": "bc"}, "dagger": {"agent": "dagger"}, "wild": {"agent": "bc", "learning_rate": 1e6, "warmup_updates": 0}}
    return compared(tmp_path_factory.mktemp("digits"), env="digits8", arms=arms, seeds=2)


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    """Points in the plane; one arm has an unpleasant name."""
    arms = {"bc": {"agent": "bc"}, '<b> & "β"': {"agent": "dagger"}}
    return compared(tmp_path_factory.mktemp("plane"), env="gaussian_mixture", arms=arms, seeds=2)


@pytest.fixture(params=["digits", "plane"])
def comparison(request):
    return request.getfixturevalue(request.param)


def text_of(out):
    return (out / "report.html").read_text()


def changed(comparison, tmp_path, **changes):
    """The page of the result with these entries in place of its own."""
    result, out = comparison
    shutil.copytree(out, tmp_path / "changed")
    return write_page({**copy.deepcopy(result), **changes}, tmp_path / "changed").read_text()


class Page(HTMLParser):
    """Reads strictly: every element is closed in order."""

    VOID = frozenset({"meta", "link", "input", "br", "img", "hr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.attributes = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self._seen(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        self._seen(tag, attributes)

    def _seen(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_its_ids_are_unique(comparison):
    page = Page(text_of(comparison[1]))
    assert len(page.ids) == len(set(page.ids))
    pointed = {value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")}
    pointed |= {i for name, value in page.attributes if name in ("aria-labelledby", "for") for i in value.split()}
    assert pointed <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text_of(comparison[1]))) <= set(page.ids)
    headings = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == headings.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(headings))  # no level is skipped


def test_page_of_a_world_plays_its_episodes(tmp_path):
    arms = {arm: {"agent": arm, "student": {"width": 8, "depth": 1}} for arm in ("bc", "dagger")}
    result, out = compared(tmp_path, env="fork", arms=arms, seeds=1, primary="success")
    assert animate_arms(result, out)
    write_page(result, out)
    page = Page(text_of(out))
    sources = [value for name, value in page.attributes if name == "src"]
    assert sum(source.startswith("data:image/gif;base64,") for source in sources) == 1
    assert "episodes" in page.ids
    for title in ("Along an episode", "Survival: share of episodes", "Own conditions against data&#39;s: error"):
        assert title in text_of(out)
    assert not any("modes are missed" in flag for flag in result["flags"])
    with Image.open(out / "episodes.gif") as gif:
        assert gif.size[1] == 4 * (HEIGHT + GAP)  # the teacher in 4 and in 2 steps, and both arms
    line = summary_line(result)
    assert re.fullmatch(r"success: bc [\d.]+, dagger [\d.]+; teacher@4 [\d.]+ \(means over 1 seed\)", line), line


def test_page_asks_for_nothing_outside_it(comparison):
    text = text_of(comparison[1])
    assert not re.search(r"https?:|@import|<iframe|<object|fetch\(|XMLHttp", text)
    assert all(target.startswith(("#", "data:")) for target in re.findall(r'(?:href|src)="([^"]*)"', text))
    assert all(target.startswith(("#", "data:")) for target in re.findall(r"url\(([^)]*)\)", text))
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_page_is_the_same_every_time(digits, tmp_path):
    assert changed(digits, tmp_path) == text_of(digits[1])


def test_page_is_small(comparison):
    assert len(text_of(comparison[1]).encode()) < 500_000


def test_strings_of_settings_are_escaped(plane, tmp_path):
    result, _ = plane
    hostile = {
        "title": HOSTILE,
        "env": HOSTILE,
        "flags": [HOSTILE],
        "env_config": {**result["env_config"], HOSTILE: HOSTILE},
        "settings": {**result["settings"], HOSTILE: HOSTILE, "extractor": HOSTILE},
        "provenance": {**result["provenance"], "hardware": HOSTILE},
        "references": {
            **result["references"],
            HOSTILE: next(rows for name, rows in result["references"].items() if name.startswith("training data")),
        },
    }
    text = changed(plane, tmp_path, **hostile)
    Page(text)
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; &#39;x&#39;") >= len(hostile)
    assert "<b> &" not in text  # the arm's name, in tables, legends, labels of figures and the script's data
    assert "&lt;b&gt; &amp; &#34;β&#34;" in text


def test_summary_says_that_two_seeds_are_too_few(plane):
    assert re.search(r'<p class="lead">In Fréchet ↓ at equal gradient steps, 2 seeds cannot show a difference at 5 %', text_of(plane[1]))


def test_summary_names_arms_without_a_difference_together(plane):
    result = copy.deepcopy(plane[0])
    pairs = {arm: {"conclusion": "no difference shown at 5 % over 2 comparisons"} for arm in ("a", "b")}
    pairs["c"] = {"conclusion": "c is lower than bc at 5 % over 3 comparisons"}
    result["budgets"]["updates"]["statistics"]["frechet"]["pairs"] = pairs
    (sentence,) = conclusions(result)
    assert "a, b against bc: no difference shown at 5 % over 2 comparisons; " in sentence
    assert sentence.endswith("c is lower than bc at 5 % over 3 comparisons.")


def test_summary_says_when_nothing_can_be_tested(plane):
    result = copy.deepcopy(plane[0])
    result["budgets"]["updates"]["statistics"]["frechet"]["pairs"] = {}
    assert "nothing can be tested" in conclusions(result)[0]
    del result["budgets"]["updates"]["statistics"]["frechet"]
    assert "nothing was measured" in conclusions(result)[0]


@pytest.mark.parametrize(
    ("mean", "shown", "bold"),
    [(-1.0, True, ['<b> & "β"']), (1.0, True, ["bc"]), (-1.0, False, []), (1.0, False, [])],
)
def test_bold_is_what_the_corrected_test_shows(plane, mean, shown, bold):
    result = copy.deepcopy(plane[0])
    pair = result["budgets"]["updates"]["statistics"]["frechet"]["pairs"]['<b> & "β"']
    pair |= {"mean": mean, "shown": shown, "conclusion": "…"}
    column = 1 + list(result["budgets"]["updates"]["statistics"]).index("frechet")
    assert [arm for arm, row in score_tables(result, "updates")["scores"].items() if row[column].strong] == bold


def test_no_arm_is_bold_where_two_seeds_show_nothing(comparison):
    assert "<td><strong>" not in text_of(comparison[1])


def test_failed_runs_stand_at_the_top(digits):
    text = text_of(digits[1])
    flags = text.split('class="flags"')[1].split("</section>")[0]
    assert "updates/wild-s0" in flags
    assert "the loss is not finite" in flags
    assert text.index('class="flags"') < text.index('id="scores"')
    assert text.count("not finished") == 2


@pytest.mark.parametrize("flags", [[], ["updates/wild-s00: the loss is not finite"]])  # of another run
def test_runs_without_a_flag_or_a_result_are_named(digits, tmp_path, flags):
    assert "wild: no result of seed 0, 1 (equal gradient steps)" in changed(digits, tmp_path, flags=flags)


def test_every_figure_has_a_caption_a_label_and_its_numbers(comparison):
    text = text_of(comparison[1])
    figures = re.findall(r"<figure>.*?</figure>", text, flags=re.DOTALL)
    assert len(figures) >= 8
    for figure in figures:
        assert re.search(r"<figcaption><b>.+?</b> .+?</figcaption>", figure)
        assert re.search(r'<svg viewBox="[\d. ]+" role="img" aria-label="[^"]{20,}">', figure)
        assert figure.count("<tr>") >= 2
        assert "NaN" not in figure
    drawn = "".join(figures)
    assert re.search(r"\d runs? an arm", drawn)
    for title in ("Covariate shift", "Error on the model&#39;s own states", "Compounding", "Training loss", "Gradient norm"):
        assert f"<b>{title}" in drawn


def test_figures_take_their_colours_from_the_style_sheet(comparison):
    svg = "".join(re.findall(r"<svg.*?</svg>", text_of(comparison[1]), flags=re.DOTALL))
    assert not re.search(r"(?:fill|stroke): #", svg)
    assert {"var(--ink)", "var(--rule)", "var(--hue-0)", "var(--hue-1)"} <= set(re.findall(r"var\(--[a-z0-9-]+\)", svg))
    assert "font-family" not in svg


def test_lists_that_no_row_has_are_left_out(plane, tmp_path):
    budgets = copy.deepcopy(plane[0]["budgets"])
    for run in budgets["updates"]["runs"]:
        for key in ("shift", "path_rmse", "action_mse_own"):
            run.pop(key, None)
    text = changed(plane, tmp_path, budgets=budgets)
    assert not re.search("<b>(Covariate shift|Path error|Error on the model|Compounding, against the teacher)", text)
    assert "<b>Error on the teacher&#39;s states</b>" in text


def test_a_reference_of_other_times_than_the_arms_is_drawn_on_its_own_or_not_at_all(plane, tmp_path):
    result, out = plane
    references = copy.deepcopy(result["references"])
    full, few = references["teacher@4"], references["teacher@2"]
    references["teacher@1"] = [{**few[0], "shift": [7.5]}]  # of one step, of which the times are not known
    few[1] |= {"times": [5, 4, 3, 0], "shift": [0.1, 0.2, 0.3]}  # a seed whose row is of another arm
    (figure,) = [f for f in step_figures({**result, "references": references}, "updates", out).figures if f.title == "Covariate shift"]
    assert "teacher@1" not in figure.headings
    assert [row[figure.headings.index("teacher@2")] for row in figure.rows] == [format_number(x) for x in few[0]["shift"]]
    assert full[0]["times"] == few[0]["times"]


def test_page_without_runs_and_trajectories_has_its_tables(plane, tmp_path):
    text = write_page(plane[0], tmp_path).read_text()
    Page(text)
    assert "Paired differences" in text
    assert 'id="viewer"' not in text
    assert "<b>Training loss" not in text
    assert "over step," in text  # times are the runs'


def test_expert_that_is_not_there_costs_the_pictures_alone(digits, tmp_path):
    text = changed(digits, tmp_path, env_config={"expert": "nowhere.to.be.Found"})
    assert "The expert could not be loaded, so there are no pictures" in text
    assert '"kind": "numbers"' in text
    assert "data:image" not in text


def test_student_that_is_not_finite_leaves_valid_data(plane, tmp_path):
    shutil.copytree(plane[1], tmp_path / "copy")
    path = tmp_path / "copy" / "runs" / "updates" / "bc-s0" / "trajectories.safetensors"
    recorded = Trajectories.load(path)
    recorded.x_t[0, -1], recorded.error[0, -1] = math.inf, math.nan
    recorded.save(path)
    (data,) = re.findall(r'id="data">(.*?)</script>', write_page(plane[0], tmp_path / "copy").read_text())
    bc = json.loads(data, parse_constant=pytest.fail)["models"][1]
    assert bc["x_t"] is None
    assert bc["error"][0][-1] is None


def test_quality_is_drawn_against_every_measure_of_diversity(plane):
    titles = [figure.title for figure in quality_figures(plane[0]).figures]
    assert titles == [f"{name}, equal gradient steps" for name in ("Recall", "Coverage", "Vendi")]
    assert quality_figures(plane[0]).figures[0].headings[1:] == ["recall ↑", "Fréchet ↓"]


def test_data_free_comparison_is_drawn_by_its_distance_to_the_teacher(plane, tmp_path):
    result = copy.deepcopy(plane[0])
    for rows in [*result["references"].values(), result["budgets"]["updates"]["runs"]]:
        for row in rows:
            row["frechet"] = row["recall"] = row["coverage"] = None
            row["lpips"] = 0.5
    del result["budgets"]["updates"]["statistics"]["frechet"]
    figures = quality_figures(result).figures
    assert [figure.headings[1:] for figure in figures] == [[x, "Fréchet to teacher ↓"] for x in ("Vendi ↑", "LPIPS diversity ↑")]
    text = changed(plane, tmp_path, references=result["references"], budgets=result["budgets"])
    assert "<b>Vendi, equal gradient steps</b>" in text
    assert 'id="profile"' not in text  # of the primary metric, which no row has


def test_only_distances_of_inceptions_features_are_called_fid_and_kid(plane, tmp_path):
    text = changed(plane, tmp_path, settings={**plane[0]["settings"], "extractor": "inception_v3_2015", "distance": "FID"}, flags=[])
    assert "In FID ↓ at equal gradient steps" in text
    assert "KID\N{NO-BREAK SPACE}↓" in text
    assert "Fréchet" not in text
    assert "KID: an unbiased estimate, which may be negative" in text
    assert not re.search("[FK]ID.↓", text_of(plane[1]))


def test_viewer_says_who_acted_in_each_step(plane, tmp_path):
    shutil.copytree(plane[1], tmp_path / "copy")
    path = tmp_path / "copy" / "runs" / "updates" / "bc-s0" / "trajectories.safetensors"
    recorded = Trajectories.load(path)
    recorded.by_expert[0, 1] = True
    recorded.save(path)
    (data,) = re.findall(r'id="data">(.*?)</script>', write_page(plane[0], tmp_path / "copy").read_text())
    teacher, bc, other = (model["teacher"] for model in json.loads(data)["models"])
    assert teacher == [[1, 1]] * 10
    assert bc == [[0, 1]] + [[0, 0]] * 9
    assert other == [[0, 0]] * 10


def test_arms_that_differ_in_thresholding_alone_are_drawn_together(plane, tmp_path):
    assert "with and without thresholding</h3>" not in text_of(plane[1])
    result, out = copy.deepcopy(plane[0]), tmp_path / "copy"
    shutil.copytree(plane[1], out)
    bc, other = (out / run["directory"] / "config.yaml" for run in result["budgets"]["updates"]["runs"][:2])
    config = yaml.safe_load(bc.read_text())
    bc.write_text(yaml.safe_dump({**config, "thresholding": {"roles": []}}))
    other.write_text(yaml.safe_dump({**config, "thresholding": {"roles": ["teacher", "student"], "kind": "static"}}))
    (figure,) = training_figures(result, "updates", out)[2].figures
    assert figure.title == 'bc, <b> & "β"'
    assert figure.headings[1:] == ["bc (no threshold)", '<b> & "β" (teacher, student thresholded)']
    assert "with and without thresholding</h3>" in write_page(result, out).read_text()


def test_sheet_holds_states_above_estimates(digits):
    result, out = digits
    recorded, expert = read_trajectories(result, out)["bc"], load_expert(digits[0])
    drawn = sprite_sheet(expert, recorded)
    n, columns = recorded.x_t.shape[:2]
    assert drawn.shape == (2 * n * 8, columns * 8, 3)
    assert (drawn[16 * 3 : 16 * 3 + 8, 8:16] == expert.decode(recorded.x_t[3:4, 1])[0].numpy()).all()
    assert (drawn[16 * 3 + 8 : 16 * 4, 8:16] == expert.decode(recorded.x_0[3:4, 1])[0].numpy()).all()
    assert (drawn[16 * 3 + 8 : 16 * 4, -8:] == expert.decode(recorded.x_t[3:4, -1])[0].numpy()).all()


def test_curves_are_means_within_stretches_of_steps():
    runs = [[{"step": s, "source_counts": {}, "loss": v} for s, v in ((1, 2.0), (2, 4.0), (3, None), (4, 8.0))]]
    runs.append([{"step": s, "source_counts": {}, "loss": v} for s, v in ((1, 0.0), (2, 0.0))])  # cut short
    x, means = bin_rows(runs, ("loss",), bins=2)
    assert x == [2.0, 4.0]  # 1.5 to even
    np.testing.assert_array_equal(means, [[3.0, 8.0], [0.0, math.nan]])


def test_evaluations_during_training_are_drawn_over_gradient_steps(plane, tmp_path):
    result, out = plane[0], tmp_path / "copy"
    shutil.copytree(plane[1], out)
    for run, last in zip(result["budgets"]["updates"]["runs"], (8, 4, 4, 4), strict=True):
        rows = [{"step": step, "frechet_to_expert": 1.0 + step, "best": step == 0, "seconds": 0.0} for step in range(0, last + 1, 4)]
        (out / run["directory"] / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (figure,) = [f for f in training_figures(result, "updates", out)[1].figures if f.title.startswith("Validation")]
    assert figure.title == "Validation: Fréchet to teacher ↓"
    assert figure.rows == [["0", "1", "1"], ["4", "5", "5"], ["8", "9", "–"]]


def test_states_drawn_are_counted_over_a_run_and_averaged_over_runs():
    rows = [{"step": 1, "source_counts": {"forward": 900, "student": 100}}, {"step": 2, "source_counts": {"forward": 500, "student": 0}}]
    assert count_states([rows, rows[:1]]) == "1,150 forward, 0 teacher, 100 student"


def test_ratio_of_errors_is_undefined_where_the_teacher_errs_not():
    ratio = step_values({"action_mse_own": [2.0, 3.0], "action_mse_expert": [1.0, 0.0]}, "compounding")
    np.testing.assert_array_equal(ratio, [2.0, math.nan])
    assert step_values({"shift": None}, "shift") == []


def test_line_is_the_mean_and_its_band_the_range():
    line = Line.over("a", ARM_STYLES[0], [1, 2], [[1.0, math.nan], [3.0, 5.0]])
    figure = line_figure("f", "title", "caption", [line], "x", "y")
    assert figure.rows == [["1", "2 [1, 3]"], ["2", "5"]]


def test_svg_has_ids_of_its_own_and_no_style_of_the_page():
    def draw(axes):
        axes.plot([0, 1], [0, 1], marker="o", color=PLACEHOLDER["ink"])

    a, b = (inline_svg(draw, name, 'a "label" <') for name in "ab")
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (a, b)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert "<style" not in a
    assert 'aria-label="a &#34;label&#34; &lt;"' in a


def contrast(a, b):
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_have_the_contrast_of_wcag_aa(scheme):
    css = (Path(write_page.__code__.co_filename).parent / "page.css").read_text()
    colours = {name: pair.split(", ")[scheme] for name, pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}, #\w{6})\)", css)}
    for paper in ("paper", "raised"):
        for name in ("ink", "muted", "accent"):
            assert contrast(colours[name], colours[paper]) >= 4.5, name
        for name in (name for name in colours if name.startswith("hue")):
            assert contrast(colours[name], colours[paper]) >= 3, name
    assert min(contrast(colours[name], colours["alarm-paper"]) for name in ("ink", "alarm")) >= 4.5


def test_wheel_carries_the_template():
    from hatchling.builders.wheel import WheelBuilder

    packed = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {f"ddil_agents/comparison/page/page.{kind}" for kind in ("html", "css", "js")} <= packed
    assert {"ddil_agents/py.typed", "ddil_env/py.typed"} <= packed  # its annotations are for those who check theirs


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed; pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium or chromedriver here; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}", "window-size=1200,900"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


def opened(browser, out, width=1200, **media):
    from selenium.webdriver.support.wait import WebDriverWait

    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in media.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("performance")
    browser.get(f"file://{out}/report.html")
    WebDriverWait(browser, 30).until(lambda _: browser.execute_script("return document.getElementById('where')?.textContent"))


def press(browser, selector, *keys):
    browser.execute_script("document.querySelector(arguments[0]).focus()", selector)
    browser.switch_to.active_element.send_keys(*keys)


def cards(browser):
    """What each card shows: its texts, and where its pictures or points are."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.card')].map((card) => [card.innerText, ...[...card.querySelectorAll('.now, .guess')].map("
        "(e) => getComputedStyle(e).backgroundPosition + e.getAttribute('cx') + e.getAttribute('cy'))])"
    )


def test_page_loads_without_errors_and_without_requests(browser, comparison):
    opened(browser, comparison[1])
    assert browser.get_log("browser") == []
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = [s["request"]["url"] for s in sent if s["documentURL"].startswith("file:")]  # the browser's own first page aside
    assert urls
    assert [url[:80] for url in urls if not url.startswith(("file:", "data:"))] == []
    assert len(cards(browser)) == 3


def test_arrow_keys_move_the_step_and_the_sample(browser, comparison):
    from selenium.webdriver.common.keys import Keys

    opened(browser, comparison[1])
    at_first = cards(browser)
    assert "teacher acts" in at_first[0][0]
    assert all("student acts" in card[0] for card in at_first[1:])
    press(browser, "#step", Keys.ARROW_RIGHT)
    second = cards(browser)
    assert all(now != then for a, b in zip(at_first, second, strict=True) for now, then in zip(a, b, strict=True))
    press(browser, "#step", Keys.END)
    assert all("done" in card[0] for card in cards(browser))
    press(browser, "#step", Keys.HOME)
    assert cards(browser) == at_first
    press(browser, "[name=sample]", Keys.ARROW_RIGHT)
    assert all(now[1:] != then[1:] for now, then in zip(at_first, cards(browser), strict=True))
    assert browser.get_log("browser") == []


def test_the_actor_changes_from_step_to_step_where_teacher_and_student_take_turns(browser, plane, tmp_path):
    from selenium.webdriver.common.keys import Keys

    shutil.copytree(plane[1], tmp_path / "copy")
    path = tmp_path / "copy" / "runs" / "updates" / "bc-s0" / "trajectories.safetensors"
    recorded = Trajectories.load(path)
    recorded.by_expert[0, 1] = True
    recorded.save(path)
    write_page(plane[0], tmp_path / "copy")
    opened(browser, tmp_path / "copy")
    assert "student acts" in cards(browser)[1][0]
    press(browser, "#step", Keys.ARROW_RIGHT)
    assert ["teacher acts" in card[0] for card in cards(browser)] == [True, True, False]


def test_pictures_are_shown_pixel_by_pixel(browser, digits):
    opened(browser, digits[1])
    style = browser.execute_script(
        "const s = getComputedStyle(document.querySelector('.card .now')); return [s.backgroundImage, s.imageRendering, s.width, s.height]"
    )
    assert style[0].startswith('url("data:image/png;base64,')
    assert style[1] == "pixelated"
    assert style[2] == style[3] != "0px"


def test_play_runs_to_the_sample_and_stops(browser, comparison):
    from selenium.webdriver.support.wait import WebDriverWait

    opened(browser, comparison[1], reduced_motion="reduce")
    play = browser.find_element("id", "play")
    play.click()
    assert play.text == "Pause"
    WebDriverWait(browser, 10).until(lambda _: play.text == "Play")
    assert browser.execute_script("return document.getElementById('step').value") == "2"
    assert browser.execute_script("return getComputedStyle(document.querySelector('.bar i')).transitionDuration") == "0s"


def test_dark_follows_the_system_and_the_button(browser, comparison):
    def colours():
        return browser.execute_script(
            "const of = (s, p) => getComputedStyle(document.querySelector(s))[p];"
            "return [of('body', 'backgroundColor'), of('body', 'color'), of('figure svg text', 'fill')]"
        )

    opened(browser, comparison[1], color_scheme="light")
    light = colours()
    button = browser.find_element("id", "theme")
    button.click()
    dark = colours()
    assert light[0] == dark[0].replace("22, 24, 27", "252, 251, 248") == "rgb(252, 251, 248)"
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert colours() == light
    opened(browser, comparison[1], color_scheme="dark")
    assert colours() == dark


@pytest.mark.parametrize("width", [360, 768])
def test_page_does_not_scroll_sideways(browser, comparison, width):
    opened(browser, comparison[1], width)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_keyboard_reaches_everything_and_shows_where_it_is(browser, comparison):
    from selenium.webdriver.common.keys import Keys

    opened(browser, comparison[1])
    reached = []
    for _ in range(300):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        name, outline = browser.execute_script(
            "const e = document.activeElement, shown = e.matches('[name=sample]') ? e.parentElement : e;"
            "return [e.id || e.name || e.tagName + (e.ariaLabel || e.textContent), getComputedStyle(shown).outlineStyle]"
        )
        if name.startswith("BODY"):
            break
        assert outline == "solid", name
        reached.append(name)
    assert {"theme", "sample", "play", "step", "AScores", "AAll settings", "SUMMARYEvery run"} <= set(reached)
    assert sum(name.startswith("SUMMARYNumbers of ") for name in reached) >= 8


def test_page_follows_wcag_aa(browser, comparison):
    axe = pytest.importorskip("selenium_axe_python", reason="selenium-axe-python is not installed; pip install selenium-axe-python")
    for width, theme in ((390, "dark"), (1200, "light")):
        opened(browser, comparison[1], width, color_scheme=theme)
        browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        checker = axe.Axe(browser)
        checker.inject()
        standards = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"], "resultTypes": ["violations"]}
        found = checker.run(options=standards)["violations"]
        assert [(rule["id"], node["target"], node["failureSummary"]) for rule in found for node in rule["nodes"]] == []


def test_the_sites_example_is_a_page_of_at_most_3_mb():
    page, site = ROOT / "docs/four_agents/report.html", (ROOT / "docs/evaluate/report.md").read_text()
    assert page.stat().st_size <= 3_000_000
    assert "(path:../four_agents/report.html)" in site
    assert (ROOT / "docs" / re.search(r"\(\.\./(four_agents/\S+\.png)\)", site)[1]).is_file()
    text = page.read_text()
    assert all(f">{arm}<" in text or f"> {arm}<" in text for arm in ("bc", "dagger", "lcm", "dmd2"))
