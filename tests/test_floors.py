"""Imports go down only, and the parent never imports torch."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
#: What each room may import of the runner; rooms below it in the house.
ALLOWED = {
    "record": {"record"},
    "config": {"record", "config"},
    "xla": {"record", "xla"},
    "backends": {"record", "config", "xla", "backends"},
    "observe": {"record", "config", "observe"},
    "batch": {"record", "config", "observe", "batch"},
    "train": {"record", "config", "xla", "backends", "train"},
    "preflight": {"record", "config", "xla", "backends", "preflight"},
    "cli": {"record", "config", "observe", "batch", "cli"},
}
FILES = sorted((ROOT / "runner").rglob("*.py")) + sorted((ROOT / "jobs").rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_to_its_floor(path: pathlib.Path) -> None:
    parts = path.relative_to(ROOT).parts
    room = parts[1] if parts[0] == "runner" and len(parts) > 2 else None
    names = imported(path)
    rooms = {name.split(".")[1] for name in names if name.startswith("runner.") and "." in name}
    if room is not None:
        assert rooms & set(ALLOWED) <= ALLOWED[room]
    if parts[0] == "jobs":
        assert not any(name.split(".")[0] == "runner" for name in names)
    if room != "xla":
        assert not any(name.split(".")[0] == "torch_xla" for name in names)
    if path.name not in ("tpu_compiler.py", "pallas.py"):
        assert not any(name.split(".")[0] in ("jax", "jaxlib") for name in names)
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("module", ["runner.batch.supervise", "runner.cli.app", "runner.__main__"])
def test_the_parent_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'torch_xla' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0
