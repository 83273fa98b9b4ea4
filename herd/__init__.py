"""herd: every Llama, end to end, verified.

The public names below are loaded on first use, so that `import herd` and `herd --help` do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOME = {
    "CheckpointError": "herd.errors",
    "ConfigError": "herd.errors",
    "ContextFullError": "herd.errors",
    "HerdError": "herd.errors",
    "HubError": "herd.errors",
    "LLM": "herd.engine.llm",
    "Llama": "herd.model.llama",
    "Message": "herd.chat.messages",
    "ModelConfig": "herd.model.config",
    "PromptError": "herd.errors",
    "Rendered": "herd.chat.format",
    "Reply": "herd.chat.model",
    "SamplingParams": "herd.chat.params",
    "ToolSpec": "herd.chat.format",
    "TokenizerError": "herd.errors",
    "UnknownModelError": "herd.errors",
    "convert": "herd.convert",
    "generate": "herd.engine.local",
    "load": "herd.checkpoint.load",
    "load_tokenizer": "herd.checkpoint.vocabulary",
    "merge": "herd.convert.merge",
    "plan": "herd.planning.plan",
    "pull": "herd.hub.pull",
    "quantize": "herd.convert.quantize",
    "render": "herd.chat.render",
    "verify": "herd.convert.verify",
}

__all__ = [
    "LLM",
    "CheckpointError",
    "ConfigError",
    "ContextFullError",
    "HerdError",
    "HubError",
    "Llama",
    "Message",
    "ModelConfig",
    "PromptError",
    "Rendered",
    "Reply",
    "SamplingParams",
    "TokenizerError",
    "ToolSpec",
    "UnknownModelError",
    "__version__",
    "convert",
    "generate",
    "load",
    "load_tokenizer",
    "merge",
    "plan",
    "pull",
    "quantize",
    "render",
    "verify",
]

if TYPE_CHECKING:
    from herd.chat.format import Rendered, ToolSpec
    from herd.chat.messages import Message
    from herd.chat.model import Reply
    from herd.chat.params import SamplingParams
    from herd.chat.render import render
    from herd.checkpoint.load import load
    from herd.checkpoint.vocabulary import load_tokenizer
    from herd.convert.driver import convert
    from herd.convert.merge import merge
    from herd.convert.quantize import quantize
    from herd.convert.verify import verify
    from herd.engine.llm import LLM
    from herd.engine.local import generate
    from herd.errors import (
        CheckpointError,
        ConfigError,
        ContextFullError,
        HerdError,
        HubError,
        PromptError,
        TokenizerError,
        UnknownModelError,
    )
    from herd.hub.pull import pull
    from herd.model.config import ModelConfig
    from herd.model.llama import Llama
    from herd.planning.plan import plan


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'herd' has no attribute {name!r}")
    home = import_module(_HOME[name])
    value = home if name == "convert" else getattr(home, name)  # that floor is its function: herd/convert/__init__.py
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
