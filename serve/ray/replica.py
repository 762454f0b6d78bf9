"""Run one replica of serve.ray_serve as an actor of Ray Serve: the routes of serve.server around a service."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from serve.http.routes import ServerConfig, open_routes

WATCH = 0.1  # seconds between two checks of the service while it loads


class Replica:
    """Answer requests; Ray sends them once __init__ has returned, and replaces the replica if check_health raises."""

    async def __init__(self, config: ServerConfig):
        """Load the models. Raises the error that prevents it."""
        self._opened = open_routes(config)
        self.routes = await self._opened.__aenter__()
        self.answer = self.routes.app()  # Ray uses the name `app`
        service = self.routes.service
        while not service.ready and not service.failure.done():
            await asyncio.sleep(WATCH)
        if service.failure.done():
            await self.close()
            service.failure.result()

    def check_health(self) -> None:
        """Raise the error that has ended the service for good; an engine that is being restarted is no such error."""
        if self.routes.service.failure.done():
            self.routes.service.failure.result()

    async def close(self) -> None:
        """End the processes; a second call does nothing."""
        self.routes.draining = True
        await self._opened.__aexit__(None, None, None)

    async def __del__(self) -> None:
        """Close; Ray awaits this once the requests are answered, or graceful_shutdown_timeout_s have passed."""
        await self.close()


def front() -> Starlette:
    """Return an application that passes each request to the replica of its process.

    Ray Serve needs an application before there are any replicas.
    """
    return Starlette(routes=[Mount("/", app=_forward)])


async def _forward(scope: Scope, receive: Receive, send: Send) -> None:
    from ray.serve import get_replica_context

    await get_replica_context().servable_object.answer(scope, receive, send)
