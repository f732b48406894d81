"""The application over a model that is loaded for it."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from sparsight.compression.recipe import Recipe
from sparsight.engine.engine import Engine
from sparsight.engine.request import RequestError
from sparsight.engine.sampling import SamplingParams
from sparsight.models.loading import load
from sparsight.server.access_log import configure_logging
from sparsight.server.app import create_app
from sparsight.server.fetch import Fetcher
from sparsight.server.images import ImageLoader
from sparsight.server.settings import Settings
from sparsight.utils.threads import one_thread


def load_app(
    model: str,
    recipe: Recipe,
    name: str,
    settings: Settings,
    *,
    keys: Sequence[str] = (),
    loopback: bool = False,
    image_domains: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    json_log: bool = False,
    **options: Any,
) -> FastAPI:
    """Load a model, try it, and return the application over it.

    Args:
        model: a hub id or a folder.
        recipe: how prompts are compressed.
        name: what clients call the model.
        settings: the limits.
        keys: API keys, one of which every request needs; none if it is empty.
        loopback: whether only this machine can connect.
        image_domains: domains that images may be fetched from.
        device: where the model runs.
        dtype: of its weights.
        json_log: whether the log is JSON lines.
        options: further arguments of :class:`sparsight.Engine`.

    Raises:
        ValueError: the model cannot be loaded, or cannot answer with these options.
    """
    configure_logging(json_log)
    fetcher = None
    if image_domains:
        fetcher = Fetcher(image_domains, max_bytes=settings.max_image_bytes, seconds=settings.fetch_seconds)
    # The engine's own thread is to have all cores.
    with one_thread():
        loaded, processor = load(model, device=device, dtype=dtype)
        engine = Engine(loaded, processor, recipe, **options)
        try:
            engine.add("Hello", params=SamplingParams(max_new_tokens=2)).wait()
        except RequestError as error:
            raise ValueError(f"The model cannot answer with these options: {error}") from error
    return create_app(engine, name, settings, ImageLoader(settings, fetcher), keys, loopback=loopback)
