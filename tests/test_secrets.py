"""Secrets from files: as containers mount them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic_settings import SettingsError

from core.settings import Secrets

NAMES = [name.upper() for name in Secrets.model_fields]


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)


@pytest.mark.parametrize("name", NAMES)
def test_every_secret_may_be_in_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("s3cret\n")
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "secret"))
    assert getattr(Secrets(), name.lower()).get_secret_value() == "s3cret"


def test_a_file_comes_before_dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("from-the-file")
    (tmp_path / ".env").write_text("API_KEY=from-dotenv\nADMIN_API_KEY=admin\n")
    monkeypatch.setenv("API_KEY_FILE", str(tmp_path / "secret"))
    found = Secrets(_env_file=tmp_path / ".env")
    assert found.api_key.get_secret_value() == "from-the-file"
    assert found.admin_api_key.get_secret_value() == "admin"


def test_a_secret_given_both_ways_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("x")
    monkeypatch.setenv("HF_TOKEN_FILE", str(tmp_path / "secret"))
    monkeypatch.setenv("HF_TOKEN", "y")
    with pytest.raises((ValueError, SettingsError), match="Both HF_TOKEN and HF_TOKEN_FILE"):
        Secrets()


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"\xff\xfe\x00", "not text")])
def test_a_file_that_cannot_be_read_is_told(content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("ADMIN_API_KEY_FILE", str(path))
    with pytest.raises((ValueError, SettingsError), match=f"ADMIN_API_KEY_FILE: .* cannot be read: .*{reason}"):
        Secrets()
