"""Prove the container without an engine: `make prove-container`, as root, with buildah and debootstrap.

A base image is made from Debian's packages where the one that the Bento's Dockerfile asks for is not
to be had, the CPU image is built on it (deploy/container/build.sh), and the image's own entry point
is started from its root file system: read-only, as the image's user, with its environment, in mount
and process namespaces of its own. The README's example call then has to answer a picture.

Not a container engine: the network is the machine's, and there is no cgroup. Ends within --seconds.
Images and Bento lie in a folder that is removed at the end, unless --keep has them in the machine's own storage.
Exit code 0: proved, 1: failed, 77: this machine cannot (and the reason).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
IMAGE, BASE = "localhost/easel:cpu", "docker.io/library/python:3.11-slim"
SKIPPED = 77
ROOM = 12 * 2**30  # bytes in /var/tmp
DEBIAN, PYPI, PYTORCH = "http://deb.debian.org/debian", "https://pypi.org/simple", "https://download.pytorch.org/whl/cpu"
KEY, ADMIN = "proof-user-key", "proof-admin-key"
CALL = "/post_config?prompt=red+apple&seed=1&num_inference_steps=25"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=1500, help="give up after so long")
    parser.add_argument("--wheels", type=Path, default=_wheels(), help="a folder with torch's CPU wheel, where PyTorch's own index cannot be reached (that of PIP_FIND_LINKS, if it has one)")
    parser.add_argument("--keep", action="store_true", help="take the image that is there, if it is, and leave it there")
    parser.add_argument("--picture", type=Path, default=ROOT / "build/container.png", help="where the picture goes")
    arguments = parser.parse_args()
    if missing := _missing(arguments.wheels):
        print(f"the container is not proved here: {missing}")
        return SKIPPED
    os.environ.setdefault("BUILDAH_ISOLATION", "chroot")
    signal.signal(signal.SIGALRM, _late)
    signal.signal(signal.SIGTERM, _ended)
    signal.alarm(arguments.seconds)
    with contextlib.nullcontext() if arguments.keep else _apart():
        _prove(arguments)
    return 0


def _prove(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    if not (arguments.keep and _there(IMAGE)):
        if not _there(BASE):
            _base()
        _build(arguments.wheels)
    print(f"image ready after {time.monotonic() - began:.0f} s", flush=True)
    container = _run("buildah", "from", "--pull=false", IMAGE)
    try:
        root = Path(_run("buildah", "mount", container))
        config = json.loads(_run("buildah", "inspect", "--type", "image", IMAGE))["Docker"]["config"]
        _serve(root, config, arguments.picture)
    finally:
        _run("buildah", "rm", container)
    print(f"proved in {time.monotonic() - began:.0f} s; the picture is {arguments.picture}")


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Storage for images and Bentos of this run's own, gone after it, however it ends."""
    with tempfile.TemporaryDirectory(prefix="easel-", dir="/var/tmp") as folder:  # not /tmp, which may be in memory
        settings = Path(folder) / "storage.conf"
        settings.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/images"\nrunroot = "{folder}/run"\n')
        os.environ |= {"CONTAINERS_STORAGE_CONF": str(settings), "BENTOML_HOME": f"{folder}/bentoml"}
        try:
            yield
        finally:
            signal.alarm(0)
            _run("buildah", "rm", "--all")  # unmounts what a build that was ended left
            subprocess.run(["umount", f"{folder}/images/overlay"], stderr=subprocess.DEVNULL)


def _wheels() -> Path | None:
    """Where pip finds wheels on this machine, if torch's is among them."""
    folder = Path(os.environ.get("PIP_FIND_LINKS") or "none")
    return folder if any(folder.glob("torch-*+cpu*.whl")) else None


def _missing(wheels: Path | None) -> str | None:
    if os.geteuid() != 0:
        return "not root, which chroot and mounting need"
    for tool in ("buildah", "debootstrap", "unshare", "setpriv"):
        if not shutil.which(tool):
            return f"no {tool} here (Debian: apt-get install buildah debootstrap util-linux)"
    apart = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", "mount -t tmpfs none /mnt && mount -t proc proc /proc"]
    if subprocess.run(apart, capture_output=True).returncode:
        return "root may not mount here, not even in a namespace of its own"
    if (free := shutil.disk_usage("/var/tmp").free) < ROOM:
        return f"/var/tmp has {free / 2**30:.0f} GiB free, and the images take up to {ROOM / 2**30:.0f}"
    for place in (f"{DEBIAN}/dists/bookworm/Release", f"{PYPI}/bentoml/", *([] if wheels else [f"{PYTORCH}/torch/"])):
        try:
            urllib.request.urlopen(place, timeout=20).close()
        except OSError as error:
            return f"{place} is not to be reached ({error})"
    return None


def _there(image: str) -> bool:
    return subprocess.run(["buildah", "inspect", "--type", "image", image], capture_output=True).returncode == 0


def _base() -> None:
    """Debian with its Python 3.11 under the name of the official image, which has much the same."""
    with tempfile.TemporaryDirectory(prefix="easel-base-") as folder:
        root = Path(folder) / "root"
        # In mounts of its own, since it mounts /proc in there and leaves it where it is ended.
        _whole("unshare", "--mount", "debootstrap", "--variant=minbase", "--include=python3,python3-pip,python3-venv,ca-certificates", "bookworm", str(root), DEBIAN)
        (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()  # the official image's Python is nobody else's
        shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs/ca-certificates.crt")
        for rubbish in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / rubbish)
            (root / rubbish).mkdir()
        container = _run("buildah", "from", "scratch")
        _run("buildah", "copy", "-q", container, str(root), "/")
    certificates = "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"
    _run("buildah", "config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "--env", certificates, "--cmd", "python3", container)
    _run("buildah", "commit", "-q", "--rm", container, BASE)


def _build(wheels: Path | None) -> None:
    _whole(str(ROOT / "deploy/container/build.sh"), "cpu", **({"WHEELS": str(wheels)} if wheels else {}))


def _whole(*command: str, **environment: str) -> None:
    """Run a command; all that it started ends with it."""
    process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
    try:
        if code := process.wait():
            raise SystemExit(f"{' '.join(command[:3])} failed with {code}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _serve(root: Path, config: dict[str, Any], picture: Path) -> None:
    """Start the image as a runtime would, call it, stop it."""
    with tempfile.TemporaryDirectory(prefix="easel-proof-") as folder:
        data, secrets, log = Path(folder) / "data", Path(folder) / "secrets", Path(folder) / "log"
        data.mkdir()
        uid, _, gid = config["User"].partition(":")
        os.chown(data, int(uid), int(gid))
        secrets.mkdir()
        hosts = Path(folder) / "hosts"
        hosts.write_text("127.0.0.1 localhost\n")
        os.chmod(folder, 0o755)
        for name, value in (("api_key", KEY), ("admin_api_key", ADMIN)):
            (secrets / name).write_text(value + "\n")
        port = _free_port()
        environment = [
            *config["Env"], "API_KEY_FILE=/run/secrets/api_key", "ADMIN_API_KEY_FILE=/run/secrets/admin_api_key",
            f"EASEL_SERVER__PORT={port}", "EASEL_SERVER__HOST=127.0.0.1", "EASEL_MODELS__CPU_THREADS=1", "EASEL_UNIDIFFUSER__CPU_THREADS=1",
        ]  # fmt: skip
        command = ["env", "-i", *environment, *config["Entrypoint"], *config["Cmd"]]
        inside = ["chroot", f"--userspec={uid}:{gid}", "--groups=", str(root), "sh", "-c", f'cd {config["WorkingDir"]} && exec "$@"', "sh", *command]
        mounts = f"""
            set -e
            mount --rbind {root} {root}
            mkdir -p {root}/run/secrets {root}/data
            mount --bind {data} {root}/data
            mount --bind {secrets} {root}/run/secrets
            touch {root}/etc/hosts
            mount --bind {hosts} {root}/etc/hosts
            mount -t tmpfs -o mode=1777 tmpfs {root}/tmp
            mount -t proc proc {root}/proc
            mount --rbind /dev {root}/dev
            mount -o remount,ro,bind {root}
            mount -o remount,ro,bind {root}/run/secrets
            exec "$@"
        """
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "sh", "-c", mounts, "sh", *inside],
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            _check(f"http://127.0.0.1:{port}", process, root, config, port, data, picture)
        except BaseException:
            print(log.read_text(errors="replace")[-4000:])
            raise
        finally:
            _stop(process)


def _check(url: str, process: subprocess.Popen[bytes], root: Path, config: dict[str, Any], port: int, data: Path, picture: Path) -> None:
    end = time.monotonic() + 240
    while True:
        try:
            status, _ = _get(url + "/readyz")
            if status == 200:
                break
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError("not ready within 240 s")
        time.sleep(0.5)
    print("ready")
    server = _server(process.pid)
    status = Path(f"/proc/{server}/status").read_text()
    assert f"Uid:\t{config['User'].partition(':')[0]}\t" in status, "runs as the image's user"
    for place in ("/home/bentoml/bento/src/x", "/app/x", "/x"):
        command = ["nsenter", f"--target={server}", "--mount", "--root", "touch", place]
        assert b"Read-only file system" in subprocess.run(command, capture_output=True).stderr, f"{place} is read-only, even for root"
    status_code, body = _get(url + CALL, method="POST")
    assert status_code == 401, "no key, no picture"
    status_code, body = _get(url + CALL, method="POST", key=KEY)
    assert status_code == 200, body[:500]
    drawn = Image.open(io.BytesIO(body))
    assert drawn.size == (64, 64), "the starter's size"
    reds = sum(1 for r, g, b in drawn.convert("RGB").get_flattened_data() if r > 150 and g < 110 and b < 110)
    assert reds > 300, "a red apple is red"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(body)
    status_code, loras = _get(url + "/get_available_loras", key=KEY)
    assert status_code == 200, loras[:500]
    assert b"pixel_art_style" in loras, "the volume's registry was laid out"
    status_code, body = _get(url + CALL + "&lora=pixel_art_style", method="POST", key=KEY)
    assert status_code == 200, body[:500]
    command = ["nsenter", f"--target={server}", "--mount", "--root", "env", "-i", f"EASEL_SERVER__PORT={port}", "/app/.venv/bin/python", *config["Healthcheck"]["Test"][2:]]
    assert subprocess.run(command).returncode == 0, "the health check agrees"
    written = sorted(str(p.relative_to(data)) for p in data.rglob("*") if p.is_file())
    print(f"in the volume: {', '.join(written)}")
    assert {"usage.sqlite3", "lora_list.json"} <= set(written)


def _get(url: str, method: str = "GET", key: str | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, method=method, headers={"X-API-Key": key} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(answer.status), bytes(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def _server(outer: int) -> int:
    """The entry point's process: the child of `unshare`."""
    return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the entry point, as `docker stop` sends it; it has to end in time by itself."""
    if process.poll() is not None:
        return
    began = time.monotonic()
    try:
        os.kill(_server(process.pid), signal.SIGTERM)
        process.wait(45)
        print(f"ended {time.monotonic() - began:.1f} s after SIGTERM")
    except (subprocess.TimeoutExpired, IndexError, ProcessLookupError):
        process.kill()
        process.wait()
        raise AssertionError("it did not end within 45 s of SIGTERM") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}")
    return done.stdout.strip()


def _late(*_: object) -> None:
    raise SystemExit("not proved in time")


def _ended(*_: object) -> None:
    raise SystemExit("ended before it was proved")


if __name__ == "__main__":
    sys.exit(main())
