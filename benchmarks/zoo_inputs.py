"""Inputs, labels and a loss for a model of which only its forward's signature is known: what it accepts is tried."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from zoo_configs import IMAGE, POSITIONS, SPECIAL, arguments, parts

BATCH, LENGTH = 2, 12

Make = Callable[[Generator], Tensor]
"""Draws one input."""


@dataclass(frozen=True)
class Feed:
    """How each of a forward's arguments is drawn."""

    makes: Mapping[str, Make]

    def batch(self, *numbers: int) -> dict[str, Tensor]:
        """The same tensors for the same numbers."""
        generator = Generator().manual_seed(sum(n * 1000**i for i, n in enumerate(numbers)))
        return {name: make(generator) for name, make in self.makes.items()}


def tokens(config: PretrainedConfig, *shape: int) -> Make:
    """Ordinary ones, which every vocabulary of this configuration has."""
    sizes = [n for part in parts(config) if isinstance(n := getattr(part, "vocab_size", None), int) and n > 4]
    return lambda g: torch.randint(3, min([SPECIAL, *sizes]), shape, generator=g)


def classes(count: int, *shape: int) -> Make:
    return lambda g: torch.randint(0, count, shape, generator=g)


def floats(*shape: int) -> Make:
    return lambda g: torch.randn(shape, generator=g)


def ones(*shape: int) -> Make:
    return lambda _: torch.ones(shape, dtype=torch.long)


def mask(*shape: int) -> Make:
    return lambda g: torch.rand(shape, generator=g) < 0.5


def feeds(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[Feed]:
    """Candidates, the most plausible first."""
    known = arguments(model)
    for main in _mains(model, config):
        others = _others(known, main, config)
        for labels in _labels(known, main, config):
            yield Feed({**main, **others, **labels})
            if "decoder_input_ids" in known and "decoder_input_ids" not in others:
                yield Feed({**main, **others, "decoder_input_ids": tokens(config, BATCH, LENGTH), **labels})


def first(config: PretrainedConfig, names: Sequence[str], otherwise: int) -> int:
    """The first number under one of these names in a configuration or those inside it."""
    for name in names:
        for part in parts(config):
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return otherwise


def _mains(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[dict[str, Make]]:
    known, name = arguments(model), model.main_input_name
    if name not in known:
        name = next((n for n in ("input_ids", "pixel_values", "input_values", "input_features") if n in known), name)
    text = {"input_ids": tokens(config, BATCH, LENGTH)}
    bins = first(
        config,
        ("feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel", "feature_size", "input_size"),
        16,
    )
    frames = first(config, ("max_length", "max_source_positions"), POSITIONS)
    channels = first(config, ("num_channels", "in_channels", "in_chans"), 3)
    size = first(config, ("image_size", "img_size"), IMAGE)
    if name.startswith("pixel_values"):
        with_text = text if "input_ids" in known else {}
        count = first(config, ("num_frames",), 2)
        for side in (size, 2 * size, 64, 128, 224):
            yield {name: floats(BATCH, channels, side, side), **with_text}
            yield {name: floats(BATCH, count, channels, side, side), **with_text}
    elif name in ("input_values", "input_features"):
        for shape in ((bins, 2 * frames), (2 * frames, bins), (frames, bins), (bins, frames), (3200,), (1, 3200)):
            yield {name: floats(BATCH, *shape)}
        yield {name: floats(BATCH, 128, 16)}
    elif name.startswith("past_values"):
        length = first(config, ("context_length", "seq_length"), 16)
        width = first(config, ("num_input_channels", "input_size"), 1)
        for shape in ((length, width), (length,)):
            yield {name: floats(BATCH, *shape)}
    yield text
    if "pixel_values" in known and "input_ids" in known:
        yield {**text, "pixel_values": floats(BATCH, channels, size, size)}
    if "inputs_embeds" in known:
        yield {"inputs_embeds": floats(BATCH, LENGTH, first(config, ("hidden_size", "d_model"), 32))}


def _others(
    known: Mapping[str, inspect.Parameter], main: Mapping[str, Make], config: PretrainedConfig
) -> dict[str, Make]:
    """What a forward needs besides its main input, as far as it can be guessed."""
    made: dict[str, Make] = {}
    patches = (first(config, ("image_size",), IMAGE) // max(first(config, ("patch_size",), 8), 1)) ** 2
    rows = first(config, ("prediction_length",), 16)
    at_hand: dict[str, Make] = {
        "bool_masked_pos": mask(BATCH, patches), "future_values": floats(BATCH, rows), "bbox": ones(BATCH, LENGTH, 4),
        "decoder_input_ids": tokens(config, BATCH, LENGTH), "past_time_features": floats(BATCH, 16, 1),
        "past_observed_mask": ones(BATCH, 16), "attention_mask": ones(BATCH, LENGTH),
    }  # fmt: skip
    for name, parameter in known.items():
        needed = parameter.default is inspect.Parameter.empty
        if name in at_hand and name not in main and (needed or name in ("bool_masked_pos", "future_values")):
            made[name] = at_hand[name]
    return made


def _labels(
    known: Mapping[str, inspect.Parameter], main: Mapping[str, Make], config: PretrainedConfig
) -> Iterator[dict[str, Make]]:
    """Tokens, classes, a map of classes or of numbers, nothing."""
    if "labels" in known:
        if "input_ids" in main or config.is_encoder_decoder:
            yield {"labels": tokens(config, BATCH, LENGTH)}
        yield {"labels": classes(getattr(config, "num_labels", 2), BATCH)}
        if "input_ids" not in main:
            yield {"labels": tokens(config, BATCH, 3)}
            side = first(config, ("image_size",), IMAGE)
            yield {"labels": classes(2, BATCH, side, side)}
            yield {"labels": floats(BATCH, side, side)}
    yield {}


# ---------------------------------------------------------------- losses


def loss_of(output: object) -> Tensor:
    """The model's own loss; without one, the mean square of all that it returns.

    Raises:
        ValueError: nothing that it returns depends on parameters.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
        return loss.reshape(())
    found = [t.float().square().mean() for t in _tensors(output) if t.is_floating_point() and t.requires_grad]
    if not found:
        raise ValueError("no output depends on parameters")
    return torch.stack(found).mean()


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)


def accepted(model: PreTrainedModel, config: PretrainedConfig) -> Feed:
    """The first candidate that the model takes and makes a finite loss of.

    Raises:
        ValueError: it takes none; with what it said to the first.
    """
    first_error = ""
    for feed in feeds(model, config):
        try:
            loss = loss_of(model(**feed.batch(0, 0)))
            loss.backward()
            if loss.isfinite():
                return feed
            error = f"the loss is {loss.item()}"
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
        finally:
            model.zero_grad()
        first_error = first_error or error
    raise ValueError(f"takes no input that was tried; the first: {first_error}")


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
