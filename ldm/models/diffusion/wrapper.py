"""How a condition reaches the network: joined to its input, as context, as labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.modules.prompt_cache import once
from taming.util import instantiate_from_config, nearest

# entries of a batch that hold conditions: texts, and numbers of classes
TEXT_KEYS = ("caption", "txt")
CLASS_KEYS = ("class_label", "cls")


class Route(NamedTuple):
    """Where a condition enters the network: joined to the input's channels, as context, as labels."""

    concat: bool = False
    context: bool = False
    y: str | None = None  # the argument that carries labels or vectors


ROUTES: dict[str | None, Route] = {
    None: Route(),
    "concat": Route(concat=True),
    "crossattn": Route(context=True),
    "hybrid": Route(concat=True, context=True),
    "adm": Route(y="c_crossattn"),
    "hybrid-adm": Route(concat=True, context=True, y="c_adm"),
    "crossattn-adm": Route(context=True, y="c_adm"),
}


class DiffusionWrapper(nn.Module):
    """The network, and how a condition reaches it.

    Args:
        diff_model_config: of the network; a key `sequential_crossattn` hands the list of contexts on as it is.
        conditioning_key: one of `ROUTES`.

    Raises:
        AssertionError: unknown conditioning key (the published error class).
    """

    def __init__(self, diff_model_config: Any, conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in ROUTES:
            raise AssertionError(
                f"conditioning_key={conditioning_key!r} is unknown. {nearest(str(conditioning_key), map(str, ROUTES))}"
            )
        self.sequential_cross_attn = diff_model_config.pop("sequential_crossattn", False)
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x: noisy input (b, c, h, w).
            t: steps (b,).
            c_concat: images of x's size, joined to its channels.
            c_crossattn: contexts (b, n, d), joined along n.
            c_adm: vectors (b, d) or labels (b,).

        Raises:
            AssertionError: a part of the condition is missing (the published error class).
            ValueError: images of another size, or of the wrong number of channels in all; contexts of different widths.
        """
        route = ROUTES[self.conditioning_key]
        given: dict[str, Any] = {"c_concat": c_concat, "c_crossattn": c_crossattn, "c_adm": c_adm}
        uses = {
            "c_concat": route.concat,
            "c_crossattn": route.context or route.y == "c_crossattn",
            "c_adm": route.y == "c_adm",
        }
        for name, is_needed in uses.items():
            if is_needed and given[name] is None:
                held = [n for n, v in given.items() if v is not None]
                raise AssertionError(
                    f"conditioning_key={self.conditioning_key!r} needs {name}, but the condition holds {held}"
                )
        if route.concat:
            x = self._joined(x, given["c_concat"])
        arguments: dict[str, Any] = {}
        if route.context:
            contexts = list(given["c_crossattn"])
            arguments["context"] = contexts if self.sequential_cross_attn else self._context(contexts)
        if route.y is not None:
            arguments["y"] = given["c_adm"] if route.y == "c_adm" else given["c_crossattn"][0]
        scripted: Any = getattr(self, "scripted_diffusion_model", None)
        if scripted is not None:
            return scripted(x, t, *arguments.values())
        return self.diffusion_model(x, t, **arguments)

    def _context(self, contexts: Sequence[Tensor]) -> Tensor:
        """Contexts in a row; the same tensor for the same contexts, so that layers need not compute its keys anew."""
        if len({(*c.shape[:1], *c.shape[2:]) for c in contexts}) > 1:
            raise ValueError(
                f"c_crossattn {[tuple(c.shape) for c in contexts]} cannot be joined to one context: all need the same batch and width"
            )
        return contexts[0] if len(contexts) == 1 else once(self, lambda *c: torch.cat(c, dim=1), *contexts)

    def _joined(self, x: Tensor, images: Sequence[Tensor]) -> Tensor:
        shapes = [tuple(c.shape) for c in images]
        if any(c.shape[2:] != x.shape[2:] or len(c) != len(x) for c in images):
            raise ValueError(
                f"c_concat {shapes} cannot be joined to an input of {tuple(x.shape)}: batch, height and width must be the same"
            )
        joined = torch.cat([x, *images], dim=1)
        expected = getattr(self.diffusion_model, "in_channels", joined.shape[1])
        if joined.shape[1] != expected:
            raise ValueError(
                f"the network takes {expected} channels, but the input has {x.shape[1]} and c_concat {shapes}: "
                f"{joined.shape[1]} in all; set unet_config.params.in_channels to that, or mend the condition"
            )
        return joined
