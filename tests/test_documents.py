"""The README and configuration.yaml name every setting there is."""

from __future__ import annotations

import pytest
import yaml
from pydantic import BaseModel

from core.model_settings import Model
from core.settings import ROOT, Settings

SETTINGS = [f"{section}.{name}" for section, field in Settings.model_fields.items() if issubclass(field.annotation, BaseModel) for name in field.annotation.model_fields]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_documented(setting: str) -> None:
    section, name = setting.split(".")
    assert name in yaml.safe_load((ROOT / "configuration.yaml").read_text())[section]
    assert setting in (ROOT / "README.md").read_text()


def test_every_key_of_a_catalogue_entry_is_documented() -> None:
    text = (ROOT / "configuration.yaml").read_text()
    assert not [name for name in Model.model_fields if name not in text]
