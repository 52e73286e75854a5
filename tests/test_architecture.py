"""What the code and the documents promise about each other: layers, commands, names."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import get_args

import pytest

import relay.client
from relay.client import Update
from relay.config import describe_settings
from relay.keys import Keys, UserKeys

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

# --- Import contracts ---


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [BIN / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_is_in_a_package_that_is_shipped() -> None:
    for package in ("relay", "gateway", "agent_worker"):
        assert (ROOT / package / "py.typed").is_file()
        for module in (ROOT / package).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), f"{module} is in no package"


def test_every_level_of_the_tests_is_a_package() -> None:
    # Without it tests/unit/relay would shadow the package relay.
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    missing = [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]
    assert not missing


# --- Commands in the documents ---


def documents() -> list[Path]:
    """Give every Markdown file that is kept with the project."""
    return [path for path in tracked_files() if path.suffix == ".md"]


def tracked_files() -> list[Path]:
    """Give the project's own files: what git keeps, or without git what is no cache or build."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        names = [name for name in listing.stdout.split("\0") if name]
        return sorted(path for name in names if (path := ROOT / name).is_file())
    left_out = {".venv", "__pycache__", "build", "dist", "node_modules", "cache"}
    return sorted(
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and not any(
            part in left_out or part.endswith("_cache") for part in path.relative_to(ROOT).parts
        )
    )


def shell_commands(document: Path) -> list[list[str]]:
    """Give the commands in a document's ```bash blocks, continued lines joined."""
    commands = []
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", document.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:&&|\|\||\|)\s", line.removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
                    words = words[1:]
                if words:
                    commands.append(words)
    return commands


def make_targets() -> set[str]:
    """Give the targets of the Makefile."""
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z]+):", text, re.MULTILINE))


def relay_help(*words: str) -> subprocess.CompletedProcess[str]:
    """Run ``relay … --help`` as a user would, on a wide terminal without colours."""
    return subprocess.run(
        [BIN / "relay", *words, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )


def relay_subcommands() -> set[str]:
    """Give the subcommands that ``relay --help`` names."""
    shown = relay_help()
    assert shown.returncode == 0, shown.stderr
    return set(re.findall(r"^[│|\s]*([a-z][a-z-]+)\s{2,}", shown.stdout, re.MULTILINE))


def relay_arguments(words: list[str]) -> list[str] | None:
    """Give what follows ``relay`` in a command, also behind compose, docker or a path; or None."""
    for position, word in enumerate(words):
        if word == "relay" or word.endswith("/bin/relay"):
            return words[position + 1 :]
    return None


def commands_for_relay() -> list[tuple[str, list[str]]]:
    """Give each relay command of the documents with the document's name."""
    return [
        (document.name, arguments)
        for document in documents()
        for words in shell_commands(document)
        if (arguments := relay_arguments(words)) is not None
    ]


def test_readme_shows_how_to_start() -> None:
    commands = shell_commands(ROOT / "README.md")
    assert ["make", "run"] in commands


def test_make_targets_in_the_documents_exist() -> None:
    targets = make_targets()
    asked = {
        (document.name, words[1])
        for document in documents()
        for words in shell_commands(document)
        if words[0] == "make" and len(words) > 1
    }
    missing = {(name, target) for name, target in asked if target not in targets}
    assert asked
    assert not missing


def test_relay_commands_and_options_in_the_documents_exist() -> None:
    commands = commands_for_relay()
    assert commands, "the documents show no relay command"
    known = relay_subcommands()
    helps: dict[str, str] = {}
    wrong = []
    for name, arguments in commands:
        if not arguments or arguments[0].startswith("-"):
            continue
        command = arguments[0]
        if command not in known:
            wrong.append(f"{name}: relay {command} does not exist")
            continue
        if command not in helps:
            helps[command] = relay_help(command).stdout
        wrong += [
            f"{name}: relay {command} has no option {word}"
            for word in arguments[1:]
            if word.startswith("--") and word.split("=")[0] not in helps[command]
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_relay_answers_at_once(arguments: list[str]) -> None:
    done = subprocess.run(
        [BIN / "relay", *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_first_words_of_all_commands_are_known() -> None:
    # A word that is neither a target nor a command here is likely a slip of the pen.
    known = {
        "make",
        "relay",
        "docker",
        "docker-compose",
        "python",
        "python3",
        "pip",
        "git",
        "cd",
        "curl",
        "openssl",
        "echo",
        "export",
        "bash",
        "redis-cli",
        "redis-server",
        "pytest",
        "apt-get",
        "brew",
        "cp",
        "mkdir",
        "uvicorn",
        "kill",
        ".venv/bin/relay",
        ".venv/bin/python",
        ".venv/bin/pre-commit",
        ".venv/bin/pytest",
    }
    unknown = {
        f"{document.relative_to(ROOT)}: {words[0]}"
        for document in documents()
        for words in shell_commands(document)
        if words[0] not in known
    }
    assert not unknown


def test_scripts_of_the_ci_exist_and_are_executable() -> None:
    for name in (".ci/run", ".ci/make-images"):
        assert os.access(ROOT / name, os.X_OK), name


# --- Names in the documents ---


def normalised(key: str) -> str:
    """Give a key name with each variable part as ``*`` and without the prefix."""
    key = re.sub(r"<[^>]*>", "*", key)
    key = re.sub(r"\{[^}]*\}", "{*}", key)
    return re.sub(r"^(?:p|prefix|relay|\*):", "", key)


def names_in_code() -> set[str]:
    """Give every key name that relay/keys.py can make."""
    keys = Keys()
    owners: list[object] = [keys, keys.user("u")]
    found = set()
    for owner in owners:
        for name, member in vars(type(owner)).items():
            if name.startswith("_") or name in ("user", "base"):
                continue
            if isinstance(member, (property, cached_property)):
                value = getattr(owner, name)
            elif inspect.isfunction(member):
                count = len(inspect.signature(member).parameters) - 1
                value = getattr(owner, name)(*["<x>"] * count)
            else:
                continue
            found.add(normalised(value))
    assert any(name.startswith("{*}:") for name in found)
    return found


def names_in_documents() -> set[str]:
    """Give the key names of every table in docs/ whose first column is headed "key"."""
    found = set()
    for document in (ROOT / "docs").rglob("*.md"):
        in_table = False
        for line in document.read_text().splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not line.startswith("|"):
                in_table = False
            elif cells[0].lower() in ("key", "keys"):
                in_table = True
            elif in_table:
                found |= {normalised(name) for name in re.findall(r"`([^`]+)`", cells[0])}
    return found


def test_key_table_in_the_documents_matches_the_code() -> None:
    assert names_in_documents() == names_in_code()


def test_user_keys_have_one_hash_tag() -> None:
    keys = UserKeys("relay", "a{b}:*")
    for name in ("channel", "log", "texts", "live", "runs", "threads", "connections"):
        value = getattr(keys, name)
        assert value.count("{") == value.count("}") == 1


def test_settings_in_the_documents_match_the_code() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    documented = re.findall(r"^\|\s*`(RELAY_[A-Z0-9_]+)`", text, re.MULTILINE)
    assert documented == [row.variable for row in describe_settings()]


def test_updates_in_the_documents_have_the_fields_that_are_named_there() -> None:
    text = (ROOT / "docs/python-client.md").read_text()
    table = text.partition("| update | meaning |")[2].partition("\n\n")[0]
    named, wrong = set(), []
    for line in table.splitlines()[2:]:
        first, _, meaning = line.strip("| ").partition(" | ")
        updates = re.findall(r"`(\w+)`", first)
        named |= set(updates)
        for field in re.findall(r"`([a-z]\w*)`", meaning):
            wrong += [
                f"{name}.{field}"
                for name in updates
                if not hasattr(getattr(relay.client, name), field)
            ]
    assert named == {update.__name__ for update in get_args(Update)}
    assert not wrong


# --- What must not be in the tree ---


def test_no_machine_paths_in_the_tree() -> None:
    # Split, so that this file does not find itself.
    forbidden = re.compile(
        "|".join(["/wo" + "rk/", "/op" + "t/v/", "/tm" + "p/team", "/ro" + "ot/", "/ho" + "me/"])
    )
    found = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), 1)
            if forbidden.search(line)
        ]
    assert not found, "\n".join(found)


def test_nothing_unfinished_in_the_sources() -> None:
    unfinished = re.compile(r"\b(?:TO" + "DO|FIX" + "ME|XX" + r"X|NotImplemented" + r"Error)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for package in ("relay", "gateway", "agent_worker", "examples", "tests", "benchmarks")
        for suffix in ("py", "lua", "js", "mjs", "css", "html")
        for path in (ROOT / package).rglob(f"*.{suffix}")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if unfinished.search(line)
    ]
    assert not found, "\n".join(found)


def test_page_loads_nothing_from_elsewhere() -> None:
    loads = re.compile(r"""(?:src|href|@import|from|import)\s*[=(]?\s*["'(]+\s*(?:https?:)?//""")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "gateway/static").rglob("*")
        if path.suffix in (".html", ".css", ".js", ".mjs")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if loads.search(line)
    ]
    assert not found, "\n".join(found)
