"""Takes one safeguard at a time out of a copy of the code, and expects its tests to go red.

``make mutations`` runs all of them, ``ARGS=fence`` those whose name contains it. A mutation that
does not fit the code any more, or that no test notices, is a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GREEN, RED = 0, 1
"""pytest's exit codes: all passed, some failed. Any other says that it could not run the tests."""


class Mutation(NamedTuple):
    """One safeguard taken out.

    Attributes:
        tests: What must notice.
    """

    name: str
    path: str
    text: str
    replacement: str
    tests: Sequence[str]


UNIT, INTEGRATION = "tests/unit", "tests/integration"

MUTATIONS = (
    Mutation(
        "owner of a channel: user ids go into key names as they are",
        "relay/keys.py",
        'return quote(user_id, safe="")',
        "quote(user_id)\n        return user_id",
        [f"{UNIT}/relay/test_keys.py"],
    ),
    Mutation(
        "owner of a connection: anybody finds it",
        "gateway/connection_pool.py",
        "entry is not None and entry.place.user_id == owner",
        "entry is not None",
        [f"{UNIT}/gateway/test_connection_pool.py"],
    ),
    Mutation(
        "owner of a connection: a refreshed token may name another user",
        "gateway/session.py",
        "if user_id != self._user_id:",
        "if False:",
        [f"{UNIT}/gateway/test_session.py"],
    ),
    Mutation(
        "fence of a publish",
        "relay/lua/publish.lua",
        "if run[2] ~= fence then",
        "if false then",
        [f"{INTEGRATION}/test_scripts_publish.py"],
    ),
    Mutation(
        "fence of a usual publish",
        "relay/lua/publish_usual.lua",
        "run[2] == ARGV[7]",
        "true",
        [f"{INTEGRATION}/test_scripts_publish.py"],
    ),
    Mutation(
        "number of a usual batch",
        "relay/lua/publish_usual.lua",
        "ARGV[8] - run[4] == 1",
        "true",
        [f"{INTEGRATION}/test_scripts_publish.py"],
    ),
    Mutation(
        "instance of the server, at a usual publish",
        "relay/lua/publish_usual.lua",
        "channel[6] == ARGV[1]",
        "true",
        [f"{INTEGRATION}/test_scripts_usual.py"],
    ),
    Mutation(
        "log of a usual publish",
        "relay/lua/publish_usual.lua",
        "'NOMKSTREAM', ",
        "",
        [f"{INTEGRATION}/test_scripts_usual.py"],
    ),
    Mutation(
        "number of a batch",
        "relay/lua/publish.lua",
        "if batch_number <= stored_batch then",
        "if false then",
        [f"{INTEGRATION}/test_scripts_publish.py"],
    ),
    Mutation(
        "hole in the numbers of batches",
        "relay/lua/publish.lua",
        "if batch_number > stored_batch + 1 and",
        "if false and",
        [f"{INTEGRATION}/test_scripts_publish.py"],
    ),
    Mutation(
        "nothing after the end of a run",
        "relay/lua/publish.lua",
        "if is_ended(run[1]) then",
        "if false then",
        [f"{INTEGRATION}/test_scripts_publish.py"],
    ),
    Mutation(
        "instance of the server",
        "relay/lua/_channel.lua",
        "if stored[6] ~= ARGV[1] then",
        "if false then",
        [f"{INTEGRATION}/test_scripts_channel.py"],
    ),
    Mutation(
        "log of a lost channel",
        "relay/lua/_channel.lua",
        "call('UNLINK', LOG, TEXTS)",
        "call('UNLINK', TEXTS)",
        [f"{INTEGRATION}/test_scripts_channel.py"],
    ),
    Mutation(
        "floor of a lost log",
        "relay/lua/_channel.lua",
        "if channel.tail > channel.floor then",
        "if false then",
        [f"{INTEGRATION}/test_scripts_channel.py"],
    ),
    Mutation(
        "window of a page",
        "relay/lua/read.lua",
        "covered = math.min(log_offset, text_offset) - 1",
        "covered = log_end",
        [f"{INTEGRATION}/test_scripts_channel.py"],
    ),
    Mutation(
        "size of a page",
        "relay/lua/read.lua",
        "if bytes + size > max_bytes and bytes > 0 then",
        "if false then",
        [f"{INTEGRATION}/test_scripts_channel.py"],
    ),
    Mutation(
        "texts of an end below the floor",
        "relay/lua/read.lua",
        "(run[4] and tonumber(run[4]) <= channel.floor)",
        "false",
        [f"{INTEGRATION}/test_scripts_channel.py"],
    ),
    Mutation(
        "texts of a superseded attempt",
        "relay/lua/read.lua",
        "or run[5] ~= attempt then",
        "then",
        [f"{INTEGRATION}/test_scripts_channel.py"],
    ),
    Mutation(
        "batches that a new epoch asks for",
        "relay/lua/publish.lua",
        "if ARGV[9] ~= channel.epoch then",
        "if false then",
        [f"{INTEGRATION}/test_scripts_publish.py"],
    ),
    Mutation(
        "hole in a run's numbers, at the client",
        "relay/client/state.py",
        "if event.seq == expected:",
        "if True:",
        [f"{UNIT}/relay/test_client_state.py"],
    ),
    Mutation(
        "one claim of a run",
        "relay/lua/claim.lua",
        "if status ~= 'queued' and status ~= 'retrying' then",
        "if false then",
        [f"{INTEGRATION}/test_scripts_runs.py"],
    ),
    Mutation(
        "turn in a thread",
        "relay/lua/claim.lua",
        "if waiting and string.match(waiting, '%S+') ~= run_id then",
        "if false then",
        [f"{INTEGRATION}/test_scripts_runs.py"],
    ),
    Mutation(
        "fence of a lease",
        "relay/lua/renew.lua",
        "if run[2] ~= ARGV[7] or run[1] == 'retrying' then",
        "if false then",
        [f"{INTEGRATION}/test_reaper.py"],
    ),
    Mutation(
        "lease that was renewed in time",
        "relay/lua/amend.lua",
        "if ARGV[10] == 'lease' and tonumber(run[4] or '0') > NOW then",
        "if false then",
        [f"{INTEGRATION}/test_reaper.py"],
    ),
    Mutation(
        "progress since a silence",
        "relay/lua/amend.lua",
        "if ARGV[10] == 'stall' and run[5] ~= ARGV[11] then",
        "if false then",
        [f"{INTEGRATION}/test_reaper.py"],
    ),
    Mutation(
        "one reaper ends a run",
        "relay/lua/amend.lua",
        "if run[1] ~= ARGV[9] or run[2] ~= ARGV[7] or run[3] ~= ARGV[8] then",
        "if false then",
        [f"{INTEGRATION}/test_reaper.py"],
    ),
    Mutation(
        "a lease of contact before reaping",
        "relay/reaper.py",
        "return since_s is not None and time.monotonic() - since_s >= self._lease_ms / 1000",
        "return since_s is not None",
        [f"{INTEGRATION}/test_reaper.py"],
    ),
    Mutation(
        "one answer to a question",
        "relay/inputs.py",
        "return first == again",
        "return True",
        [f"{INTEGRATION}/test_worker_questions.py"],
    ),
    Mutation(
        "an answer to an open question only",
        "relay/lua/resolve.lua",
        "if not is_open then",
        "if false then",
        [f"{INTEGRATION}/test_worker_questions.py"],
    ),
    Mutation(
        "silence that is shorter than a lease",
        "relay/runs.py",
        "if 0 < stall_after_ms < lease_ms:",
        "if False:",
        [f"{INTEGRATION}/test_reaper.py"],
    ),
    Mutation(
        "epoch of a position",
        "relay/recovery/cursor.py",
        "if since.epoch != page.epoch:",
        "if False:",
        [f"{UNIT}/relay/test_recovery.py"],
    ),
    Mutation(
        "epoch of a live message",
        "relay/recovery/feed.py",
        "if self.state is not _LIVE or epoch != self.epoch:",
        "if self.state is not _LIVE:",
        [f"{UNIT}/relay/test_recovery.py", f"{UNIT}/relay/test_recovery_model.py"],
    ),
    Mutation(
        "gap between offsets",
        "relay/recovery/feed.py",
        "if publication.offset == self.head + 1 and publication.event:",
        "if publication.offset > self.head and publication.event:",
        [f"{UNIT}/relay/test_recovery.py"],
    ),
    Mutation(
        "generation of a page",
        "relay/recovery/feed.py",
        "if read.generation != self.generation:",
        "if False:",
        [f"{UNIT}/relay/test_recovery.py", f"{UNIT}/relay/test_recovery_model.py"],
    ),
    Mutation(
        "signature of a token",
        "relay/tokens.py",
        "algorithms=list(key.algorithms))",
        'algorithms=list(key.algorithms), options={"verify_signature": False})',
        [f"{UNIT}/relay/test_tokens.py"],
    ),
    Mutation(
        "signature of a token whose header is known",
        "relay/tokens.py",
        "return payload if algorithm.verify(signed, key.key, _decoded(signature)) else None",
        "return payload",
        [f"{UNIT}/relay/test_tokens.py"],
    ),
    Mutation(
        "one form only of a token whose header is known",
        "relay/tokens.py",
        'if base64.urlsafe_b64encode(decoded).rstrip(b"=") != segment:',
        "if False:",
        [f"{UNIT}/relay/test_tokens.py"],
    ),
    Mutation(
        "expiry of a token",
        "relay/tokens.py",
        "if now_s >= expires_s + LEEWAY_S:",
        "if False:",
        [f"{UNIT}/relay/test_tokens.py"],
    ),
    Mutation(
        "expiry of a token on a live connection",
        "gateway/session.py",
        "return self._end_ms if self._is_warned else",
        "return 2**62 if self._is_warned else",
        [
            f"{UNIT}/gateway/test_session.py",
            f"{INTEGRATION}/test_gateway_delivery.py::test_token_is_announced_refreshed_and_enforced",
        ],
    ),
    Mutation(
        "issuer of a token",
        "relay/tokens.py",
        'if issuer is not None and claims.get("iss") != issuer:',
        "if False:",
        [f"{UNIT}/relay/test_tokens.py"],
    ),
    Mutation(
        "audience of a token",
        "relay/tokens.py",
        'if audience is not None and not _has_audience(claims.get("aud"), audience):',
        "if False:",
        [f"{UNIT}/relay/test_tokens.py"],
    ),
    Mutation(
        "revocation of a token",
        "gateway/auth.py",
        "if self._is_revoked(identity):",
        "if False:",
        [f"{INTEGRATION}/test_gateway_revocation.py"],
    ),
    Mutation(
        "single use of a ticket",
        "gateway/tickets.py",
        "self._link.client.getdel(",
        "self._link.client.get(",
        [f"{INTEGRATION}/test_gateway_handshake.py::test_ticket_opens_one_connection_only"],
    ),
    Mutation(
        "token in the URL",
        "gateway/auth.py",
        "if any(name.lower() in _TOKEN_PARAMETERS for name in query) or looks_like_token(",
        "if looks_like_token(",
        [
            f"{INTEGRATION}/test_gateway_handshake.py::test_token_in_the_url_is_refused_with_guidance"
        ],
    ),
    Mutation(
        "origin of a page",
        "gateway/auth.py",
        'if not is_origin_allowed(origin, headers.get("host"), self._allowed_origins):',
        "if False:",
        [f"{INTEGRATION}/test_gateway_handshake.py::test_pages_of_other_origins_are_refused"],
    ),
    Mutation(
        "scope of an operator",
        "gateway/auth.py",
        "if scope not in identity.scopes:",
        "if False:",
        [f"{INTEGRATION}/test_gateway_http.py::test_operators_need_the_scope"],
    ),
    Mutation(
        "redaction of secrets",
        "relay/encoding.py",
        "if isinstance(text, str) and text.lower() in names:",
        "if False:",
        [f"{UNIT}/relay/test_encoding.py"],
    ),
    Mutation(
        "one write for each socket and tick",
        "gateway/direct.py",
        "            self._pending = data\n            self._ticks.touch(self)",
        "            self._pending = data\n            self._ticks.flush_now(self)",
        [f"{UNIT}/gateway/test_direct.py"],
    ),
    Mutation(
        "room for whoever is behind in the ring",
        "relay/recovery/feed.py",
        "                is_awaited = True",
        "                is_awaited = False",
        [f"{UNIT}/relay/test_recovery.py"],
    ),
    Mutation(
        "version of a live message",
        "relay/codec.py",
        "if message[0] != WIRE_VERSION:",
        "if message[0] is None:",
        [f"{UNIT}/relay/test_codec.py", f"{INTEGRATION}/test_rolling_upgrade.py"],
    ),
    Mutation(
        "version of a task",
        "relay/codec.py",
        "if version != WIRE_VERSION:",
        "if version is None:",
        [f"{UNIT}/relay/test_codec.py", f"{INTEGRATION}/test_rolling_upgrade.py"],
    ),
)


def copy_tree(folder: Path) -> None:
    """Copy what git knows of, as it lies in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run tests on the copy, up to the first failure."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        # The copy comes before an installed version of the packages.
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


def judge(folder: Path, mutation: Mutation) -> str:
    """Apply a mutation, run its tests, and undo it; gives ``red`` or what is wrong."""
    path = folder / mutation.path
    original = path.read_text()
    if original.count(mutation.text) != 1:
        return f"DOES NOT APPLY: found {original.count(mutation.text)} times in {mutation.path}"
    path.write_text(original.replace(mutation.text, mutation.replacement))
    try:
        done = run_tests(folder, mutation.tests)
    finally:
        path.write_text(original)
    if done.returncode == RED:
        return "red"
    if done.returncode == GREEN:
        return "NOT NOTICED"
    return f"TESTS DID NOT RUN ({done.returncode}): {done.stdout[-500:]}{done.stderr[-500:]}"


def main(words: Sequence[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if all(word in mutation.name for word in words)]
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        folder = Path(name)
        copy_tree(folder)
        tests = sorted({test for mutation in chosen for test in mutation.tests})
        print(f"without any mutation: {len(tests)} files of tests …", flush=True)
        clean = run_tests(folder, tests)
        if clean.returncode != GREEN:
            print(clean.stdout[-3_000:])
            print("The tests are red before anything is taken out.")
            return 1
        verdicts = []
        print("| taken out | tests | seconds |\n|---|---|---:|")
        for mutation in chosen:
            began_s = time.monotonic()
            verdicts.append(judge(folder, mutation))
            took_s = time.monotonic() - began_s
            print(f"| {mutation.name} | {verdicts[-1]} | {took_s:.0f} |", flush=True)
    noticed = verdicts.count("red")
    print(f"\n{noticed} of {len(verdicts)} went red.")
    return 0 if chosen and noticed == len(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
