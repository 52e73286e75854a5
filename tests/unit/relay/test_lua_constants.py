"""The scripts take every time, size and version that Python knows as well from Python."""

from __future__ import annotations

import re
from importlib import resources

from relay import keys
from relay.scripts import load_scripts

LUA = resources.files("relay") / "lua"


def test_the_values_of_keys_stand_where_scripts_name_them() -> None:
    names = re.compile(rb"\b(?:%s)\b" % "|".join(keys.SCRIPT_CONSTANTS).encode())
    sources = {name: script.source for name, script in load_scripts().items()}
    assert not [name for name, source in sources.items() if names.search(source)]
    assert b"call('PEXPIRE', RUNS, %d)" % keys.RUN_TTL_ACTIVE_MS in sources["publish"]
    assert {name: getattr(keys, name) for name in keys.SCRIPT_CONSTANTS} == keys.SCRIPT_CONSTANTS


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
    assert written == set()


def test_every_constant_is_used_by_a_script() -> None:
    used = {
        word
        for file in LUA.iterdir()
        for word in re.findall(r"\b[A-Z][A-Z_]+\b", re.sub(r"--.*", "", file.read_text()))
    }
    assert set(keys.SCRIPT_CONSTANTS) <= used
