"""Draw with any model of the library: text, classes or nothing; latent diffusion, token transformers, or an engine of sgm.

    python scripts/sample.py --ckpt logs/<run> --prompt "red heart"
    python scripts/sample.py --ckpt models/ldm/cin256 --class 207 --class 360 --steps 100
    python scripts/sample.py --config configs/inference/sd_xl_base.yaml --ckpt sd_xl_base_1.0.safetensors --prompt "…"
    python scripts/sample.py --ckpt models/ldm/semantic_synthesis256 --cond labels.png

What the model reads decides which of --prompt, --class and --cond it wants. The i-th picture has the seed SEED + i, whatever is drawn
beside it (token transformers: SEED for all). Pictures go to OUTDIR/samples/00000.png, … and a grid to OUTDIR/grid-0000.png; nothing
there is overwritten. Values of the configuration are overridden by a.b=c.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout first, whatever else owns `ldm`

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning import seed_everything
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from tqdm import trange

from ldm import inference, inference_images
from ldm.inference import CLASS_KEYS, TEXT_KEYS, InferenceError
from ldm.inference_images import Finished
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.sampling_util import draw, sources
from scripts import flags
from scripts.sample_fast import latent_shape
from taming.models.cond_transformer import Net2NetTransformer
from taming.training.arguments import split_overrides

ENGINE, DRAWING_ENGINE = "sgm.models.diffusion.DiffusionEngine", "sgm.models.notebook.DiffusionModel"
MAPS = "segmentation"  # condition keys of models that read a picture of labels
# sides of pictures by what an engine reads and has: SDXL reads sizes; first stages of factor 8 are those of Stable Diffusion
SIDE_WITH_SIZES, SIDE_OF_FACTOR = 1024, {8: 512}


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = flags.add_text_arguments(parser)
    what.add_argument(
        "--class",
        dest="labels",
        type=int,
        action="append",
        metavar="NUMBER",
        help="a class; several alternate",
    )
    what.add_argument("--cond", metavar="FILE", help="a picture of labels, one number a pixel")
    flags.add_model_arguments(parser)
    way = parser.add_argument_group("sampling")
    way.add_argument("--steps", "--ddim_steps", dest="steps", type=int, help="default: the model's, or 50")
    way.add_argument("--sampler", help="by name; default: the model's own")
    way.add_argument(
        "--eta", "--ddim_eta", dest="eta", type=float, help="noise of the sampler; default: its own"
    )
    flags.add_token_arguments(parser)
    flags.add_size_arguments(parser)
    flags.add_output_arguments(parser, "outputs/samples")
    parser.set_defaults(n_samples=4, n_iter=1)
    return parser


def labels_of(opt: argparse.Namespace, first: int) -> list[int]:
    """The classes of a batch whose first picture has that number.

    Raises:
        InferenceError: none is named.
    """
    if not opt.labels:
        raise InferenceError("this model draws classes: name one or more with --class NUMBER")
    return [opt.labels[(first + i) % len(opt.labels)] for i in range(opt.n_samples)]


def prompt_of(opt: argparse.Namespace) -> str:
    """The prompt.

    Raises:
        InferenceError: there is none.
    """
    if opt.prompt is None:
        raise InferenceError("this model reads a text: give it with --prompt")
    return str(opt.prompt)


class LatentDrawer:
    """Draws with a latent diffusion model: text, class, a map of labels, or nothing.

    Args:
        model: the model.
        opt: the flags.

    Raises:
        InferenceError: a condition that the flags do not give.
    """

    def __init__(self, model: Any, opt: argparse.Namespace) -> None:
        self.model, self.opt, self.key = model, opt, model.cond_stage_key
        self.reads = model.model.conditioning_key is not None
        name, _ = inference.make_sampler(model, opt.sampler)
        self.details = {"sampler": name, "steps": opt.steps or 50, "eta": opt.eta or 0.0}
        if self.reads and self.key not in (*TEXT_KEYS, *CLASS_KEYS, MAPS):
            raise InferenceError(
                f"this {type(model).__name__} reads {self.key!r}; see scripts/ for inpaint.py, depth2img.py and superresolution.py"
            )
        self.map = self.encoded_map() if self.reads and self.key == MAPS else None

    def encoded_map(self) -> Tensor:
        """The map of labels as a condition: one channel for each label.

        Raises:
            InferenceError: it is missing, or holds a label that the model does not know.
        """
        if not self.opt.cond:
            raise InferenceError("this model reads a map of labels: give a picture of them with --cond FILE")
        inference_images.open_picture(self.opt.cond, "--cond")  # a missing file is a sentence
        labels = torch.from_numpy(np.asarray(Image.open(self.opt.cond).convert("L")).astype(np.int64))
        side, _ = inference.image_size(self.model)
        size = (self.opt.H or side, self.opt.W or side)
        mapper = getattr(self.model.cond_stage_model, "channel_mapper", None)
        if mapper is None:
            raise InferenceError(
                f"how many labels a {type(self.model.cond_stage_model).__name__} reads is not known; only those of a SpatialRescaler are"
            )
        count = mapper.in_channels
        if int(labels.max()) >= count:
            raise InferenceError(
                f"--cond {self.opt.cond}: label {int(labels.max())} in a picture for {count} labels"
            )
        maps = F.one_hot(labels, count).permute(2, 0, 1)[None].float()
        return self.model.get_learned_conditioning(F.interpolate(maps, size).to(self.model.device))

    def __call__(self, first: int) -> tuple[list[Image.Image], list[str]]:
        """A batch whose first picture has that number, and what each shows."""
        opt, text = self.opt, None
        condition: Any = self.map
        shown = [""] * opt.n_samples
        if self.reads and self.key in TEXT_KEYS:
            text = [prompt_of(opt)] * opt.n_samples
            shown = text
        elif self.reads and self.key in CLASS_KEYS:
            condition = labels_of(opt, first)
            shown = [f"class {label}" for label in condition]
        per = 1 if text or isinstance(condition, list) else opt.n_samples
        made = self.model.generate(
            text, opt.steps or 50, opt.scale, condition=condition, num_images=per, negative_prompt=opt.negative_prompt,
            height=opt.H, width=opt.W, sampler=opt.sampler, eta=opt.eta or 0.0, generator=opt.seed + first, dtype=precision_of(opt),
        )  # fmt: skip
        return made if isinstance(made, list) else [made], shown


class TokenDrawer:
    """Draws with a token transformer: text, class, or nothing.

    Args:
        model: the model.
        opt: the flags.

    Raises:
        InferenceError: a condition that is neither, or a flag of diffusion models.
    """

    def __init__(self, model: Any, opt: argparse.Namespace) -> None:
        self.model, self.opt = model, opt
        self.key = None if model.be_unconditional else model.cond_stage_key
        flags_of_diffusion = ("sampler", "eta", "steps", "H", "W", "lora", "negative_prompt")
        foreign = [name for name in flags_of_diffusion if getattr(opt, name)]
        if foreign:
            raise InferenceError(f"--{foreign[0]} is for diffusion models; this is a token transformer")
        if self.key not in (None, *TEXT_KEYS, *CLASS_KEYS):
            raise InferenceError(
                f"this transformer reads {self.key!r}: scripts/make_samples.py and sample_conditional.py draw with it"
            )
        self.latent = latent_shape(model)
        self.guidance = 1.0 if opt.scale is None or model.null_cond is None else opt.scale
        self.details = {
            "sampler": "tokens",
            "top_k": opt.top_k,
            "top_p": opt.top_p,
            "temperature": opt.temperature,
        }

    def condition(self, first: int) -> tuple[Tensor, list[str]]:
        """Condition tokens of a batch, and what its pictures show."""
        model, count = self.model, self.opt.n_samples
        if self.key in TEXT_KEYS:
            shown = [prompt_of(self.opt)] * count
            return model.condition_tokens(shown), shown
        if self.key is None:
            return model.condition_tokens().repeat(count, 1), [""] * count
        labels = labels_of(self.opt, first)
        tokens = model.encode_to_c(torch.tensor(labels, device=model.device))[1].reshape(count, -1)
        return tokens, [f"class {label}" for label in labels]

    @torch.no_grad()
    def __call__(self, first: int) -> tuple[list[Image.Image], list[str]]:
        """A batch whose first picture has that number, and what each shows."""
        opt = self.opt
        cond, shown = self.condition(first)
        with inference.precision_scope(self.model.device, opt.precision, opt.bf16), self.model.ema_scope():
            codes = self.model.sample(
                cond[:, :0], cond, self.latent[1] * self.latent[2], opt.temperature, True, opt.top_k, guidance=self.guidance,
                top_p=opt.top_p, progress=True,
            )  # fmt: skip
            images = self.model.decode_to_img(codes, (len(cond), *self.latent))
        return as_pictures(images), shown


class EngineDrawer:
    """Draws with an engine of sgm.

    Args:
        model: a `sgm.models.notebook.DiffusionModel`.
        opt: the flags.
        config: the model's.

    Raises:
        InferenceError: a condition that the flags do not give, or an unknown size.
    """

    def __init__(self, model: Any, opt: argparse.Namespace, config: Any) -> None:
        self.model, self.opt = model, opt
        self.keys = list(
            dict.fromkeys(k for e in model.conditioner.embedders for k in [e.input_key] if k is not None)
        )
        encoder = getattr(model.first_stage_model, "encoder", None)
        self.factor = 1 if encoder is None else 2 ** (encoder.num_resolutions - 1)
        self.size = self.find_size(config)
        self.channels = model.model.diffusion_model.out_channels
        self.details = {"sampler": opt.sampler, "steps": opt.steps, "eta": opt.eta}

    def find_size(self, config: Any) -> tuple[int, int]:
        """Height and width in pixels.

        Raises:
            InferenceError: nothing tells, or the first stage cannot make it.
        """
        trained = OmegaConf.select(config, "data.params.train.params.size")
        side = (
            SIDE_WITH_SIZES
            if "target_size_as_tuple" in self.keys
            else trained or SIDE_OF_FACTOR.get(self.factor)
        )
        if side is None and not (self.opt.H and self.opt.W):
            raise InferenceError("the configuration does not tell the size of the pictures: give --H and --W")
        height, width = int(self.opt.H or side), int(self.opt.W or side)
        if height % self.factor or width % self.factor:
            raise InferenceError(
                f"{width}x{height} pixels: width and height must be multiples of {self.factor}, the factor of the first stage"
            )
        return height, width

    def entries(self, first: int) -> tuple[dict[str, Any], list[str]]:
        """A batch for the embedders, and what its pictures show.

        Raises:
            InferenceError: an entry that the flags do not give.
        """
        size, shown = list(self.size), [""] * self.opt.n_samples
        batch: dict[str, Any] = {}
        sizes = {
            "original_size_as_tuple": size, "target_size_as_tuple": size, "crop_coords_top_left": [0, 0], "aesthetic_score": [6.0],
        }  # fmt: skip
        for key in self.keys:
            if key in TEXT_KEYS:
                batch[key] = shown = [prompt_of(self.opt)] * self.opt.n_samples
            elif key in CLASS_KEYS:
                labels = labels_of(self.opt, first)
                batch[key], shown = torch.tensor(labels), [f"class {label}" for label in labels]
            elif key in sizes:
                batch[key] = torch.tensor([sizes[key]], dtype=torch.float32)
            else:
                raise InferenceError(
                    f"this engine reads {self.keys}, and no flag gives {key!r}; for videos see scripts/sampling/"
                )
        return batch, shown

    @torch.no_grad()
    def __call__(self, first: int) -> tuple[list[Image.Image], list[str]]:
        """A batch whose first picture has that number, and what each shows."""
        opt, model = self.opt, self.model
        batch, shown = self.entries(first)
        seeds = sources([opt.seed + first + i for i in range(opt.n_samples)], opt.n_samples)
        shape = (opt.n_samples, self.channels, *(side // self.factor for side in self.size))
        noise = draw(shape, model.device, seeds)
        negative = {k: [opt.negative_prompt] * opt.n_samples for k in batch if k in TEXT_KEYS}
        with inference.precision_scope(model.device, opt.precision, opt.bf16):
            latents = model.sample_latents(
                noise, batch or None, opt.steps, opt.scale, sampler=opt.sampler, eta=opt.eta, generator=seeds, progress=True,
                unconditional={**batch, **negative} if opt.negative_prompt else None,
            )  # fmt: skip
            images = model.decode_first_stage(latents * model.scale_factor)
        return as_pictures(images), shown


def as_pictures(images: Tensor) -> list[Image.Image]:
    """(b, 3 or 1, h, w) in [-1, 1] → pictures."""
    pixels = ((images.float() + 1.0) / 2.0).clamp(0.0, 1.0)
    return [inference.to_image(image.expand(3, -1, -1)) for image in pixels]


def precision_of(opt: argparse.Namespace) -> torch.dtype | None:
    """The flags of precision as `generate` takes them."""
    return torch.bfloat16 if opt.bf16 else torch.float32 if opt.precision == "full" else None


def make_drawer(model: Any, opt: argparse.Namespace, config: Any) -> Any:
    """What draws with the model.

    Raises:
        InferenceError: nothing can be drawn with it.
    """
    if config.model.target == DRAWING_ENGINE:
        return EngineDrawer(model, opt, config)
    for kind, drawer in ((LatentDiffusion, LatentDrawer), (Net2NetTransformer, TokenDrawer)):
        if isinstance(model, kind):
            return drawer(model, opt)
    raise InferenceError(f"this is a {type(model).__name__}: it encodes pictures, and draws none of its own")


def run(opt: argparse.Namespace, overrides: list[str]) -> Finished:
    """Load, draw, save."""
    if opt.n_samples < 1 or opt.n_iter < 1:
        raise InferenceError(f"--n_samples {opt.n_samples} --n_iter {opt.n_iter}: both must be at least 1")
    flags.name_model(opt)
    device = inference.choose_device(opt.device)
    # an engine is built as the class with short calls
    model, path, config = inference.load_model(
        opt.ckpt, opt.config, device, overrides, {ENGINE: DRAWING_ENGINE}
    )
    drawer = make_drawer(model, opt, config)
    lora = flags.add_adapters(model, opt)
    common = inference_images.described(
        path, negative_prompt=opt.negative_prompt or None, scale=opt.scale, config=opt.config, lora=lora, **drawer.details
    )  # fmt: skip
    gallery = flags.make_gallery(opt, common)
    seed_everything(opt.seed, verbose=False)
    with gallery.until_stopped():
        for _ in trange(opt.n_iter, desc="Sampling", disable=opt.n_iter == 1):
            made, shown = drawer(gallery.count)
            for image, text in zip(made, shown, strict=True):
                own = opt.seed if isinstance(drawer, TokenDrawer) else opt.seed + gallery.count
                gallery.add(to_tensor(image), text, seed=own)
    gallery.close()
    return gallery


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    overrides, given = split_overrides(sys.argv[1:] if argv is None else argv)
    opt = get_parser().parse_args(given)
    return inference_images.report(lambda: run(opt, overrides))


if __name__ == "__main__":
    sys.exit(main())
