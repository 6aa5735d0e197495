"""The page at /studio: how its files are served, and the page itself in Chromium."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from api import studio
from core.settings import ROOT
from tests.civitai import KEY, FakeCivitai
from tests.conftest import ADMIN, USER, Server, serving
from tests.test_http import problem

FILES = sorted(studio.files())
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1280,1000",
)  # fmt: skip
KEYS = ["maker", "canceller", "reloader"]  # of tests that look at what their key has made
HOSTILE = '<img src=x onerror="window.hacked=1">'
pytestmark = pytest.mark.http


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The starters, a fake Civitai, and a registry that means harm."""
    base = tmp_path_factory.mktemp("studio")
    entries = json.loads((ROOT / "lora_list.json").read_text())
    entries["x' onmouseover='hacked=1"] = {**entries["pixel_art_style"], "trigger words": [HOSTILE], "allow_no_mention": False, "creator": "<script>window.hacked=1</script>", "usage_rights": "NoCommercialUse"}
    (base / "lora_list.json").write_text(json.dumps(entries))
    with FakeCivitai() as fake:
        fake.add(1, "Style 01")
        with serving(base, {"loras": fake.settings()}, env={"CIVIT_KEY": KEY, "API_KEY": ",".join([USER, *KEYS])}) as running:
            yield running


# Its files.


@pytest.mark.parametrize("path", FILES)
def test_its_files_need_no_key_and_are_kept_by_their_etag(server: Server, path: str) -> None:
    answer = requests.get(server.url + path, timeout=30)
    assert answer.status_code == 200
    assert answer.content == (studio.FOLDER / (path.removeprefix("/studio").strip("/") or "index.html")).read_bytes()
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    again = requests.get(server.url + path, headers={"If-None-Match": answer.headers["ETag"]}, timeout=30)
    assert (again.status_code, again.content) == (304, b"")


def test_everything_else_beside_them_needs_a_key(server: Server) -> None:
    for path in ("/studio/nothing.js", "/studio/..%2fconfiguration.yaml", "/studio/app.js/", "/STUDIO", "/capabilities", "/"):
        assert requests.get(server.url + path, timeout=30).status_code == 401, path
    assert problem(server.get("/studio/nothing.js"), 404)
    assert problem(server.get("/studio/..%2fconfiguration.yaml"), 404)
    assert requests.post(server.url + "/studio", data="x", timeout=30).status_code == 405


def test_a_slash_behind_leads_to_the_page(server: Server) -> None:
    answer = requests.get(server.url + "/studio/", timeout=30)
    assert answer.url == server.url + "/studio"
    assert answer.status_code == 200
    assert requests.head(server.url + "/studio", timeout=30).headers["Content-Type"].startswith("text/html")


def test_the_page_names_only_files_that_there_are_and_has_no_code_of_its_own() -> None:
    page = (studio.FOLDER / "index.html").read_text()
    scripts = {file.name: file.read_text() for file in studio.FOLDER.glob("*.js")}
    named = {f"/{name}" for name in re.findall(r'(?:src|href)="(studio/[^"]+)"', page)}
    named |= {f"/studio/{name}" for text in scripts.values() for name in re.findall(r'from "\./([^"]+)"', text)}
    assert named | {"/studio"} == set(FILES)
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)", page)
    for name, text in scripts.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|setHTML", text), name


def test_its_policy_lets_no_other_code_run_and_no_page_frame_it() -> None:
    policy = {name: set(values) for name, *values in (directive.split() for directive in studio.POLICY.split(";"))}
    closed = {"'none'"}
    assert policy == {
        "default-src": closed, "script-src": {"'self'"}, "style-src": {"'self'"}, "img-src": {"'self'", "blob:", "data:"}, "connect-src": {"'self'"}, "form-action": closed,
        "frame-ancestors": closed, "base-uri": closed, "require-trusted-types-for": {"'script'"}, "trusted-types": closed,
    }  # fmt: skip


# The page.


class Page:
    """The page in a browser, with a key of its own."""

    def __init__(self, browser: webdriver.Chrome, server: Server) -> None:
        self.browser, self.server = browser, server

    def open(self, key: str = ADMIN, part: str = "create") -> Page:
        self.browser.get(self.server.url + "/studio#" + part)
        self.run(f"sessionStorage.setItem('easel-key', {json.dumps(key)})")
        self.browser.refresh()
        self.until(lambda: self.one(f"#view-{part}").is_displayed())
        self.until(lambda: not self.one("#gallery").get_attribute("aria-busy"))  # the key's last jobs are there
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def fill(self, **values: object) -> None:
        for name, value in values.items():
            self.one(f"#create [name={name}]").clear()
            self.one(f"#create [name={name}]").send_keys(str(value))

    def until(self, condition: Callable[[], Any], seconds: float = 180) -> Any:
        return WebDriverWait(self.browser, seconds, 0.1).until(lambda _: condition())

    def draw(self, **values: object) -> list[list[int]]:
        """Generate; answers the large picture's pixels, (r, g, b) row by row."""
        before = len(self.all("#gallery li"))
        self.fill(**values)
        self.one("#generate").click()
        self.until(lambda: len(self.all("#gallery li")) > before or self.one("#create-problem").is_displayed())
        assert not self.one("#create-problem").is_displayed(), self.text("#create-problem")
        self.until(lambda: self.run("return document.querySelector('#viewer img').complete"))
        return self.run(
            "const i = document.querySelector('#viewer img'), c = new OffscreenCanvas(i.naturalWidth, i.naturalHeight).getContext('2d');"
            "c.drawImage(i, 0, 0); const d = [...c.getImageData(0, 0, i.naturalWidth, i.naturalHeight).data];"
            "return Array.from({length: d.length / 4}, (_, p) => d.slice(4 * p, 4 * p + 3))"
        )

    def running(self) -> int:
        return int(self.server.get("/buffer_status").json()["queue"]["running"])


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no chromium and chromedriver here (`make system` installs them)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        made = webdriver.Chrome(options, webdriver.ChromeService(driver))
        yield made
        made.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, server: Server) -> Iterator[Page]:
    yield Page(browser, server)
    said = [entry["message"] for entry in browser.get_log("browser")]  # errors of scripts, and what the policy stopped
    assert not [text for text in said if "Failed to load resource" not in text]


def test_it_asks_for_a_key_and_keeps_it_for_the_tab(page: Page) -> None:
    page.browser.get(page.server.url + "/studio")
    page.run("sessionStorage.clear()")
    page.browser.refresh()
    page.until(lambda: page.one("#key").is_displayed())
    page.one("#key").send_keys("wrong" + Keys.ENTER)
    page.until(lambda: page.text("#key-error").endswith("This key is not valid."))
    page.one("#key").clear()
    page.one("#key").send_keys(USER + Keys.ENTER)
    page.until(lambda: page.one("#create").is_displayed())
    page.browser.refresh()
    page.until(lambda: page.one("#create").is_displayed())
    page.browser.get(page.server.url + "/studio#loras")
    page.until(lambda: page.one("#loras-admin").is_displayed())
    assert not page.one("#add").is_displayed()


def test_a_picture_and_the_same_again_by_its_settings(page: Page) -> None:
    page.open("maker")
    page.one("[id='lora-pixel_art_style']").click()
    page.one("[id='lora-pixel_art_style'] ~ span").click()  # the label: off again,
    page.one("[id='lora-pixel_art_style']").click()  # and on
    page.one(".lora .word").click()
    assert page.one("#prompt").get_attribute("value") == "pixel_art_style"
    first = page.draw(prompt="red apple", num_inference_steps=6, seed=11, count_returned=2)
    assert len(first) == 64 * 64
    assert len(page.all("#gallery li")) == 2
    shown = page.text("#viewer dl")
    for fact in ("red apple", "starter/stable-diffusion", "11", "64x64", "pixel_art_style:1 (96 layers)", "✓ commercial use", "Apache-2.0"):
        assert fact in shown, fact
    page.all("#gallery button")[1].click()
    page.until(lambda: "12" in page.text("#viewer dl"))
    page.fill(prompt="something else")
    page.one("#viewer .primary").click()
    page.until(lambda: page.one("#prompt").get_attribute("value") == "red apple")
    assert page.one("#seed").get_attribute("value") == "12"
    assert page.one("[id='lora-pixel_art_style']").is_selected()
    again = page.draw(seed=11)
    assert max(abs(a - b) for p, q in zip(again, first, strict=True) for a, b in zip(p, q, strict=True)) <= 2  # it was one of two
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")


def test_settings_from_a_picture(page: Page, tmp_path: Path) -> None:
    made = page.server.post("/post_config", params={"prompt": "yellow star", "negative_prompt": "blue", "seed": 5, "num_inference_steps": 4, "lora": "pixel_art_style:0.7", "clip_skip": 1})
    (tmp_path / "star.png").write_bytes(made.content)
    page.open(USER)
    page.one("#replay-file").send_keys(str(tmp_path / "star.png"))
    page.until(lambda: page.one("#prompt").get_attribute("value") == "yellow star")
    assert page.one("#negative_prompt").get_attribute("value") == "blue"
    assert page.one("#num_inference_steps").get_attribute("value") == "4"
    assert page.one("[id='lora-pixel_art_style']").is_selected()
    assert "clip_skip: 1" in page.text("#extras")  # it has no control, and is sent all the same
    assert "star.png" in page.text("#notes")
    Image.open(tmp_path / "star.png").convert("RGB").save(tmp_path / "bare.png")
    page.one("#replay-file").send_keys(str(tmp_path / "bare.png"))
    page.until(lambda: page.one("#replay-problem").is_displayed())
    pixels = page.draw()
    with Image.open(tmp_path / "star.png") as image:
        assert pixels == [list(p) for p in image.convert("RGB").getdata()]


def test_progress_is_told_and_cancelling_stops_the_work(page: Page) -> None:
    page.open("canceller")
    page.fill(prompt="blue heart", num_inference_steps=150, count_returned=8)
    page.one("#generate").click()
    page.until(lambda: page.running() == 1)
    page.until(lambda: page.one("#jobs img").is_displayed())  # a preview
    assert re.search(r"step \d+ of 150", page.text("#jobs"))
    assert 0 < page.run("return document.querySelector('#jobs progress').value") < 1
    page.one("#jobs button").click()
    page.until(lambda: not page.all("#jobs li"))
    page.until(lambda: page.running() == 0)
    assert page.server.get("/jobs?limit=1", key="canceller").json()["jobs"][0]["status"] in ("canceled", "canceling")
    assert page.run("return document.getElementById('live').textContent") == "Cancelled"
    assert not page.all("#gallery li")


def test_after_a_reload_the_keys_jobs_are_there_and_those_that_run_are_followed(page: Page) -> None:
    page.open("reloader")
    assert not page.all("#gallery li, #jobs li")
    drawn = page.draw(prompt="red apple", num_inference_steps=6, seed=11)
    page.fill(prompt="blue heart", num_inference_steps=150, count_returned=8)
    page.one("#generate").click()
    page.until(lambda: page.running() == 1)
    page.open("reloader")
    assert page.one("#gallery img").get_attribute("alt") == "red apple, seed 11"
    assert not page.one("#viewer").is_displayed()
    page.one("#gallery button").click()
    page.until(lambda: page.run("return document.querySelector('#viewer img').complete"))
    page.until(lambda: page.one("#jobs img").is_displayed())  # the other goes on, with previews
    page.until(lambda: re.search(r"step \d+ of 150", page.text("#jobs")))
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    page.one("#viewer .primary").click()
    page.until(lambda: page.one("#prompt").get_attribute("value") == "red apple")
    assert (page.one("#seed").get_attribute("value"), page.one("#num_inference_steps").get_attribute("value")) == ("11", "6")
    page.one("#jobs button").click()
    page.until(lambda: not page.all("#jobs li"))
    page.until(lambda: page.running() == 0)
    assert page.server.get("/jobs?limit=1", key="reloader").json()["jobs"][0]["status"] in ("canceled", "canceling")
    assert page.draw() == drawn
    job = page.server.post("/jobs", key="reloader", params={"prompt": "star", "num_inference_steps": 2, "seed": 3}).json()
    page.until(lambda: page.server.get(job["urls"]["self"], key="reloader").json()["status"] == "succeeded")
    page.open("reloader")  # what was left elsewhere is there too
    assert [thumb.get_attribute("alt") for thumb in page.all("#gallery img")] == ["star, seed 3", "red apple, seed 11", "red apple, seed 11"]


def test_an_error_is_told_beside_its_field(page: Page) -> None:
    page.open(USER)
    page.fill(prompt="star", num_inference_steps=999, width=65)
    page.one("#generate").click()
    page.until(lambda: page.one("#create-problem").is_displayed())
    assert "Invalid parameters" in page.text("#create-problem")
    steps = page.one("#num_inference_steps")
    assert steps.get_attribute("aria-invalid") == "true"
    assert page.text("#" + steps.get_attribute("aria-describedby")).endswith("is too large. Allowed: 1 to 150")
    assert "a multiple of 16" in page.text("#error-width")
    assert page.one("#seed").get_attribute("aria-invalid") is None
    assert page.browser.switch_to.active_element.get_attribute("id") == "num_inference_steps"
    page.one("#create [type=reset]").click()
    assert not page.all("[aria-invalid]")
    page.one("#generate").click()
    page.until(lambda: page.one("#prompt").get_attribute("aria-invalid"))


def test_what_is_painted_is_repainted_and_nothing_else(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (20, 90, 200)).save(tmp_path / "blue.png")
    page.open(USER)
    page.one("#image").send_keys(str(tmp_path / "blue.png"))
    page.until(lambda: page.one("#mask").is_displayed())
    page.run("document.getElementById('strength').value = 1")
    page.one("#mask").send_keys(Keys.ARROW_RIGHT, " ", Keys.ARROW_LEFT, " ")
    pixels = page.draw(prompt="red apple", num_inference_steps=6, seed=3)
    changed = [i for i, p in enumerate(pixels) if max(abs(a - b) for a, b in zip(p, (20, 90, 200), strict=True)) > 8]
    assert len(changed) > 40
    assert all(20 <= i % 64 <= 48 and 20 <= i // 64 <= 44 for i in changed)


def test_captions_of_what_is_chosen(page: Page) -> None:
    page.open(USER, "caption")
    page.one("#caption-files").send_keys(str(ROOT / "starter/samples.png"))
    page.until(lambda: page.all("#captions button") or page.one("#caption-problem").is_displayed())
    said = page.text("#captions p").removesuffix("Use as prompt").strip()
    assert said
    page.one("#captions button").click()
    page.until(lambda: page.one("#create").is_displayed())
    assert page.one("#prompt").get_attribute("value") == said


def test_the_queue_and_the_memory(page: Page) -> None:
    page.open(ADMIN, "server")
    page.until(lambda: len(page.all("#runners > section")) == 2)
    assert "ready" in page.text("#runner-StableDiffusion")
    assert "of at most 64 waiting" in page.text("#runner-StableDiffusion")
    for unload in page.all("#runner-StableDiffusion button"):
        unload.click()
    page.until(lambda: "is in memory" in page.text("#runner-StableDiffusion"))


def test_a_lora_is_added_and_removed(page: Page) -> None:
    page.open(ADMIN, "loras")
    page.one("#add-source").send_keys("77" + Keys.ENTER)
    page.until(lambda: page.one("#loras-problem").is_displayed())
    assert "77" in page.text("#loras-problem")
    page.one("#add-source").clear()
    page.one("#add-source").send_keys("1" + Keys.ENTER)
    page.until(lambda: "Style_01" in page.text("#lora-rows") or "Style 01" in page.text("#lora-rows"))
    assert not page.one("#loras-problem").is_displayed()
    page.one("[aria-label^='Remove Style']").click()
    page.browser.switch_to.alert.accept()
    page.until(lambda: "Style" not in page.text("#lora-rows"))
    assert "Style" not in str(page.server.get("/get_available_loras").json())


def test_nothing_that_is_named_becomes_markup(page: Page) -> None:
    page.open(ADMIN)
    assert HOSTILE in [word.text for word in page.all(".lora .word")]
    assert "credit: <script>window.hacked=1</script>" in page.text("#lora-list")
    page.draw(prompt=HOSTILE, num_inference_steps=1)
    assert HOSTILE in page.text("#viewer dl")
    page.open(ADMIN, "loras")
    page.until(lambda: HOSTILE in page.text("#lora-rows"))
    assert not page.all("img[src='x'], main script")
    assert page.run("return window.hacked") is None
    stopped = page.run("try { document.body.innerHTML = '<b>x</b>' } catch (e) { return e.name }")
    assert stopped == "TypeError"  # whatever a script did, the policy has text stay text
    page.browser.get_log("browser")


@pytest.mark.parametrize("part", ["create", "caption", "server", "loras"])
def test_every_control_has_a_name_and_a_phone_need_not_scroll_sideways(page: Page, part: str) -> None:
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 780, "deviceScaleFactor": 2, "mobile": True})
    try:
        page.open(ADMIN, part)
        assert page.run("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        time.sleep(0.3)
        nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    roles = {"button", "textbox", "searchbox", "checkbox", "combobox", "spinbutton", "slider", "link", "application", "img", "progressbar", "meter"}
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(found) > 5
    assert [one for one in found if not one[1].strip()] == []


def test_the_model_decides_what_may_be_set(page: Page) -> None:
    page.open(USER)
    Select(page.one("#model_id")).select_by_visible_text("stabilityai/stable-diffusion-xl-base-1.0")
    assert page.one("#width").get_attribute("placeholder") == "1024"
    assert not page.all(".lora")
    Select(page.one("#model_id")).select_by_visible_text("starter/unidiffuser")
    assert not page.one("#source").is_displayed()
