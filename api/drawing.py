"""The middle of every contract: a checked request is planned, done by its runner, and put down in the usage log."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from fastapi import Request

from api import backend, usage
from api.backend import Service
from core.catalogue import Catalogue
from core.generation import Generation
from core.plans import Inputs, Plan
from core.problems import Problem, renamed
from core.requests import GenerationRequest


async def planned(wanted: GenerationRequest, inputs: Inputs | None, request: Request, names: Mapping[str, str] | None = None) -> Plan:
    """The request with every value decided.

    Args:
        names: what the contract calls the request's fields, where it has names of its own.

    Raises:
        Problem: 422 that lists every field that cannot be honoured.
    """
    catalogue: Catalogue = request.app.state.catalogue
    try:
        return await asyncio.to_thread(catalogue.plan, wanted, inputs, request.state.caller.id)
    except Problem as problem:
        raise renamed(problem, names or {}) from None


async def drawn(plan: Plan, request: Request | None, service: Service = "StableDiffusion") -> Generation:
    """What comes of a plan, as long as the client waits for it; takes and raises what `backend.generate` does."""
    generation = await backend.generate(plan, request, service)
    await usage.record(plan, generation)
    return generation
