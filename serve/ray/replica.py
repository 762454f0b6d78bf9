"""One replica of serve.ray_serve, as an actor of Ray Serve runs it: the routes of serve.server around a service."""

from __future__ import annotations

import argparse
import asyncio

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from serve.server import opened

WATCH = 0.1  # seconds between looks at the service while it loads


class Replica:
    """Ray routes requests to it once __init__ has returned, replaces it where check_health raises."""

    async def __init__(self, args: argparse.Namespace):
        """Load the models. Raises what keeps them from it."""
        self._opened = opened(args)
        self.routes = await self._opened.__aenter__()
        self.answer = self.routes.app()  # `app` is taken by Ray
        service = self.routes.service
        while not service.ready and not service.failure.done():
            await asyncio.sleep(WATCH)
        if service.failure.done():
            await self.close()
            service.failure.result()

    def check_health(self) -> None:
        """Raise what has ended the service for good; an engine that is started again has not."""
        if self.routes.service.failure.done():
            self.routes.service.failure.result()

    async def close(self) -> None:
        """End the processes; a second time does nothing."""
        self.routes.draining = True
        await self._opened.__aexit__(None, None, None)

    async def __del__(self) -> None:
        """Ray awaits this once the requests are answered, or graceful_shutdown_timeout_s have passed."""
        await self.close()


def front() -> Starlette:
    """An application that hands every request to the replica in whose process it is: Ray wants one before there are
    any replicas."""
    return Starlette(routes=[Mount("/", app=_forward)])


async def _forward(scope: Scope, receive: Receive, send: Send) -> None:
    from ray.serve import get_replica_context

    await get_replica_context().servable_object.answer(scope, receive, send)
