"""The commands. Each does one thing that a server has a route for, and prints it for people, or with --json for programs."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.progress import DownloadColumn, MofNCompleteColumn, TransferSpeedColumn

from cli import bench as measuring
from cli import saving, showing
from cli.server import ACTIVE, Json, Refused, Server, line

POLL_S = 0.5
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_output = click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("."), help="A folder, or a picture's file. Nothing is written over.")
_file = click.Path(exists=True, dir_okay=False, path_type=Path)


class Commands(click.Group):
    """Says what a server refused in one line, and exits with 1; with 130 when interrupted."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (Refused, OSError) as error:
            showing.ERR.print(f"easel: {error}")
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--url", envvar="EASEL_URL", default="http://127.0.0.1:3000", show_default=True, help="The server; or EASEL_URL.")
@click.pass_context
def main(context: click.Context, url: str) -> None:
    """Pictures and captions from an Easel server. The key is EASEL_API_KEY, or the server's own API_KEY and
    ADMIN_API_KEY, in the environment or in .env here."""
    context.obj = Server(url)


def _drawing(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a request for pictures."""
    options = [
        click.option("--negative-prompt"),
        click.option("-m", "--model-id"),
        click.option("--steps", "--num-inference-steps", "num_inference_steps", type=int),
        click.option("--guidance-scale", type=float),
        click.option("--scheduler"),
        click.option("--width", type=int),
        click.option("--height", type=int),
        click.option("--seed", type=int, help="Of the first picture; random if left out."),
        click.option("--lora", help="By name, with weights: a:0.6,b"),
        click.option("-p", "--parameter", "more", multiple=True, metavar="NAME=VALUE", help="Any other parameter of POST /post_config. May be repeated."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("prompt")
@click.option("-n", "--count-returned", type=int, help="How many pictures.")
@_drawing
@click.option("--image", type=_file, help="Start from this picture.")
@click.option("--mask", type=_file, help="Repaint what is white in it.")
@click.option("--strength", type=float, help="With an image: 0 keeps it, 1 redraws it.")
@click.option("--file", "files", multiple=True, metavar="NAME=PATH", help="Another file: control_image, ip_adapter_image. May be repeated.")
@click.option("--format", type=click.Choice(["png", "jpeg", "webp"]))
@_output
@_json
@click.pass_obj
def generate(server: Server, /, output: Path, as_json: bool, image: Path | None, mask: Path | None, files: tuple[str, ...], **values: Any) -> None:
    """Draw pictures, and save them with their metadata. Ctrl+C cancels the work."""
    fields = _fields(values)
    if format := saving.FORMATS.get(output.suffix.lower()):
        fields.setdefault("format", format)
    named = [(name, Path(path)) for name, path in _pairs(files, "--file")]
    sent = [(name, path) for name, path in (("image", image), ("mask", mask), *named) if path]
    job = _made(server, fields, sent)
    _save(server, job, output, [f"{saving.slug(values['prompt'])}-{o['seed']}" for o in job["outputs"]], as_json)


@main.command()
@click.argument("pictures", nargs=-1, required=True, type=_file)
@click.option("-n", "--count-returned", type=int, help="How many captions of each.")
@click.option("--seed", type=int)
@_json
@click.pass_obj
def caption(server: Server, /, pictures: tuple[Path, ...], as_json: bool, **values: Any) -> None:
    """Say what pictures show."""
    job = _made(server, {"task": "caption", **_fields(values)}, [("image", path) for path in pictures])
    made = server.get(job["urls"]["result"])["captions"]
    if as_json:
        showing.as_json([{"file": str(path), "captions": texts} for path, texts in zip(pictures, made, strict=True)])
        return
    for path, texts in zip(pictures, made, strict=True):
        for text in texts:
            showing.OUT.print(f"{path}: {text}" if len(pictures) > 1 else text)


@main.group()
def loras() -> None:
    """The LoRAs: list, add, remove (the last two with an admin key)."""


@loras.command("list")
@_json
@click.pass_obj
def list_loras(server: Server, /, as_json: bool) -> None:
    """Every LoRA, with its trigger words."""
    listing = server.get("/get_available_loras")
    if as_json:
        showing.as_json(listing)
        return
    if listing["warning"]:
        showing.ERR.print(f"easel: {listing['warning']}")
    showing.table(("name", "base model", "trigger words"), ((name, lora.get("base_model"), ", ".join(lora.get("trigger words") or [])) for name, lora in listing["loras"].items()))


@loras.command("add")
@click.argument("source")
@click.option("--hub", is_flag=True, help="SOURCE is a repository of the Hugging Face hub: OWNER/NAME.")
@click.option("--filename", help="Of several in that repository.")
@click.option("--name", help="What to call it here.")
@click.option("--base-model", help="What it is for; needed for a file.")
@click.option("--trigger-word", "trigger_words", multiple=True, help="May be repeated.")
@_json
@click.pass_obj
def add_lora(server: Server, /, source: str, hub: bool, filename: str | None, trigger_words: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """Add a LoRA: SOURCE is a .safetensors file here, a Civitai name, id, MODEL@VERSION or page, or with --hub a repository."""
    fields = _fields(values)
    path = Path(source)
    if not hub and path.suffix == ".safetensors" and path.is_file():
        fields |= {"name": fields.get("name", path.stem)} | ({"trigger_words": ",".join(trigger_words)} if trigger_words else {})
        with path.open("rb") as file:
            added = server.call("POST", "/admin/loras/upload", "admin", data=fields, files={"file": (path.name, file)}, timeout=None).json()
    else:
        origin = {"repo_id": source} | ({"filename": filename} if filename else {}) if hub else source
        body = {"source": origin, **fields} | ({"trigger_words": list(trigger_words)} if trigger_words else {})
        added = _downloaded(server, server.call("POST", "/admin/loras", "admin", json=body, params={"wait": "false"}).json())
    showing.as_json(added) if as_json else showing.OUT.print(added["message"])


@loras.command("remove")
@click.argument("name")
@_json
@click.pass_obj
def remove_lora(server: Server, /, name: str, as_json: bool) -> None:
    """Remove a LoRA, and its weights where Easel downloaded them."""
    removed = server.call("POST", "/remove_lora", "admin", json={"name": name}).json()
    showing.as_json(removed) if as_json else showing.OUT.print(f"{removed['name']} is removed" + (", its file too." if removed["file_deleted"] else "; its file is left."))


@main.group()
def jobs() -> None:
    """One's own jobs: list, show, cancel, result."""


@jobs.command("list")
@click.option("--status", help="Only those.")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@_json
@click.pass_obj
def list_jobs(server: Server, /, status: str | None, limit: int, as_json: bool) -> None:
    """The newest jobs."""
    found = server.get("/jobs", params=_fields({"status": status, "limit": limit}))
    showing.as_json(found) if as_json else showing.table(("id", "task", "status", "done", "created"), map(_row, found["jobs"]))


@jobs.command()
@click.argument("id")
@_json
@click.pass_obj
def show(server: Server, /, id: str, as_json: bool) -> None:
    """How a job is."""
    _tell(server.get(f"/jobs/{id}"), as_json)


@jobs.command()
@click.argument("id")
@_json
@click.pass_obj
def cancel(server: Server, /, id: str, as_json: bool) -> None:
    """Cancel a job."""
    _tell(server.call("DELETE", f"/jobs/{id}").json(), as_json)


@jobs.command()
@click.argument("id")
@_output
@_json
@click.pass_obj
def result(server: Server, /, id: str, output: Path, as_json: bool) -> None:
    """Wait for a job, and save what it made. Ctrl+C leaves the job as it is."""
    job = server.done(_followed(server, server.get(f"/jobs/{id}")))
    _save(server, job, output, [f"{id}-{o['index']}" for o in job["outputs"]], as_json)


@main.command()
@_json
@click.pass_obj
def status(server: Server, /, as_json: bool) -> None:
    """The runners, their queues, and the models in their memory."""
    found = server.get("/buffer_status")
    if as_json:
        showing.as_json(found)
        return
    for runner in found["runners"]:
        if "problem" in runner:
            showing.OUT.print(f"{runner['service']}: {line(runner['problem'])}")
            continue
        queue = runner["queue"]
        state = "shuts down" if runner["draining"] else "ready" if runner["ready"] else "not ready"
        memory = f"{showing.size(runner['resident_bytes'])} of {showing.size(runner['memory_budget_bytes'])}"
        showing.OUT.print(f"{runner['service']}: {state}, {runner['device']}, {memory}; {queue['running']} running, {queue['waiting']} of {queue['limit']} waiting")
        showing.table(("  model", "state", "memory"), ((f"  {m['model_id']}", m["state"], showing.size(m["resident_bytes"])) for m in runner["models"]))


@main.command()
@click.argument("prompt", default="red apple")
@click.option("-n", "--requests", type=click.IntRange(1), default=32, show_default=True)
@click.option("-c", "--clients", type=click.IntRange(1), default=4, show_default=True, help="How many at once.")
@_drawing
@_json
@click.pass_obj
def bench(server: Server, /, requests: int, clients: int, as_json: bool, **values: Any) -> None:
    """Measure pictures a second and latencies; a first request, not counted, loads the model. Counts against the key's quotas."""
    with showing.bar(MofNCompleteColumn()) as progress:
        shown = progress.add_task("requests", total=requests)
        measured = measuring.run(server.url, server.headers("user"), _fields(values), requests, clients, lambda: progress.advance(shown))
    if as_json:
        showing.as_json(measured)
    else:
        showing.OUT.print(f"{measured['pictures']} pictures in {measured['seconds']:.2f} s: {measured['pictures_per_s']:.2f} a second; p50 {measured['p50_s']} s, p95 {measured['p95_s']} s")
        for text, count in measured["refused"].items():
            showing.OUT.print(f"{count} refused: {text}")
    if measured["refused"]:
        sys.exit(1)


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """What was given of a request, with what --parameter names."""
    more = dict(_pairs(values.pop("more", ()), "--parameter"))
    return {name: value for name, value in values.items() if value is not None} | more


def _pairs(texts: tuple[str, ...], option: str) -> list[tuple[str, str]]:
    for text in texts:
        if "=" not in text:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint=option)
    return [(name, value) for name, _, value in (text.partition("=") for text in texts)]


def _made(server: Server, fields: Json, files: list[tuple[str, Path]]) -> Json:
    """A job that is submitted here and has succeeded; it ends with this process."""
    with contextlib.ExitStack() as opened:
        sent = [(name, (path.name, opened.enter_context(path.open("rb")))) for name, path in files]
        job = server.call("POST", "/jobs", data=fields, files=sent or None).json()
    try:
        return server.done(_followed(server, job))
    except KeyboardInterrupt:
        server.call("DELETE", job["urls"]["cancel"])
        showing.ERR.print(f"easel: {job['id']} is cancelled.")
        raise


def _followed(server: Server, job: Json) -> Json:
    """A job once it is over, its progress shown meanwhile."""
    with showing.bar(MofNCompleteColumn()) as progress:
        shown = progress.add_task(job["status"], total=None)
        for now in server.follow(job):
            job = now
            place = f" ({job['queue_position']})" if job["queue_position"] else ""
            progress.update(shown, description=job["status"] + place, completed=job["progress"]["step"], total=job["progress"]["steps"])
    return job


def _downloaded(server: Server, adding: Json) -> Json:
    """The outcome of adding a LoRA, its progress shown meanwhile."""
    if "status" not in adding:  # it was there already
        return adding
    with showing.bar(DownloadColumn(), TransferSpeedColumn()) as progress:
        shown = progress.add_task(adding["source"], total=None)
        while adding["status"] in ACTIVE:
            time.sleep(POLL_S)
            adding = server.get(f"/admin/loras/jobs/{adding['id']}", "admin")
            progress.update(shown, completed=adding["progress"]["bytes"], total=adding["progress"]["total_bytes"])
    if adding["status"] != "succeeded":
        raise Refused(line(adding["error"]) if adding["error"] else f"{adding['source']}: {adding['status']}", adding["error"])
    return dict(adding["result"])


def _save(server: Server, job: Json, output: Path, stems: list[str], as_json: bool) -> None:
    """Write what a job made, each thing as the server sends it, and print the paths; what the server notes goes to stderr.
    `output` is a picture's file, or the folder for files of the names `stems`."""
    folder = output
    if output.suffix.lower() in saving.FORMATS:
        folder, stems = output.parent, [output.stem] * len(stems)
    paths, notes = [], dict[str, None]()
    for made, stem in zip(job["outputs"], stems, strict=True):
        answer = server.call("GET", made["url"])
        kind = answer.headers["content-type"].split(";")[0]
        paths.append(saving.save(folder, stem, saving.SUFFIXES.get(kind, ".bin"), answer.content))
        notes |= dict.fromkeys(filter(None, answer.headers.get("x-easel-notes", "").split("; ")))
    for note in notes:
        showing.ERR.print(f"note: {note}")
    if as_json:
        showing.as_json({**job, "files": [str(path) for path in paths]})
    else:
        for path in paths:
            showing.OUT.print(str(path))


def _tell(job: Json, as_json: bool) -> None:
    if as_json:
        showing.as_json(job)
    else:
        showing.table(("id", "task", "status", "done", "created"), [_row(job)])
        if job["error"]:
            showing.OUT.print(line(job["error"]))


def _row(job: Json) -> Iterator[object]:
    yield from (job["id"], job["task"], job["status"], f"{job['progress']['value']:.0%}", job["created_at"][:19].replace("T", " "))
