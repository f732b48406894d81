"""Vision features of images and videos that were seen before, so that the vision tower does not run again."""

import hashlib
import inspect
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sparsight.models.families import FAMILIES

KNOWN_IMAGES = 2**16
"""Images whose number of vision tokens is remembered."""

Sizes = dict[str, tuple[int, list[int]]]
"""For each tensor that is split into images, the dimension and the sizes."""


@dataclass
class VisionFeatures(BaseModelOutputWithPooling):
    """What a model reads of a vision tower's output.

    Args:
        pooler_output: features of each image, or of each of its tiles: tensors ``[tokens, D]``, or one of
            ``[images, tokens, D]``, as the model expects.
        deepstack_features: for each layer of the language model that adds features of its own, those of each image.
        visual_indicator_features: embeddings of the tokens between Ovis2's tiles.
    """

    pooler_output: Any = None
    deepstack_features: Any = None
    visual_indicator_features: Any = None


class _Entry(NamedTuple):
    """Features of one image, or of one of its tiles.

    Args:
        layers: the tower's output and what deepstack layers add, each ``[tokens, D]``.
        stacked: whether the model expects the images' features in one tensor.
    """

    layers: tuple[Tensor, ...]
    stacked: bool

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


@dataclass
class Media:
    """The images, or the videos, of a prompt.

    Args:
        encoder: the model's method that encodes them.
        arguments: for all of them.
        salt: images of different salts have different keys.
    """

    encoder: Any
    arguments: dict[str, Any]
    salt: str = ""

    @cached_property
    def sizes(self) -> Sizes:
        """How the arguments are split."""
        return _sizes(self.arguments)

    @cached_property
    def images(self) -> list[dict[str, Any]]:
        """Arguments for each image, or each tile."""
        return _split(self.arguments, self.sizes)

    @cached_property
    def keys(self) -> list[bytes]:
        """SHA-256 of each."""
        return [_key(f"{self.salt} {self.encoder.__name__}", image) for image in self.images]


class VisionCache:
    """Encodes images and videos with a model's vision tower, and keeps the features of the most recently used ones.

    The key of an image is the SHA-256 of its pixels, their shape and type, and everything else that its encoding
    depends on; padded to the size of a larger image beside it, it is another image. Threads may share a cache.

    Args:
        model: the model.
        max_bytes: bytes that may be kept, on the model's device.

    Attributes:
        hits: images and videos whose features were in the cache.
        misses: images and videos that were encoded.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int) -> None:
        self.model, self.max_bytes = model, max_bytes
        self.nbytes = self.hits = self.misses = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._tokens: OrderedDict[bytes, int] = OrderedDict()
        # The same for all images.
        self._visual_indicator_features: Tensor | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def media(self, inputs: Mapping[str, Any], salt: str = "") -> dict[str, Media]:
        """The images and videos of one prompt, by modality; only those of the same salt share features."""
        return {
            modality: Media(encoder, arguments, salt)
            for modality, encoder, arguments in self._arguments(inputs)
            if any(name.startswith("pixel_values") for name in arguments)
        }

    def _arguments(self, inputs: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        """The model's encoder of each modality, and what it takes of the inputs."""
        for modality in ("image", "video"):
            encoder = getattr(self.model.base_model, f"get_{modality}_features", None)
            names = inspect.signature(encoder).parameters if encoder else ()
            yield modality, encoder, {name: inputs[name] for name in names if inputs.get(name) is not None}

    @torch.no_grad()
    def encode(
        self, inputs: Mapping[str, Any], media: Mapping[str, Media] | None = None, skip: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """A prompt's inputs with vision features, ``mm_encoder_outputs``, in place of pixels and their descriptions.

        Images that are not in the cache are encoded together. Without their grids a model cannot compute positions of
        multimodal RoPE: call :func:`~sparsight.engine.positions.prompt_positions` first.

        Args:
            inputs: what the processor returned for one prompt, on the model's device.
            media: what :meth:`media` returned for them.
            skip: how many of the first images of each modality are not needed. A modality that needs none has None.
        """
        media = self.media(inputs) if media is None else media
        skip = skip or {}
        encoded = {modality: self._encode(each, skip.get(modality, 0)) for modality, each in media.items()}
        used = {name for _, _, arguments in self._arguments(inputs) for name in arguments}
        prompt = {name: value for name, value in inputs.items() if name not in used}
        return prompt | {"mm_encoder_outputs": encoded} if encoded else prompt

    def _encode(self, media: Media, skip: int) -> VisionFeatures | None:
        """Features of all images but the first ``skip``; only those that are not in the cache are computed."""
        keys, images = media.keys[skip:], media.images[skip:]
        if not keys:
            return None
        entries = {key: entry for key in keys if (entry := self._get(key)) is not None}
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in entries}
        with self._lock:
            self.hits += len(keys) - len(missing)
            self.misses += len(missing)
        if missing:
            for key, entry in zip(missing, self._run(media.encoder, list(missing.values()), media.sizes), strict=True):
                entries[key] = entry
                self._put(key, entry)
        pooled, *deepstack = zip(*(entries[key].layers for key in keys), strict=True)
        return VisionFeatures(
            pooler_output=torch.cat(pooled)[None] if entries[keys[0]].stacked else pooled,
            deepstack_features=deepstack or None,
            visual_indicator_features=self._visual_indicator_features,
        )

    def learn(self, tokens: Mapping[bytes, int]) -> None:
        """Remember numbers of vision tokens of images, by their keys."""
        with self._lock:
            self._tokens |= tokens
            while len(self._tokens) > KNOWN_IMAGES:
                self._tokens.popitem(last=False)

    def tokens_of(self, media: Media) -> list[int]:
        """Numbers of vision tokens of the first images, up to one that was not encoded before."""
        with self._lock:
            known = [self._tokens.get(key) for key in media.keys]
        return [count for count in takewhile(lambda count: count is not None, known) if count is not None]

    def _run(self, encoder: Any, images: list[dict[str, Any]], sizes: Sizes) -> list[_Entry]:
        output = encoder(**_join(images, sizes), return_dict=True)
        self._visual_indicator_features = getattr(output, "visual_indicator_features", None)
        layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        if len(images) == 1 or "pixel_attention_mask" in images[0]:
            # One image may have several parts. Idefics3's tower returns all tiles as one; they are of one size.
            layers = [_flat(layer).chunk(len(images)) for layer in layers]
        elif len(output.pooler_output) != len(images):
            return [entry for image in images for entry in self._run(encoder, [image], sizes)]
        stacked = isinstance(output.pooler_output, Tensor)
        # Copies, as the features of all images lie in one tensor.
        return [_Entry(tuple(_flat([layer]) for layer in image), stacked) for image in zip(*layers, strict=True)]

    def _get(self, key: bytes) -> _Entry | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def _put(self, key: bytes, entry: _Entry) -> None:
        self.learn({key: len(entry.layers[0])})
        with self._lock:
            if key in self._entries or entry.nbytes > self.max_bytes:
                return
            self._entries[key] = entry
            self.nbytes += entry.nbytes
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._entries.popitem(last=False)[1].nbytes


def vision_places(config: Any, media: Collection[str], modality: str, input_ids: Tensor) -> Tensor:
    """Indices of the vision tokens of one modality in a prompt ``[1, T]`` that has the given ones."""
    # GLM-4V's video frames have image tokens; no prompt of it has both.
    alone = len(media) == 1
    tokens = FAMILIES[config.model_type].token_ids(config) if alone else [getattr(config, f"{modality}_token_id")]
    return torch.isin(input_ids[0], input_ids.new_tensor(tokens)).nonzero()[:, 0]


def slice_features(
    config: Any,
    encoded: Mapping[str, VisionFeatures | None],
    input_ids: Tensor,
    start: int,
    stop: int,
    skipped: Mapping[str, int] | None = None,
) -> dict[str, VisionFeatures]:
    """The ``mm_encoder_outputs`` of a chunk of a prompt: the features of its vision tokens.

    Args:
        config: the model's config.
        encoded: ``mm_encoder_outputs`` of the prompt.
        input_ids: the prompt, ``[1, T]``.
        start: the chunk's first token.
        stop: the first token after the chunk.
        skipped: how many of the first vision tokens of each modality have no features in ``encoded``.
    """
    chunk = {}
    for modality, features in encoded.items():
        places = vision_places(config, encoded, modality, input_ids) - start
        first = (skipped or {}).get(modality, 0)
        part = slice(int((places < 0).sum()) - first, int((places < stop - start).sum()) - first)
        if features is not None and part.start < part.stop:
            deepstack = features.deepstack_features and [_slice(layer, part) for layer in features.deepstack_features]
            chunk[modality] = VisionFeatures(
                pooler_output=_slice(features.pooler_output, part),
                deepstack_features=deepstack,
                visual_indicator_features=features.visual_indicator_features,
            )
    return chunk


def _slice(features: Any, part: slice) -> Any:
    """Some tokens of all images' features, in the same kind of container."""
    tokens = _flat(features)[part]
    return tokens[None] if isinstance(features, Tensor) else [tokens]


def _flat(features: Any) -> Tensor:
    """Features of images, a tensor or a list, as ``[tokens, D]``."""
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in features])


def _sizes(arguments: Mapping[str, Any]) -> Sizes:
    """How an encoder's arguments are split into images, or into tiles where those are encoded independently.

    The result is empty if the images belong together.
    """
    (name,) = (name for name in arguments if name.startswith("pixel_values"))
    pixels = arguments[name]
    for description, sizes in arguments.items():
        if description.endswith("grid_thw"):
            return {name: (0, sizes.prod(-1).tolist()), description: (0, [1] * len(sizes))}
        if description.startswith("target_sizes"):
            areas = sizes.prod(-1).tolist()
            side = pixels.shape[-1] // sum(areas)
            return {name: (-1, [side * area for area in areas]), description: (0, [1] * len(sizes))}
    if max(arguments.get("batch_num_images", [1])) > 1:
        return {}
    dim = 1 if "pixel_attention_mask" in arguments else 0
    count = pixels.shape[dim]
    return {
        other: (dim, [1] * count)
        for other, value in arguments.items()
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[dim] == count
    }


def _split(arguments: Mapping[str, Any], sizes: Sizes) -> list[dict[str, Any]]:
    parts = [arguments[name].split(lengths, dim) for name, (dim, lengths) in sizes.items()]
    images = [dict(zip(sizes, image, strict=True)) for image in zip(*parts, strict=True)] or [{}]
    return [{**arguments, **image} for image in images]


def _join(images: list[dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    return images[0] | {name: torch.cat([image[name] for image in images], dim) for name, (dim, _) in sizes.items()}


def _key(encoder: str, arguments: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(encoder.encode())
    for name, value in sorted(arguments.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.digest()
