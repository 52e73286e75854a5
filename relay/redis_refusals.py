"""Why Redis lets us do nothing, in a sentence that says what to change.

Servers word the same refusal differently from version to version; what is understood here was
read in Redis 6.2, 7.0, 7.2 and 8 and in Valkey.
"""

from __future__ import annotations

import re
import ssl
from urllib.parse import unquote, urlsplit

ACL_FOLDER = "deploy/acl"
ROLES = ("gateway", "worker", "operator")

_TLS_SCHEMES = ("rediss", "valkeys", "rediss+sentinel")

_COMMAND = re.compile(r"run the '([^']+)' command")
_OBJECT = re.compile(r"\b(?:one of the (?P<many>keys|channels)|an? (?P<one>key|channel))\b")
_SCRIPT_LINE = re.compile(r"user_script:\s?(\d+)")
_CALL = re.compile(rb"\bp?call\('(\w+)'")

_WORDS = ("NOAUTH", "WRONGPASS", "NOPERM")
# From within a script the answer begins with ERR.
_IN_SCRIPT = ("ACL failure in script", "user executing the script can't")


def is_refusal(text: str) -> bool:
    """Say whether an answer refuses us, and not only what was asked."""
    return text.startswith(_WORDS) or any(words in text for words in _IN_SCRIPT)


def explain_refusal(text: str, url: str, source: bytes = b"") -> str:
    """Word an answer that refuses us for want of a password or of a right.

    Args:
        text: What Redis answered.
        url: Where it was asked; its user tells which file of rights is meant.
        source: The script that was run, if one was: before 7.2 Redis names only its line.
    """
    user = unquote(urlsplit(url).username or "") or "default"
    in_script = any(words in text for words in _IN_SCRIPT)
    command = _COMMAND.search(text)
    name = command[1] if command else _command_at(text, source) if in_script else ""
    thing = _OBJECT.search(text)
    if thing and "permission" in text.lower():
        missing = f"use a {(thing['many'] or thing['one']).removesuffix('s')} that we need"
    elif name:
        missing = f"run the command {name}"
    elif in_script:
        missing = "do all that our scripts do"
    else:
        return f"{text.rstrip('.')}. Check user and password in RELAY_REDIS_URL and the ACL."
    files = [user] if user in ROLES else list(ROLES)
    return (
        f"the user {user!r} may not {missing}{' (in a script)' if in_script else ''}. "
        f"Give it the rights in {' or '.join(f'{ACL_FOLDER}/{role}.acl' for role in files)}, "
        "with the prefix of your keys."
    )


def _command_at(text: str, source: bytes) -> str:
    """Give the command on the line of a script that an answer names; empty if unknown."""
    line = _SCRIPT_LINE.search(text)
    lines = source.splitlines()
    if line is None or not 0 < int(line[1]) <= len(lines):
        return ""
    call = _CALL.search(lines[int(line[1]) - 1])
    return call[1].decode().lower() if call else ""


def explain_tls(error: BaseException, url: str) -> str | None:
    """Word a failure of TLS that trying again does not cure; None for any other error."""
    if urlsplit(url).scheme not in _TLS_SCHEMES:
        return None
    cause = _find_cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError) and "mismatch" in cause.verify_message:
        return (
            f"its certificate is for another host: {cause.verify_message.rstrip('.')}. Use a name "
            "in RELAY_REDIS_URL that the certificate has."
        )
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted: {cause.verify_message}. Name the file of the "
            "authority that signed it in RELAY_REDIS_URL: "
            "rediss://host:port/0?ssl_ca_certs=/path/to/ca.pem"
        )
    if isinstance(cause, FileNotFoundError | PermissionError):
        return (
            "a file that RELAY_REDIS_URL names for TLS (ssl_ca_certs, ssl_certfile, ssl_keyfile) "
            f"cannot be read: {cause.strerror}."
        )
    if isinstance(cause, ssl.SSLError):
        text = str(cause)
        if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
            return "it does not speak TLS on this port. Begin RELAY_REDIS_URL with redis://."
        if "CERTIFICATE_REQUIRED" in text:
            return (
                "it asks for a client certificate. Name one in RELAY_REDIS_URL by ssl_certfile "
                "and ssl_keyfile."
            )
        if "PEM" in text or "NO_CERTIFICATE_OR_CRL_FOUND" in text or "KEY_VALUES" in text:
            return (
                "a file named in RELAY_REDIS_URL is no certificate or key in PEM form, or the key "
                "belongs to another certificate."
            )
    return None


def hint_at_tls(url: str) -> str:
    """Say what may be wrong with TLS where a server neither answers nor says why."""
    if urlsplit(url).scheme in _TLS_SCHEMES:
        return (
            " rediss:// needs a port that speaks TLS; one that asks for a client certificate needs "
            "ssl_certfile and ssl_keyfile in its address."
        )
    return " A port that speaks TLS needs rediss://."


def _find_cause(error: BaseException) -> BaseException | None:
    """Give the error of TLS or of a file behind what the client library raised."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLError | FileNotFoundError | PermissionError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
