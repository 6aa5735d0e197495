"""The registry's file: the seed's schema, hand edits, broken files, and writers beside each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.loras import Lora, Registry
from core.loras.registry import SCHEMA_VERSION, is_name
from core.problems import Problem
from core.settings import ROOT

SEED = """{
  "model_name": {
    "model_id": 123456,
    "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
    "lora_path": "https://civitai.com/api/download/models/777",
    "trigger words": ["keyword1", "keyword2"],
    "allow_no_mention": true,
    "usage_rights": "AllowCommercialUse"
  }
}
"""
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    (tmp_path / "lora_list.json").write_text(SEED)
    return Registry(tmp_path / "lora_list.json", tmp_path / "loras")


def lora(name: str, **fields: object) -> Lora:
    return Lora.model_validate({"name": name, "base_model": SDXL, "lora_path": "https://x.example/y", **fields})


def test_the_seeds_file_is_read_and_stays_readable_by_the_seeds_readers(registry: Registry) -> None:
    found = registry.find("model_name")
    assert (found.model_id, found.trigger_words, found.allow_no_mention, found.commercial_use) == (123456, ("keyword1", "keyword2"), True, True)
    assert registry.file(found) == registry.folder / "civitai-777.safetensors"
    before = json.loads(SEED)["model_name"]
    registry.put(lora("other", version_id=5, sha256="a" * 64))
    content = json.loads(registry.path.read_text())
    assert content["model_name"] == before
    assert set(before) <= set(content["other"])
    assert content["other"]["trigger words"] == []
    assert content["other"]["model_id"] is None


def test_an_entry_says_which_schema_it_has_and_a_later_one_is_refused(registry: Registry) -> None:
    registry.put(lora("other"))
    content = json.loads(registry.path.read_text())
    assert "schema_version" not in content["model_name"]
    assert content["other"]["schema_version"] == SCHEMA_VERSION
    registry.change("model_name", nsfw=True)
    assert json.loads(registry.path.read_text())["model_name"]["schema_version"] == SCHEMA_VERSION
    assert set(registry.entries()) == {"model_name", "other"}
    content = json.loads(registry.path.read_text())
    content["later"] = content["other"] | {"schema_version": SCHEMA_VERSION + 1}
    registry.path.write_text(json.dumps(content))
    assert set(registry.entries()) == {"model_name", "other"}
    assert f"'later': schema_version: {SCHEMA_VERSION + 1} is a later Easel's; this one reads up to {SCHEMA_VERSION}" in (registry.warning or "")
    with pytest.raises(Problem, match="a later Easel's"):
        registry.put(lora("more"))
    assert json.loads(registry.path.read_text()) == content


def test_a_local_entry_is_found_beside_the_registry(registry: Registry) -> None:
    registry.put(lora("mine", lora_path="kept/mine.safetensors"))
    assert registry.file(registry.find("mine")) == registry.path.parent / "kept/mine.safetensors"


def test_the_starters_entries_are_found_where_the_registry_is_kept_elsewhere(tmp_path: Path) -> None:
    elsewhere = Registry(tmp_path / "lora_list.json", tmp_path / "loras")
    elsewhere.path.write_text((ROOT / "lora_list.json").read_text())
    for lora in elsewhere.entries().values():
        assert elsewhere.file(lora) == ROOT / lora.lora_path
        assert elsewhere.file(lora).is_file()


def test_hand_edits_are_seen_by_every_reader_without_a_restart(registry: Registry) -> None:
    other = Registry(registry.path, registry.folder)
    assert set(other.entries()) == {"model_name"}
    registry.path.write_text(SEED.replace("model_name", "renamed___"))  # the same size
    assert set(registry.entries()) == set(other.entries()) == {"renamed___"}


def test_fields_that_others_wrote_are_kept(registry: Registry) -> None:
    registry.path.write_text(SEED.replace('"model_id"', '"my_note": {"a": 1}, "model_id"'))
    registry.change("model_name", trigger_words=["new"])
    entry = json.loads(registry.path.read_text())["model_name"]
    assert entry["my_note"] == {"a": 1}
    assert entry["trigger words"] == ["new"]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        (SEED.replace("true,", "true"), "line 8, column 5", "delimiter"),
        (SEED.replace('"base_model"', '"base"'), "line 2, column 3", "base_model"),
        ('{"a": 1}', "line 1, column 2", "must be a JSON object"),
        ("[]", "line 1, column 1", "must be a JSON object"),
        ("", "line 1, column 1", "Expecting value"),
        (SEED.rstrip()[:-1] + "," + SEED[1:], "line 11, column 3", "second time"),
        (SEED.replace("model_name", "a:b"), "line 2, column 3", "cannot name a LoRA"),
        (SEED.replace('"model_id"', '"file_name": "../x.safetensors", "model_id"'), "line 2, column 3", "file_name"),
        ("[" * 100_000, "line 1, column 1", "nested"),
    ],
)
def test_a_broken_file_is_refused_with_its_place_and_the_last_good_one_stays(registry: Registry, text: str, where: str, what: str) -> None:
    assert registry.warning is None
    registry.path.write_text(text)
    assert set(registry.entries()) == {"model_name"}
    assert where in registry.warning
    assert what in registry.warning
    with pytest.raises(Problem) as refused:
        registry.put(lora("b"))
    assert refused.value.details.status == 409
    assert where in refused.value.details.detail
    assert registry.path.read_text() == text
    registry.path.write_text(SEED)
    assert registry.warning is None
    registry.put(lora("b"))


def test_not_utf_8_is_refused_with_its_place(registry: Registry) -> None:
    registry.entries()
    registry.path.write_bytes(b'{\n"\xff": {}}')
    assert "line 2, column 2" in registry.warning
    assert set(registry.entries()) == {"model_name"}


def test_writing_keeps_the_mode_and_the_link_and_leaves_nothing_beside(registry: Registry) -> None:
    real = registry.path.parent / "elsewhere" / "real.json"
    real.parent.mkdir()
    registry.path.rename(real)
    real.chmod(0o640)
    registry.path.symlink_to(real)
    registry.put(lora("b"))
    assert registry.path.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert os.listdir(real.parent) == ["real.json"]
    assert sorted(os.listdir(registry.path.parent)) == ["elsewhere", "lora_list.json"]


def test_a_name_that_is_taken_is_refused(registry: Registry) -> None:
    with pytest.raises(Problem) as refused:
        registry.put(lora("model_name"))
    assert refused.value.details.status == 409
    assert registry.path.read_text() == SEED


ADD = """
import sys
from pathlib import Path
from core.loras import Lora, Registry
registry = Registry(Path(sys.argv[1]), Path(sys.argv[1]).parent)
for i in range(25):
    registry.put(Lora(name=f"{sys.argv[2]}-{i}", base_model="x/y", lora_path="z"))
    assert len(registry.entries()) >= i + 1
"""


def test_two_processes_that_add_at_once_lose_nothing(registry: Registry) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", ADD, str(registry.path), who], cwd=ROOT) for who in ("ann", "bob")]
    while any(p.poll() is None for p in processes):
        assert registry.warning is None  # a reader never sees half a file
    assert [p.returncode for p in processes] == [0, 0]
    assert len(registry.entries()) == 51
    assert os.listdir(registry.path.parent) == ["lora_list.json"]


@pytest.mark.parametrize("name", ["pixel_art_style", "Ghibli Style v2 (XL)", "ümlaut", "日本", "a", "x" * 100, "a.b-c+d'e"])
def test_names_that_may_be(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", " a", "a ", "a:b", "a,b", "<a", "a>", "a/b", "a\\b", "..", ".", ".a", 'a"b', "a\nb", "a\x00", "x" * 101, "a\u202eb", "a\x85"])
def test_names_that_may_not_be(name: str) -> None:
    assert not is_name(name)
