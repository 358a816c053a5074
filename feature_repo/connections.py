"""Where the production stores are: ``DATABASE_URL`` and ``REDIS_URL``, as Feast wants to hear it.

Feast's yaml asks for the database's parts one by one and for Redis in a form of its own. It expands
``${VAR}``, so both addresses are translated to the variables that ``production.yaml`` names
(:func:`feast_variables`). Secrets live in the environment: nothing here writes or shows them.
"""

import json
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from feature_repo.errors import StoreError

DATABASE_URL = "DATABASE_URL"
REDIS_URL = "REDIS_URL"

_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg2", "postgresql+psycopg")
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_SSL_FILES = ("sslrootcert", "sslcert", "sslkey")
_DATABASE_FORM = "postgresql://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=require"
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_REDIS_TIMEOUTS_S = {"socket_timeout": 0.2, "socket_connect_timeout": 0.2}
"""A lookup for a ranking fails fast; others can be given in REDIS_URL."""
_REDIS_FORM = (
    "redis://USER:PASSWORD@HOST:PORT/0 (rediss for TLS; HOST:PORT,HOST:PORT for a cluster)"
)


@dataclass(frozen=True)
class DatabaseAddress:
    """A PostgreSQL database; made by :meth:`parse`."""

    host: str
    port: int
    name: str
    user: str
    password: str = field(repr=False)
    sslmode: str
    files: dict[str, str]
    """Paths by libpq's names: ``sslrootcert`` to trust, ``sslcert`` and ``sslkey`` to show."""

    @classmethod
    def parse(cls, url: str) -> "DatabaseAddress":
        """Read a ``DATABASE_URL``; without ``sslmode`` the connection must be encrypted.

        Raises:
            StoreError: If it is not of that form; the sentence holds no secret.
        """
        parts = _split(url, DATABASE_URL, _DATABASE_FORM)
        if parts.scheme not in _SCHEMES:
            raise _unusable(DATABASE_URL, "its scheme is another", _DATABASE_FORM)
        named = {
            "host": parts.hostname,
            "user": parts.username,
            "database": parts.path.removeprefix("/"),
        }
        for what, value in named.items():
            if not value:
                raise _unusable(DATABASE_URL, f"it names no {what}", _DATABASE_FORM)
        options = _options(parts, DATABASE_URL, ("sslmode", *_SSL_FILES))
        sslmode = options.pop("sslmode", "require")
        if sslmode not in _SSL_MODES:
            raise _unusable(DATABASE_URL, "its sslmode is unknown", ", ".join(_SSL_MODES))
        return cls(
            host=str(named["host"]),
            port=parts.port or 5432,
            name=unquote(str(named["database"])),
            user=unquote(str(named["user"])),
            password=unquote(parts.password or ""),
            sslmode=sslmode,
            files=options,
        )

    @property
    def shown(self) -> str:
        """The address for people: no password."""
        return f"postgresql://{self.user}@{self.host}:{self.port}/{self.name}"

    @property
    def location(self) -> str:
        """The URL after its ``scheme://``, with the password."""
        login = quote(self.user, safe="")
        if self.password:
            login += ":" + quote(self.password, safe="")
        host = f"[{self.host}]" if ":" in self.host else self.host
        query = {"sslmode": self.sslmode, **self.files}
        options = "&".join(f"{name}={quote(value)}" for name, value in query.items())
        return f"{login}@{host}:{self.port}/{quote(self.name, safe='')}?{options}"


@dataclass(frozen=True)
class RedisAddress:
    """A Redis server, or a Redis Cluster by some of its nodes; made by :meth:`parse`."""

    hosts: tuple[tuple[str, int], ...]
    user: str
    password: str = field(repr=False)
    database: int
    tls: bool
    cluster: bool
    files: dict[str, str]
    """Paths: ``ssl_ca_certs`` to trust, ``ssl_certfile`` and ``ssl_keyfile`` to show."""
    timeouts_s: dict[str, float]

    @classmethod
    def parse(cls, url: str) -> "RedisAddress":
        """Read a ``REDIS_URL``; several hosts, or ``?cluster=true``, mean a Redis Cluster.

        Raises:
            StoreError: If it is not of that form; the sentence holds no secret.
        """
        parts = _split(url, REDIS_URL, _REDIS_FORM, port=False)
        if parts.scheme not in ("redis", "rediss"):
            raise _unusable(REDIS_URL, "its scheme is another", _REDIS_FORM)
        login, _, names = parts.netloc.rpartition("@")
        user, _, password = login.partition(":")
        nodes = [_split(f"redis://{name}", REDIS_URL, _REDIS_FORM) for name in names.split(",")]
        # Feast splits `host:port` at colons, so the numbers of IPv6 cannot be said.
        if any(not node.hostname or ":" in node.hostname for node in nodes):
            raise _unusable(REDIS_URL, "it names no host, or one by IPv6", _REDIS_FORM)
        options = _options(parts, REDIS_URL, ("cluster", *_REDIS_TIMEOUTS_S, *_TLS_FILES))
        cluster = options.pop("cluster", "true" if len(nodes) > 1 else "false")
        database = parts.path.strip("/") or "0"
        if cluster not in ("true", "false") or (cluster == "false" and len(nodes) > 1):
            raise _unusable(REDIS_URL, "its cluster contradicts its hosts", "cluster=true")
        if not database.isdecimal() or (cluster == "true" and int(database)):
            raise _unusable(
                REDIS_URL, "its database is not usable", "a number such as 0, the only of a cluster"
            )
        timeouts = {}
        for name, default in _REDIS_TIMEOUTS_S.items():
            try:
                timeouts[name] = float(options.pop(name, default))
            except ValueError:
                raise _unusable(REDIS_URL, f"its {name} is no number", "seconds") from None
        return cls(
            hosts=tuple((str(node.hostname), node.port or 6379) for node in nodes),
            user=unquote(user),
            password=unquote(password),
            database=int(database),
            tls=parts.scheme == "rediss",
            cluster=cluster == "true",
            files=options,
            timeouts_s=timeouts,
        )

    @property
    def shown(self) -> str:
        """The address for people: no password."""
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"redis{'s' if self.tls else ''}://{hosts}/{self.database}"

    @property
    def connection_string(self) -> str:
        """The address as Feast spells it, with the password."""
        values: dict[str, object] = {
            **({"username": self.user} if self.user else {}),
            **({"password": self.password} if self.password else {}),
            **({} if self.cluster else {"db": self.database}),
            **({"ssl": True} if self.tls else {}),
            **self.files,
            **self.timeouts_s,
        }
        # Feast splits at commas, then reads JSON: escapes keep every password whole.
        words = [f"{host}:{port}" for host, port in self.hosts]
        for name, value in values.items():
            words.append(name + "=" + json.dumps(value).replace(",", "\\u002c"))
        return ",".join(words)

    @property
    def url(self) -> str:
        """The address of the first host as ``redis-cli -u`` takes it, with the password."""
        host, port = self.hosts[0]
        # Without a user's name redis-cli logs in as the user "".
        login = f"{quote(self.user or 'default', safe='')}:{quote(self.password, safe='')}@"
        scheme = "rediss" if self.tls else "redis"
        return f"{scheme}://{login if self.password else ''}{host}:{port}/{self.database}"


def feast_variables(database: DatabaseAddress, redis: RedisAddress) -> dict[str, str]:
    """The variables that ``production.yaml`` names, secrets included.

    Their values stand between single quotes in the yaml, where YAML wants a quote doubled.
    """
    values = {
        "LONGTRAIL_DATABASE": database.location,
        "LONGTRAIL_DATABASE_HOST": database.host,
        "LONGTRAIL_DATABASE_PORT": str(database.port),
        "LONGTRAIL_DATABASE_NAME": database.name,
        "LONGTRAIL_DATABASE_USER": database.user,
        "LONGTRAIL_DATABASE_PASSWORD": database.password,
        "LONGTRAIL_DATABASE_SSLMODE": database.sslmode,
        **{
            f"LONGTRAIL_DATABASE_{name.upper()}": database.files.get(name, "")
            for name in _SSL_FILES
        },
        "LONGTRAIL_REDIS": redis.connection_string,
        "LONGTRAIL_REDIS_TYPE": "redis_cluster" if redis.cluster else "redis",
        "LONGTRAIL_REDIS_URL": redis.url,  # for redis-cli
    }
    return {name: value.replace("'", "''") for name, value in values.items()}


def _split(url: str, variable: str, form: str, *, port: bool = True) -> SplitResult:
    """The parts of a URL; ``port`` checks that of its single host."""
    if any(character < " " for character in url):  # urlsplit would drop them silently
        raise _unusable(variable, "it holds a line break or another control character", form)
    if "#" in url:  # would begin a fragment and cut the URL short
        raise _unusable(variable, "it holds a # (in a password it is %23)", form)
    try:
        parts = urlsplit(url)
        _ = parts.port if port else None
    except ValueError:  # its own sentence may quote the password
        raise _unusable(
            variable, "its host or port cannot be read (in a password / is %2F, @ is %40)", form
        ) from None
    return parts


def _options(parts: SplitResult, variable: str, known: tuple[str, ...]) -> dict[str, str]:
    """The query's options."""
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if options.keys() - set(known):
        raise _unusable(variable, "it has an unknown option", ", ".join(known))
    return options


def _unusable(variable: str, problem: str, form: str) -> StoreError:
    # No part of the URL is repeated: a wrongly quoted password may stand in any.
    return StoreError(f"{variable} cannot be used: {problem}; expected {form}")
