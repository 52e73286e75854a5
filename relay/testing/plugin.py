"""The pytest plugin ``relay``: a whole relay on a real Redis from one fixture.

Loaded by every pytest run in an environment with agent-relay, so it imports nothing but pytest
until a fixture is asked for.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from relay.testing.blocking import BlockingStack
    from relay.testing.redis_source import RedisSource, SharedRedis
    from relay.testing.relay_stack import RelayStack
    from relay.testing.streams import StreamWatch

_SOURCE = pytest.StashKey["RedisSource"]()
_STACKS = pytest.StashKey[list["RelayStack"]]()

_MARKERS = (
    "relay(gateways=1, workers=[], settings={}): what relay_stack starts; the nearest mark wins",
    "relay_any_stream(reason): this test's streams are not held against the grammar of runs",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options of the ini file."""
    parser.addini("relay_redis", "docker, process or an address; RELAY_TEST_REDIS wins", default="")
    parser.addini("relay_gateways", "how many gateways relay_stack starts", default="1")
    parser.addini(
        "relay_workers", "module:attribute of each worker process", "linelist", default=[]
    )
    parser.addini("relay_settings", "NAME=value of RELAY_* variables", "linelist", default=[])
    parser.addini("relay_app_dir", "folder of the modules of relay_workers", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers, and the fixtures that need pytest-asyncio."""
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    if config.pluginmanager.has_plugin("asyncio"):
        from relay.testing import async_fixtures as fixtures
    else:
        from relay.testing import missing_asyncio as fixtures  # type: ignore[no-redef]
    config.pluginmanager.register(fixtures, "relay-fixtures")


# --- Redis ---


def redis_source(config: pytest.Config) -> RedisSource:
    """Give where the session's Redis comes from, decided once.

    Raises:
        UsageError: The choice cannot be met.
    """
    import os

    from relay.errors import ConfigurationError
    from relay.testing.redis_source import choose_redis

    if _SOURCE not in config.stash:
        choice = os.environ.get("RELAY_TEST_REDIS") or str(config.getini("relay_redis"))
        try:
            config.stash[_SOURCE] = choose_redis(choice)
        except ConfigurationError as error:
            raise pytest.UsageError(f"RELAY_TEST_REDIS or relay_redis: {error}") from None
    return config.stash[_SOURCE]


@pytest.fixture(scope="session")
def relay_redis(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedRedis]:
    """The session's real Redis: it has a ``url``, ``pause()`` and ``resume()``."""
    from relay.testing.redis_source import running_redis

    with running_redis(redis_source(pytestconfig), tmp_path_factory.mktemp("relay-redis")) as redis:
        yield redis


@pytest.fixture(scope="session")
def relay_redis_login() -> Callable[[str, str], str] | None:
    """Gives the address of Redis as a ``gateway`` or a ``worker`` logs in; for you to override."""
    return None


# --- Stacks ---


@pytest.fixture
def relay_streams(request: pytest.FixtureRequest) -> Iterator[StreamWatch]:
    """What all clients of this test receive; held against the grammar of runs at its end."""
    from relay.testing.streams import watching

    with watching() as watch:
        yield watch
    exempt = request.node.get_closest_marker("relay_any_stream")
    if exempt is None:
        # The test has ended: no line of it is to blame, so no traceback is shown.
        text = watch.complaint()
        if text:
            pytest.fail(text, pytrace=False)
    elif not exempt.kwargs.get("reason"):
        pytest.fail('relay_any_stream must say why: relay_any_stream(reason="…")', pytrace=False)


@pytest.fixture
def relay_stack_options(
    request: pytest.FixtureRequest,
    relay_redis: SharedRedis,
    relay_redis_login: Callable[[str, str], str] | None,
    tmp_path: Path,
) -> Callable[..., RelayStack]:
    """Makes the stack that ini file, markers and arguments describe; does not start it."""
    made: list[RelayStack] = []
    request.node.stash[_STACKS] = made

    def make(**options: Any) -> RelayStack:
        from relay.testing.relay_stack import RelayStack

        marked = marked_options(request.node)
        config = request.config
        ini_settings = dict(line.split("=", 1) for line in config.getini("relay_settings"))
        settings = {**ini_settings, **marked.pop("settings", {}), **options.pop("settings", {})}
        app_dir = Path(config.getini("relay_app_dir") or ".")
        described = {
            "gateways": int(config.getini("relay_gateways")),
            "workers": config.getini("relay_workers"),
            "app_dir": config.rootpath / app_dir,
            "key_prefix": f"t{uuid.uuid4().hex[:12]}",
            "login": relay_redis_login,
            **marked,
            **options,
        }
        folder = tmp_path / described["key_prefix"]
        stack = RelayStack(folder, relay_redis, settings=settings, **described)
        made.append(stack)
        return stack

    return make


def marked_options(node: pytest.Item) -> dict[str, Any]:
    """Join the ``relay`` marks of a test, its class and its module; the nearest wins."""
    joined: dict[str, Any] = {}
    for marker in reversed(list(node.iter_markers("relay"))):
        if marker.args:
            raise pytest.UsageError("pytest.mark.relay takes options by name only.")
        settings: Mapping[str, Any] = {
            **joined.get("settings", {}),
            **marker.kwargs.get("settings", {}),
        }
        joined = {**joined, **marker.kwargs, "settings": settings}
    return joined


@pytest.fixture
def relay_stack_sync(
    relay_stack_options: Callable[..., RelayStack],
    relay_streams: StreamWatch,
) -> Iterator[BlockingStack]:
    """A stack for a test without an event loop: the calls of ``relay_stack``, without ``await``."""
    from relay.testing.blocking import BlockingStack

    with BlockingStack(relay_stack_options) as stack:
        yield stack


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show the end of the processes' logs with a test that failed."""
    report = yield
    if report.failed:
        # The stacks as they were made, not as a fixture hands them out: that needs an event loop,
        # which is closed where the streams are checked.
        stacks: list[RelayStack] = item.stash.get(_STACKS, [])
        for number, stack in enumerate(stacks, 1):
            origin = "relay" if number == 1 else f"relay stack {number}"
            for name, lines in stack.last_lines().items():
                report.sections.append((f"{origin}: {name}", lines))
    return report
