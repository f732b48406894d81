"""``sparsight serve --ray``: copies of the model behind Ray Serve.

Ray's HTTP proxies pass requests to an ingress, which checks and reads them and gives them to a replica of the model.
Ray answers a request whose replica dies with an error; the ingress gives it to another replica.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsight.server.app import guards
from sparsight.server.errors import RETRY_SECONDS, APIError, stopping, unexpected
from sparsight.server.run import LAST_SECONDS, SWITCH_SECONDS
from sparsight.server.service import Service
from sparsight.server.settings import Settings
from sparsight.server.streaming import DONE
from sparsight.utils.text import shorten

logger = logging.getLogger("sparsight.server")

APPLICATION, REPLICA, INGRESS = "sparsight", "replica", "ingress"

TRIES = 3
"""Replicas that a request is given to, so that one on which replicas die does not end all of them."""

OTHER_REQUESTS = 16
"""Requests to a replica besides those that generate or wait for it: models, metrics, the page."""

REPLICAS_PER_INGRESS = 4

HEALTH_SECONDS = 2
"""Time between two health checks of a replica."""

REQUEST_ID = "x-request-id"

FIELDS = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
"""What a replica gets of a request's ASGI scope."""

Load = Callable[[], FastAPI]


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster and the replicas on it.

    Args:
        address: address of a running Ray cluster, ``auto`` for the one of this machine, or ``local`` to start one here.
        replicas: copies of the model; the fewest of them.
        max_replicas: most copies, which are started while there are many requests.
    """

    address: str
    replicas: int
    max_replicas: int


def run(
    cluster: Cluster,
    address: tuple[str, int],
    load: Load,
    max_running: int,
    settings: Settings,
    keys: Sequence[str],
    loopback: bool,
    started: Callable[[], Any],
) -> None:
    """Serve on a cluster until SIGINT or SIGTERM.

    After the signal new requests get 503; the process goes on until those that have begun are answered, or the
    setting ``drain_seconds`` is over. A second signal ends the process at once.

    Args:
        cluster: where.
        address: host and port that Ray's proxies listen on.
        load: loads the application of a replica, which has no keys.
        max_running: answers that a replica generates at the same time.
        settings: the limits.
        keys: API keys, one of which every request needs; none if it is empty.
        loopback: whether only this machine can connect.
        started: called when requests can be sent.

    Raises:
        ValueError: there is no such cluster, it serves other applications, or a replica cannot start.
    """
    stop, stdout = threading.Event(), sys.stdout
    # Ray prints messages, which must not mix with our output.
    with contextlib.redirect_stdout(sys.stderr), _connection(cluster.address):
        try:
            serve.start(http_options=HTTPOptions(host=address[0], port=address[1]))
            if others := ", ".join(serve.status().applications):
                raise ValueError(f"Ray Serve on this cluster already has applications: {others}.")
            try:
                _deploy(_application(cluster, load, max_running, settings, keys, loopback))
                _on_signals(stop)
                with contextlib.redirect_stdout(stdout):
                    started()
                stop.wait()
                _drain(settings.drain_seconds)
            finally:
                serve.shutdown()
        except (RayError, RayServeException, RuntimeError) as error:
            raise ValueError(f"Ray Serve failed: {str(error).strip().splitlines()[-1]}") from error


class Replica:
    """A copy of the model in an actor of the cluster.

    Args:
        load: loads its application.
    """

    async def __init__(self, load: Load) -> None:  # type: ignore[misc]  # Ray waits for it
        sys.setswitchinterval(SWITCH_SECONDS)
        self._app = load()
        self._service: Service = self._app.state.service
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()

    def check_health(self) -> None:
        """Raise an exception if the replica takes no requests; Ray then starts another one in its place."""
        if self._service.draining or self._service.loop.failed:
            raise stopping()

    def abort(self) -> None:
        """End all requests."""
        self._service.draining = True
        for generation in tuple(self._service.active):
            generation.abort()

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """The response to a request as ASGI messages: all at once, or those of an event stream as they come.

        The request ends with the iteration.
        """
        received: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        sent: asyncio.Queue[Message | None] = asyncio.Queue()

        async def receive() -> Message:
            if not received:
                # A client that goes ends the task.
                await asyncio.Event().wait()
            return received.pop()

        async def work() -> None:
            try:
                await self._app({**scope, "type": "http", "asgi": {"version": "3.0"}}, receive, sent.put)
            except Exception:
                # The response says so.
                logger.exception("A request failed.")
            finally:
                sent.put_nowait(None)

        working = asyncio.create_task(work())
        try:
            messages: list[Message] = []
            streams = False
            while (message := await sent.get()) is not None:
                messages.append(message)
                streams = streams or _is_stream(message)
                if streams and sent.empty():
                    yield messages
                    messages = []
            yield messages
        finally:
            working.cancel()


class Ingress:
    """Checks and reads requests, and has a replica answer them: another one, if it dies before anything is sent.

    Args:
        replicas: a handle of the replicas.
        settings: the limits.
        keys: API keys, one of which every request needs; none if it is empty.
        loopback: whether only this machine can connect.
    """

    def __init__(self, replicas: Any, settings: Settings, keys: Sequence[str], loopback: bool) -> None:
        self._answer = replicas.options(method_name="answer", stream=True).remote
        self._guards = guards(settings, keys, loopback=loopback)
        self._draining, self._active = False, 0

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Ray gives the requests to."""
        app: ASGIApp = self._forward
        for guard, arguments, options in reversed(self._guards):
            app = guard(app, *arguments, **options)
        return app

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait until those that have begun are answered; whether they all were in time."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._active:
                    await asyncio.sleep(0.05)
        return not self._active

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (message := await receive())["type"] != "http.request":
            return
        if self._draining:
            await stopping().response()(scope, receive, send)
            return
        request = {name: scope[name] for name in FIELDS}
        key_id = scope.get("state", {}).get("key_id")
        # Ray gives each request an id, which the response has too.
        request["state"] = {"key_id": key_id, "request_id": shorten(Headers(scope=scope).get(REQUEST_ID, ""), 64)}
        self._active += 1
        try:
            begun, error = await self._exchange(request, message["body"], send)
        finally:
            self._active -= 1
        if error is not None and begun:
            # Only streams are sent in parts.
            await send({"type": "http.response.body", "body": f"data: {error.json()}\n\n{DONE}".encode()})
        elif error is not None:
            await error.response()(scope, receive, send)

    async def _exchange(self, request: Scope, body: bytes, send: Send) -> tuple[bool, APIError | None]:
        """Send what replicas answer; returns whether something was sent, and why the response is not complete."""
        message = "The replica that worked on the request has died."
        error = APIError(503, message, kind="server_error", code="replica_lost", retry_after=RETRY_SECONDS)
        begun = complete = False
        for _ in range(TRIES):
            try:
                async for messages in self._answer(request, body):
                    for each in messages:
                        if not begun:
                            del MutableHeaders(scope=each)[REQUEST_ID]
                        begun = True
                        complete = each["type"] == "http.response.body" and not each.get("more_body", False)
                        await send(each)
            except (RayActorError, ObjectLostError):
                logger.warning(message)
            except BackPressureError:
                message = "The server is busy: too many requests are waiting."
                error = APIError(503, message, kind="server_error", code="overloaded", retry_after=RETRY_SECONDS)
                break
            except (RayError, RayServeException):
                logger.exception("A request failed.")
                error = unexpected()
                break
            if begun:
                break
        return begun, None if complete else error


def _is_stream(message: Message) -> bool:
    headers = dict(message.get("headers", ()))
    return bool(headers.get(b"content-type", b"").startswith(b"text/event-stream"))


def _application(
    cluster: Cluster, load: Load, max_running: int, settings: Settings, keys: Sequence[str], loopback: bool
) -> serve.Application:
    """The ingress and the replicas; each replica has one GPU, or one CPU core if the cluster has no GPUs."""
    ongoing = max_running + settings.max_queue + OTHER_REQUESTS
    common = {"health_check_period_s": HEALTH_SECONDS, "graceful_shutdown_wait_loop_s": 0.1}
    number: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.max_replicas > cluster.replicas:
        autoscaling = {"min_replicas": cluster.replicas, "max_replicas": cluster.max_replicas}
        # Further replicas are started before requests wait.
        number = {"autoscaling_config": autoscaling | {"target_ongoing_requests": max(1, max_running // 2)}}
    replicas = serve.deployment(
        Replica,
        name=REPLICA,
        max_ongoing_requests=ongoing,
        max_queued_requests=settings.max_queue,
        # What cannot be loaded once cannot be loaded the next time.
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1},
        **number,
        **common,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=ceil(cluster.max_replicas / REPLICAS_PER_INGRESS),
        max_ongoing_requests=REPLICAS_PER_INGRESS * ongoing + settings.max_queue,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": 0},
        **common,
    )
    return ingress.bind(replicas.bind(load), settings, keys, loopback)


def _deploy(application: serve.Application) -> None:
    """Start an application; raises ValueError if a replica cannot be loaded."""
    try:
        serve.run(application, name=APPLICATION)
    except RuntimeError as error:
        status = serve.status().applications[APPLICATION].deployments[REPLICA]
        # A traceback, which ends with our own sentence where the options are wrong.
        lines = status.message.strip().splitlines() or [str(error)]
        cause = next((line for line in reversed(lines) if line.startswith("ValueError: ")), lines[-1])
        raise ValueError(f"A replica cannot start: {cause.removeprefix('ValueError: ')}") from error


def _drain(seconds: float) -> None:
    """Let requests that have begun be answered, and end them when the time is over."""
    ingress = serve.get_app_handle(APPLICATION)
    if not all(ingress.broadcast("drain", seconds).results(timeout_s=seconds + LAST_SECONDS)):
        serve.get_deployment_handle(REPLICA, APPLICATION).broadcast("abort").results(timeout_s=LAST_SECONDS)
        ingress.broadcast("drain", LAST_SECONDS).results(timeout_s=2 * LAST_SECONDS)


@contextlib.contextmanager
def _connection(address: str) -> Iterator[None]:
    """A connection to a cluster."""
    try:
        ray.init(address, log_to_driver=False, logging_level="error")
    # The exception's type depends on the step that failed.
    except Exception as error:
        raise ValueError(f"There is no Ray cluster at {address!r}; local starts one.") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _on_signals(stop: threading.Event) -> None:
    """Set an event when SIGINT or SIGTERM comes; the second one ends the process."""

    def handle(*_: object) -> None:
        if stop.is_set():
            os._exit(128 + signal.SIGINT)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
