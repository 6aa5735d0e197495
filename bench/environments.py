"""The peers' virtual environments, made on first use under bench/.cache.

Each has the peer's own packages. The others, torch among them, it takes from the environment that the benchmark runs in, by a
.pth file: so every contender computes with the very same torch, diffusers and transformers.
"""

from __future__ import annotations

import site
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parent / ".cache"
TORCH = "2.13.0"
# What pip installs for each; a peer whose packages are listed one by one would otherwise bring a torchvision, torchcodec, librosa and
# the like, which drawing does not touch.
PACKAGES: dict[str, list[str]] = {
    "bentoml": [],  # Easel's own requirement
    "litserve": ["litserve==0.2.19"],
    "hf-serve": ["--no-deps", "hf-serve==0.2.0", "python-magic==0.4.27"],
}


def python(peer: str) -> Path:
    """The interpreter of a peer's environment.

    Raises:
        RuntimeError: where it cannot be made.
    """
    if version("torch").partition("+")[0] != TORCH:
        raise RuntimeError(f"the peers are to have torch {TORCH}, and this environment has {version('torch')}")
    folder = CACHE / "environments" / peer
    made, wanted = folder / "made", repr((PACKAGES[peer], sys.version, sys.prefix))
    interpreter = folder / "bin" / "python"
    if made.exists() and made.read_text() == wanted:
        return interpreter
    _run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder))
    own = next((folder / "lib").glob("python*")) / "site-packages"
    (own / "shared.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    if PACKAGES[peer]:
        _run(str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES[peer])
    made.write_text(wanted)
    return interpreter


def versions(peer: str) -> str:
    """The peer's package and its version, as its environment has them."""
    code = "import sys, importlib.metadata as m; print(m.version(sys.argv[1]), m.version('torch'))"
    done = subprocess.run([str(python(peer)), "-c", code, peer], check=True, capture_output=True, text=True)
    own, torch = done.stdout.split()
    return f"{peer} {own} (torch {torch})"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
