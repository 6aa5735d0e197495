"""What may import what: the HTTP side starts without torch, and core knows neither api nor runners."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.settings import ROOT


@pytest.mark.parametrize("module", ["api.app", "api.gate", "service"])
def test_the_entry_process_imports_no_torch(module: str) -> None:
    heavy = ("torch", "diffusers", "transformers")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    environment = {**os.environ, "API_KEY": "k"}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "[]", out.stderr


@pytest.mark.parametrize(("folder", "forbidden"), [("core", {"api", "runners", "service", "torch"}), ("api", {"runners", "service", "torch"}), ("runners", {"api", "service"}), ("cli", {"api", "core", "runners", "service", "torch", "bentoml", "pydantic"})])
def test_imports_go_one_way(folder: str, forbidden: set[str]) -> None:
    for file in Path(ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & forbidden, file
