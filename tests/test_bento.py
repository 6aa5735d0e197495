"""What `bentoml build` makes of bentofile.yaml: all that is needed to serve, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from core.settings import ROOT

STRAYS = {"usage.sqlite3": "x", "experiments.sqlite3": "x", ".env": "API_KEY=secret", "loras/mine.safetensors": "x", "compile_cache/x": "x", "notes.py": "x"}


@pytest.fixture(scope="module")
def bento(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Bento of a copy of what git knows, among what a served working tree has beside it."""
    tree, home = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("home")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(ROOT / name, tree / name) if os.stat(ROOT).st_dev == os.stat(tree).st_dev else (tree / name).write_bytes((ROOT / name).read_bytes())
    for name, content in STRAYS.items():
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(content)
    environment = {**os.environ, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "true", "EASEL_AUTH__MODE": "off"}
    environment.pop("EASEL_CONFIGURATION", None)
    done = subprocess.run([sys.executable, "-m", "bentoml", "build", "-o", "tag"], cwd=tree, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    name, version = done.stdout.split("__tag__:")[1].split()[0].split(":")
    return home / "bentos" / name / version


def test_it_has_what_serving_needs(bento: Path) -> None:
    known = subprocess.run(["git", "ls-files", "api", "core", "runners", "wildcards", "starter"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    needed = [n for n in known if n.endswith((".safetensors", ".txt", "config.json", "tokenizer.json")) or (n.endswith(".py") and not n.startswith("starter"))]
    missing = [name for name in [*needed, "studio/index.html", "studio/app.js", "studio/style.css", "studio/icon.svg", "service.py", "configuration.yaml", "lora_list.json", "styles.csv", "LICENSE"] if not (bento / "src" / name).is_file()]
    assert not missing


def test_it_has_nothing_else(bento: Path) -> None:
    src = bento / "src"
    assert {p.name for p in src.iterdir()} <= {
        "api", "core", "runners", "starter", "studio", "wildcards",
        "service.py", "configuration.yaml", "lora_list.json", "styles.csv", "LICENSE", "README.md", "bentofile.yaml", "sbom.cdx.json",
    }  # fmt: skip
    assert not [name for name in STRAYS if (src / name).exists()]
    assert not [p for p in src.rglob("*") if p.name in (".git", ".cache", "__pycache__")]
    assert not list((src / "starter").glob("*.py"))


def test_its_bill_of_materials_lists_what_is_pinned(bento: Path) -> None:
    listed = json.loads((bento / "src/sbom.cdx.json").read_text())
    assert listed["bomFormat"] == "CycloneDX"
    pinned = [line for line in (ROOT / "requirements.lock").read_text().split() if "==" in line]
    assert sorted(f"{part['name']}=={part['version']}" for part in listed["components"]) == sorted(pinned)


def test_its_packages_are_pinned_and_it_says_what_it_is(bento: Path) -> None:
    packages = (bento / "env/python/requirements.txt").read_text().split()
    assert set((ROOT / "requirements.lock").read_text().split()) <= set(packages)
    assert [p for p in packages if "==" not in p] == []
    assert not [p for p in packages if p.split("==")[0] in ("av", "nudenet")]  # under the GPL and the AGPL: extras
    assert (bento / "README.md").read_text() == (ROOT / "README.md").read_text()
    assert yaml.safe_load((bento / "bento.yaml").read_text())["labels"] == {"project": "easel", "licence": "Apache-2.0"}
