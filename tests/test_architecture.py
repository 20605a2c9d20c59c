"""The house's walls: who may import whom, where jax and ConfigDict may appear, no cycles, no giant files.

The rule is `ROOMS` below, and docs/tour.md says it in prose. The checks read source text only, so that a wall holds
for imports inside functions too; each of them is also shown a small wrong tree and has to notice.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A room may import the rooms of any level above its own. Rooms of one level never import each other, except the first.
ROOMS = (
    {
        "__init__",
        "config",
        "config_dict",
        "config_file",
        "checks",
        "variants",
        "batch",
        "stripes",
        "stages",
        "positions",
        "laptop",
    },
    {"kernels", "parallel", "observe"},
    {"model", "optim", "data", "losses", "rewards"},
    {"checkpoint", "sample"},
    {"loading"},
    {"evals"},
    {"train"},
    {"post", "preflight", "starting"},
    {"run", "generating", "evaluating", "plan", "show"},
    {"cli", "__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}

JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "tokamax"}
WITHOUT_JAX = ROOMS[0] | {"data", "rewards"}  # a wrong config is refused, and a batch is packed, without a device
WITH_CONFIG_DICT = {
    "config",
    "config_dict",
    "config_file",
    "checks",
    "laptop",
    "cli",
}  # and recipes, not below freeze()

FRONT_DOOR = (
    "llamax.config"  # what its functions import on use (checks, config_file, variants) makes no cycle; top level does
)

MAX_FILE_LINES = 600  # the aim is 300, 500 in kernels/
MAX_FUNCTION_LINES = 80  # the aim is 60

Tree = dict[str, str]  # dotted module name -> source


def read_tree(root: Path) -> Tree:
    """Every module of the package below `root`/llamax; a package goes by the name of its folder."""
    tree = {}
    for path in sorted((root / "llamax").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        tree[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return tree


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(module: str, tree: Tree, top_level: bool = False) -> list[tuple[int, str]]:
    """(line, imported module) for each import of the file, or of its top level only; `from a import b` is a.b where
    that is a module."""
    is_package = any(name.startswith(module + ".") for name in tree)
    parsed = ast.parse(tree[module])
    found = []
    for node in parsed.body if top_level else ast.walk(parsed):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: a package counts from itself, a module from its folder
                parts = module.split(".")
                folder = parts[: len(parts) - node.level + is_package]
                base = ".".join(folder + ([base] if base else []))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((node.lineno, inner if inner in tree or base == "llamax" else base))
    return found


def wrong_imports(tree: Tree) -> list[str]:
    """Imports that go against the one direction, and files that stand in no room."""
    wrong = [f"{m}: no room of the house; see ROOMS" for m in tree if room_of(m) not in LEVEL]
    for module in tree:
        here = room_of(module)
        # The package's own attributes (`llamax.load`) are imported when they are asked for.
        for line, target in imports(module, tree, top_level=module == "llamax"):
            if target.split(".")[0] != "llamax" or here not in LEVEL:
                continue
            there = room_of(target)
            if there == here or there not in LEVEL:
                continue
            if LEVEL[there] > LEVEL[here] or (LEVEL[there] == LEVEL[here] and LEVEL[here] > 0):
                wrong.append(f"{module}:{line} imports {target}: {here} may not import {there}")
    return wrong


def wrong_third_parties(tree: Tree) -> list[str]:
    """jax where there should be numpy only, jax at the top of cli.py, ConfigDict below freeze()."""
    wrong = []
    for module in tree:
        room = room_of(module)
        for line, target in imports(module, tree, top_level=room == "cli"):
            package = target.split(".")[0]
            if package in JAX and room in WITHOUT_JAX | {"cli"}:
                wrong.append(f"{module}:{line} imports {target}: {room} has to start without jax")
            if package == "ml_collections" and room not in WITH_CONFIG_DICT:
                wrong.append(f"{module}:{line} imports {target}: past freeze() take a frozen dataclass")
    return wrong


def cycles(tree: Tree) -> list[str]:
    """At most one cycle, as text: modules that import each other in a ring, within a room too."""
    graph = {m: {t for _, t in imports(m, tree, top_level=m == FRONT_DOOR) if t in tree and t != m} for m in tree}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


def too_long(tree: Tree) -> list[str]:
    wrong = []
    for module, source in tree.items():
        lines = source.count("\n") + 1
        if lines > MAX_FILE_LINES:
            wrong.append(f"{module}: {lines} lines; find the seam")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{module}:{node.lineno} {node.name}: {length} lines")
    return wrong


CHECKS = [wrong_imports, wrong_third_parties, cycles, too_long]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_llamax_keeps_to_the_house(check):
    tree = read_tree(ROOT)
    assert len(tree) > 10 and "llamax.config" in tree
    assert check(tree) == []


@pytest.mark.parametrize("folder", ["recipes", "bench"])
def test_scripts_stay_short(folder):
    tree = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / folder).glob("*.py")}
    assert tree and too_long(tree) == []


# Each row: the check that has to notice, a tree that is right, the module to spoil, the line that spoils it.
RIGHT = {
    "llamax": "",
    "llamax.config": "from ml_collections import ConfigDict\n",
    "llamax.variants": "from llamax import config\n",
    "llamax.batch": "",
    "llamax.kernels": "",
    "llamax.kernels.attention": "import jax\n",
    "llamax.parallel.mesh": "from llamax.config import Mesh\n",
    "llamax.model.llama": "from llamax.kernels.attention import attention\nfrom .layers import norm\n",
    "llamax.model.layers": "import jax.numpy as jnp\n",
    "llamax.losses": "from llamax.losses.sum import Sum\nfrom . import router\n",
    "llamax.losses.sum": "from typing import NamedTuple\n",
    "llamax.losses.router": "from llamax.losses.sum import Sum\n",
    "llamax.data.packing": "import numpy as np\nfrom llamax.batch import Batch\n",
    "llamax.train.step": "from llamax.model import llama\nfrom llamax import losses\n",
    "llamax.run": "import llamax.train.step\n",
    "llamax.cli": "def main():\n    import jax\n    from llamax import run\n",
}
SPOILT = [
    (wrong_imports, "llamax.kernels.attention", "from llamax.model import llama"),
    (wrong_imports, "llamax.model.layers", "import llamax.losses.router"),
    (wrong_imports, "llamax.data.packing", "def f():\n    from llamax.losses import router"),
    (wrong_imports, "llamax.parallel.mesh", "from llamax.kernels import attention"),
    (wrong_imports, "llamax.losses.sum", "from ..train import step"),
    (wrong_imports, "llamax.losses", "from ..train.step import step"),
    (wrong_imports, "llamax.config", "from llamax import kernels"),
    (wrong_imports, "llamax.run", "from llamax import cli"),
    (wrong_imports, "llamax.utils", "x = 1"),
    (wrong_third_parties, "llamax.data.packing", "import jax.numpy as jnp"),
    (wrong_third_parties, "llamax.variants", "def f():\n    from flax import nnx"),
    (wrong_third_parties, "llamax.cli", "import jax"),
    (wrong_third_parties, "llamax.train.step", "from ml_collections import ConfigDict"),
    (cycles, "llamax.model.layers", "from llamax.model.llama import Llama"),
    (cycles, "llamax.losses.sum", "from llamax.losses import router"),
    (cycles, "llamax.losses.router", "from llamax.losses import Sum"),
    (cycles, "llamax.model.layers", "def f():\n    from llamax.model.llama import Llama"),
    (cycles, "llamax.config", "from llamax.variants import scout"),
    (too_long, "llamax.run", "\n" * MAX_FILE_LINES),
    (too_long, "llamax.run", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_accepts_a_right_tree(check):
    assert check(RIGHT) == []


@pytest.mark.parametrize(("check", "module", "line"), SPOILT, ids=lambda value: getattr(value, "__name__", None))
def test_check_notices(check, module, line):
    found = check({**RIGHT, module: RIGHT.get(module, "") + line + "\n"})
    assert found and any(module in text for text in found)


def test_cli_and_config_start_without_jax():
    """What the source check cannot see: a third party that brings jax along."""
    script = "import sys, llamax, llamax.cli, llamax.config; sys.exit(sorted({'jax', 'flax'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0
