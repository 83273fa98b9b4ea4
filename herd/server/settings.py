"""How a server runs: every flag of `herd serve` as a field, checked. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from herd.chat.formats import FORMATS
from herd.errors import ConfigError
from herd.server.auth import hashed
from herd.server.protocol import Chat
from herd.server.providers.spec import ProviderSpec

__all__ = ["EngineOptions", "ModelSpec", "ServerSettings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How a model is opened: the keyword arguments of `herd.LLM`, as JSON values. Raises ConfigError."""

    weights: str | None = None
    dtype: str | None = None
    device: str = "auto"
    format: str | None = None
    kv: str = "auto"
    max_len: int | None = None
    memory: int | str | None = None
    max_seqs: int = 16
    step_tokens: int = 512
    prefix_cache: bool = True
    deterministic: bool = False
    seed: int | None = None
    draft: str | None = None
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.tensor_parallel <= 1024:
            raise ConfigError(f"tensor_parallel is {self.tensor_parallel}: expected from 1 to 1,024 processes")
        if self.format is not None and self.format not in FORMATS:
            raise ConfigError(f"there is no prompt format {self.format!r}; choose one of {', '.join(FORMATS)}")

    def arguments(self) -> dict[str, Any]:
        """Those that are not the default."""
        plain = EngineOptions()
        return {key: value for key, value in asdict(self).items() if value != getattr(plain, key) or key == "seed"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A model that can be asked for: `source` is what is opened (a name, folder or file), `name` what clients call it.

    `adapters` are (name, path): each is a model of its own for clients, called `name` or `base@name`. `keep_alive` is after how
    many idle seconds it is unloaded; None: never. What `herd create` said of it: `lora` is an adapter that always lies on top,
    conversations that bring no system prompt get `system`, and all begin with `beginning` (role, text).
    """

    source: str
    name: str
    aliases: tuple[str, ...] = ()
    adapters: tuple[tuple[str, str], ...] = ()
    options: EngineOptions = EngineOptions()
    keep_alive: float | None = None
    lora: str | None = None
    system: str = ""
    beginning: tuple[tuple[str, str], ...] = ()

    @property
    def loras(self) -> tuple[tuple[str, str], ...]:
        """Every adapter that is loaded with it: its own is called `own`, which no client can say."""
        return ((self.own, self.lora), *self.adapters) if self.lora is not None and self.own else self.adapters

    @property
    def own(self) -> str | None:
        """What the adapter that always lies on top is called in the worker."""
        return None if self.lora is None else f"@{self.name}"

    def opened(self, chat: Chat) -> Chat:
        """The conversation with what the model was created with before it, and its note in its place."""
        if not (self.system or self.beginning or chat.note):
            return chat
        given = list(chat.messages)
        head = next((i for i, m in enumerate(given) if m["role"] not in ("system", "developer")), len(given))
        system = given[:head] or ([{"role": "system", "content": self.system}] if self.system else [])
        if chat.note:
            last = system.pop() if system else {"role": "system", "content": ""}
            system = [*system, last | {"content": _more(last["content"], chat.note)}]
        turns = [{"role": role, "content": text} for role, text in self.beginning]
        return replace(chat, messages=(*system, *turns, *given[head:]), note="")

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases, *(name for name, _ in self.adapters)):
            if not name or len(name) > 256 or not name.isprintable() or "@" in name:
                raise ConfigError(
                    f"a model cannot be called {name[:80]!r}: names are printable, without @, up to 256 characters"
                )


def _more(content: Any, note: str) -> Any:
    """What a message says, and a note behind it."""
    if isinstance(content, str):
        return f"{content}\n\n{note}" if content else note
    return [*content, {"type": "text", "text": f"\n\n{note}"}]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Everything a server is told. Raises ConfigError naming the field.

    `models` are loaded when the server starts unless `lazy`; with `any_model`, models on this machine that nobody named are
    opened with `engine` when they are asked for. `max_queue` requests may wait for a model beside those that run; more are
    refused (429). `max_body` is in bytes. After a signal, replies on their way get `drain_seconds` to end.
    """

    models: tuple[ModelSpec, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    any_model: bool = False
    lazy: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)
    keep_alive: float | None = None
    max_loaded: int = 3
    load_seconds: float = 600.0
    max_queue: int = 256
    max_body: int = 16 << 20
    max_prompt_work: int = 4_000_000
    """n (or best_of) times the characters or ids of all prompts of one request."""
    max_prompt_told: int = 1_000_000
    """Log-probabilities of prompts, or ids of a text, in one answer: they come all at once, 5 microseconds of reading each."""
    drain_seconds: float = 30.0
    ping_seconds: float = 15.0
    api_keys: tuple[str, ...] = ()
    """Kept as `auth.hashed` writes them: a name and a SHA-256."""
    open_metrics: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    rate_requests: int | None = None
    rate_tokens: int | None = None
    """A minute, for each key, or each address where there are no keys; `max_concurrent` is requests at once."""
    max_concurrent: int | None = None
    max_connections: int = 4096
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    send_seconds: float = 30.0
    """See `deadlines`."""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    reply_cache: int = 0
    """Bytes for replies to requests that were answered before; 0: none are kept."""
    reply_cache_shared: bool = False
    log_requests: bool = True
    root_path: str = ""
    adapter_dir: str | None = None
    """Adapters below this folder may be loaded by clients; None: none are."""
    guard: str | None = None
    """The name of the model, one of `models`, that moderates; None: there is none."""
    state_dir: str | None = None
    """Where files and batches are kept; None: there are none."""
    max_file: int = 200 << 20
    max_files: int = 10 << 30
    """Bytes of one file that is uploaded, and of all together."""
    otel: bool = False
    """Spans for OpenTelemetry, also without an endpoint in the environment (`tracing`)."""
    max_bodies: int = 64 << 20
    """Bytes of the bodies of all requests together, beyond the first of each (`gate.FREE`); one of `max_body` always fits."""
    pooling: Literal["mean", "last"] = "mean"
    """What embeddings make of a text's states: their average, or the last one."""
    fetch_images: bool = False
    """Whether images may be given as public http:// and https:// addresses, which the server then opens (`fetching`)."""
    providers: tuple[ProviderSpec, ...] = ()
    """Servers elsewhere whose models are served, too."""

    def provider_of(self, name: str) -> ProviderSpec | None:
        """The provider that a model called `name` would be of."""
        head, slash, own = name.partition("/")
        return next((one for one in self.providers if slash and own and one.name == head), None)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port is {self.port}: expected 0 (any free one) to 65535")
        sizes = ("max_queue", "max_body", "max_loaded", "max_prompt_work", "max_prompt_told", "max_connections")
        for name in (*sizes, "max_bodies"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least 1")
        object.__setattr__(self, "api_keys", tuple(hashed(key) for key in self.api_keys))
        for name in ("rate_requests", "rate_tokens", "max_concurrent"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ConfigError(f"{name} is {limit}: expected at least 1, or None for no limit")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("TLS needs both a certificate and its key: --ssl-certfile and --ssl-keyfile")
        for origin in self.allowed_origins:
            if origin != "*" and "://" not in origin:
                raise ConfigError(f"{origin!r} is no origin: write https://example.org, or * for every page")
        for name in ("drain_seconds", "ping_seconds", "load_seconds", "head_seconds", "body_seconds", "send_seconds"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected seconds from 0 up")
        names = [
            name for model in self.models for name in (model.name, *model.aliases, *(a for a, _ in model.adapters))
        ]
        if self.guard is not None and self.guard not in names:
            raise ConfigError(f"guard is {self.guard!r}, which is not one of the models")
        self._check_providers(names)
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(
                f"two models are called {twice!r}: give them different names (--served-model-name, NAME=MODEL)"
            )

    def _check_providers(self, names: list[str]) -> None:
        for number, one in enumerate(self.providers):
            for other in self.providers[:number]:
                if other.name == one.name:
                    raise ConfigError(f"two providers are called {one.name!r}: give them different names")
                if other.variable == one.variable and not (other.key_env and one.key_env):
                    raise ConfigError(
                        f"providers {other.name!r} and {one.name!r} would both get the key in {one.variable}: give one of them "
                        "another name, or each a variable with --provider-key-env"
                    )
        for name in names:
            if (provider := self.provider_of(name)) is not None:
                raise ConfigError(
                    f"a model cannot be called {name!r}: such names are those of provider {provider.name!r}; give one of them "
                    "another name"
                )
