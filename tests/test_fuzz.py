"""Some hundred of the inputs that `make fuzz` tries on the picture decoder, and what fuzzing has found."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from PIL import Image

from core.settings import ROOT
from tests.conftest import Server
from tests.fuzz import pictures
from tests.test_http import problem
from tests.test_images import saved


def test_mutated_pictures_are_taken_or_refused() -> None:
    files, chance = pictures.corpus(), random.Random(2)
    outcomes = {pictures.tried(pictures.mutated(files, chance)) for _ in range(300)}
    assert "picture" in outcomes
    assert outcomes & {"415", "422"}


def test_every_file_of_the_corpus_is_a_picture() -> None:
    assert [pictures.tried(data) for data in pictures.corpus()] == ["picture"] * len(pictures.corpus())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_the_largest_picture_takes_no_more_than_512_mib(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(saved(Image.new(mode, (7000, 7000)), "PNG", **({"transparency": 0} if mode == "P" else {})))
    code = f"from tests.fuzz import pictures; b = pictures.peak(); pictures.images.decode(open({str(path)!r}, 'rb').read(), pictures.LIMITS); print((pictures.peak() - b) // pictures.MEBIBYTE)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 512


@pytest.mark.http
def test_health_takes_no_method_that_it_does_not_name(server: Server) -> None:
    for path in ("/livez", "/healthz", "/readyz"):
        for method in ("TRACE", "POST", "DELETE"):
            response = requests.request(method, server.url + path, timeout=10)
            assert "GET" in problem(response, 405)["detail"]
            assert response.headers["allow"] == "GET, HEAD"
