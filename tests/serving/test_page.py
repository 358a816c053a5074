"""The page in a real Chromium, over the real application and the toy shop."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect

from encoders.loaded_artifact import Artifact
from feature_repo.home import Home
from serving.app import AppSettings
from serving.security import ApiKeys, new_key
from tests.serving.chromium import VARIABLE, chromium
from tests.serving.conftest import ITEMS, USERS, ToyUser, World, expected_logit
from tests.serving.page_server import Site, running_site

TIMEOUT_MS = 10_000
MINUS, DASH = chr(0x2212), chr(0x2013)
ANN = USERS["ann"]
NEWEST = "Remove red lamp, purchase, 20 May 2024, 12:00"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, toy_program: bytes, toy_artifact: Artifact
) -> Iterator[Site]:
    world = World(Home(tmp_path_factory.mktemp("page")), toy_program, toy_artifact)
    with running_site(world) as site:
        yield site


@pytest.fixture
def site(served: Site) -> Iterator[Site]:
    yield served
    served.reader.is_away = False
    served.reader.users = dict(USERS)


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.set_default_timeout(TIMEOUT_MS)
        yield context


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page without a complaint in its console, unless the test takes it from the list."""
    page = context.new_page()
    complaints = complaints_of(page)
    yield page
    assert complaints == []


def complaints_of(page: Page) -> list[str]:
    complaints: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    page.on("console", on_console)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    return complaints


def opened(page: Page, site: Site, user_id: str) -> Page:
    """The page of a user, ranked."""
    page.goto(f"{site.url}/?user={user_id}")
    expect(page.locator("#announcement")).to_contain_text(f"ranked for {user_id}")
    return page


def scores(page: Page) -> dict[str, str]:
    """Item id -> its score, in the order of the page."""
    return dict(
        page.locator(".ranked-item").evaluate_all(
            "items => items.map(item => [item.dataset.item,"
            " item.querySelector('.score-number').lastChild.textContent])"
        )
    )


def expected_scores(user: ToyUser) -> dict[str, str]:
    """The same by the toy model's formula: best first, of equals the smaller id."""
    logits = {item_id: expected_logit(user, item_id, item) for item_id, item in ITEMS.items()}
    order = sorted(ITEMS, key=lambda item_id: (-round(logits[item_id], 5), item_id))
    return {item_id: f"{1 / (1 + math.exp(-logits[item_id])):.1%}" for item_id in order}


def with_events(user: ToyUser, events: Sequence[tuple[str, str, str | None, float]]) -> ToyUser:
    return replace(user, events=tuple(events))


def announced(page: Page, words: str | re.Pattern[str]) -> None:
    expect(page.locator("#announcement")).to_contain_text(words)


def violations(page: Page) -> list[str]:
    """What axe finds, a line for each."""
    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html']}" for one in found for node in one["nodes"]]


# The first one, while no other browser runs in this thread.
def test_without_chromium_the_reason_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/nowhere/chromium")
    with pytest.raises(RuntimeError, match="install it with `apt-get install"), chromium():
        pass


def test_asks_nobody_else_and_complains_about_nothing(page: Page, site: Site) -> None:
    asked: list[Request] = []
    page.on("request", lambda request: asked.append(request))
    answer = page.goto(site.url)
    assert answer is not None
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    expect(page.get_by_role("heading", level=1)).to_have_text("Longtrail")
    # Those who did most come first.
    expect(page.get_by_role("list", name="For example").get_by_role("button")).to_have_text(
        ["ann", "bob", "idle"]
    )
    page.get_by_role("button", name="ann").click()
    announced(page, "6 items ranked for ann.")
    expect(page.locator("#health-text")).to_have_text("Ready")
    assert {urlsplit(request.url).netloc for request in asked} == {urlsplit(site.url).netloc}
    failed = [request.url for request in asked if (a := request.response()) and not a.ok]
    assert failed == []


def test_a_user_is_found_and_read_with_the_keyboard_alone(page: Page, site: Site) -> None:
    page.goto(site.url)
    expect(page.get_by_role("button", name="bob")).to_be_visible()
    press = page.keyboard.press
    for _ in range(3):  # the link to the content, the theme, the field
        press("Tab")
    field = page.get_by_role("combobox", name="User id")
    expect(field).to_be_focused()
    page.keyboard.type("b")
    expect(page.get_by_role("option")).to_have_text(["bob"])
    expect(field).to_have_attribute("aria-expanded", "true")
    press("ArrowDown")
    expect(field).to_have_attribute("aria-activedescendant", "user-options-0")
    expect(page.get_by_role("option", selected=True)).to_have_text("bob")
    press("Escape")
    expect(page.get_by_role("option")).to_have_count(0)
    press("ArrowDown")
    expect(page.get_by_role("option")).to_have_count(1)
    press("ArrowUp")
    press("Enter")
    announced(page, "ranked for bob")
    expect(page.get_by_role("heading", name="History of bob")).to_be_visible()

    for _ in range(5):  # the button, three examples, the timeline's only bar
        press("Tab")
    bar = page.get_by_role("button", name="29 May 2024, purchase, 1 behaviour: sail boat")
    expect(bar).to_be_focused()
    expect(page.locator("#timeline-detail")).to_contain_text("sail boat")
    press("Enter")
    expect(bar).to_have_attribute("aria-pressed", "true")
    summary = page.locator(".ranked-item summary").first
    summary.focus()
    press("Enter")
    expect(page.locator(".ranked-item details").first).to_have_attribute("open", "")


def test_the_timeline_shows_every_behaviour_by_scene(page: Page, site: Site) -> None:
    opened(page, site, "ann")
    expect(page.locator(".lane-label")).to_have_text(
        ["purchase 2", "search 1"], use_inner_text=False
    )
    bars = page.locator("#timeline").get_by_role("button")
    labels = [bar.get_attribute("aria-label") for bar in bars.all()]
    assert labels == [
        "22 Apr 2024, purchase, 1 behaviour: red lamp",
        "20 May 2024, purchase, 1 behaviour: red lamp",
        "12 May 2024, search, 1 behaviour: looking for a lamp",
    ]
    assert page.locator("#timeline .block").count() == len(ANN.events)
    listed = page.get_by_role("list", name="Behaviours, newest first")
    expect(listed.locator(".behavior-text")).to_have_text(
        ["red lamp", "looking for a lamp", "red lamp"]
    )

    # One stop of the Tab key per lane; the arrows do the rest.
    bars.nth(1).focus()
    page.keyboard.press("ArrowLeft")
    expect(bars.nth(0)).to_be_focused()
    expect(page.locator("#timeline-detail")).to_contain_text("22 Apr 2024 · 1 purchase")
    page.keyboard.press("ArrowDown")
    expect(bars.nth(2)).to_be_focused()
    page.keyboard.press("Enter")
    expect(listed.locator(".behavior-text")).to_have_text(["looking for a lamp"])
    page.get_by_role("button", name="Show all 3").click()
    expect(listed.locator(".behavior-text")).to_have_count(3)


def test_the_ranking_shows_scores_and_what_pulled_them(page: Page, site: Site) -> None:
    opened(page, site, "ann")
    assert scores(page) == expected_scores(ANN)
    first = page.locator(".ranked-item").first
    expect(first.locator(".reason")).to_contain_text("purchase before: 2 times, last 12 days ago")
    first.locator("summary").click()
    rows = first.get_by_role("row").filter(has=page.get_by_role("rowheader"))
    expect(rows.first).to_contain_text("red lamp")
    expect(rows.first).to_contain_text("purchase, 2 times, last 12 days ago")
    expect(rows.first).to_contain_text(re.compile(r"\+\d\.\d\dpulls up"))
    # What speaks for the open item is marked in the timeline.
    expect(page.locator("#timeline .block.linked")).to_have_count(len(ANN.events))


def test_what_speaks_against_an_item_says_so(page: Page, site: Site) -> None:
    # The toy model is never against: the answer is the server's, with one number's sign changed.
    def against(text: str) -> str:
        return re.sub(r'("logits":)(\d)', r"\1-\2", text, count=1)

    page.route("**/v1/rank", lambda route: route.fulfill(body=against(route.fetch().text())))
    opened(page, site, "ann")
    share = page.locator(".ranked-item .share").first
    expect(share).to_have_text(re.compile(f"^{MINUS}"))
    page.locator(".ranked-item summary").first.click()
    expect(page.locator(".effect").first).to_contain_text("pushes down")


def test_a_behaviour_is_removed_and_put_back(page: Page, site: Site) -> None:
    opened(page, site, "ann")
    button = page.get_by_role("button", name=NEWEST)
    button.focus()
    page.keyboard.press("Enter")
    announced(page, "The ranking stays the same.")
    without = with_events(ANN, ANN.events[:-1])
    assert scores(page) == expected_scores(without)
    assert scores(page) != expected_scores(ANN)
    expect(page.locator("#change-summary")).to_have_text("1 removed")
    expect(page.locator(".block.removed")).to_have_count(1)
    back = page.get_by_role("button", name=NEWEST.replace("Remove", "Put back"))
    expect(back).to_be_focused()  # nobody has to find their place again
    page.keyboard.press("Enter")
    announced(page, "ranked for ann")
    assert scores(page) == expected_scores(ANN)
    expect(page.get_by_role("button", name="Reset")).to_be_disabled()


def test_added_behaviours_move_the_ranking(page: Page, site: Site) -> None:
    opened(page, site, "ann")
    page.get_by_role("combobox", name="Scene").select_option("purchase")
    field = page.get_by_role("combobox", name="Behaviour to add")
    field.fill("boat")
    expect(page.locator("#add-options > li")).to_have_text(
        [re.compile("row boat"), re.compile("sail boat")]
    )
    page.get_by_role("option", name="sail boat").click()
    expect(field).to_have_value("sail boat")
    page.get_by_role("button", name="Add", exact=True).click()
    # Bought once and just now.
    boat = ("purchase", "sail boat", "B1", 0)
    announced(page, "The ranking changed: ")
    more = with_events(ANN, (*ANN.events, boat))
    assert scores(page) == expected_scores(more)

    before, after = list(expected_scores(ANN)), list(expected_scores(more))
    steps = {item_id: before.index(item_id) - after.index(item_id) for item_id in after}
    words = {
        item_id: f"▲ up {n}" if n > 0 else f"▼ down {-n}" if n < 0 else "same"
        for item_id, n in steps.items()
    }
    expect(page.locator(".move")).to_have_text(list(words.values()))
    announced(page, f"sail boat up to {after.index('B1') + 1}")

    # Words of one's own, of the other scene.
    page.get_by_role("combobox", name="Scene").select_option("search")
    field.fill("looking for a lamp")
    field.press("Enter")
    expect(page.locator("#change-summary")).to_have_text("2 added")
    search = ("search", "looking for a lamp", None, 0)
    wanted = expected_scores(with_events(ANN, (*ANN.events, boat, search)))
    expect(page.locator(".score-number")).to_have_text([f"Score {one}" for one in wanted.values()])
    page.get_by_role("button", name="Take back sail boat").click()
    expect(page.locator("#change-summary")).to_have_text("1 added")
    page.get_by_role("button", name="Reset").click()
    announced(page, "ranked for ann")
    assert scores(page) == expected_scores(ANN)
    expect(page.locator(".move")).to_have_count(0)


def test_a_removed_behaviour_stays_the_one_when_newer_ones_come(page: Page, site: Site) -> None:
    opened(page, site, "bob")
    live = ("purchase", "row boat", "B2", 1)
    site.reader.users["bob"] = with_events(USERS["bob"], (*USERS["bob"].events, live))
    page.get_by_role("button", name="Remove sail boat").click()
    announced(page, "The ranking ")
    # The history is read again with every ranking, so the new one is there, and kept.
    expect(page.get_by_role("button", name="Remove row boat")).to_be_visible()
    assert scores(page) == expected_scores(with_events(USERS["bob"], [live]))


def test_similar_items(page: Page, site: Site) -> None:
    opened(page, site, "ann")
    item = page.locator("[data-item=L1]")
    item.locator("summary").click()
    item.get_by_role("button", name="Similar items to red lamp").click()
    expect(item.get_by_role("heading", name="Similar items to red lamp")).to_be_focused()
    expect(item.locator(".similar li").first).to_contain_text("green lamp")
    expect(item.locator(".similar li .number").first).to_have_text("similarity 0.96")


def test_the_model_card_tells_its_metrics_with_intervals(page: Page, site: Site) -> None:
    page.goto(site.url)
    card = page.get_by_role("region", name="Model card")
    expect(card).to_contain_text("toy-run")
    expect(card).to_contain_text("toy-shop")
    expect(card.get_by_role("columnheader")).to_have_text(["Metric", "Test", "Validation"])
    expect(card.get_by_role("row", name="AUC").get_by_role("cell")).to_have_text(
        [f"0.77560.7639{DASH}0.7869", f"0.79560.7850{DASH}0.8067"]
    )
    expect(card.get_by_role("row", name="Impressions").get_by_role("cell")).to_have_text(
        ["100,000", "50,000"]
    )


def test_dark_follows_the_system_until_the_button_is_used(page: Page, site: Site) -> None:
    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))

    page.emulate_media(color_scheme="light")
    page.goto(site.url)
    light = paper()
    page.emulate_media(color_scheme="dark")
    # A locator, since the page's policy forbids to evaluate the text of a condition.
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    dark = paper()
    assert light != dark
    page.get_by_role("button", name="Light").click()
    assert paper() == light
    page.reload()
    assert paper() == light
    page.get_by_role("button", name="Dark").click()
    assert paper() == dark


@pytest.mark.parametrize(("motion", "animates"), [("reduce", False), ("no-preference", True)])
def test_items_glide_unless_motion_is_unwanted(
    page: Page, site: Site, motion: str, animates: bool
) -> None:
    page.emulate_media(reduced_motion="reduce" if motion == "reduce" else "no-preference")
    page.add_init_script(
        "window.moves = 0; const animate = Element.prototype.animate;"
        "Element.prototype.animate = function (...how) {"
        "  moves += 1; return animate.apply(this, how); }"
    )
    opened(page, site, "ann")
    assert page.evaluate("moves") == 0
    page.get_by_role("combobox", name="Behaviour to add").fill("sail boat")
    page.keyboard.press("Enter")
    announced(page, "The ranking changed")
    assert (page.evaluate("moves") > 0) is animates


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_axe_finds_nothing_and_nothing_is_cut_off(
    page: Page, site: Site, width: int, scheme: str
) -> None:
    page.emulate_media(
        color_scheme="light" if scheme == "light" else "dark", reduced_motion="reduce"
    )
    page.set_viewport_size({"width": width, "height": 800})
    opened(page, site, "ann")
    page.locator("#features summary").click()
    page.locator(".ranked-item summary").first.click()
    page.get_by_role("button", name=NEWEST).click()
    announced(page, "The ranking stays the same.")
    page.get_by_role("button", name="Similar items").click()
    expect(page.locator(".similar li").first).to_be_visible()
    page.get_by_role("combobox", name="Behaviour to add").fill("boat")
    expect(page.locator("#add-options > li")).to_have_count(2)
    page.keyboard.press("ArrowDown")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_store_that_is_away_is_told_and_the_ranking_goes_on(
    context: BrowserContext, site: Site
) -> None:
    page = context.new_page()  # its console tells of the 503
    site.reader.is_away = True
    page.goto(f"{site.url}/?user=ann")
    expect(page.locator(".degraded")).to_contain_text("Degraded: ")
    expect(page.get_by_role("alert")).to_contain_text("The online store does not answer")
    assert scores(page) == expected_scores(ToyUser())
    expect(page.locator("#health-text")).to_contain_text("Not ready: The online store does not")
    site.reader.is_away = False
    page.get_by_role("button", name="Show").click()
    expect(page.locator(".degraded")).to_have_count(0)
    assert scores(page) == expected_scores(ANN)


def test_a_server_that_is_gone_is_one_sentence(context: BrowserContext, site: Site) -> None:
    page = opened(context.new_page(), site, "ann")
    context.set_offline(True)
    page.get_by_role("button", name=NEWEST).click()
    expect(page.get_by_role("alert")).to_have_text(
        "The server does not answer: check that it runs, then try again."
    )


def test_an_unknown_user_is_ranked_and_said_to_be_unknown(page: Page, site: Site) -> None:
    page.goto(site.url)
    page.get_by_role("combobox", name="User id").fill("nobody")
    page.keyboard.press("Enter")
    announced(page, "ranked for nobody")
    expect(page.locator("#user-facts")).to_contain_text("does not know this user")
    expect(page.locator("#remarks")).to_contain_text("unknown user")
    assert urlsplit(page.url).query == "user=nobody"
    opened(page, site, "ann")
    page.go_back()
    expect(page.get_by_role("heading", name="History of nobody")).to_be_visible()


def test_a_key_is_asked_for_and_kept_in_the_tab_only(
    context: BrowserContext, world: World, tmp_path: Path
) -> None:
    page = context.new_page()  # its console tells of the 401
    key, entry = new_key("reader", ["read"])
    (tmp_path / "keys.toml").write_text(entry)
    settings = AppSettings(keys=ApiKeys(tmp_path / "keys.toml"))
    with running_site(world, settings) as site:
        page.goto(f"{site.url}/?user=ann")
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
        assert violations(page) == []
        page.keyboard.type("not the key")
        page.keyboard.press("Enter")
        expect(dialog).to_be_visible()
        expect(dialog.get_by_label("Key", exact=True)).to_have_value("")
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        announced(page, "ranked for ann")
        expect(dialog).to_be_hidden()
        expect(page.get_by_role("region", name="Model card")).to_contain_text("toy-run")
        assert page.evaluate("JSON.stringify(localStorage)") == "{}"
        assert key in page.evaluate("JSON.stringify(sessionStorage)")

        stranger = context.new_page()
        stranger.goto(f"{site.url}/?user=ann")
        stranger.get_by_role("button", name="Cancel").click()
        expect(stranger.get_by_role("alert")).to_contain_text(re.compile("key", re.IGNORECASE))
        stranger.get_by_role("button", name="API key").click()
        stranger.keyboard.type(key)
        stranger.keyboard.press("Enter")
        announced(stranger, "ranked for ann")
