"""Which of a model's parameters a run trains (`config.Tune`), and their tree as two: what is trained, what is frozen.

A rule is a pattern over paths such as "stack/segment0/slot1/moe/router": what matches is frozen, or trained again after
a "!". Of several rules that match a path the last one counts; what none matches is trained.

    freeze=("*", "!vision/*", "!projector")     the language model is frozen, encoder, adapter and projector are trained
    freeze=("*/router",)                        the routers alone are frozen

`*` stands for any characters, "/" among them. With adapters (lora.py) all else is frozen, before the first rule, but
for the head of a reward model: so freeze=("!vision/*", "!projector") trains the vision side beside the adapters.

What is frozen has no gradient and no optimizer state: a step differentiates and updates the one tree, and only reads
the other. The balancing bias of a frozen router stays too.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator
from typing import Any

from llamax import config
from llamax.config import ConfigError
from llamax.model.lora import ADAPTERS, HEAD

Tree = dict[str, Any]
AGAIN = "!"  # before a pattern of what is trained after all
SHOWN = 3  # nearest names that an error tells
LAYER = re.compile(r"^stack/segment\d+/slot\d+/")
BOTH = re.compile(r"(_lora_)[ab]$")  # adapters come in twos


def trained(tune: config.Tune, params: Tree) -> Tree:
    """For every parameter of a tree of this structure whether it is trained.

    Raises:
        ConfigError: a pattern that matches none of them, or nothing is left to be trained.
    """
    paths, rules = list(paths_of(params)), rules_of(tune)
    for rule in tune.freeze:
        if not any(_matches(path, rule) for path in paths):
            true = f"no parameter's path matches; the nearest are {', '.join(_nearest(rule, paths))}"
            raise ConfigError(f"{rule!r} in --config.tune.freeze", true, f"Write it like {_example(tune, rule, paths)}")
    verdicts = {path: _is_trained(path, rules) for path in paths}
    if not any(verdicts.values()):
        asked, true = f"--config.tune.freeze={tune.freeze}", "it freezes every parameter, and a run trains some"
        raise ConfigError(asked, true, f"Add what is to be trained: {AGAIN}PATTERN after the others.")
    return _told(params, verdicts)


def rules_of(tune: config.Tune) -> tuple[str, ...]:
    """All rules, in their order."""
    beside = ("*", *(AGAIN + name for name in (*ADAPTERS, HEAD))) if tune.lora_rank else ()
    return (*beside, *tune.freeze)


def trains(tune: config.Tune, path: str) -> bool:
    """Whether a parameter of that path is trained."""
    return _is_trained(path, rules_of(tune))


def split(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """Nested dicts as two, by a tree of bools with their structure: those that are true, and the others. A dict that
    would be empty is left out. `config_dict.merged` makes them one again."""
    taken: Tree = {}
    rest: Tree = {}
    for key, value in tree.items():
        if isinstance(mask[key], dict):
            for side, part in zip((taken, rest), split(value, mask[key]), strict=True):
                side |= {key: part} if part else {}
        else:
            (taken if mask[key] else rest)[key] = value
    return taken, rest


def paths_of(tree: Tree, prefix: str = "") -> Iterator[str]:
    """Of every leaf: "stack/segment0/slot1/moe/router"."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from paths_of(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}"


def named(mask: Tree, which: bool) -> list[str]:
    """What of a tree of bools is `which`: the paths of whole parts; what is alike in all layers once, stack/*/PART."""
    verdicts = dict(zip(paths_of(mask), _leaves(mask), strict=True))
    other = [LAYER.sub("", path) for path, verdict in verdicts.items() if verdict is not which]

    def shown(path: str) -> str:
        part = LAYER.sub("", path)
        alike = part != path and not any(f"{rest}/".startswith(f"{part}/") for rest in other)
        return BOTH.sub(r"\1*", f"stack/*/{part}" if alike else path)

    return list(dict.fromkeys(map(shown, _whole_parts(mask, which))))


def _whole_parts(mask: Tree, which: bool, prefix: str = "") -> Iterator[str]:
    for key, value in mask.items():
        leaves = _leaves(value) if isinstance(value, dict) else (value,)
        if all(leaf is which for leaf in leaves):
            yield f"{prefix}{key}"
        elif isinstance(value, dict):
            yield from _whole_parts(value, which, f"{prefix}{key}/")


def _leaves(mask: Tree) -> Iterator[bool]:
    for value in mask.values():
        yield from _leaves(value) if isinstance(value, dict) else (value,)


def _told(tree: Tree, verdicts: dict[str, bool], prefix: str = "") -> Tree:
    return {
        key: _told(value, verdicts, f"{prefix}{key}/") if isinstance(value, dict) else verdicts[f"{prefix}{key}"]
        for key, value in tree.items()
    }


def _matches(path: str, rule: str) -> bool:
    return fnmatch.fnmatchcase(path, rule.removeprefix(AGAIN))


def _is_trained(path: str, rules: tuple[str, ...]) -> bool:
    last = next((rule for rule in reversed(rules) if _matches(path, rule)), AGAIN)
    return last.startswith(AGAIN)


def _nearest(rule: str, paths: list[str]) -> list[str]:
    """Ends of paths, or beginnings, that are most like a pattern."""
    parts = [path.split("/") for path in paths]
    names = {"/".join(part[i:]) for part in parts for i in range(len(part))}
    names |= {"/".join(part[: i + 1]) for part in parts for i in range(len(part))}
    return difflib.get_close_matches(rule.removeprefix(AGAIN).strip("*/"), sorted(names), SHOWN, 0.0)


def _example(tune: config.Tune, rule: str, paths: list[str]) -> str:
    (near, *_), again = _nearest(rule, paths), AGAIN if rule.startswith(AGAIN) else ""
    path = next(path for path in paths if path.startswith(near) or path.endswith(near))
    fits = path if path == near else f"*/{near}" if path.endswith(near) else f"{near}/*"
    rules = tuple(again + fits if other == rule else other for other in tune.freeze)
    return f'--config.tune.freeze="{rules}".'
