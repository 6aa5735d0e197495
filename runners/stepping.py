"""Runs of diffusers' pipelines side by side, which share the denoiser's passes step by step.

A run is one call of a pipeline in a greenlet of its own: with its own scheduler, generators and settings, as if
it were alone. Where it calls its denoiser it pauses. Once every run has paused, what they gave to it is put together
where the shapes agree, the denoiser runs once with a timestep for each row, and every run goes on with its own rows.
So a run may begin and end at any step, and whatever a scheduler does between two passes stays its own matter. Runs that have
taken their last step at once are decoded together, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from core import metrics
from runners.memory import out_of_memory, release_memory
from runners.pace import Pace
from runners.remembered import Encoder

log = logging.getLogger("easel.stepping")
T = TypeVar("T")
Network = Callable[..., Any]  # a denoiser, or a VAE's decoding
Pass = tuple[Tensor, ...]  # what it returns for `return_dict=False`
Kind = tuple[Any, ...]
_POSITIONS = ("txt_ids", "img_ids")  # of Flux: the tokens' places, which all rows have in common


class Shared:
    """Stands in a run's pipeline for its denoiser, or with `step=False` for what else runs share; outside of a run it is what it stands for."""

    def __init__(self, network: Network, step: bool = True) -> None:
        self._network, self._step = network, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __call__(self, *args: Any, **named: Any) -> Any:
        run = getcurrent()
        if not isinstance(run, Run):
            return self._network(*args, **named)
        assert run.parent is not None
        return run.parent.switch(Call.of(self._network, args, named, run.name, self._step))


class Decoder:
    """Stands in a run's pipeline for its VAE, whose decoding it shares."""

    def __init__(self, vae: Any) -> None:
        self._vae, self._decode = vae, Shared(vae.decode, step=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """(N, C, h, w). The generator is of no use to it."""
        return self._decode(z, return_dict=False) if not return_dict else self._vae.decode(z)


def share_passes(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Let a pipeline that nobody else has share its denoiser's passes, and its VAE's decoding."""
    for name in ("unet", "transformer"):
        if isinstance(network := vars(pipe).get(name), nn.Module):
            vars(pipe)[name] = Shared(network)
    vae = vars(pipe).get("vae")
    # One that is to overflow in float16 is float32 from just before its decoding to just after it, for all who have it.
    if type(vae) in (AutoencoderKL, Encoder) and not (vae.dtype == torch.float16 and vae.config.force_upcast):
        vars(pipe)["vae"] = Decoder(vae)
    return pipe


@dataclass(frozen=True)
class Call:
    """What a run gives to its denoiser: tensors whose first dimension is `rows`, and what all rows have in common.
    Calls with an equal `kind` can be put together. `whose` is the run's name; `step`: it is the denoiser."""

    network: Network
    tensors: list[Tensor]
    others: dict[str, Any]
    rebuild: Callable[[list[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]
    rows: int
    kind: Kind
    whose: Any
    step: bool
    texts: int | None  # which of the tensors are the prompts' embeddings

    @classmethod
    def of(cls, network: Network, args: tuple[Any, ...], named: dict[str, Any], whose: Any = None, step: bool = True) -> Call:
        common = {name: named[name] for name in _POSITIONS if named.get(name) is not None}
        # Some pipelines name what they leave out, and others do not.
        leaves, spec = pytree.tree_flatten((args, {k: named[k] for k in sorted(named) if k not in common and named[k] is not None}))
        rows = len(args[0] if args else named["hidden_states"])
        # A single timestep becomes one for each row; as float32, which holds every one, since some schedulers count in integers.
        leaves = [leaf.float().expand(rows) if isinstance(leaf, Tensor) and leaf.ndim == 0 else leaf for leaf in leaves]
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def rebuild(tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            given = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            made: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(given, spec)
            return made

        kinds = [(leaf.shape[1:], leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
        kind = (network, repr(spec), *kinds, *(tuple(t.shape) for t in common.values()))
        tensors = [leaves[place] for place in places]
        texts = next((i for i, tensor in enumerate(tensors) if tensor is named.get("encoder_hidden_states")), None)
        return cls(network, tensors, common, rebuild, rows, kind, whose, step, texts)


class Texts:
    """The prompts' embeddings of a pass's rows: the very same tensors as at the pass before while the same runs give the same,
    so that the denoiser knows what it has made of them (runners.attention)."""

    def __init__(self) -> None:
        self._kept: dict[Kind, tuple[list[Any], list[Tensor]]] = {}  # by whom and of what they were made, and they

    def parts(self, calls: list[Call], given: Sequence[Tensor], most: int) -> list[Tensor]:
        """Put together, at most `most` rows each; always new tensors for other runs."""
        kind, known = calls[0].kind, [*(call.whose for call in calls), *given]
        kept, parts = self._kept.get(kind, ([], []))
        if len(kept) == len(known) and all(a is b for a, b in zip(kept, known, strict=True)):
            return parts
        self._kept[kind] = known, _parts(given, most)
        return self._kept[kind][1]

    def forget(self, but: Container[Kind] = ()) -> None:
        """All that are not of these kinds of calls."""
        self._kept = {kind: kept for kind, kept in self._kept.items() if kind in but}


def together(calls: list[Call], most: int | None = None, before: Callable[[list[Any]], object] = lambda _: None, texts: Texts | None = None) -> list[Pass]:
    """The denoiser's answer to each of the calls, which are of one kind; at most `most` rows go through it at once.
    `before` a pass is told whose each of its rows is."""
    first, rows = calls[0], sum(call.rows for call in calls)
    most, texts = most or rows, texts or Texts()
    given = enumerate(zip(*(call.tensors for call in calls), strict=True))
    parts = zip(*(texts.parts(calls, of_all, most) if i == first.texts else _parts(of_all, most) for i, of_all in given), strict=True)
    made, whose = [], [call.whose for call in calls for _ in range(call.rows)]
    for start, tensors in zip(range(0, rows, most), parts, strict=True):
        before(whose[start : start + most])
        args, named = first.rebuild([*tensors])
        made.append(first.network(*args, **named, **first.others))
    whole = [torch.cat(of_all) if len(made) > 1 else of_all[0] for of_all in zip(*made, strict=True)]
    return list(zip(*(t.split([call.rows for call in calls]) for t in whole), strict=True))


def _parts(given: Sequence[Tensor], most: int) -> list[Tensor]:
    return list((torch.cat([*given]) if len(given) > 1 else given[0]).split(most))


class Run(greenlet, Generic[T]):  # type: ignore[misc]
    """Work that pauses where it calls a denoiser. `name` tells whose it is; `pictures`: how many it draws at once.

    Once it is dead, `outcome` or `error` is there."""

    def __init__(self, name: Any, work: Callable[[], T], pictures: int) -> None:
        super().__init__(work)
        self.name, self.pictures = name, pictures
        self.call: Call | None = None
        self.outcome: T | None = None
        self.error: BaseException | None = None

    def go_on(self, given: Any = None, error: BaseException | None = None) -> None:
        """Until it calls its denoiser again, or ends."""
        try:
            got = self.throw(error) if error else self.switch() if self.call is None else self.switch(given)
            if self.dead:
                self.call, self.outcome = None, got
            else:
                self.call = got
        except BaseException as raised:
            self.call, self.error = None, raised


@dataclass
class Runs(Generic[T]):
    """The runs that share a model's passes, in one thread.

    Args:
        device: where the model is.
        pace: told how long the passes took.
        before: told, before each pass, whose each of its rows is (the names of the runs).
    """

    device: torch.device
    pace: Pace
    before: Callable[[list[Any]], object] = lambda _: None
    most: int | None = None  # rows that go through the denoiser at once, since memory ran out, and
    most_pictures: int | None = None  # how many pictures that is
    running: list[Run[T]] = field(default_factory=list)
    _texts: Texts = field(default_factory=Texts)

    @property
    def pictures(self) -> int:
        return sum(run.pictures for run in self.running)

    def start(self, name: Any, work: Callable[[], T], pictures: int) -> Iterator[Run[T]]:
        """Begin a run, up to its first pass; yields it if that is its end already."""
        run: Run[T] = Run(name, work, pictures)
        with torch.no_grad():
            run.go_on()
        if run.dead:
            yield run
        else:
            self.running.append(run)

    def step(self) -> Iterator[Run[T]]:
        """One pass for each run, and the decoding of those that come to it; yields those that end."""
        yield from self._pass(self.running)
        while decoding := [run for run in self.running if run.call and not run.call.step]:
            yield from self._pass(decoding)
        self._texts.forget(but={run.call.kind for run in self.running if run.call})

    def _pass(self, runs: list[Run[T]]) -> Iterator[Run[T]]:
        kinds: dict[Kind, list[Run[T]]] = {}
        for run in runs:
            assert run.call is not None
            kinds.setdefault(run.call.kind, []).append(run)
        for alike in kinds.values():
            # Gradients are off here too: a run that ends gives back the state it found, while others are in the middle.
            with torch.no_grad():
                answers = self._answers([run.call for run in alike if run.call], sum(run.pictures for run in alike))
                for run, answer in zip(alike, answers, strict=True):
                    run.go_on(error=answer) if isinstance(answer, BaseException) else run.go_on(answer)
            for run in alike:
                if run.dead:
                    self.running.remove(run)
                    yield run

    def _answers(self, calls: list[Call], pictures: int) -> list[Pass | BaseException]:
        """Of each call. Where memory runs out, again with half the rows at once; where it fails otherwise, each on its own."""
        while True:
            try:
                if not calls[0].step:
                    return [*together(calls, self.most)]
                with self.pace.timed(pictures, self.device):
                    answers = together(calls, self.most, self.before, self._texts)
                metrics.BATCH_ROWS.labels(metrics.here()).observe(pictures)
                return [*answers]
            except Exception as error:
                failure: Exception = error
            rows = min(self.most or sum(call.rows for call in calls), sum(call.rows for call in calls))
            if out_of_memory(failure) and rows > 1:
                self.most, self.most_pictures = rows // 2, max(1, pictures * (rows // 2) // sum(call.rows for call in calls))
                metrics.OUT_OF_MEMORY.labels(metrics.here()).inc()
                log.warning("a pass of %d rows ran out of memory; going on with %d at once", rows, self.most)
                failure.__traceback__ = None  # it holds on to the tensors of the pass
                self._texts.forget()
                release_memory(self.device)
            elif len(calls) > 1:
                return [answer for call in calls for answer in self._answers([call], 1)]
            else:
                return [failure]
