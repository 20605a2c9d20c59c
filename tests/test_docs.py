"""The docs do not lie about what a machine can check: links lead somewhere, and every `llamax` command parses."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from llamax import cli, config

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("*.md", "docs/**/*.md", "launch/*.md", "data/*.md")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(folder))
SCRIPTS = sorted((ROOT / "recipes").glob("*.py"))  # their docstrings show commands too
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FENCED = re.compile(r"^ *```.*?\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# A line of an indented block, perhaps behind variables; fenced blocks are indented before.
COMMAND = re.compile(r"^ {4}\s*(?:\$ )?(?:\w+=\S+ +)*(?:\.venv/bin/)?llamax (.+)$", re.MULTILINE)


def dead_links(text: str, folder: Path) -> list[str]:
    return [link for link in LINK.findall(text) if "://" not in link and not (folder / link).exists()]


def commands(text: str) -> list[list[str]]:
    """The words after `llamax` of each command of a code block, joined over continued lines, without comments."""
    indented = FENCED.sub(lambda block: "\n" + textwrap.indent(block[1], "    "), text)
    joined = re.sub(r"\\\n\s*", "", indented)
    return [shlex.split(command, comments=True) for command in COMMAND.findall(joined)]


def check(words: list[str]) -> None:
    """Parses a command line, and freezes its recipe with its overrides where that recipe exists."""
    words, overrides = cli.split_overrides(words)
    args = cli.parser().parse_args(words)
    recipe = getattr(args, "recipe", None) or ""
    if (ROOT / recipe.split(":")[0]).is_file():
        config.freeze(config.load(recipe, overrides))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert dead_links(page.read_text(encoding="utf-8"), page.parent) == []


@pytest.mark.parametrize("page", PAGES + SCRIPTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page.read_text(encoding="utf-8")):
        check(words)


def test_the_readme_has_commands():
    assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) >= 3


def test_checks_notice(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert dead_links("[a](b.md) and [c](https://d/e)", tmp_path) == ["b.md"]
    text = "Run\n\n    llamax train recipes/scout_pretrain.py:tiny --workdir runs/x \\\n        --config.train.step=3\n"
    (words,) = commands(text)
    with pytest.raises(config.ConfigError, match="train.steps"):
        check(words)
    with pytest.raises(SystemExit):
        check(["train", "recipes/scout_pretrain.py"])
