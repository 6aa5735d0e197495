"""The usage log: what it counts, that it only grows, and that no fault of its file fails a request."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from api import answering, usage
from core import metadata
from core.catalogue import Catalogue
from core.database import in_file
from core.generation import AppliedLora, Generation, Ran, Timing
from core.loras.registry import is_name
from core.model_settings import Model, Models
from core.plans import Pixels, Plan
from core.problems import Problem
from core.requests import GenerationRequest
from core.settings import ROOT, Settings
from core.usage import SCHEMA, Ledger, Line
from core.versions import LaterVersion
from runners.device import Device

# As the first version made it: without a column for flagged pictures.
FIRST = """
CREATE TABLE usage (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL, pictures INTEGER NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, steps INTEGER NOT NULL,
    commercial INTEGER NOT NULL, commercial_use INTEGER NOT NULL, credit TEXT NOT NULL);
CREATE TABLE usage_loras (
    usage INTEGER NOT NULL REFERENCES usage (id), lora TEXT NOT NULL, weight REAL NOT NULL, sha256 TEXT NOT NULL);
CREATE INDEX usage_at ON usage (at);
CREATE INDEX usage_loras_usage ON usage_loras (usage);
CREATE TRIGGER usage_kept BEFORE DELETE ON usage BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER usage_unchanged BEFORE UPDATE ON usage BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER usage_loras_kept BEFORE DELETE ON usage_loras BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER usage_loras_unchanged BEFORE UPDATE ON usage_loras BEGIN SELECT RAISE(ABORT, 'append-only'); END;
INSERT INTO usage VALUES (1, 0, 'k1', 'm', 4, 64, 64, 25, 0, 1, '[]');
INSERT INTO usage_loras VALUES (1, 'a', 1, '00');
"""
CATALOGUE = Catalogue(Settings(models=Models(default="m", catalogue=[Model(id="m", family="starter", commercial_use=True)])))


def plan(client: str = "k1", commercial: bool = False) -> Plan:
    return CATALOGUE.plan(GenerationRequest(prompt="secret words", commercial=commercial), None, client)


def drawn(pictures: int = 1, loras: tuple[str, ...] = (), steps: int = 25) -> Generation:
    applied = [AppliedLora(name=n, weight=1, sha256="0" * 64, layers=1, unmatched=0, commercial_use=True, credit=None) for n in loras]
    ran = Ran(
        model_id="m", family="starter", scheduler="Euler", schedule=None, torch_dtype="float32", device="cpu", num_inference_steps=steps, steps_run=steps,
        guidance_scale=5, width=1, height=1, clip_skip=0, loras=applied, strength=None, prompt="secret words", negative_prompt="", prompt_tokens=2,
        prompt_tokens_cut=0, licence="L", commercial_use=True, notes=[], libraries={}, timing=Timing(), model_sha256="f" * 64,
    )  # fmt: skip
    return Generation(pictures=[Pixels(width=1, height=1, data=b"abc")] * pictures, seeds=list(range(pictures)), ran=ran)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(in_file(tmp_path / "usage.sqlite3"))


def file(ledger: Ledger) -> Path:
    assert ledger.file is not None
    return ledger.file


def total(ledger: Ledger) -> Line:
    return ledger.report(None, None, [])[0]


def test_pictures_are_counted_by_key_model_and_lora(ledger: Ledger) -> None:
    ledger.append(plan("k1"), drawn(2, ("a", "b"), steps=10))
    ledger.append(plan("k1", commercial=True), drawn(3))
    ledger.append(plan("k2"), drawn(1, ("a",)))
    assert total(ledger) == Line({}, 3, 6, 2 * 10 + 3 * 25 + 25)
    assert ledger.report(None, None, ["key"]) == [Line({"key": "k1"}, 2, 5, 95), Line({"key": "k2"}, 1, 1, 25)]
    assert {line.group["lora"]: line.pictures for line in ledger.report(None, None, ["lora"])} == {"a": 3, "b": 2, None: 3}
    assert {line.group["commercial"]: line.pictures for line in ledger.report(None, None, ["commercial"])} == {"true": 3, "false": 3}
    today = datetime.now(UTC).date()
    assert {line.group["day"] for line in ledger.report(None, None, ["day"])} <= {str(today), str(today - timedelta(1))}
    assert len(ledger.report(None, None, ["key", "model", "lora"])) == 4


@pytest.mark.parametrize("name", ["=1+1", "@SUM(1+1)*cmd|' '!A0", "+detail", "-x"])
def test_no_name_is_a_formula_to_the_spreadsheet_that_opens_the_report(name: str) -> None:
    assert is_name(name)
    row = {"lora": name, "pictures": 1}
    assert list(csv.DictReader(io.StringIO(usage.table([row, {"lora": "a=b", "pictures": -1}], list(row))))) == [{"lora": f"'{name}", "pictures": "1"}, {"lora": "a=b", "pictures": "-1"}]


def test_a_report_is_bounded_in_time(ledger: Ledger) -> None:
    before = datetime.now(UTC)
    ledger.append(plan(), drawn())
    after = datetime.now(UTC) + timedelta(seconds=1)
    assert ledger.report(before, after, [])[0].pictures == 1
    assert ledger.report(None, before, [])[0].pictures == 0
    assert ledger.report(after, None, ["key"]) == []


def test_nothing_written_can_be_changed_and_no_prompt_is_written(ledger: Ledger) -> None:
    ledger.append(plan(), drawn(1, ("a",)))
    ledger.close()
    with sqlite3.connect(file(ledger)) as connection:
        for statement in ("DELETE FROM usage", "UPDATE usage SET pictures = 0", "DELETE FROM usage_loras", "UPDATE usage_loras SET lora = 'x'"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(statement)
    assert b"secret" not in file(ledger).read_bytes()


def test_a_failure_draws_no_line(ledger: Ledger) -> None:
    ledger.append(plan(), Generation())
    assert total(ledger).requests == 0


def test_processes_and_threads_lose_nothing(ledger: Ledger) -> None:
    ledgers = [ledger, Ledger(ledger.url)]
    threads = [threading.Thread(target=lambda one=one: [one.append(plan(), drawn()) for _ in range(20)]) for one in ledgers * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total(ledger).pictures == 80


@pytest.mark.parametrize("fault", ["from the start", "later"])
def test_a_corrupt_file_is_moved_aside(ledger: Ledger, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    if fault == "later":
        ledger.append(plan(), drawn())
        ledger.close()
    content = b"this is no database" * 500
    file(ledger).write_bytes(content)
    with caplog.at_level(logging.ERROR):
        ledger.append(plan(), drawn(2))
    assert total(ledger).pictures == 2
    aside = list(file(ledger).parent.glob("usage.sqlite3.corrupt-*"))
    assert [p.read_bytes() for p in aside if not p.name.endswith(("-wal", "-shm"))] == [content]
    assert "corrupt" in caplog.text


@pytest.mark.parametrize("version", [0, 1])
def test_an_earlier_versions_file_is_brought_to_this_one_with_what_it_holds(ledger: Ledger, version: int) -> None:
    with sqlite3.connect(file(ledger)) as connection:
        connection.executescript(FIRST)
        if version == 1:
            connection.executescript("ALTER TABLE usage ADD COLUMN flagged INTEGER NOT NULL DEFAULT 0; PRAGMA user_version = 1")
    connection.close()
    SCHEMA.check(ledger.url)
    threads = [threading.Thread(target=Ledger(ledger.url).append, args=(plan(), drawn(1))) for _ in range(3)]  # processes that start at once
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total(ledger) == Line({}, requests=4, pictures=7, picture_steps=175, flagged=0)
    assert {line.group["lora"]: line.pictures for line in ledger.report(None, None, ["lora"])} == {"a": 4, None: 3}
    with sqlite3.connect(file(ledger)) as connection:
        assert connection.execute("SELECT version FROM usage_schema").fetchall() == connection.execute("PRAGMA user_version").fetchall() == [(2,)]
        assert "usage_key" in {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    connection.close()


def test_a_later_versions_file_is_refused_and_left_alone(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    with sqlite3.connect(file(ledger)) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(LaterVersion, match="version of the usage log is 99, and this Easel knows 2"):
        SCHEMA.check(ledger.url)
    ledger.append(plan(), drawn())
    assert "not in the usage log" in caplog.text
    with pytest.raises(LaterVersion):
        ledger.report(None, None, [])
    with sqlite3.connect(file(ledger)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []
    connection.close()


def test_easel_does_not_start_with_a_later_versions_file(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite3"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    started = subprocess.run(
        [sys.executable, "-c", "import service"], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, "EASEL_USAGE__PATH": str(path), "API_KEY": "k", "ADMIN_API_KEY": "a"},
    )  # fmt: skip
    assert started.returncode == 1
    assert started.stderr.strip().endswith("Easel cannot start. The version of the usage log is 99, and this Easel knows 2: use the Easel that wrote it, or another usage.path or usage.store")


def test_a_file_taken_away_is_begun_anew(ledger: Ledger) -> None:
    ledger.append(plan(), drawn())
    for path in file(ledger).parent.glob("usage.sqlite3*"):
        path.unlink()
    ledger.append(plan(), drawn(3))
    assert total(ledger).pictures == 3


def test_a_log_that_cannot_be_written_is_logged_and_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "folder").mkdir()
    with caplog.at_level(logging.ERROR):
        Ledger(in_file(tmp_path / "folder")).append(plan(), drawn())
    assert "not in the usage log" in caplog.text


def test_a_hub_model_of_unknown_licence_counts_as_not_for_commercial_use(tmp_path: Path, miniatures: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An unlisted id, whose files are in the hub's cache: told in what ran, headers and metadata, and refused for commercial=true."""
    snapshot = tmp_path / "models--someone--mini-sd/snapshots" / ("0" * 40)
    shutil.copytree(miniatures["sd15"], snapshot)
    (tmp_path / "models--someone--mini-sd/refs").mkdir()
    (tmp_path / "models--someone--mini-sd/refs/main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings = Settings(models=Models(allow_unlisted=True, default="someone/mini-sd", device="cpu", cpu_threads=1))
    catalogue = Catalogue(settings)
    request = GenerationRequest(prompt="x", seed=1, num_inference_steps=1, width=128, height=128)
    device = Device(settings, catalogue)
    try:
        made = device.submit(catalogue.plan(request, None, "k"), device.fetch(catalogue.find(None))).result(60)
    finally:
        device.queue.close()
    assert made.ran is not None
    headers = answering.describe(made.ran, made.seeds)
    assert (headers["X-Easel-Licence"], headers["X-Easel-Commercial-Use"]) == ("unknown", "not allowed")
    assert "the licence of someone/mini-sd is not known here" in headers["X-Easel-Notes"]
    record = json.loads(metadata.texts(made, 0)["easel"])
    assert (record["licence"], record["commercial_use"]) == ("unknown", False)
    with pytest.raises(Problem, match=r"someone/mini-sd \(unknown\) does not allow commercial use"):
        catalogue.plan(request.model_copy(update={"commercial": True}), None, "k")


def test_every_model_that_is_listed_says_its_licence() -> None:
    listed = yaml.safe_load((ROOT / "configuration.yaml").read_text())
    parts = [part for name in ("catalogue", "controlnets", "ip_adapters") for part in listed["models"][name]]
    parts += [*listed["unidiffuser"]["catalogue"], *listed["animation"]["motion_adapters"]]
    assert not [part["id"] for part in parts if "licence" not in part or "commercial_use" not in part]
    flux = next(part for part in parts if part["id"] == "black-forest-labs/FLUX.1-dev")
    assert (flux["licence"], flux["commercial_use"]) == ("FLUX.1-dev Non-Commercial", False)
