"""Typed configs from YAML files and `key.sub=value` overrides, with all mistakes reported at once.

Each part of the repository owns a `Config`; a stage script composes them. Precedence: defaults,
then the YAML file, then the command line. pydantic checks the fields. The rules between fields
(`Config.problems`) run in a pass of their own: pydantic skips whole-model validators as soon as a
field fails, and nobody should have to mend one mistake to be told of the next.

Plain YAML values are read as in YAML 1.2, since 1.1 surprises: `3e-4` is a number, `no`, `on` and
`12:30` are text, `010` is ten (`1_000_000` stays allowed). Keys are text and never appear twice.

Left out: includes, interpolation and environment variables. Only `model:` may name another file.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A user's mistake; the message says what is wrong, the value, the rule and the remedy."""


class Problem(NamedTuple):
    """A broken rule between fields: the dotted keys it reads, and a message that begins with the
    first of them: `d_model (100) must be a multiple of n_heads (12)`."""

    keys: tuple[str, ...]
    message: str


class Config(BaseModel):
    """Base of all configs: strict types, unknown keys refused, immutable, no NaN or infinity."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def problems(self) -> Iterator[Problem]:
        """Yield the broken rules between this config's fields."""
        yield from ()


C = TypeVar("C", bound=Config)


class _Loader(yaml.BaseLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, mark = key_node.value, key_node.start_mark
            if not isinstance(key, str) or key in mapping:
                what = f"duplicate key '{key}'" if isinstance(key, str) else "a key must be text"
                raise yaml.constructor.ConstructorError(problem=what, problem_mark=mark)
            mapping[key] = self.construct_object(value_node, deep)
        return mapping


def _scalar(kind: str, pattern: str, convert: Callable[[str], Any]) -> None:
    """Read plain scalars that match `pattern` with `convert`; all others are text."""
    tag = f"tag:yaml.org,2002:{kind}"
    _Loader.add_implicit_resolver(tag, re.compile(f"({pattern})$"), None)
    _Loader.add_constructor(tag, lambda loader, node: convert(node.value))


_DIGITS = r"\d+(_\d+)*"
_scalar("null", "null|Null|NULL|~|", lambda text: None)
_scalar("bool", "true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true")
_scalar("int", rf"[-+]?{_DIGITS}", int)
_scalar("float", rf"[-+]?(\.\d+|{_DIGITS}(\.\d*)?)([eE][-+]?\d+)?", float)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers  # puts text such as 3e-4 in quotes


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        what = error.problem or error.context
        remedy = "; indent with spaces" if r"'\t'" in what else ""
        raise ConfigError(f"{source}, line {line}: {what}{remedy}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; ConfigError, with the line, for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', 'not UTF-8 text')}") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        what = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path}: must hold a mapping (`key: value` lines), but is {what}")
    return json.loads(json.dumps(values))  # an alias becomes a copy, to be overridden alone


def save_yaml(path: str | Path, values: dict[str, Any]) -> None:
    """Write plain values such that `load_yaml` returns the same."""
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=100)
    Path(path).write_text(text, encoding="utf-8")


def plain(config: Config) -> dict[str, Any]:
    """Return the config as plain values (tuples as lists), for YAML files and checkpoints."""
    return config.model_dump(mode="json")


def load_config(cls: type[C], path: str | Path, overrides: Iterable[str] = ()) -> C:
    """Read a YAML file, apply `key.sub=value` overrides and validate the whole.

    A `model:` that is a path (from the current directory, else from the YAML's) is replaced by
    that file's mapping. An override of a whole block comes before those of its parts.
    """
    raw = load_yaml(path)
    problems: dict[str, str] = {}
    for override in sorted(overrides, key=lambda text: text.partition("=")[0].count(".")):
        key, equals, value = override.partition("=")
        if "." in key:
            _read_model(cls, raw, Path(path), problems)
        try:
            if not equals or not all(key.split(".")):
                raise ConfigError("an override has the form key.sub=value")
            _assign(raw, key.split("."), _parse_yaml(value, f"its value '{value}'"))
        except ConfigError as error:
            problems[key] = str(error)
    _read_model(cls, raw, Path(path), problems)
    return validate(cls, raw, str(path), problems)


def _assign(container: Any, names: list[str], value: Any) -> None:
    """Set `container[names[0]][names[1]]...`, making the mappings that are not there yet."""
    name, *rest = names
    if isinstance(container, list) and name.isdecimal() and int(name) < len(container):
        name = int(name)
    elif not isinstance(container, dict):
        raise ConfigError(f"there is no '{name}' in {_show(container)}")
    elif rest and container.get(name) is None:
        container[name] = {}
    if rest:
        _assign(container[name], rest, value)
    else:
        container[name] = value


def _read_model(cls: type[Config], raw: dict, yaml_path: Path, problems: dict[str, str]) -> None:
    """Replace `model: some/file.yaml` by the file's mapping, where the config has a model block."""
    file = raw.get("model")
    if not isinstance(file, str) or "model" in problems or not _blocks(cls).get("model"):
        return
    beside = yaml_path.parent / file
    try:
        raw["model"] = load_yaml(beside if beside.exists() and not Path(file).exists() else file)
    except ConfigError as error:
        problems["model"] = str(error)


def validate(cls: type[C], raw: dict, source: str, found: dict[str, str] | None = None) -> C:
    """Build a config from plain values; one ConfigError lists every problem in them.

    `found` (path -> text) are problems met earlier; they replace others at the same path.
    """
    problems = found or {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: should be a mapping, but is {_show(raw)}")
    failed = set(problems)
    try:  # JSON, because pydantic's strict mode takes a list for a tuple only there
        config = cls.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        problems = _field_problems(cls, raw, error, failed) | problems
        config = _stand_in(cls, raw, failed)
    lines = [f"{path}: {text}" for path, text in problems.items()]
    lines += _broken_rules(config, failed)
    if lines:
        raise ConfigError("\n  ".join([f"{len(lines)} problem(s) in {source}:", *lines]))
    return config


def _field_problems(cls: type, raw: dict, error: ValidationError, failed: set) -> dict[str, str]:
    """Return path -> text for pydantic's errors, and add every path they touch to `failed`."""
    by_path: dict[str, list[Any]] = {}
    for detail in error.errors():
        by_path.setdefault(_path(raw, detail), []).append(detail)
    problems = {}
    for path, details in by_path.items():
        if details[0]["type"] == "extra_forbidden":
            meant, problems[path] = _unknown(cls, path)
            failed |= {path, meant}
        else:
            problems[path] = _describe(details)
            failed.add(path)
    return problems


def _path(raw: Any, detail: Any) -> str:
    """Return an error's dotted path, without what pydantic adds for the branches of a union."""
    path = []
    for key in detail["loc"]:
        keys = raw if isinstance(raw, dict) else range(len(raw)) if isinstance(raw, list) else ()
        if key in keys:
            path.append(str(key))
            raw = raw[key]
    if detail["type"] == "missing":
        path.append(str(detail["loc"][-1]))
    return ".".join(path)


_REMEDIES = {"bool_type": "; write true or false", "string_type": "; put it in quotes"}


def _describe(details: list[Any]) -> str:
    """Say in one line what is wrong with a value; several details are the branches of a union."""
    kind, value = details[0]["type"], details[0]["input"]
    if kind == "missing":
        return "required, but missing"
    rule = " or ".join(re.sub("^(Input|Value error,) ", "", detail["msg"]) for detail in details)
    rule = rule.replace("an object", "a mapping").replace("a valid array", "a list")
    remedy = _REMEDIES.get(kind, "")
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        remedy = f"; write {int(value):_}"
    if close := get_close_matches(str(value), re.findall(r"'([^']*)'", rule), n=1):
        remedy = f"; did you mean '{close[0]}'?"
    return f"{rule}, but is {_show(value)}{remedy}"


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown(cls: type[Config], path: str) -> tuple[str, str]:
    """Return the path that an unknown key probably meant (else its own), and what to tell."""
    block, _, name = path.rpartition(".")
    keys = [key.rpartition(".") for key in _all_keys(cls)]
    siblings = [key[2] for key in keys if key[0] == re.sub(r"(^|\.)\d+(?=\.|$)", "", block)]
    elsewhere = ["".join(key) for key in keys if key[2] == name]
    if close := get_close_matches(name, siblings, n=1):
        return path.removesuffix(name) + close[0], f"unknown key, did you mean '{close[0]}'?"
    if elsewhere:
        return elsewhere[0], f"unknown key, did you mean '{elsewhere[0]}'?"
    return path, f"unknown key; known here: {', '.join(siblings)}"


def _blocks(cls: type[Config]) -> dict[str, type[Config] | None]:
    """Return for each field the config class in its annotation, also inside `list` or `| None`."""

    def inside(annotation: Any) -> type[Config] | None:
        if isinstance(annotation, type) and issubclass(annotation, Config):
            return annotation
        return next(filter(None, map(inside, get_args(annotation))), None)

    return {name: inside(field.annotation) for name, field in cls.model_fields.items()}


def _all_keys(cls: type[Config], prefix: str = "") -> Iterator[str]:
    for name, block in _blocks(cls).items():
        yield prefix + name
        if block:
            yield from _all_keys(block, f"{prefix}{name}.")


def _stand_in(cls: type[C], raw: dict, failed: Collection[str], prefix: str = "") -> C:
    """Return a config for the rules to read: a failed field has its default, or is absent."""
    kept = {}
    for name, block in _blocks(cls).items():
        path, value = prefix + name, raw.get(name)
        if name not in raw or path in failed:
            if block and cls.model_fields[name].is_required():
                kept[name] = block.model_construct()
        elif block and isinstance(value, dict):
            kept[name] = _stand_in(block, value, failed, f"{path}.")
        elif block and isinstance(value, list):
            items = [(f"{path}.{i}.", item) for i, item in enumerate(value)]
            kept[name] = [_stand_in(block, x, failed, p) for p, x in items if isinstance(x, dict)]
        elif not any(bad.startswith(f"{path}.") for bad in failed):
            kept[name] = value
    return cls.model_construct(**kept)


def _broken_rules(config: Config, failed: Collection[str], prefix: str = "") -> Iterator[str]:
    """Yield a line for each broken rule, here and in nested configs, that reads no failed field."""
    try:
        for keys, message in config.problems():
            paths = [f"{prefix}{key}." for key in keys]
            marks = [f"{bad}." for bad in failed]
            if not any(p.startswith(m) or m.startswith(p) for p in paths for m in marks):
                yield prefix + (message if message.startswith(keys[0]) else f"{keys[0]}: {message}")
    except AttributeError:  # a required field is absent: the other rules of this config must wait
        if not failed:
            raise
    for name, value in config:
        many = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        items = {f"{name}.{i}": x for i, x in many.items()} if isinstance(many, dict) else {}
        for path, item in [(name, value), *items.items()]:
            if isinstance(item, Config):
                yield from _broken_rules(item, failed, f"{prefix}{path}.")


def check_resume(old: dict[str, Any], new: Config, may_change: Collection[str]) -> None:
    """Refuse to resume under a config that differs from the checkpoint's, except in `may_change`.

    A key that the checkpoint is too old to have counts as its default, one that the config has no
    more as null. `may_change` holds dotted keys; one that names a block covers all of it.
    """
    filled = _stand_in(type(new), old, ()).model_dump(mode="json", warnings=False)
    given, known, after = _flatten(old), _flatten(filled), _flatten(plain(new))
    lines = []
    for key in given | known | after:
        before, now = (given | known).get(key), after.get(key)
        if before == now or any(f"{key}.".startswith(f"{free}.") for free in may_change):
            continue
        is_setting = key in known or key in after
        told = _show(now) if is_setting else "no setting here; resume with the code that wrote it"
        lines.append(f"{key}: {_show(before)} -> {told}")
    if lines:
        head = "these settings differ from the checkpoint's; restore them or start another run:"
        raise ConfigError("\n  ".join([head, *lines, f"free to change: {', '.join(may_change)}"]))


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> leaf; a list is a leaf unless it holds mappings."""
    if isinstance(values, list) and any(isinstance(item, dict) for item in values):
        values = {str(i): item for i, item in enumerate(values)}
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
