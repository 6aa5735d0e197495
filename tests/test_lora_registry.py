"""The registry's file: the seed's schema, hand edits, broken files, and writers beside each other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse

from core.loras import Lora, Registry, keeping
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
        (SEED.replace("123456", "9" * 5000), "line 1, column 1", "cannot be read"),
        (SEED.replace("keyword1", "\\ud800"), "line 2, column 3", "half a character"),
        (SEED.replace("123456", "NaN"), "line 2, column 3", "model_id"),
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


TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
JSONS = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2), max_leaves=4)
ENTRIES = st.fixed_dictionaries(
    {"name": TEXTS.filter(is_name), "base_model": TEXTS, "lora_path": TEXTS, "trigger_words": st.lists(TEXTS, max_size=3).map(tuple)},
    optional={"model_id": st.integers(), "usage_rights": TEXTS | st.lists(TEXTS, max_size=2), "creator": TEXTS, "nsfw": st.booleans(), "kind": st.sampled_from(["lora", "embedding"]), "sha256": st.from_regex("[0-9a-f]{64}", fullmatch=True), "note of others": JSONS},
).map(Lora.model_validate)


@given(st.lists(ENTRIES, max_size=4, unique_by=lambda lora: lora.name))
@settings(deadline=None, max_examples=50)
def test_whatever_is_written_is_read_back(entries: list[Lora]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(Path(folder) / "lora_list.json", Path(folder))
        for entry in entries:
            registry.put(entry)
        again = Registry(registry.path, registry.folder)
        assert [lora.entry() for lora in again.entries().values()] == [lora.entry() for lora in entries]
        assert (list(again.entries()), again.warning) == ([lora.name for lora in entries], None)


EDITED = st.recursive(
    st.sampled_from(["null", "true", "1", "NaN", "-Infinity", "1e999", "9" * 5000, '"a"', '"\\ud800"', '"../x.safetensors"', '"' + "a" * 64 + '"', "", "x", '"']),
    lambda inner: st.lists(inner, max_size=2).map(lambda some: f"[{','.join(some)}]") | st.dictionaries(st.sampled_from(["a", "b:c", "base_model", "lora_path", "trigger words", "file_name", "schema_version", "usage_rights", "\\udc00", "creator"]), inner, max_size=6).map(lambda some: "{" + ",".join(f'"{name}": {value}' for name, value in some.items()) + "}"),
    max_leaves=12,
)  # fmt: skip


@given(EDITED | st.dictionaries(st.sampled_from(["a", "b"]), EDITED).map(lambda some: "{" + ",".join(f'"{name}": {{"base_model": "b", "lora_path": "p", "more": {value}}}' for name, value in some.items()) + "}") | st.text())
@settings(deadline=None, max_examples=200)
def test_a_hand_edited_file_is_read_or_its_fault_is_told(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(Path(folder) / "lora_list.json", Path(folder))
        registry.path.write_text(text, "utf-8")
        listed = JSONResponse(keeping.listing(registry).model_dump()).body  # that GET /get_available_loras answers
        if registry.warning:
            assert registry.entries() == {}
            assert re.search(r"line \d+, column \d+", registry.warning)
        else:
            assert set(json.loads(listed)["loras"]) == set(registry.of_kind("lora"))
        try:
            registry.put(lora("other"))
        except Problem as problem:
            assert (problem.details.status, bool(registry.warning)) == (409, True)
        else:
            assert "other" in registry.entries()
