"""``sparsight serve``: an HTTP API of OpenAI's shape over one engine."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from sparsight.cli import options
from sparsight.cli.terminal import console
from sparsight.server.settings import Settings

LIMITS, ACCESS, RAY = "Limits", "Access", "Ray"

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
    host_dtype: options.HostDtype = None,
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
    ray: Annotated[
        str | None,
        typer.Option(
            help="Serve on a Ray cluster: its address, auto, or local to start one.",
            metavar="ADDRESS",
            rich_help_panel=RAY,
        ),
    ] = None,
    replicas: Annotated[
        int, typer.Option(help="Copies of the model on the Ray cluster.", min=1, rich_help_panel=RAY)
    ] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(
            help="Most copies, which are started while there are many requests; as many as --replicas by default.",
            min=1,
            rich_help_panel=RAY,
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Serve a model to OpenAI's clients; Ctrl-C or SIGTERM lets running requests finish."""
    given = locals()
    settings = Settings(**{field.name: given[field.name] for field in fields(Settings)})
    _check_ray(ray, replicas, max_replicas, settings, prefix_dir)
    if missing := [name for name in REQUIRED if find_spec(name) is None]:
        raise ValueError(f"sparsight serve needs {missing[0]}: pip install 'sparsight[serve]'.")
    from sparsight.cli.parsing import byte_count
    from sparsight.cli.recipe_options import recipe_from_options
    from sparsight.server.keys import read_keys
    from sparsight.server.launch import load_app
    from sparsight.server.run import bind, is_loopback, run

    recipe = recipe_from_options(model, method, budget, heads)
    keys = [] if api_key_file is None else read_keys(api_key_file)
    name, terminal = served_name(model), console()
    load = partial(
        load_app,
        model,
        recipe,
        name,
        image_domains=allow_image_urls or (),
        device=device,
        dtype=dtype,
        json_log=json_log,
        kv_memory=kv_memory,
        max_running=max_concurrent,
        prefill_bound=prefill_bound,
        host_memory=byte_count("--host-memory", host_memory),
        host_dtype=host_dtype,
        prefix_dir=prefix_dir,
    )

    def announce() -> None:
        terminal.print(f"Serving {name} at {url}/v1. Ask it:", soft_wrap=True)
        key = " -H 'Authorization: Bearer KEY'" if keys else ""
        terminal.print(example(url, name) + key, soft_wrap=True)

    with bind(host, port) as bound:
        address, loopback = (host, bound.getsockname()[1]), is_loopback(bound)
        url = f"http://{f'[{host}]' if ':' in host else host}:{address[1]}"
        if ray is None:
            with terminal.status(f"Loading {options.model_name(model)}"):
                app = load(settings, keys=keys, loopback=loopback)
            run(app, bound, announce)
            return
    # Ray's proxies listen on the address that is free now.
    from sparsight.server import ray_serve

    cluster = ray_serve.Cluster(ray, replicas, max_replicas or replicas)
    # The requests of all replicas together are counted before they come to one.
    load = partial(load, replace(settings, requests_per_minute=None))
    ray_serve.run(cluster, address, load, max_concurrent, settings, keys, loopback, announce)


def _check_ray(
    address: str | None, replicas: int, max_replicas: int | None, settings: Settings, prefix_dir: Path | None
) -> None:
    """Raise ValueError for options that do not go together."""
    if address is None:
        if replicas != 1 or max_replicas is not None:
            raise ValueError("--replicas and --max-replicas are for --ray, which is not given.")
        return
    if max_replicas is not None and max_replicas < replicas:
        raise ValueError(f"--max-replicas must be at least --replicas, {replicas}.")
    if prefix_dir is not None:
        raise ValueError("--prefix-dir is for one process, not for --ray.")
    for name in ("max_connections", "header_seconds", "send_seconds"):
        if getattr(settings, name) != getattr(Settings, name):
            raise ValueError(f"--{name.replace('_', '-')} is not for --ray, whose proxies hold the connections.")
    if find_spec("ray") is None or find_spec("ray.serve") is None:
        raise ValueError("sparsight serve --ray needs Ray: pip install 'sparsight[ray]'.")


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
