"""The scripts take every time, size and version that Python knows as well from Python."""

from __future__ import annotations

import re
from importlib import resources

from relay import keys
from relay.scripts import load_scripts

LUA = resources.files("relay") / "lua"


def test_every_script_begins_with_the_constants_of_keys() -> None:
    for script in load_scripts().values():
        names, values = re.match(rb"local ([A-Z_, ]+) = ([\d, ]+)\n", script.source).groups()  # type: ignore[union-attr]
        known = dict(zip(names.decode().split(", "), map(int, values.split(b", ")), strict=True))
        assert known == {name: getattr(keys, name) for name in known}
        assert known


def test_no_script_writes_down_what_keys_says() -> None:
    # Small numbers stand for other things too: those are told by their names.
    known = {str(value) for value in keys.SCRIPT_CONSTANTS.values() if value > 1_000}
    names = "|".join(keys.SCRIPT_CONSTANTS)
    named = re.compile(rf"\blocal [A-Z_, ]*(?:_MS|\b(?:{names}))\b.*=\s*\d")
    written = {
        (file.name, number)
        for file in LUA.iterdir()
        for line in file.read_text().splitlines()
        for number in re.findall(r"\b\d+\b", line.partition("--")[0])
        if number in known or named.search(line)
    }
    assert written == {("_channel.lua", "60000")}, "only how often times to live are renewed"


def test_every_constant_is_used_by_a_script() -> None:
    used = {
        word
        for file in LUA.iterdir()
        for word in re.findall(r"\b[A-Z][A-Z_]+\b", re.sub(r"--.*", "", file.read_text()))
    }
    assert set(keys.SCRIPT_CONSTANTS) <= used
