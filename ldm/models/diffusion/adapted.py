"""A diffusion model that trains low-rank adapters: what becomes of its condition, its averages and its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.lora import Lora


class Adapted(pl.LightningModule):
    """The switch `lora_config` of a diffusion model.

        lora_config: {rank: 8, alpha: 8, targets: [to_q, to_k, to_v, to_out.0], text_encoder: true}

    Everything but the adapters is frozen; the options are those of `ldm.lora.inject`. In a checkpoint they lie beside
    `state_dict`, as `adapters`, so that it loads without LoRA as well, and next to it `lora.safetensors` is written: the
    adapters alone, in kohya's layout, as of the last checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora: Lora | None = None

    def prepare_adapters(self, config: Mapping[str, Any], options: dict[str, Any]) -> bool:
        """Switch the averages off, before anything is built; returns whether the condition's encoder is trained along.

        Raises:
            ValueError: averages are asked for.
        """
        if options.setdefault("use_ema", False):
            raise ValueError(
                "lora_config trains adapters, of which no average is kept: set use_ema to False. To start from averaged weights, "
                "convert the checkpoint with scripts/convert.py --ema."
            )
        return bool(config.get("text_encoder", False))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Move the adapters out of `state_dict`, and write them as a file of their own."""
        super().on_save_checkpoint(checkpoint)
        if self.lora is None:
            return
        state = checkpoint["state_dict"]
        checkpoint["adapters"] = {k: state.pop(k) for k in list(state) if k.startswith("lora.")}
        if self._trainer is not None and self.trainer.is_global_zero:
            folder = getattr(self.trainer.checkpoint_callback, "dirpath", None)
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                self.lora.save(Path(folder) / "lora.safetensors", self.lora_layout)

    @property
    def lora_layout(self) -> str:
        """Kohya's layout, with the blocks named as in diffusers where all have such a name."""
        adapters: Any = self.lora.values() if self.lora is not None else ()
        return "kohya-ldm" if any(a.place.theirs is None for a in adapters) else "kohya"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Move them back."""
        super().on_load_checkpoint(checkpoint)
        if self.lora is not None:
            checkpoint["state_dict"].update(checkpoint.get("adapters", {}))
