"""What a designer does with the page, in a real browser: Debian's Chromium, headless. No request leaves the machine."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn

from brewjax.explore.cases import Case, case_presets, make_case
from brewjax.explore.page import make_page
from tests.serve.serving import eventually

pytestmark = pytest.mark.long
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("BREWJAX_SCREENSHOTS")  # a folder to keep them in, to be looked at
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address(planted, explorer) -> Iterator[str]:
    context = planted.context("m6", items=5, note="Calm.")
    expected = [context.item_ids[index] for index in context.order[:2]]
    cases = [make_case(context, order, text) for order, text in ((expected, "as it is"), (expected[::-1], "turned"))]
    page = make_page([planted, explorer], case_presets(cases))
    server = uvicorn.Server(uvicorn.Config(page, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address) -> Iterator:
    """Opens the page, by default of member m5, and fails on a request to elsewhere or an error of the console."""
    contexts, problems = [], []

    def open_(path: str = "#%7B%22member%22%3A%22m5%22%2C%22candidates%22%3A8%7D", **settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: _is_local(request.url) or problems.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: _is_mistake(message) and problems.append(message.text))
        page.goto(address + path)
        page.locator("#ranking tbody tr").first.wait_for()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not problems


def _is_local(url: str) -> bool:
    return urlsplit(url).scheme in ("blob", "data") or urlsplit(url).hostname == "127.0.0.1"


def _is_mistake(message) -> bool:
    """Whether a message of the console is an error, and not that of a refused request, which the page shows."""
    return message.type == "error" and "status of 400" not in message.text


def keep(page, name: str) -> None:
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png", full_page=True)


def probability(page) -> float:
    return float(page.locator("#ranking tbody tr td.number").nth(2).inner_text())


def settled(page, probability_before: float) -> None:
    eventually(lambda: probability(page) != probability_before)


def test_switch_off_the_cause_see_why_and_undo(open_page):
    page = open_page()
    keep(page, "first")
    before = probability(page)
    page.locator("#ranking tbody button").first.click()
    reasons = page.locator("tr.why li")
    reasons.first.wait_for()
    keep(page, "why")
    assert "Zookeeper" in page.locator("tr.why p").inner_text()
    page.get_by_label("Zookeeper").first.uncheck()
    settled(page, before)
    assert probability(page) == pytest.approx(0.5, abs=1e-3)
    eventually(lambda: "No single part has an effect" in page.locator("tr.why p").inner_text())  # it is still open
    keep(page, "without the cause")
    page.get_by_role("button", name="undo").click()
    eventually(lambda: probability(page) == before)


def test_change_the_instruction_and_save_it(open_page, tmp_path):
    page = open_page()
    before = probability(page)
    page.get_by_label("instruction").fill("Guess.")
    page.get_by_label("note").fill("Zzz.")
    settled(page, before)
    eventually(lambda: "Note: Zzz." in page.locator("#prompt").inner_text())
    keep(page, "a note")
    with page.expect_download() as download:
        page.get_by_role("button", name="save task").click()
    assert "steering_note: Zzz." in Path(download.value.path()).read_text()
    shared = open_page(page.evaluate("location.hash"))  # a link shows the same to a colleague
    assert shared.get_by_label("instruction").input_value() == "Guess."
    page.get_by_role("button", name="reset").click()
    eventually(lambda: probability(page) == before)


def test_edit_the_profile(open_page):
    page = open_page()
    before = probability(page)
    page.get_by_label("position").fill("Zzz")
    page.get_by_label("position").press("Enter")
    settled(page, before)
    assert "Zzz|" in page.locator("#prompt").inner_text()
    page.get_by_role("button", name="undo").click()
    eventually(lambda: page.get_by_label("position").input_value() == "Nurse")


def test_type_a_member(open_page):
    page = open_page()
    before, events = probability(page), page.locator("#events li")
    page.get_by_text("type a member").click()
    box = page.get_by_label("events, one a line")
    assert box.get_attribute("placeholder").startswith(("viewed: ", "applied: "))
    box.fill("viewed: zookeeper\napplied: 101 | seconds=9")
    box.press("Tab")
    eventually(lambda: events.count() == 2)
    assert "Zookeeper" in events.nth(0).inner_text()
    assert page.get_by_label("member").input_value() == ""
    page.get_by_label("position").fill("Nurse")
    page.get_by_label("position").press("Enter")
    eventually(lambda: "Nurse|" in page.locator("#prompt").inner_text())
    keep(page, "typed")
    shared = open_page(page.evaluate("location.hash"))
    assert shared.get_by_label("events, one a line").input_value().startswith("viewed: zookeeper")
    page.get_by_label("member").fill("m5")
    page.get_by_label("member").press("Enter")
    eventually(lambda: probability(page) == before)


def test_order_by_mouse_and_by_keyboard(open_page):
    page = open_page()
    events = page.locator("#events li")
    first, second = events.nth(0).inner_text(), events.nth(1).inner_text()
    assert first != second
    events.nth(0).locator(".handle").drag_to(events.nth(2).locator(".handle"))
    eventually(lambda: events.nth(0).inner_text() == second)
    events.nth(1).locator("input").focus()
    moving = events.nth(1).inner_text()
    page.keyboard.press("Alt+ArrowUp")
    eventually(lambda: events.nth(0).inner_text() == moving)
    assert page.evaluate("document.activeElement.closest('#events li') === document.querySelector('#events li')")


def test_choose_a_case_and_save_one(open_page):
    page = open_page()
    status = page.locator("#status")
    page.locator("#case").select_option("2. turned")
    eventually(lambda: "Not as expected" in status.inner_text())
    assert page.get_by_label("member").input_value() == "m6"
    assert page.get_by_label("note").input_value() == "Calm."
    keep(page, "a case")
    page.locator("#case").select_option("1. as it is")
    eventually(lambda: "As expected" in status.inner_text())
    page.get_by_text("save as a case").click()
    page.get_by_label("what should be so").fill("calm")
    first = page.get_by_label("expected order").input_value().splitlines()[0]
    page.get_by_label("expected order").fill("7")
    page.get_by_role("button", name="save case").click()
    eventually(lambda: "'7' is not among the 5 candidates" in status.inner_text())
    page.get_by_label("expected order").fill(first)
    with page.expect_download() as download:
        page.get_by_role("button", name="save case").click()
    case = Case.parse(Path(download.value.path()).read_text())
    assert (case.member, case.comment, case.expected) == ("m6", "calm", (first,))
    page.get_by_label("member").fill("m5")
    page.get_by_label("member").press("Enter")
    eventually(lambda: page.locator("#case").input_value() == "")


def test_beside_it_another_model(open_page):
    page = open_page()
    page.get_by_label("beside it").select_option("model")
    eventually(lambda: page.locator("#compare-heading").inner_text() == "there")
    eventually(lambda: page.locator("td.up, td.down").count() > 0)


def test_all_is_reached_by_keyboard(open_page):
    page = open_page()
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {
        "member",
        "task",
        "style",
        "instruction",
        "note",
        "profile-position",
        "case",
        "undo",
        "save-task",
        "pin",
        "why",
    } <= reached


def test_an_error_is_shown_and_goes_away(open_page):
    page = open_page()
    page.get_by_label("member").fill("nobody")
    page.get_by_label("member").press("Enter")
    eventually(lambda: "no member 'nobody'" in page.locator("#status").inner_text())
    page.get_by_label("member").fill("m4")
    page.get_by_label("member").press("Enter")
    eventually(lambda: "ranked in" in page.locator("#status").inner_text())


@pytest.mark.parametrize(("name", "settings"), [("phone", {"viewport": PHONE}), ("dark", {"color_scheme": "dark"})])
def test_on_a_phone_and_in_the_dark(open_page, name, settings):
    page = open_page(**settings)
    page.locator("#ranking tbody button").first.click()
    page.locator("tr.why li").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 29)" if name == "dark" else "rgb(255, 255, 255)")
    keep(page, name)
