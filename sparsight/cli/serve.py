"""``sparsight serve``: an HTTP API of OpenAI's shape over one engine."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from sparsight.cli import options
from sparsight.cli.terminal import console
from sparsight.server.settings import Settings

LIMITS, ACCESS = "Limits", "Access"

BUNDLED_NAME = "sparsight-reader"
"""What clients call the bundled model."""

REQUIRED = ("fastapi", "uvicorn", "prometheus_client")


def main(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.", metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any that is free.", min=0, max=65535)] = 8000,
    model: options.Model = options.DEFAULT_MODEL,
    method: options.Method = "sparsight",
    budget: options.Budget = None,
    heads: options.Heads = None,
    prefill_bound: options.PrefillBound = None,
    kv_memory: Annotated[
        float,
        typer.Option(help="Bytes for compressed KV caches, or a fraction of free memory.", rich_help_panel=LIMITS),
    ] = 0.5,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with API keys, one per line; requests need one of them. None by default.",
            metavar="FILE",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    allow_image_urls: Annotated[
        list[str] | None,
        typer.Option(
            help="Domain that images may be fetched from over https; .example.com has its subdomains too. Repeat the "
            "option for more. None by default.",
            metavar="DOMAIN",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    host_memory: options.HostMemory = "0",
    prefix_dir: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps these prompts between runs.", rich_help_panel=options.METHOD),
    ] = None,
    max_concurrent: Annotated[
        int, typer.Option(help="Answers generated at the same time.", min=1, rich_help_panel=LIMITS)
    ] = 64,
    max_queue: Annotated[
        int, typer.Option(help="Requests that wait; further ones get 503.", min=1, rich_help_panel=LIMITS)
    ] = Settings.max_queue,
    max_connections: Annotated[
        int, typer.Option(help="Open connections; further ones get 503.", min=1, rich_help_panel=LIMITS)
    ] = Settings.max_connections,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer in tokens.", min=1, rich_help_panel=LIMITS)
    ] = Settings.max_new_tokens,
    max_answers: Annotated[
        int, typer.Option(help="Answers to one request (n).", min=1, rich_help_panel=LIMITS)
    ] = Settings.max_answers,
    max_messages: Annotated[
        int, typer.Option(help="Messages of a request.", min=1, rich_help_panel=LIMITS)
    ] = Settings.max_messages,
    max_images: Annotated[
        int, typer.Option(help="Images of a request.", min=0, rich_help_panel=LIMITS)
    ] = Settings.max_images,
    max_text: Annotated[
        int, typer.Option(help="Characters of a request's texts.", min=1, rich_help_panel=LIMITS)
    ] = Settings.max_text,
    max_image_bytes: Annotated[
        int, typer.Option(help="Bytes of an encoded image.", min=1, rich_help_panel=LIMITS)
    ] = Settings.max_image_bytes,
    max_image_pixels: Annotated[
        int, typer.Option(help="Pixels of an image.", min=1, rich_help_panel=LIMITS)
    ] = Settings.max_image_pixels,
    max_decoded_pixels: Annotated[
        int, typer.Option(help="Pixels of all images in use; further images get 503.", min=1, rich_help_panel=LIMITS)
    ] = Settings.max_decoded_pixels,
    image_seconds: Annotated[
        float, typer.Option(help="Time to decode an image.", min=0.1, rich_help_panel=LIMITS)
    ] = Settings.image_seconds,
    fetch_seconds: Annotated[
        float, typer.Option(help="Time to fetch an image from a link.", min=0.1, rich_help_panel=LIMITS)
    ] = Settings.fetch_seconds,
    max_body_bytes: Annotated[
        int, typer.Option(help="Bytes of a request's body.", min=1, rich_help_panel=LIMITS)
    ] = Settings.max_body_bytes,
    max_bodies_bytes: Annotated[
        int,
        typer.Option(
            help="Bytes of all bodies that are being received; further ones get 503.", min=1, rich_help_panel=LIMITS
        ),
    ] = Settings.max_bodies_bytes,
    body_seconds: Annotated[
        float, typer.Option(help="Time for a body to arrive.", min=0.1, rich_help_panel=LIMITS)
    ] = Settings.body_seconds,
    max_headers: Annotated[
        int, typer.Option(help="Headers of a request.", min=1, rich_help_panel=LIMITS)
    ] = Settings.max_headers,
    max_header_bytes: Annotated[
        int, typer.Option(help="Bytes of a request's headers and path.", min=1, rich_help_panel=LIMITS)
    ] = Settings.max_header_bytes,
    header_seconds: Annotated[
        float, typer.Option(help="Time for the headers to arrive.", min=0.1, rich_help_panel=LIMITS)
    ] = Settings.header_seconds,
    send_seconds: Annotated[
        float, typer.Option(help="Time that a client may stop to read its response.", min=0.1, rich_help_panel=LIMITS)
    ] = Settings.send_seconds,
    requests_per_minute: Annotated[
        int | None,
        typer.Option(
            help="Requests a minute of each API key, or of all clients if there are no keys; any number by default.",
            min=1,
            rich_help_panel=LIMITS,
        ),
    ] = Settings.requests_per_minute,
    kept_requests: Annotated[
        int,
        typer.Option(help="Newest requests of which the entries kept can be looked up.", min=0, rich_help_panel=LIMITS),
    ] = Settings.kept_requests,
    drain_seconds: Annotated[
        float,
        typer.Option(help="Time for running requests to finish after a stop signal.", min=0, rich_help_panel=LIMITS),
    ] = Settings.drain_seconds,
    json_log: Annotated[
        bool, typer.Option("--json-log", help="Log JSON lines.", rich_help_panel=options.OUTPUT)
    ] = False,
    log_prompts: Annotated[
        bool,
        typer.Option("--log-prompts", help="Log the texts of requests too.", rich_help_panel=options.OUTPUT),
    ] = Settings.log_prompts,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Serve a model to OpenAI's clients; Ctrl-C or SIGTERM lets running requests finish."""
    given = locals()
    settings = Settings(**{field.name: given[field.name] for field in fields(Settings)})
    if missing := [name for name in REQUIRED if find_spec(name) is None]:
        raise ValueError(f"sparsight serve needs {missing[0]}: pip install 'sparsight[serve]'.")
    from sparsight.cli.parsing import byte_count
    from sparsight.cli.recipe_options import recipe_from_options
    from sparsight.engine.engine import Engine
    from sparsight.engine.request import RequestError
    from sparsight.engine.sampling import SamplingParams
    from sparsight.models.loading import load
    from sparsight.server.access_log import configure_logging
    from sparsight.server.app import create_app
    from sparsight.server.fetch import Fetcher
    from sparsight.server.images import ImageLoader
    from sparsight.server.keys import read_keys
    from sparsight.server.run import bind, is_loopback, run
    from sparsight.utils.threads import one_thread

    recipe = recipe_from_options(model, method, budget, heads)
    host_bytes = byte_count("--host-memory", host_memory)
    keys = [] if api_key_file is None else read_keys(api_key_file)
    fetcher = None
    if allow_image_urls:
        fetcher = Fetcher(allow_image_urls, max_bytes=max_image_bytes, seconds=fetch_seconds)
    configure_logging(json_log)
    terminal = console()
    with bind(host, port) as bound:
        # The engine's own thread is to have all cores.
        with terminal.status(f"Loading {options.model_name(model)}"), one_thread():
            loaded, processor = load(model, device=device, dtype=dtype)
            engine = Engine(
                loaded,
                processor,
                recipe,
                kv_memory=kv_memory,
                max_running=max_concurrent,
                prefill_bound=prefill_bound,
                host_memory=host_bytes,
                prefix_dir=prefix_dir,
            )
            try:
                engine.add("Hello", params=SamplingParams(max_new_tokens=2)).wait()
            except RequestError as error:
                raise ValueError(f"The model cannot answer with these options: {error}") from error
        name = served_name(model)
        images = ImageLoader(settings, fetcher)
        app = create_app(engine, name, settings, images, keys, loopback=is_loopback(bound))

        def announce() -> None:
            terminal.print(f"Serving {name} at {url}/v1. Ask it:", soft_wrap=True)
            key = " -H 'Authorization: Bearer KEY'" if keys else ""
            terminal.print(example(url, name) + key, soft_wrap=True)

        url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
        run(app, bound, announce)


def served_name(model: str) -> str:
    """What clients call a model: a hub id, or the last part of a folder's path."""
    if model == options.DEFAULT_MODEL:
        return BUNDLED_NAME
    return Path(model).resolve().name if Path(model).is_dir() else model


def example(url: str, name: str) -> str:
    """A command that asks a question about an image."""
    image = "data:image/png;base64,'$(base64 < examples/receipt-1.png | tr -d '\\n')'"
    content = (
        '[{"type": "image_url", "image_url": {"url": "' + image + '"}}, {"type": "text", "text": "How much is JU?"}]'
    )
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": {content}}}]}}'
    return f"echo '{body}' | curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d @-"
