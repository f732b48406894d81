"""The application: endpoints, error handlers and the engine's lifetime."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

import sparsight
from sparsight.engine.engine import Engine
from sparsight.server import chat, completions, kept, metrics, page_router, responses, status
from sparsight.server.access_log import AccessLog
from sparsight.server.errors import APIError, unexpected
from sparsight.server.images import ImageLoader
from sparsight.server.keys import KeyGuard, RateLimit
from sparsight.server.middleware import BodyLimit, HeaderLimit, LocalHost, QueueLimit
from sparsight.server.service import Service
from sparsight.server.settings import Settings
from sparsight.server.validation import body_error

ROUTERS = (
    status.router,
    metrics.router,
    chat.router,
    completions.router,
    responses.router,
    kept.router,
    page_router.router,
)

SENTENCES = {400: "The body cannot be parsed.", 404: "There is no such path.", 405: "The path has no such method."}


def create_app(
    engine: Engine,
    name: str,
    settings: Settings,
    images: ImageLoader,
    keys: Sequence[str] = (),
    *,
    loopback: bool = False,
) -> FastAPI:
    """The application over an engine, which it steps, and closes when it ends.

    Args:
        engine: the engine; nobody else uses it.
        name: what clients call the model.
        settings: the limits.
        images: opens the images of requests; the application closes it.
        keys: API keys, one of which every request needs; none if it is empty.
        loopback: whether only this machine can connect.
    """
    service = Service(engine, name, settings, images)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()
        await images.close()

    *checks, body = guards(settings, keys, loopback=loopback)
    queue = Middleware(QueueLimit, check_queue=service.check_queue)
    app = FastAPI(
        title="Sparsight",
        version=sparsight.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        middleware=[Middleware(AccessLog, metrics=service.metrics), *checks, queue, body],
    )
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(APIError, _api_error)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


def guards(settings: Settings, keys: Sequence[str], *, loopback: bool) -> list[Middleware]:
    """What checks requests before they are parsed, the outermost first. The arguments are those of the application."""
    found = [Middleware(HeaderLimit, max_headers=settings.max_headers, max_bytes=settings.max_header_bytes)]
    if keys:
        found.append(Middleware(KeyGuard, keys=keys))
    elif loopback:
        found.append(Middleware(LocalHost))
    if settings.requests_per_minute is not None:
        found.append(Middleware(RateLimit, per_minute=settings.requests_per_minute))
    sizes = {"max_bytes": settings.max_body_bytes, "max_total": settings.max_bodies_bytes}
    return [*found, Middleware(BodyLimit, **sizes, seconds=settings.body_seconds)]


# Coroutines: Starlette calls functions in another thread.
async def _api_error(_: Request, error: Any) -> Response:
    return error.response()


async def _malformed(_: Request, error: Any) -> Response:
    return body_error(error.errors(), error.body).response()


async def _http_error(_: Request, error: Any) -> Response:
    response = APIError(error.status_code, SENTENCES.get(error.status_code, "The request is wrong.")).response()
    response.headers.update(error.headers or {})
    return response


async def _unexpected(_: Request, error: Exception) -> Response:
    return unexpected().response()
