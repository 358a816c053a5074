"""Who may ask: API keys with scopes, kept as digests, and how often.

A key is 256 random bits, so its plain SHA-256 says nothing about it and needs no salt; whoever
reads the file of keys can use none of them. The file::

    [keys.dashboard]
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    scopes = ["read"]
"""

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from feature_repo.errors import LongtrailError

Scope = Literal["read", "write"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
KEYS_VARIABLE = "LONGTRAIL_API_KEYS_FILE"
NAME_PATTERN = r"[A-Za-z0-9_-]{1,64}"

_PREFIX = "lt_"
"""Tells people, and scanners of leaked secrets, what a key is for."""
_SECRET_BYTES = 32
_API = "/v1/"
_WRITING = frozenset({"/v1/events"})
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]+)?", re.ASCII)


@dataclass(frozen=True)
class ApiKey:
    """A key as the service knows it.

    Args:
        name: Whose; it is in logs, the key never is.
        digest: SHA-256 of the key, 32 bytes.
        scopes: What it opens; "write" alone does not open reading.
    """

    name: str
    digest: bytes
    scopes: frozenset[Scope]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[list[Scope], Field(min_length=1)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: dict[Annotated[str, StringConstraints(pattern=rf"^{NAME_PATTERN}$")], _Entry]


_EXPECTED = {
    "sha256": "expected 64 hexadecimal digits in lower case, the SHA-256 of the key",
    "scopes": 'expected a list of "read", "write" or both',
    "[key]": "expected a name of letters, digits, - and _, at most 64 of them",
}
"""Where pydantic would show a pattern."""


class ApiKeys:
    """The keys of a file; :meth:`reload` takes what was added and lets go what was removed.

    Args:
        path: The file.

    Raises:
        LongtrailError: If it cannot be read, is not of that form, or names no key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = _read(path)

    def __len__(self) -> int:
        return len(self._keys)

    def reload(self) -> None:
        """Read the file again; after an error the keys of before go on.

        Raises:
            LongtrailError: As when it was first read.
        """
        try:
            self._keys = _read(self._path)
        except LongtrailError as error:
            raise LongtrailError(f"{error}; until then the keys of before stay valid") from error

    def find(self, secret: str) -> ApiKey | None:
        """Return the key whose secret this is; the time tells nothing about which, or how near."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def new_key(name: str, scopes: Sequence[Scope]) -> tuple[str, str]:
    """Make a key.

    Args:
        name: Whose it is; letters, digits, hyphen and underscore, at most 64.
        scopes: What it opens.

    Returns:
        The secret, which is stored nowhere, and its entry for the file of keys.
    """
    secret = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return secret, f'[keys.{name}]\nsha256 = "{digest}"\nscopes = {json.dumps(list(scopes))}\n'


def required_scope(path: str) -> Scope | None:
    """Return the scope that an address asks for; None where it is open to everyone."""
    if not path.startswith(_API):
        return None
    return "write" if path.rstrip("/") in _WRITING else "read"


def secret_of(headers: Mapping[bytes, bytes]) -> str | None:
    """Return the secret of a request: ``Authorization: Bearer ...`` or ``X-API-Key``, if any."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    secret = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
    return secret.decode("latin-1") or None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; a name other than localhost is not trusted."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hosts_allowed(host: str, named: Sequence[str], *, asks_for_keys: bool) -> tuple[str, ...]:
    """Return the hosts that requests may name; "*" for any.

    A page from elsewhere can point its own name at 127.0.0.1 and then read what answers there, as
    one of the same origin (DNS rebinding). What asks for keys is safe from it: that page has none.
    Beyond this machine nobody but the operator knows the names.

    Args:
        host: Where the service listens.
        named: What the operator allows besides.
        asks_for_keys: Whether callers need a key.

    Raises:
        LongtrailError: If a name is not one.
    """
    for name in named:
        if name != "*" and host_of(name) != name.lower():
            raise LongtrailError(
                f"an allowed host is a name or an address without port, such as shop.example or "
                f"[::1], or * for any; got {name!r}"
            )
    if not named and (asks_for_keys or not is_loopback(host)):
        return ("*",)
    own = f"[{host}]" if ":" in host else host
    return tuple(dict.fromkeys((*_LOCAL_HOSTS, own.lower(), *(name.lower() for name in named))))


def host_of(header: str) -> str | None:
    """Return the host of a Host header in lower case, without its port; None if it is none."""
    found = _HOST.fullmatch(header)
    return found[1].lower() if found else None


def _read(path: Path) -> tuple[ApiKey, ...]:
    try:
        document = _Document.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise LongtrailError(f"the file of API keys {path} cannot be read: {reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise LongtrailError(f"the file of API keys {path} is not TOML: {error}") from error
    except ValidationError as error:
        # Not the value: someone may have written the key itself where its digest belongs.
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"] if part != "[key]")
        if first["type"] == "extra_forbidden":
            reason = "there is no such field"
        elif first["loc"] == ("keys",):
            reason = "it has no [keys.NAME] entry"
        else:
            reason = _EXPECTED.get(str(first["loc"][-1]), first["msg"])
        raise LongtrailError(
            f"the file of API keys {path} is not usable ({place}: {reason}): `longtrail key` "
            "prints entries as they should be"
        ) from None
    if not document.keys:
        raise LongtrailError(
            f"the file of API keys {path} names no key, so nobody could ask: add one that "
            "`longtrail key` prints"
        )
    return tuple(
        ApiKey(name=name, digest=bytes.fromhex(entry.sha256), scopes=frozenset(entry.scopes))
        for name, entry in document.keys.items()
    )
