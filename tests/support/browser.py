"""A real Chromium or Firefox that opens the page, and notes everything it complains about."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest

from relay.testing import streams
from tests.support import firefox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from playwright.async_api import Browser, BrowserContext, Locator, Page, Playwright, WebSocket

ROOT = Path(__file__).parents[2]

BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome")
NO_BROWSER = (
    "There is no browser: none of "
    + ", ".join(BROWSER_NAMES)
    + " is on PATH, and CHROMIUM names none. Install one, for example: apt-get install chromium."
)
FIREFOX_NAMES = ("firefox-esr", "firefox")
NO_FIREFOX = "There is no Firefox on PATH. Install it, for example: apt-get install firefox-esr."
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
DEADLINE_MS = 45_000
ANSWER_DEADLINE_S = 5.0

NETWORK_CHANGES = 5

# Chromium ends all that is on its way when an address comes or goes, such as that of a container
# that another test starts. The page has to get over that, and a test must not mind.
_MACHINE_COMPLAINT = "net::ERR_NETWORK_CHANGED"
# What browsers themselves log when a gateway is away; the page cannot prevent it.
_NETWORK_COMPLAINT = re.compile(
    r"net::ERR_|WebSocket connection to '.*' failed"
    r"|can.t establish a connection to the server|connection to .* was interrupted"
)
# Firefox's preference for the scheme that a page is told of.
_SCHEMES = {"dark": 0, "light": 1}

# In the page: remember every event, also text, and every breach of the policy.
_WATCH = """
window.breaches = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.breaches.push(`${event.violatedDirective}: ${event.blockedURI} ${event.sample}`));
"""
_RECORD = """
() => {
  window.received = [];
  window.relayPage.client.addEventListener("event", ({ detail }) => window.received.push(detail));
}
"""


def find_browser() -> str | None:
    """Give the path of a Chromium or Chrome: CHROMIUM, else the first one on PATH."""
    named = os.environ.get("CHROMIUM")
    candidates = (named,) if named else BROWSER_NAMES
    return next((path for name in candidates if (path := shutil.which(name))), None)


def find_firefox() -> str | None:
    """Give the path of a Firefox, if there is one."""
    return next((path for name in FIREFOX_NAMES if (path := shutil.which(name))), None)


@asynccontextmanager
async def running_browser(
    name: str = "chromium", color_scheme: str = "light"
) -> AsyncIterator[Browser]:
    """Start a browser of its own; a machine without one fails the test with what to do.

    Args:
        name: ``chromium`` or ``firefox``.
        color_scheme: What pages in Firefox are told; in Chromium each tab has its own.
    """
    # Here, because what is above is asked by every test session.
    from playwright.async_api import async_playwright

    path = find_browser() if name == "chromium" else find_firefox()
    if path is None:
        pytest.fail(NO_BROWSER if name == "chromium" else NO_FIREFOX, pytrace=False)
    async with async_playwright() as playwright:
        if name == "chromium":
            browser = await playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        else:
            browser = await _launch_firefox(playwright, path, color_scheme)
        try:
            yield browser
        finally:
            await browser.close()


async def _launch_firefox(playwright: Playwright, path: str, color_scheme: str) -> Browser:
    with TemporaryDirectory() as folder:
        # Playwright takes a program without arguments; see the module that it runs.
        program = Path(folder) / "firefox"
        program.write_text(
            f"#!/bin/sh\nexec '{sys.executable}' -m {firefox.__name__} '{path}' \"$@\"\n"
        )
        program.chmod(0o700)
        return await playwright.firefox.launch(
            channel="moz-firefox",
            executable_path=program,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            firefox_user_prefs={
                "layout.css.prefers-color-scheme.content-override": _SCHEMES[color_scheme]
            },
        )


def _record(socket: WebSocket) -> None:
    """Hand in what the browser receives on a connection: it is held to the grammar, as all is."""
    frames: list[dict[str, Any]] = []
    socket.on("framereceived", lambda payload: frames.append(json.loads(payload)))
    streams.record("page", None, lambda: frames)


class Tab:
    """The page as one user has it open, in a browser context of its own.

    Attributes:
        page: For what this class has no word for.
        complaints: Errors and warnings of the console, and exceptions that nobody caught.
        story: What the page loaded and connected to, with seconds since the tab was opened.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.story: list[str] = []
        self._opened_s = time.monotonic()
        page.set_default_timeout(DEADLINE_MS)
        self._listen(page)

    def _listen(self, page: Page) -> None:
        page.on(
            "console",
            lambda message: (
                self.complaints.append(f"{message.type}: {message.text}")
                if message.type in ("error", "warning")
                else None
            ),
        )
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.on("websocket", _record)
        page.on("request", lambda request: self._note("asks for", request.url))
        page.on("requestfinished", lambda request: self._note("has", request.url))
        page.on("requestfailed", lambda request: self._note("cannot have", request.url))
        page.on("domcontentloaded", lambda page: self._note("read", page.url))
        page.on("load", lambda page: self._note("loaded", page.url))
        page.on("crash", lambda page: self._note("crashed", page.url))
        page.on("websocket", self._follow)

    def _follow(self, socket: WebSocket) -> None:
        where = socket.url.partition("?")[0]
        self._note("connects to", where)
        socket.on("socketerror", lambda error: self._note(f"cannot connect ({error})", where))
        socket.on("close", lambda _: self._note("disconnected from", where))

    def _note(self, what: str, where: str) -> None:
        place = where.partition("#")[0]
        self.story.append(f"{time.monotonic() - self._opened_s:7.3f} {what} {place}")

    # --- Opening ---

    async def open(self, url: str, token: str) -> None:
        """Open a gateway's page by a link that carries a token; return when it is live."""
        await self.load(f"{url}/#token={token}")
        await self.wait_live()

    async def load(self, url: str) -> None:
        """Load a page; return when all its files are here."""
        await in_spite_of_network_changes(lambda: self.page.goto(url))

    async def reload(self) -> None:
        """Reload; return when the page is live again."""
        await in_spite_of_network_changes(self.page.reload)
        await self.wait_live()

    async def wait_live(self) -> None:
        """Wait until the page says that it is connected, and note each event from then on."""
        await self.wait_state("live")
        await self.page.evaluate(_RECORD)

    async def wait_state(self, state: str) -> None:
        """Wait until the connection indicator says ``state``."""
        # Playwright is installed where browsers are tested; this module is read everywhere.
        from playwright.async_api import Error

        try:
            await self.page.wait_for_selector(
                f'[data-testid=connection-state][data-state="{state}"]', state="attached"
            )
        except Error as error:
            raise AssertionError(await self._explain(f"not {state}: {error}")) from None

    async def _explain(self, problem: str) -> str:
        """Tell all that is known of a page that does not do what it should."""
        from playwright.async_api import Error

        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                shown = await self.page.evaluate(
                    """() => [document.readyState, document.visibilityState,
                      document.querySelector("[data-testid=connection-state]")?.outerHTML,
                      typeof window.relayPage, window.relayPage?.client?.state,
                      JSON.stringify(window.breaches)].join("\\n")"""
                )
        except (TimeoutError, Error) as failure:
            shown = f"the page does not answer: {failure!r}"
        now_s = time.monotonic() - self._opened_s
        return "\n".join(
            [problem, *self.story, f"{now_s:7.3f} now", *self.complaints, "It shows:", shown]
        )

    async def node(self) -> str:
        """Give the gateway that serves this tab, as the page names it."""
        return await self.get("connection-state").get_attribute("data-node") or ""

    # --- What a user does ---

    def get(self, test_id: str) -> Locator:
        """Give the elements with a test id."""
        return self.page.get_by_test_id(test_id)

    async def ask(self, content: str, agent: str | None = None) -> None:
        """Choose an agent, write a question and press Enter."""
        if agent is not None:
            await self.get("agent-picker").select_option(agent)
        await self.get("composer").fill(content)
        await self.get("composer").press("Enter")

    # --- What a user sees ---

    async def wait_answer(self, status: str) -> Locator:
        """Wait until the last answer has a status, and give it."""
        answer = self.get("message-agent").last
        await self.page.wait_for_function(
            """status => [...document.querySelectorAll("[data-testid=message-agent]")]
                 .at(-1)?.dataset.status === status""",
            arg=status,
        )
        return answer

    async def wait_text(self, part: str) -> None:
        """Wait until the last answer contains a text."""
        await self.page.wait_for_function(
            """part => [...document.querySelectorAll("[data-testid=message-agent]")]
                 .at(-1)?.querySelector(".answer").textContent.includes(part)""",
            arg=part,
        )

    async def answer_text(self) -> str:
        """Give the text of the last answer, as it is shown."""
        return await self.get("message-agent").last.locator(".answer").inner_text()

    async def timeline(self) -> list[tuple[str, int | None]]:
        """Give type and ``seq`` of the timeline's entries, from top to bottom."""
        rows: list[list[Any]] = await self.page.evaluate(
            """() => [...document.querySelectorAll(
                 "[data-testid=timeline] [data-testid=timeline-item]")]
                 .map(({ dataset }) => [dataset.type, dataset.seq ? Number(dataset.seq) : null])"""
        )
        return [(row[0], row[1]) for row in rows]

    # --- What the page knows ---

    async def lifecycle(self) -> list[dict[str, Any]]:
        """Give every lifecycle event that the page has received, in order, as it came."""
        events: list[dict[str, Any]] = await self.page.evaluate("window.relayPage.events")
        return events

    async def received(self) -> list[dict[str, Any]]:
        """Give every event since the page was live, text too, in order."""
        events: list[dict[str, Any]] = await self.page.evaluate("window.received")
        return events

    async def wait_event(self, kind: str) -> float:
        """Wait until an event of a type has come; give the page's clock, in seconds."""
        handle = await self.page.wait_for_function(
            """kind => window.relayPage.events.some((event) => event.type === kind)
                 && performance.timeOrigin + performance.now()""",
            arg=kind,
            polling=10,
        )
        return float(await handle.json_value()) / 1_000

    async def assert_quiet(self, *, network_may_fail: bool = False) -> None:
        """Fail if the browser complained: an error, a warning, a breach of the page's policy.

        Args:
            network_may_fail: Connections that fail are not held against the page.
        """
        complaints = [
            text
            for text in self.complaints
            if _MACHINE_COMPLAINT not in text
            and not (network_may_fail and _NETWORK_COMPLAINT.search(text))
        ]
        assert not complaints, complaints
        assert await self.page.evaluate("window.breaches") == []


async def in_spite_of_network_changes(load: Callable[[], Awaitable[object]]) -> None:
    """Load a page; once more where this machine's network changed meanwhile."""
    from playwright.async_api import Error

    for _ in range(NETWORK_CHANGES):
        try:
            await load()
        except Error as error:
            if _MACHINE_COMPLAINT not in error.message:
                raise
        else:
            return
    raise AssertionError(f"the network changed {NETWORK_CHANGES} times while the page was loaded")


async def new_tab(browser: Browser, **options: Any) -> Tab:
    """Give a tab of a new browser context: no storage shared with any other tab.

    Args:
        browser: Whose.
        options: Of the context: viewport, color_scheme and the like.
    """
    if browser.browser_type.name == "firefox":
        # A narrow window is all that it has of a phone, and its scheme is the browser's.
        options = {name: value for name, value in options.items() if name == "viewport"}
    context: BrowserContext = await browser.new_context(
        **{"viewport": {"width": 1360, "height": 860}, **options}
    )
    await context.add_init_script(_WATCH)
    return Tab(await context.new_page())


async def take_screenshot(tab: Tab, path: Path) -> Path:
    """Keep what the tab shows now."""
    await tab.page.screenshot(path=path, animations="disabled")
    return path
