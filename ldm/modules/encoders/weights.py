"""Encoders with published weights, which come when they are first needed: from a checkpoint, a file or the hub."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taming.checkpoint import CheckpointError
from taming.modules.util import AbstractEncoder
from taming.util import freeze

logger = logging.getLogger(__name__)


class PretrainedEncoder(AbstractEncoder):
    """An encoder whose architecture is known before its weights are there.

    It builds without a download, on any device. A weight that nothing has filled yet has NaN as its first number, so
    whatever fills it (a checkpoint, an initialisation) is seen, and what is still empty at the first use is fetched.
    """

    _complete = False

    def network(self) -> nn.Module:
        """The part that has published weights."""
        raise NotImplementedError(f"{type(self).__name__} does not define network")

    def fetch_weights(self) -> Mapping[str, Tensor]:
        """The published weights, under the names of `network().state_dict()`; more names than those do no harm.

        Raises:
            OSError: they are neither here nor downloadable; the message says what to do.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define fetch_weights")

    def needs(self, name: str) -> bool:
        """Whether encoding reads this weight; one that it does not read is not worth a download."""
        return True

    def ensure_weights(self) -> None:
        """Fetch what is still empty; called before each encoding, and free once everything is there.

        Raises:
            OSError: see `fetch_weights`.
            CheckpointError: the published weights do not fit.
            RuntimeError: the module is on the meta device.
        """
        if self._complete:
            return
        network = self.network()
        if any(p.is_meta for p in network.parameters()):
            raise RuntimeError(
                f"{type(self).__name__} is on the meta device, which holds no numbers; build it on a real one"
            )
        empty = empty_weights(network)
        if any(self.needs(name) for name in empty):
            total = len(network.state_dict())
            if len(empty) < total / 2:
                logger.warning(
                    "%s: %d of %d weights were in no checkpoint (%s, …) and are fetched.",
                    type(self).__name__, len(empty), total, empty[0],
                )  # fmt: skip
            copy_weights(network, self.fetch_weights(), empty, type(self).__name__)
        self._complete = True

    def obtain(self, load: Callable[[], Any], what: str) -> Any:
        """The result of `load`, which may want a connection.

        Raises:
            OSError: it failed; the message says what to do.
        """
        try:
            return load()
        except (OSError, RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise OSError(
                f"{type(self).__name__} needs the {what}, and they could not be loaded ({reason}). Load a checkpoint that holds "
                "them, or fetch the model on a machine with a connection (hf download NAME) and give its folder or file as "
                "`version`."
            ) from error

    def freeze(self) -> None:
        """Eval mode and no gradients, for good."""
        freeze(self.network())
        self.requires_grad_(False)


class HubEncoder(PretrainedEncoder):
    """An encoder over a model of the hub's kind: `transformer`, and a `tokenizer` that is made at first use."""

    version: Any
    transformer: Any
    _tokenizer: Any = None

    def network(self) -> Any:
        """The transformer."""
        return self.transformer

    def load_folder(self) -> None:
        """Read weights and vocabulary at once where the version is a folder, which may be gone later."""
        is_folder = isinstance(self.version, str) and Path(self.version).is_dir()
        if is_folder and torch.get_default_device().type != "meta":
            self.ensure_weights()
            with contextlib.suppress(OSError):  # a folder of weights alone is fine until texts come
                self._tokenizer = self.make_tokenizer()

    def make_tokenizer(self) -> Any:
        """The version's tokenizer, from its folder or the hub.

        Raises:
            OSError: it is neither here nor downloadable.
        """
        from transformers import AutoTokenizer

        return self.obtain(
            lambda: AutoTokenizer.from_pretrained(self.version), f"tokenizer's files of {self.version!r}"
        )

    @property
    def tokenizer(self) -> Any:
        """What turns texts into ids, a tokenizer of transformers."""
        if self._tokenizer is None:
            self._tokenizer = self.make_tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer


def make_empty(network: nn.Module) -> None:
    """Move a network from the meta device to the default one, its weights marked as empty, its integers zero."""
    device = torch.get_default_device()
    if device.type == "meta":
        return
    network.to_empty(device=device)
    with torch.no_grad():
        # one number, not all: memory that nothing has touched costs nothing yet
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.view(-1)[0] = torch.nan
            else:
                tensor.zero_()


def empty_weights(network: nn.Module) -> list[str]:
    """Names of the weights that nothing has filled yet."""
    state = {k: v for k, v in network.state_dict().items() if v.is_floating_point() and v.numel()}
    if not state:
        return []
    first = torch.stack([v.view(-1)[0].float() for v in state.values()]).isnan()  # one question, not hundreds
    return [name for name, is_empty in zip(state, first.tolist(), strict=True) if is_empty]


@torch.no_grad()
def copy_weights(network: nn.Module, weights: Mapping[str, Tensor], names: list[str], owner: str) -> None:
    """Copy the named weights into a network, in place, so that optimizers keep their parameters.

    Raises:
        CheckpointError: a name is missing or has another shape (axes of length one apart).
    """
    own: dict[str, Any] = network.state_dict()
    lost = [n for n in names if n not in weights]
    wrong = [
        f"{n} is {tuple(weights[n].shape)} there and {tuple(own[n].shape)} here"
        for n in names
        if n in weights and weights[n].squeeze().shape != own[n].squeeze().shape
    ]
    if lost or wrong:
        raise CheckpointError(
            f"the published weights do not fit {owner}: "
            + "; ".join([*wrong[:3], *(f"{n} is missing" for n in lost[:3])])
        )
    for name in names:
        own[name].copy_(weights[name].reshape(own[name].shape))
