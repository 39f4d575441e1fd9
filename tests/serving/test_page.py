"""The page in a real browser, over the demo's server: what a visitor does, and how it looks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browsing import Visit
from serving_fakes import until
from serving_process import Served

RECORD = """
window.states = [];
new MutationObserver((changes) => {
  for (const { target } of changes) {
    if (target.dataset?.state) window.states.push(target.dataset.state);
  }
}).observe(document, { subtree: true, attributes: true, attributeFilter: ["data-state"] });
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def demo(browser: Any, runs: Path) -> Iterator[Served]:
    server = Served("--demo", "--runs", str(runs))
    yield server
    server.end()


class Visitor(Visit):
    """A page of the server, once it is there."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        super().__init__(browser, url, script=RECORD, **{"accept_downloads": True} | options)
        self.page.wait_for_selector("#language:not(:empty)")
        if not url.endswith("/runs"):
            self.page.wait_for_selector("#examples button")

    def until(self, condition: str) -> None:
        """Waits for what a script says; the page's policy allows no `wait_for_function`."""
        until(lambda: self.page.evaluate(condition), seconds=20)


@pytest.mark.browser
@pytest.mark.slow
def test_a_visit(browser: Any, demo: Served, tmp_path: Path) -> None:
    visit = Visitor(browser, demo.url, viewport={"width": 1280, "height": 900})
    page = visit.page
    assert "toy" in page.inner_text("#toy")
    page.click("#examples button >> nth=2")
    assert page.input_value("#prompt") == "三枚火箭，橙色背景"
    page.click("#examples button >> nth=0")
    # The dice, then a seed of one's own.
    seeds = {page.input_value("#seed")}
    page.click("#dice")
    assert page.input_value("#seed") not in seeds
    page.fill("#seed", "7")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".card[data-state=done]")
    assert page.evaluate("states.filter((s, i) => s !== states[i - 1])")[:2] == ["preview", "done"]
    assert "preview" in page.inner_text(".card .clock")
    assert page.evaluate("document.querySelector('.card img.shown + img').naturalWidth") == 64
    assert visit.shot("desktop-one", tmp_path).std() > 10

    # Several at once: seeds ascending, each in the gallery.
    page.click("[data-preset=four]")
    page.click("#go")
    visit.until("document.querySelectorAll('.card[data-state=done]').length === 4")
    visit.until("document.querySelectorAll('#gallery li').length === 5")
    assert {"seed 7", "seed 8", "seed 9", "seed 10"} <= {
        text.lower().split(" · ")[-1] for text in page.locator("#gallery small").all_inner_texts()
    }

    # 2 against 8 from equal noise, both clocks, the slider.
    page.check("input[value=pair]", force=True)
    page.fill("#seed", "3")
    page.click("#go")
    page.wait_for_selector("#slider:not([hidden])")
    assert page.locator(".card[data-state=done] .clock").count() == 2
    titles = page.locator(".card figcaption b").all_inner_texts()
    assert titles == ["emoji-student · 2 steps", "emoji-teacher · 8 steps"]
    page.locator("#share").fill("25")
    assert page.evaluate("getComputedStyle(over).getPropertyValue('--share')") == "25%"
    visit.shot("desktop-pair", tmp_path)

    # A PNG that was made here brings its settings back.
    with page.expect_download() as saved:
        page.locator("#gallery li >> nth=-1").locator("button >> nth=1").click()
    made = tmp_path / "made.png"
    saved.value.save_as(made)
    page.fill("#prompt", "something else")
    page.fill("#seed", "1")
    page.set_input_files("#file", str(made))
    visit.until("document.getElementById('seed').value === '7'")
    assert page.input_value("#prompt") == "two cats on a red background"
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(other)
    page.set_input_files("#file", str(other))
    visit.until("document.getElementById('status').textContent.includes('no settings')")
    visit.end()


@pytest.mark.browser
@pytest.mark.slow
def test_on_a_phone_in_chinese_and_dark_and_a_cancel(
    browser: Any, demo: Served, tmp_path: Path
) -> None:
    visit = Visitor(
        browser, demo.url, locale="zh-CN", color_scheme="dark", has_touch=True, is_mobile=True,
        viewport={"width": 390, "height": 844},
    )  # fmt: skip
    page = visit.page
    assert page.inner_text("#go").startswith("生成")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#go")
    page.wait_for_selector(".card[data-state=done]")
    pixels = visit.shot("phone-zh-dark", tmp_path)
    assert pixels[2, 2].max() < 60  # dark paper
    page.click("#theme")
    assert visit.shot("phone-zh-light", tmp_path)[2, 2].min() > 200
    page.click("#language")
    assert page.inner_text("#go").startswith("Make")
    # The teacher's eight steps are long enough to cancel in.
    page.select_option("#model", "emoji-teacher")
    page.evaluate("count.value = 8")
    page.click("#go")
    page.click("#cancel")
    visit.until("document.getElementById('status').textContent === 'cancelled'")
    assert page.locator(".card[data-state=cancelled]").count() > 0
    assert page.is_enabled("#go")
    visit.end()


@pytest.mark.browser
@pytest.mark.slow
def test_a_key_is_asked_for_and_used(browser: Any) -> None:
    server = Served("--model", "zoo:emoji-student", TWOSTEP_API_KEY="a-key-for-the-page")
    try:
        visit = Visitor(browser, server.url)
        page = visit.page
        assert "key" in page.inner_text("#trouble")
        page.fill("#key", "a-key-for-the-page")
        page.press("#key", "Tab")
        page.wait_for_selector("#model option", state="attached")
        assert page.is_hidden("#pair-mode")  # no teacher here
        page.click("#go")
        page.wait_for_selector(".card[data-state=done]")
        visit.problems = [each for each in visit.problems if "401" not in each]
        visit.end()
    finally:
        server.end()


def write_records(run: Path, turns: range) -> None:
    """As a training writes them."""
    with (run / "metrics.jsonl").open("a") as file:
        for turn in turns:
            record = {
                "turn": turn, "loss": 1000.0 / turn**2, "critic/accuracy_final": 0.5 + 0.1 / turn,
                "critic/accuracy_step1": 0.6, "latents/std": 1.0 + 0.01 * turn,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")


def write_sheet(run: Path, turn: int) -> None:
    gradient = np.indices((64, 96)).sum(0) * turn % 256
    (run / "samples").mkdir(exist_ok=True)
    picture = np.repeat(gradient[..., None], 3, axis=2).astype(np.uint8)
    Image.fromarray(picture).save(run / "samples" / f"turn-{turn:07d}.png")


@pytest.mark.browser
@pytest.mark.slow
def test_a_training_is_followed_live(
    browser: Any, demo: Served, runs: Path, tmp_path: Path
) -> None:
    run = runs / "mine"
    run.mkdir()
    write_records(run, range(1, 21))
    write_sheet(run, 10)
    visit = Visitor(browser, f"{demo.url}/runs", viewport={"width": 1280, "height": 900})
    page = visit.page
    page.wait_for_selector(".chart")
    titles = page.locator(".chart figcaption").all_inner_texts()
    assert titles == ["Critic accuracy", "Student's loss", "Spread of the latents"]
    assert page.inner_text("#state") == "turn 20"
    assert page.locator(".chart polyline").count() == 4
    points = page.locator(".chart >> nth=2 >> polyline").get_attribute("points").split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == 20
    assert heights == sorted(heights, reverse=True)  # it grows
    visit.until("document.getElementById('sheet').naturalWidth === 96")
    assert page.inner_text("#turned") == "10"
    # It goes on while the page is open.
    write_sheet(run, 20)
    write_records(run, range(21, 31))
    visit.until("document.getElementById('state').textContent === 'turn 30'")
    visit.until("document.getElementById('turned').textContent === '20'")
    assert visit.shot("runs-desktop", tmp_path).std() > 10
    page.locator("#turn").fill("0")
    visit.until("document.getElementById('turned').textContent === '10'")
    page.set_viewport_size({"width": 390, "height": 844})
    page.click("#theme")
    page.click("#language")
    assert page.locator(".chart figcaption").all_inner_texts()[1] == "学生损失"
    assert page.inner_text("#state") == "第 30 轮"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    visit.shot("runs-phone-zh", tmp_path)
    visit.end()
