"""Run configurations from YAML (or mappings) with dotted overrides, and back to YAML.

    config = load_config("lora.yaml", ["model.source=nano", "train.optim.lr=2e-4", "data.sources.0.weight=2"])
    print(dump_config(config))

What is given twice in one file, unknown, or of another type is refused with the key, what was expected and the nearest name;
keys of other trainers are answered with the one that herd has for them.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from herd.errors import ConfigError
from herd.train.config import RunConfig
from herd.train.typed import Raw, build, documents, nearest, plain, spelled, types_of

__all__ = ["KNOWN_ELSEWHERE", "dump_config", "leaves", "load_config", "read_yaml", "set_key"]

KNOWN_ELSEWHERE = {
    **dict.fromkeys(("learning_rate", "lr"), "train.optim.lr"),
    **dict.fromkeys(("max_steps", "iters", "max_iters", "steps"), "train.budget.steps"),
    **dict.fromkeys(("num_train_epochs", "epochs", "num_epochs"), "train.budget.steps (or tokens, minutes)"),
    **dict.fromkeys(("max_tokens", "tokens"), "train.budget.tokens"),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size", "batch_size"), "data.rows"),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulate_grad_batches"), "train.accumulate"),
    **dict.fromkeys(("max_grad_norm", "clip_grad_norm", "gradient_clip_val"), "train.optim.clip"),
    **dict.fromkeys(("warmup_ratio", "warmup_steps", "num_warmup_steps"), "train.schedule.warmup_steps"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), "train.schedule.kind"),
    **dict.fromkeys(("optimizer", "optim"), "train.optim.kind"),
    "weight_decay": "train.optim.weight_decay",
    **dict.fromkeys(("gradient_checkpointing", "enable_activation_checkpointing"), "train.checkpointing"),
    **dict.fromkeys(("bf16", "fp16", "tf32", "mixed_precision", "precision"), "train.precision"),
    **dict.fromkeys(("torch_compile", "compile"), "train.compile"),
    **dict.fromkeys(("packing", "sample_packing", "packed"), "data.pack"),
    **dict.fromkeys(("max_length", "max_seq_length", "sequence_len", "seq_len", "block_size"), "data.length"),
    **dict.fromkeys(("datasets", "dataset", "train_file", "data_path", "data_dir"), "data.sources"),
    **dict.fromkeys(("val_set_size", "eval_dataset", "validation_file"), "data.held_out"),
    **dict.fromkeys(("base_model", "model_name_or_path", "model_id", "checkpoint_dir"), "model.source"),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir"), "out"),
    **dict.fromkeys(("logging_steps", "log_every_n_steps", "log_interval"), "train.log_every"),
    **dict.fromkeys(("save_steps", "save_interval"), "train.save.every_steps"),
    "save_total_limit": "train.save.keep",
    **dict.fromkeys(("eval_steps", "eval_interval"), "train.evaluate.every_steps"),
    "report_to": "report.to",
    **dict.fromkeys(("adapter", "fine_tune_type", "peft_type"), "method.kind"),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), "method.rank"),
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    **dict.fromkeys(("lora_target_modules", "target_modules", "lora_attn_modules"), "method.targets"),
    "use_dora": "method.kind=dora",
    "use_rslora": "method.rslora",
    **dict.fromkeys(("load_in_4bit", "quantize_base"), "method.kind=qlora"),
    **dict.fromkeys(("chat_template", "prompt_template"), "data.chat_format"),
    "seed": "train.seed (weights: model.seed, order of the data: data.seed)",
    **dict.fromkeys(("tensor_parallel_dim", "tensor_parallel_size"), "parallel.tp"),
    **dict.fromkeys(("resume_from_checkpoint", "resume"), "the option --resume auto|never|PATH"),
}
"""Keys of TRL, Axolotl, torchtune, litgpt and MLX -> what they are called here."""


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a file, or of a mapping, with `key.of.it=value` overrides on top (values are YAML).

    Raises ConfigError: a file that cannot be read, a key that does not exist, a value of another type or out of range.
    """
    whole = _copied(source) if isinstance(source, Mapping) else read_yaml(Path(source))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip("-. "):
            raise ConfigError(f"{override!r} is not an override: write KEY=VALUE, for example train.optim.lr=2e-4")
        set_key(whole, key.strip().removeprefix("--"), Raw(value))
    try:
        return build(RunConfig, whole)
    except ConfigError as error:
        raise _told(error, whole) from None


def dump_config(config: Any, *, comments: bool = False) -> str:
    """YAML of a configuration with every key; `load_config` makes the same of it. `comments` puts its text over each key."""
    if not comments:
        return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return "\n".join(_commented(config, 0)).strip() + "\n"


def leaves(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, type in words, text) of every key that holds a value, those of lists as `key.0.name`."""
    for name, hint in types_of(cls).items():
        inner = _part_of(hint)
        if inner is None:
            yield prefix + name, spelled(hint), documents(cls).get(name, "")
        else:
            yield from leaves(inner, f"{prefix}{name}.{'0.' if get_origin(hint) is tuple else ''}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file. Only plain values are read; a key given twice is an error."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{where}: {getattr(error, 'problem', None) or 'not YAML'}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected keys with values, as `herd recipes cp` writes them")
    return value


def set_key(whole: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` at a dotted `key` in place; numbers in it count the items of a list."""
    *parents, last = key.split(".")
    inner: Any = whole
    for i, part in enumerate(parents):
        where = ".".join(parents[: i + 1])
        if isinstance(inner, list):
            inner = inner[_index(inner, part, key)]
        else:
            before = inner.get(part)
            if before is None:
                before = {}
            elif isinstance(before, Raw):
                before = yaml.safe_load(before)
            elif isinstance(before, str) and [*parents, last][i + 1].isdigit():  # the short form of a list
                before = [before]
            inner[part] = before
            inner = before
        if not isinstance(inner, (dict, list)):
            raise ConfigError(f"{key}: {where} is {inner!r} and has no keys of its own")
    if isinstance(inner, list):
        inner[_index(inner, last, key)] = value
    else:
        inner[last] = value


def _index(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"{key}: {part} is no item of a list of {len(items)} (they count from 0)")
    number = int(part)
    if isinstance(items[number], str):  # the short form of a source
        items[number] = {"path": items[number]}
    return number


def _told(error: ConfigError, whole: Mapping[str, Any]) -> ConfigError:
    """The error, with what herd calls a key that other trainers have."""
    text = str(error)
    key, _, rest = text.partition(": ")
    if not rest.startswith("there is no such key"):
        return error
    name = key.rpartition(".")[2]
    if name in KNOWN_ELSEWHERE:
        return ConfigError(f"{key}: there is no such key; herd calls it {KNOWN_ELSEWHERE[name]}")
    known = [leaf for leaf, _, _ in leaves()]
    same = [leaf for leaf in known if leaf.rpartition(".")[2] == name]
    if same:
        return ConfigError(f"{key}: there is no such key; did you mean {' or '.join(same[:3])}?")
    hint = nearest(name, [leaf.rpartition(".")[2] for leaf in known])
    if "did you mean" in hint and "did you mean" not in rest:
        near = hint.removeprefix("did you mean ").rstrip("?").split(" or ")
        found = [leaf for leaf in known if leaf.rpartition(".")[2] in near]
        return ConfigError(f"{key}: there is no such key; did you mean {' or '.join(found[:3])}?")
    return error


def _part_of(hint: Any) -> type | None:
    """The dataclass that a field holds, alone, or null, or in a list."""
    if dataclasses.is_dataclass(hint):
        return hint  # type: ignore[return-value]
    if get_origin(hint) is not None and get_origin(hint) not in (dict,):
        parts = [part for part in get_args(hint) if dataclasses.is_dataclass(part)]
        return parts[0] if parts else None  # type: ignore[return-value]
    return None


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def _commented(part: Any, depth: int, lead: str = "") -> Iterator[str]:
    indent = "  " * depth
    for i, field in enumerate(dataclasses.fields(part)):
        value, text = getattr(part, field.name), documents(type(part)).get(field.name, "")
        first = lead if i == 0 and lead else indent
        if depth == 0:
            yield ""
        if text and not (i == 0 and lead):
            yield from (f"{indent}# {line}" for line in textwrap.wrap(text, 100 - len(indent)))
        if dataclasses.is_dataclass(value):
            yield f"{first}{field.name}:"
            yield from _commented(value, depth + 1)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            yield f"{first}{field.name}:"
            for item in value:
                yield from _commented(item, depth + 2, f"{indent}  - ")
        else:
            whole = yaml.dump({field.name: plain(value)}, Dumper=_Dumper, default_flow_style=True, **_ONE_LINE)
            yield first + whole.strip()[1:-1]


_ONE_LINE: Any = {"allow_unicode": True, "width": 10**6}


class _Dumper(yaml.SafeDumper):
    """Short lists and mappings of scalars in one line, the rest as blocks."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        flat = all(not isinstance(item, (list, dict)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, and knows 1e-4 for a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)
