"""The page in real browsers, on two gateways and two workers that share nothing but Redis."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from playwright.async_api import Locator, expect

from tests.e2e.agents.page_agents import HOSTILE_ANSWER, LONG_NAME, piece
from tests.support.browser import Tab, new_tab, running_browser, take_screenshot
from tests.support.stack import GatewayProcess, Stack

pytestmark = [pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
QUESTION = "How does a client resume after a reconnect?"
SLOW_ANALYSIS = "Analyse bike_hire.csv with resamples=1000000"
STORY = [
    "agent_queued",
    "agent_started",
    "agent_thinking",
    "tool_executing",
    "tool_completed",
    "text_delta",
    "agent_completed",
]


class OpenTab(Protocol):
    """Opens the page for a user, on the gateway of a number."""

    async def __call__(self, user_id: str, gateway: int, **options: Any) -> Tab: ...


@pytest.fixture(scope="module")
def stack(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two gateways, a worker with the examples, another one with agents of these tests."""
    folder = tmp_path_factory.mktemp("page")
    stack = Stack(folder, redis_url, key_prefix=f"t{uuid.uuid4().hex[:12]}")

    async def start() -> None:
        await stack.__aenter__()
        await asyncio.gather(
            stack.start_gateways(2),
            stack.start_worker("demo:worker", ROOT / "examples"),
            stack.start_worker("tests.e2e.agents.page_agents:worker", ROOT),
        )

    try:
        asyncio.run(start())
        yield stack
    finally:
        for process in [*stack.gateways, *stack.workers]:
            process.end_blocking()


@pytest.fixture
async def open_tab(
    stack: Stack, browser_name: str, request: pytest.FixtureRequest
) -> AsyncIterator[OpenTab]:
    scheme = request.node.callspec.params.get("scheme", "light")
    async with running_browser(browser_name, scheme) as browser:

        async def opened(user_id: str, gateway: int, **options: Any) -> Tab:
            tab = await new_tab(browser, **options)
            await tab.open(stack.gateways[gateway].url, stack.token(user_id))
            return tab

        yield opened
    stack.assert_no_defects()


@pytest.fixture
async def mortal(stack: Stack) -> AsyncIterator[GatewayProcess]:
    """A third gateway, for one test to kill and restart; ``open_tab`` knows it as number 2."""
    gateway = await stack.start_gateway()
    yield gateway
    await gateway.kill()
    stack.gateways.remove(gateway)


@pytest.fixture
def user_id() -> str:
    """A user whom no other test knows."""
    return f"alice-{uuid.uuid4().hex[:6]}"


async def test_run_is_shown_alike_on_two_gateways_and_to_nobody_else(
    open_tab: OpenTab, user_id: str
) -> None:
    first, second = await open_tab(user_id, 0), await open_tab(user_id, 1)
    stranger = await open_tab(f"not-{user_id}", 1)
    assert await first.node() != await second.node()

    await first.ask(QUESTION, "docs")
    for tab in (first, second):
        await tab.wait_answer("completed")

    for tab in (first, second):
        events = await tab.lifecycle()
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert {event["user_id"] for event in events} == {user_id}
        received = await tab.received()
        kinds = [event["type"] for event in received]
        assert [kind for kind in dict.fromkeys(kinds) if kind in STORY] == STORY
        assert kinds[-1] == "agent_completed"
        offsets = [event["offset"] for event in received]
        assert offsets == sorted(set(offsets))
        # Not one text at the end: the answer grew while it was written.
        pieces = [event["data"] for event in received if event["type"] == "text_delta"]
        assert len(pieces) > 5
        assert "".join(one["text"] for one in pieces) == events[-1]["data"]["result"]
        shown = await tab.timeline()
        assert sorted(seq for _, seq in shown if seq) == [event["seq"] for event in events]
        assert {event["seq"]: event["type"] for event in events} == {
            seq: kind for kind, seq in shown if seq
        }
        await expect(tab.get("message-user")).to_have_text(QUESTION)
        await expect(tab.get("stop")).to_be_hidden()
    assert await first.lifecycle() == await second.lifecycle()
    assert await first.answer_text() == await second.answer_text()
    assert await first.timeline() == await second.timeline()
    assert "docs/" in await first.answer_text() or ".md" in await first.answer_text()

    # The stranger's own question is the first thing that the stranger sees.
    await stranger.ask("hello?", "docs")
    await stranger.wait_answer("completed")
    events = await stranger.lifecycle()
    assert {event["user_id"] for event in events} == {f"not-{user_id}"}
    assert (events[0]["offset"], events[0]["type"]) == (1, "agent_queued")
    assert {event["run_id"] for event in await stranger.received()} == {events[0]["run_id"]}
    for test_id in ("message-user", "message-agent", "thread"):
        assert await stranger.get(test_id).count() == 1
    for tab in (first, second, stranger):
        await tab.assert_quiet()


WAIT_SHOWN_AS_CANCELLED = """
() => new Promise((resolve) => {
  const look = () => {
    const shown = document.querySelector("[data-testid=message-agent][data-status=cancelled]");
    if (shown) resolve(performance.timeOrigin + performance.now());
    return shown;
  };
  if (!look()) new MutationObserver(look).observe(document.body,
    { subtree: true, childList: true, attributeFilter: ["data-status"] });
})
"""
NOTE_CLICK = """
() => addEventListener("click", () => {
  window.clickedAt = performance.timeOrigin + performance.now();
}, { capture: true, once: true })
"""


async def test_stop_in_one_tab_ends_the_run_within_a_second_in_both(
    stack: Stack, open_tab: OpenTab, user_id: str
) -> None:
    asking, stopping = await open_tab(user_id, 0), await open_tab(user_id, 1)
    assert len({process.pid for process in [*stack.gateways, *stack.workers]}) == 4
    assert await asking.node() != await stopping.node()

    await asking.ask(SLOW_ANALYSIS, "data")
    for tab in (asking, stopping):
        await tab.page.wait_for_function(
            """name => window.relayPage.events.some(({ type, data }) =>
                 type === "tool_executing" && data.tool_name === name)""",
            arg="bootstrap_intervals",
        )
        await expect(tab.get("stop")).to_be_enabled()
    shown = [
        asyncio.ensure_future(tab.page.evaluate(WAIT_SHOWN_AS_CANCELLED))
        for tab in (asking, stopping)
    ]
    await stopping.page.evaluate(NOTE_CLICK)
    await stopping.get("stop").click()
    async with asyncio.timeout(20):
        shown_at = await asyncio.gather(*shown)
    clicked_at = await stopping.page.evaluate("window.clickedAt")
    assert max(shown_at) - clicked_at < 1_000

    for tab in (asking, stopping):
        events = await tab.lifecycle()
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        end = [(event["type"], event["data"].get("status")) for event in events[-3:]]
        assert end == [
            ("cancel_requested", None),
            ("tool_completed", "cancelled"),
            ("agent_cancelled", None),
        ]
        await expect(tab.get("stop")).to_be_hidden()
        await tab.assert_quiet()
    assert await asking.lifecycle() == await stopping.lifecycle()

    # The worker is free again, and the thread goes on.
    await asking.ask(QUESTION, "docs")
    await asking.wait_answer("completed")


async def test_reload_in_mid_run_shows_the_answer_in_progress_and_stop(
    open_tab: OpenTab, user_id: str
) -> None:
    tab = await open_tab(user_id, 0)
    await tab.ask("2000", "teller")
    await tab.wait_text(piece(30))
    await tab.reload()

    await tab.wait_answer("running")
    await expect(tab.get("stop")).to_be_enabled()
    await expect(tab.get("message-user")).to_have_text("2000")
    await tab.wait_text(piece(30))
    last = int((await tab.answer_text()).split()[-1])
    await tab.wait_text(piece(last + 20))
    numbers = (await tab.answer_text()).split()
    assert numbers == [piece(number).strip() for number in range(len(numbers))]
    kinds = [event["type"] for event in await tab.lifecycle()]
    assert kinds == ["agent_queued", "agent_started", "agent_thinking"]

    await tab.page.keyboard.press("Escape")
    await tab.wait_answer("cancelled")
    await expect(tab.get("stop")).to_be_hidden()
    await tab.assert_quiet()


async def test_questions_are_answered_on_any_page_and_shown_on_all(
    open_tab: OpenTab, user_id: str
) -> None:
    first, second = tabs = [await open_tab(user_id, 0), await open_tab(user_id, 1)]

    async def asked(prompt: str) -> list[Locator]:
        cards = [tab.get("input-request").filter(has_text=prompt) for tab in tabs]
        for card in cards:
            await expect(card).to_have_attribute("data-outcome", "open")
        return cards

    async def shown(cards: list[Locator], outcome: str, words: str) -> None:
        for card in cards:
            await expect(card).to_have_attribute("data-outcome", outcome)
            await expect(card.locator(".input-outcome")).to_contain_text(words)
            await expect(card.get_by_role("button")).to_have_count(0)

    await first.ask("please", "asker")
    cards = await asked("Begin?")
    # A page that has just been loaded can answer as well.
    await first.reload()
    cards = await asked("Begin?")
    await cards[0].get_by_test_id("approve").click()
    await shown(cards, "answered", "Approved")
    cards = await asked("Which size?")
    await cards[1].get_by_role("button", name="large").click()
    await shown(cards, "answered", "Answered: large")
    cards = await asked("Which name?")
    await cards[0].get_by_test_id("input-text").fill("Ann")
    await cards[0].get_by_test_id("input-text").press("Enter")
    await shown(cards, "answered", "Answered: Ann")
    cards = await asked("Send it?")
    await cards[1].get_by_test_id("deny").click()
    await shown(cards, "denied", "Denied")
    for tab in tabs:
        await tab.wait_answer("completed")
        await tab.wait_text("begun True, large, for Ann, sent False")
        await tab.assert_quiet()
    assert await first.lifecycle() == await second.lifecycle()


async def test_page_whose_gateway_is_killed_while_it_streams_misses_nothing(
    stack: Stack, mortal: GatewayProcess, open_tab: OpenTab, user_id: str
) -> None:
    tab, witness = await open_tab(user_id, 2), await open_tab(user_id, 1)
    node, pieces = await tab.node(), 250
    await tab.ask(str(pieces), "teller")
    await tab.wait_text(piece(20))
    await mortal.kill()
    await tab.wait_state("reconnecting")
    await stack.restart(mortal)
    await tab.wait_state("live")
    assert await tab.node() not in ("", node)

    for each in (tab, witness):
        await each.wait_answer("completed")
        numbers = (await each.answer_text()).split()
        assert numbers == [piece(number).strip() for number in range(pieces)]
    events = await tab.lifecycle()
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events == await witness.lifecycle()
    await tab.assert_quiet(network_may_fail=True)
    await witness.assert_quiet()


async def test_message_written_while_the_gateway_is_away_goes_out_once(
    stack: Stack, mortal: GatewayProcess, open_tab: OpenTab, user_id: str
) -> None:
    tab = await open_tab(user_id, 2)
    await mortal.kill()
    await tab.wait_state("reconnecting")
    await tab.ask(QUESTION, "docs")
    await expect(tab.get("message-user")).to_contain_text("as soon as the connection is back")
    await stack.restart(mortal)
    await tab.wait_answer("completed")
    await expect(tab.get("message-user")).to_have_text(QUESTION)
    assert [event["type"] for event in await tab.lifecycle()].count("agent_queued") == 1
    await tab.assert_quiet(network_may_fail=True)


async def test_hostile_output_of_an_agent_is_inert(
    stack: Stack, open_tab: OpenTab, user_id: str
) -> None:
    tab = await open_tab(user_id, 0)
    requests: list[str] = []
    tab.page.on("request", lambda request: requests.append(request.url))
    await tab.ask("<img src=x onerror=\"window.pwned = 'question'\">", "hostile")
    answer = await tab.wait_answer("completed")

    # What would run is shown as the text that it is.
    await expect(answer).to_contain_text("<img src=x onerror=")
    for fold in await tab.get("timeline").locator("details").all():
        await fold.locator("summary").first.click()
    await expect(tab.get("timeline").locator("pre").first).to_be_visible()
    made = await tab.page.evaluate(
        """() => {
          const parts = ["message-agent", "message-user", "timeline", "thread"]
            .flatMap((id) => [...document.querySelectorAll(`[data-testid=${id}]`)]);
          const nodes = parts.flatMap((part) => [part, ...part.querySelectorAll("*")]);
          return {
            tags: nodes.map((node) => node.localName),
            handlers: nodes.flatMap((node) => node.getAttributeNames())
              .filter((name) => name.startsWith("on")),
            links: nodes.filter((node) => node.localName === "a").map((node) => node.href),
          };
        }"""
    )
    assert not {"script", "iframe", "object", "embed", "img"} & set(made["tags"])
    assert made["handlers"] == []
    assert all(re.match("https?:", link) for link in made["links"])
    for words in ("run me", "run me too"):
        await answer.get_by_text(words, exact=True).click()
    assert await tab.page.evaluate("window.pwned") is None
    own_files = f"{stack.gateways[0].url}/static/"
    assert [url for url in requests if not url.startswith(own_files)] == []
    assert (await tab.lifecycle())[-1]["data"]["result"] == HOSTILE_ANSWER
    await tab.assert_quiet()

    # Were the first line to fail, the policy would hold, and these tests would notice.
    await tab.page.evaluate(
        """() => document.body.insertAdjacentHTML(
             "beforeend", `<img src=x onerror="window.pwned = 'really'">`)"""
    )
    await tab.page.wait_for_function("window.breaches.length > 0")
    assert await tab.page.evaluate("window.pwned") is None
    with pytest.raises(
        AssertionError, match=r"Content Security Policy|settings blocked an event handler"
    ):
        await tab.assert_quiet()


@pytest.mark.parametrize("part", ["relay-client.js", "styles.css"])
async def test_page_whose_files_were_broken_off_is_loaded_again(
    stack: Stack, user_id: str, browser_name: str, part: str
) -> None:
    async with running_browser(browser_name) as browser:
        tab = await new_tab(browser)
        await tab.page.route(f"**/{part}", lambda route: route.abort("connectionreset"), times=1)
        await tab.load(f"{stack.gateways[0].url}/#token={stack.token(user_id)}")
        # Without its style the page works all the same, until it is loaded again.
        await tab.page.wait_for_function(
            """() => getComputedStyle(document.body).backgroundColor !== "rgba(0, 0, 0, 0)" """
        )
        await tab.wait_live()
        assert [line for line in tab.story if part in line and "cannot" in line]
        await tab.ask("hello?", "docs")
        await tab.wait_answer("completed")
        await tab.assert_quiet(network_may_fail=True)


async def test_page_whose_files_are_missing_says_so_and_stops_trying(
    stack: Stack, browser_name: str
) -> None:
    async with running_browser(browser_name) as browser:
        tab = await new_tab(browser)
        # The page's time stands still but for what the test lets pass.
        await tab.page.clock.install(time=0)
        await tab.page.clock.pause_at(1_000)
        await tab.page.route("**/timeline.js", lambda route: route.fulfill(status=404))
        await tab.load(stack.gateways[0].url)
        banner = tab.page.get_by_role("alert")
        for _ in range(8):
            await expect(banner).to_have_text(re.compile("could not be loaded. Trying again"))
            async with tab.page.expect_event("load"):
                await tab.page.clock.fast_forward(60_000)
        await expect(banner).to_contain_text("ask whoever runs it")
        await tab.page.clock.fast_forward(120_000)
        await expect(banner).to_contain_text("ask whoever runs it")
        assert not await tab.get("token-field").is_visible()


async def test_page_without_a_token_asks_for_one(
    stack: Stack, user_id: str, browser_name: str
) -> None:
    async with running_browser(browser_name) as browser:
        tab = await new_tab(browser)
        await tab.load(stack.gateways[0].url)
        field = tab.get("token-field")
        await expect(field).to_be_visible()
        await field.fill("not a token")
        await field.press("Enter")
        await expect(tab.page.get_by_role("alert").filter(has_text="neither")).to_be_visible()

        link = f"{stack.gateways[1].url}/#token={stack.token(user_id)}"
        await field.fill(link)
        await field.press("Enter")
        await tab.wait_state("live")
        await expect(field).to_be_hidden()
        assert "token" not in tab.page.url
        await tab.assert_quiet()


async def test_page_says_why_a_token_is_refused_and_takes_another(
    stack: Stack, user_id: str, browser_name: str
) -> None:
    async with running_browser(browser_name) as browser:
        tab = await new_tab(browser)
        expired = stack.token(user_id, ttl_s=-60)
        await tab.load(f"{stack.gateways[0].url}/#token={expired}")
        await tab.wait_state("stopped")
        banner = tab.page.get_by_role("alert").filter(has_text="Not connected")
        await expect(banner).to_contain_text("expired")
        await banner.get_by_role("button").click()
        await tab.get("token-field").fill(stack.token(user_id))
        await tab.get("token-field").press("Enter")
        await tab.wait_state("live")
        await expect(banner).to_be_hidden()
        await tab.ask("hello?", "docs")
        await tab.wait_answer("completed")


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
NARROW = {**PHONE, "viewport": {"width": 320, "height": 640}}
_MISFITS = """
() => {
  const misfits = [];
  for (const root of document.querySelectorAll(".topbar, .byline, .run-toggle, .composer-foot")) {
    const whole = root.getBoundingClientRect();
    let end = whole.left - 1;
    for (const part of root.children) {
      const { left, right, width, height } = part.getBoundingClientRect();
      // What is for screen readers only, or has nothing to say.
      if (width <= 1 || getComputedStyle(part).visibility === "hidden") continue;
      const gap = part.className === "hint" ? left - end : 0;
      if (left < end - 1 || gap > 20 || right > whole.right + 1 || height > whole.height)
        misfits.push(`${root.className}: ${part.className || part.tagName}`);
      end = right;
    }
  }
  return misfits;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_page_fits_every_screen_in_both_themes(
    open_tab: OpenTab, user_id: str, scheme: str, tmp_path: Path
) -> None:
    wide = await open_tab(user_id, 0, color_scheme=scheme)
    phone = await open_tab(user_id, 1, color_scheme=scheme, **PHONE)
    await wide.ask(QUESTION, "docs")
    for name, tab in (("wide", wide), ("phone", phone)):
        await tab.wait_answer("completed")
        overflow = await tab.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert overflow == 0, f"{name} scrolls sideways by {overflow} px"
        await expect(tab.get("composer")).to_be_in_viewport(ratio=1)
        await expect(tab.get("send")).to_be_in_viewport(ratio=1)
        await expect(tab.get("connection-state")).to_be_in_viewport(ratio=1)
        assert await tab.page.evaluate(_MISFITS) == []
        await tab.assert_quiet()
        # For this a style is put into the page, which Firefox reports as a breach of its policy.
        await take_screenshot(tab, tmp_path / f"{scheme}-{name}.png")
    before = await darkness(wide)
    assert before is (scheme == "dark")
    await wide.get("theme-toggle").click()
    assert await darkness(wide) is not before
    await wide.reload()
    assert await darkness(wide) is not before


async def test_long_names_fit_the_narrowest_screen_in_every_state(
    open_tab: OpenTab, user_id: str, mortal: GatewayProcess
) -> None:
    tab = await open_tab(user_id, 2, **NARROW)
    await tab.ask("A question that is long enough for no title to hold all of it", LONG_NAME)
    await expect(tab.get("stop")).to_be_in_viewport(ratio=1)
    assert await tab.page.evaluate(_MISFITS) == []
    lines = "() => [...document.querySelectorAll('.byline')].map((one) => one.clientHeight)"
    assert max(await tab.page.evaluate(lines)) < 40
    code = tab.page.locator(".code-block pre")
    await expect(code).to_have_text("print(1)")
    label = "getComputedStyle(document.querySelector('.code-language'), '::after').content"
    assert "cut off" not in await tab.page.evaluate(label)
    await tab.get("stop").click()
    await tab.wait_answer("cancelled")
    # What was being written says that it is a part.
    await expect(code).to_have_text("print(1)")
    assert "cut off" in await tab.page.evaluate(label)
    assert await tab.page.evaluate(_MISFITS) == []
    await mortal.kill()
    await tab.wait_state("reconnecting")
    assert await tab.page.evaluate(_MISFITS) == []


async def darkness(tab: Tab) -> bool:
    """Say whether the page's ground is darker than its writing."""
    dark: bool = await tab.page.evaluate(
        """() => {
          const style = getComputedStyle(document.body);
          const canvas = document.createElement("canvas").getContext("2d");
          const light = (colour) => {
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            const [red, green, blue] = canvas.getImageData(0, 0, 1, 1).data;
            return red + green + blue;
          };
          return light(style.backgroundColor) < light(style.color);
        }"""
    )
    return dark
