"""Dynamic prompts: `{a|b}`, `{2$$a|b|c}`, `${name=...}` and wildcards `__colour__`, by the dynamicprompts library.

What stands here are the bounds: only names of files in one folder can be asked for, a seed always makes
the same choices, and a template that would grow without end is refused. core.wording calls it.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from random import Random

from dynamicprompts.commands import Command, LiteralCommand, WildcardCommand
from dynamicprompts.enums import SamplingMethod
from dynamicprompts.parser.parse import parse
from dynamicprompts.samplers.random import RandomSampler
from dynamicprompts.sampling_context import SamplingContext
from dynamicprompts.types import ResultGen
from dynamicprompts.wildcards import WildcardManager
from dynamicprompts.wildcards.collection.list import ListWildcardCollection
from dynamicprompts.wildcards.collection.structured import parse_structured_file
from dynamicprompts.wildcards.item import WildcardItem
from dynamicprompts.wildcards.values import WildcardValues
from pyparsing import ParseException

from core.problems import nearest

log = logging.getLogger("easel.wildcards")
logging.getLogger("dynamicprompts").setLevel(logging.ERROR)  # what it warns of is refused here
warnings.filterwarnings("ignore", module="dynamicprompts")
MARKS = 400  # of `{ | } __ $ %` in one template: the library's parser takes a millisecond for each
PARTS = 2_000  # that a template may have once its choices are made
DEPTH = 20  # of wildcards within wildcards
FILES, FILE_BYTES = 5_000, 1024 * 1024
_STRUCTURED = (".yaml", ".json")
Options = dict[str, list[str | WildcardItem]]  # by a wildcard's name; an item has a weight


class Refused(ValueError):
    """Why a template cannot be expanded; `known` are the names that there are, where one was unknown."""

    def __init__(self, message: str, known: list[str] | None = None) -> None:
        super().__init__(message)
        self.known = known


class Wildcards:
    """The wildcards of a folder (None: none): NAME.txt with an option a line, or YAML and JSON as the
    library reads them. Edits are seen at the next request."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._read: tuple[object, Options, list[str]] = (None, {}, [])
        self._lock = threading.Lock()  # the parser is one for all threads

    @property
    def warnings(self) -> list[str]:
        """What is wrong with files as they are now; they are left out."""
        self.entries()
        return self._read[2]

    def entries(self) -> Options:
        """Every wildcard's options by its name (`animals/cats` for a file in a folder)."""
        found = sorted(_files(self.folder)) if self.folder else []
        if found != self._read[0]:
            options: Options = {}
            wrong = []
            for file, _, size in found[:FILES]:
                try:
                    options |= self._options(Path(file), size)
                except Exception as error:  # of YAML's and JSON's parsers too
                    wrong.append(f"{file} is left out: {' '.join(str(error).split())[:200]}")
            if len(found) > FILES:
                wrong.append(f"{self.folder} has more than {FILES} files; the others are left out")
            for warning in wrong:
                log.warning("%s", warning)
            self._read = (found, dict(sorted(options.items())), wrong)
        return self._read[1]

    def expand(self, template: str, seeds: Iterable[int], longest: int) -> list[str]:
        """A text for each seed, by choices that depend on the seed alone.

        Args:
            longest: characters that a text may have.

        Raises:
            Refused: for a template that cannot be read, names what there is not, or grows too far.
        """
        if (marks := _marks(template)) > MARKS:
            raise Refused(f"has {marks} of the marks {{ | }} $ % __; dynamic prompts may have {MARKS}")
        folder = _Folder(self.entries())
        with self._lock:
            try:
                command = parse(template)
                return [_sample(command, folder, seed, longest) for seed in seeds]
            except Refused:
                raise
            except ParseException as error:
                raise Refused(f"cannot be read from character {error.loc + 1} on ({template[error.loc : error.loc + 20]!r})") from None
            except RecursionError:
                raise Refused("is nested too deeply") from None
            except (KeyError, ValueError, RuntimeError) as error:
                raise Refused(f"cannot be expanded: {str(error.args[0] if error.args else error)[:200]}") from None

    def _options(self, file: Path, size: int) -> Options:
        assert self.folder is not None
        if size > FILE_BYTES:
            raise ValueError(f"it has more than {FILE_BYTES} bytes")
        if not file.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError("it leads out of the folder")
        name = file.relative_to(self.folder).with_suffix("").as_posix()
        if file.suffix == ".txt":
            lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
            found: Options = {name: [line for line in lines if line and not line.startswith("#")]}
        else:
            parent = name.rpartition("/")[0]
            found = {"/".join(filter(None, (parent, key))): list(values.get_values()) for key, values in parse_structured_file(file)}
        if any(_marks(str(option)) > MARKS for options in found.values() for option in options):
            raise ValueError(f"an option has more than {MARKS} marks")
        return found


def _files(folder: Path) -> Iterable[tuple[str, int, int]]:
    """Path, modification time and bytes of each file that may hold wildcards; links to folders are not followed."""
    for where, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            if file.endswith((".txt", *_STRUCTURED)) and not file.startswith("."):
                path = os.path.join(where, file)
                try:
                    stat = os.stat(path)
                except OSError:
                    continue
                yield path, stat.st_mtime_ns, stat.st_size


def _marks(text: str) -> int:
    return sum(text.count(mark) for mark in ("{", "|", "}", "$", "%", "__"))


class _Folder(WildcardManager):
    """The library's view of the wildcards; a name that there is not is refused rather than left in the prompt."""

    def __init__(self, options: Options) -> None:
        super().__init__(root_map={"": [{name: ListWildcardCollection(values) for name, values in options.items()}]})
        self._names = list(options)

    def get_values(self, wildcard: str) -> WildcardValues:
        found = super().get_values(wildcard)
        if not found:
            raise Refused(f"there is no wildcard __{wildcard[:80]}__{nearest(wildcard, self._names)}", self._names)
        return found


class _Bounded(RandomSampler):
    """Chooses at random, and counts what it makes."""

    def __init__(self, characters: int) -> None:
        self._parts, self._characters, self._depth = PARTS, characters, 0

    def generator_from_command(self, command: Command, context: SamplingContext) -> ResultGen:
        self._parts -= 1
        if self._parts < 0:
            raise Refused(f"grows to more than {PARTS} parts")
        if command.sampling_method not in (None, SamplingMethod.RANDOM):
            raise Refused("asks for combinatorial (!) or cyclical (@) choices; only random ones are made")
        return super().generator_from_command(command, context)

    def _get_wildcard(self, command: WildcardCommand, context: SamplingContext) -> ResultGen:
        options = super()._get_wildcard(command, context)
        while True:
            self._depth += 1
            if self._depth > DEPTH:
                raise Refused(f"has wildcards that contain each other, or are nested more than {DEPTH} deep")
            option = next(options, None)
            self._depth -= 1
            if option is None:
                return
            yield option

    def _get_literal(self, command: LiteralCommand, context: SamplingContext) -> ResultGen:
        self._characters -= len(command.literal)
        if self._characters < 0:
            raise Refused("grows too long")
        return super()._get_literal(command, context)


def _sample(command: Command, folder: WildcardManager, seed: int, longest: int) -> str:
    sampler = _Bounded(longest)
    context = SamplingContext(
        default_sampling_method=SamplingMethod.RANDOM, wildcard_manager=folder, samplers=dict.fromkeys(SamplingMethod, sampler), rand=Random(seed)
    )
    text = next((str(result) for result in context.sample_prompts(command, 1)), "")
    if len(text) > longest:
        raise Refused("grows too long")
    return text.strip()
