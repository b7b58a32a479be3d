"""The originals' import paths: present, and aliases are the very objects of their home."""

import importlib
import subprocess
import sys

import pytest

# path of the original → (where it lives, names)
ALIASES = {
    "main": ("taming.training", "DataModuleFromConfig ImageLogger SetupCallback CUDACallback instantiate_from_config get_obj_from_str WrappedDataset worker_init_fn"),
    "ldm.util": ("taming.util", "instantiate_from_config get_obj_from_str exists default count_params"),
    "ldm.lr_scheduler": ("taming.lr_scheduler", "LambdaWarmUpCosineScheduler"),
    "sgm.lr_scheduler": ("ldm.lr_scheduler", "LambdaLinearScheduler LambdaWarmUpCosineScheduler2 LambdaWarmUpCosineScheduler"),
    "ldm.modules.ema": ("taming.modules.ema", "LitEma"),
    "sgm.modules.ema": ("taming.modules.ema", "LitEma"),
    "ldm.modules.attention": ("taming.modules.attention", "LinearAttention"),
    "ldm.modules.diffusionmodules.model": ("taming.modules.diffusionmodules.model", "Encoder Decoder Model ResnetBlock AttnBlock Upsample Downsample Normalize make_attn get_timestep_embedding nonlinearity"),
    "taming.modules.diffusionmodules.model": ("taming.modules.diffusionmodules.blocks", "ResnetBlock AttnBlock Upsample Downsample Normalize"),
    "ldm.modules.diffusionmodules.openaimodel": ("ldm.modules.diffusionmodules.unet_blocks", "ResBlock AttentionBlock Upsample Downsample TimestepBlock QKVAttention QKVAttentionLegacy AttentionPool2d TransposedUpsample"),
    "ldm.modules.losses": ("ldm.modules.losses.contperceptual", "LPIPSWithDiscriminator"),
    "ldm.modules.losses.contperceptual": ("taming.modules.losses.vqperceptual", "DummyLoss VQLPIPSWithDiscriminator LPIPS NLayerDiscriminator weights_init adopt_weight hinge_d_loss vanilla_d_loss"),
    "ldm.models.diffusion.ddpm": ("ldm.models.diffusion.pixel", "DDPM"),
    "sgm.modules.distributions.distributions": ("ldm.modules.distributions.distributions", "DiagonalGaussianDistribution normal_kl"),
    "sgm.util": ("taming.util", "instantiate_from_config get_obj_from_str exists default count_params"),
    "sgm.modules.diffusionmodules.denoiser_weighting": ("sgm.modules.diffusionmodules.loss_weighting", "UnitWeighting EDMWeighting VWeighting EpsWeighting"),
    "sgm.modules.diffusionmodules.sampling": ("sgm.modules.diffusionmodules.sampler", "BaseDiffusionSampler SingleStepDiffusionSampler"),
    "sgm.modules.attention": ("ldm.modules.attention", "GEGLU FeedForward LinearAttention SpatialSelfAttention Normalize"),
    "sgm.modules.diffusionmodules.model": ("taming.modules.diffusionmodules.model", "Encoder Decoder"),
    "sgm.modules.diffusionmodules.openaimodel": ("ldm.modules.diffusionmodules.unet_blocks", "AttentionBlock Upsample Downsample Timestep TimestepBlock TimestepEmbedSequential"),
    "ldm.models": ("ldm.models.diffusion.ddpm", "LatentDiffusion DDPM"),
    "taming.models.vqgan": ("taming.modules.diffusionmodules.model", "Encoder Decoder"),
    "taming.modules.transformer.mingpt": ("taming.modules.transformer.sampling", "top_k_logits sample sample_with_past"),
    "taming.models.cond_transformer": ("taming.modules.util", "SOSProvider"),
}  # fmt: skip
REAL = {
    "taming.models": "VQModel Transformer",
    "taming.models.vqgan": "VQModel VQSegmentationModel VQNoDiscModel GumbelVQ EMAVQ VectorQuantizer GumbelQuantize EMAVectorQuantizer",
    "taming.models.cond_transformer": "Net2NetTransformer disabled_train",
    "taming.models.dummy_cond_stage": "DummyCondStage",
    "taming.modules.vqvae.quantize": "VectorQuantizer VectorQuantizer2 GumbelQuantize EmbeddingEMA EMAVectorQuantizer",
    "taming.modules.losses": "DummyLoss",
    "taming.modules.losses.segmentation": "BCELoss BCELossWithQuant",
    "taming.modules.misc.coord": "CoordStage",
    "taming.modules.transformer.mingpt": "GPTConfig GPT1Config CausalSelfAttention Block GPT DummyGPT CodeGPT KMeans",
    "taming.modules.transformer.permuter": "Identity Subsample ZCurve SpiralOut SpiralIn Random AlternateParsing",
    "taming.data.base": "ConcatDatasetWithIndex ImagePaths NumpyPaths",
    "taming.data.custom": "CustomBase CustomTrain CustomTest",
    "taming.data.faceshq": "CelebAHQTrain CelebAHQValidation FFHQTrain FFHQValidation FacesHQTrain FacesHQValidation",
    "taming.data.sflckr": "SegmentationBase Examples",
    "taming.data.coco": "CocoImagesAndCaptionsTrain CocoImagesAndCaptionsValidation Examples",
    "taming.data.ade20k": "ADE20kTrain ADE20kValidation Examples",
    "taming.data.imagenet": "ImageNetTrain ImageNetValidation ImageNetTrainWithDepth RINTrainWithDepth DRINExamples ImageNetScaleTrain ImageNetEdgesTrain ImagePaths download retrieve str_to_indices give_synsets_from_indices get_preprocessor imscale rgba_to_depth",
    "taming.data.utils": "unpack reporthook get_root is_prepared mark_prepared prompt_download download_url download_urls quadratic_crop custom_collate",
    "taming.data.helper_types": "Annotation Category ImageDescription BoundingBox SplitType CropMethodType",
    "taming.data.annotated_objects_coco": "AnnotatedObjectsCoco COCO_PATH_STRUCTURE",
    "taming.data.annotated_objects_open_images": "AnnotatedObjectsOpenImages OPEN_IMAGES_STRUCTURE",
    "taming.data.conditional_builder.objects_bbox": "ObjectsBoundingBoxConditionalBuilder",
    "taming.data.conditional_builder.objects_center_points": "ObjectsCenterPointsConditionalBuilder",
    "taming.modules.losses.lpips": "LPIPS ScalingLayer NetLinLayer vgg16 normalize_tensor spatial_average",
    "taming.modules.util": "ActNorm AbstractEncoder Labelator SOSProvider count_params",
    "taming.util": "download md5_hash get_ckpt_path KeyNotFoundError retrieve URL_MAP CKPT_MAP MD5_MAP",
    "ldm.models.autoencoder": "VQModel VQModelInterface AutoencoderKL IdentityFirstStage",
    "ldm.models.diffusion.ddpm": "DDPM LatentDiffusion DiffusionWrapper disabled_train",
    "ldm.lr_scheduler": "get_scheduler",
    "sgm": "AutoencodingEngine DiffusionEngine get_configs_path instantiate_from_config",
    "sgm.models": "AutoencodingEngine DiffusionEngine AutoencoderKL DiffusionModel",
    "sgm.modules": "GeneralConditioner UNCONDITIONAL_CONFIG",
    "sgm.data": "StableDataModuleFromConfig",
    "sgm.data.mnist": "MNISTLoader",
    "sgm.data.cifar10": "CIFAR10Loader",
    "sgm.models.autoencoder": "AbstractAutoencoder AutoencodingEngine AutoencodingEngineLegacy AutoencoderKL AutoencoderKLModeOnly AutoencoderLegacyVQ AutoencoderKLInferenceWrapper IdentityFirstStage AEIntegerWrapper",
    "sgm.models.diffusion": "DiffusionEngine",
    "sgm.modules.checkpoint": "CheckpointEngine",
    "sgm.modules.autoencoding.losses": "GeneralLPIPSWithDiscriminator LatentLPIPS",
    "sgm.modules.autoencoding.regularizers": "DiagonalGaussianRegularizer AbstractRegularizer",
    "sgm.modules.autoencoding.temporal_ae": "VideoDecoder",
    "sgm.modules.encoders.modules": "AbstractEmbModel GeneralConditioner ClassEmbedder ConcatTimestepEmbedderND FrozenCLIPEmbedder FrozenOpenCLIPEmbedder FrozenOpenCLIPEmbedder2 FrozenOpenCLIPImageEmbedder FrozenOpenCLIPImagePredictionEmbedder VideoPredictionEmbedderWithEncoder FrozenT5Embedder FrozenByT5Embedder SpatialRescaler LowScaleEncoder",
    "sgm.inference.api": "SamplingPipeline SamplingParams ModelArchitecture model_specs",
    "sgm.inference.helpers": "get_batch do_sample do_img2img Img2ImgDiscretizationWrapper",
    "sgm.modules.diffusionmodules.sampling": "EDMSampler EulerEDMSampler HeunEDMSampler AncestralSampler EulerAncestralSampler DPMPP2SAncestralSampler DPMPP2MSampler LinearMultistepSampler DPMPP2MSDESampler DPMPP3MSDESampler",
    "sgm.modules.diffusionmodules.guiders": "VanillaCFG IdentityGuider LinearPredictionGuider TrianglePredictionGuider TrapezoidPredictionGuider SpatiotemporalPredictionGuider",
    "sgm.modules.diffusionmodules.denoiser": "Denoiser DiscreteDenoiser",
    "sgm.modules.diffusionmodules.discretizer": "Discretization EDMDiscretization LegacyDDPMDiscretization",
    "sgm.modules.diffusionmodules.denoiser_scaling": "EDMScaling EpsScaling VScaling VScalingWithEDMcNoise",
    "sgm.modules.diffusionmodules.sigma_sampling": "EDMSampling DiscreteSampling ZeroSampler",
    "sgm.modules.diffusionmodules.loss": "StandardDiffusionLoss",
    "sgm.modules.diffusionmodules.wrappers": "OpenAIWrapper IdentityWrapper",
    "sgm.modules.diffusionmodules.video_model": "VideoUNet VideoResBlock SpatialUNetModelWithTime UNetModel ResBlock",
    "sgm.modules.video_attention": "SpatialVideoTransformer VideoTransformerBlock",
    "ldm.models.diffusion.ddim": "DDIMSampler",
    "ldm.models.diffusion.plms": "PLMSSampler",
    "ldm.models.diffusion.dpm_solver": "DPMSolverSampler",
    "ldm.models.diffusion.dpm_solver.dpm_solver": "NoiseScheduleVP DPM_Solver model_wrapper interpolate_fn expand_dims",
    "ldm.modules.encoders.modules": "AbstractEncoder ClassEmbedder TransformerEmbedder BERTTokenizer BERTEmbedder SpatialRescaler IdentityEncoder disabled_train",
    "ldm.modules.x_transformer": "Encoder TransformerWrapper",
    "ldm.modules.diffusionmodules.openaimodel": "UNetModel EncoderUNetModel Timestep TimestepEmbedSequential convert_module_to_f16 convert_module_to_f32",
}  # fmt: skip


@pytest.mark.parametrize("path", ALIASES)
def test_aliases_are_the_objects_of_their_home(path):
    home, names = ALIASES[path]
    there, here = importlib.import_module(path), importlib.import_module(home)
    for name in names.split():
        assert getattr(there, name) is getattr(here, name), name


@pytest.mark.parametrize("path", REAL)
def test_published_names_exist_under_their_paths(path):
    module = importlib.import_module(path)
    assert not [n for n in REAL[path].split() if not hasattr(module, n)]


@pytest.mark.parametrize(
    "module",
    ["taming.modules.diffusionmodules.model", "taming.modules.losses", "ldm.modules.diffusionmodules.openaimodel", "ldm.modules.encoders.modules", "ldm.modules.x_transformer", "sgm"],
)  # fmt: skip
def test_networks_import_without_hub_libraries_and_lightning(module):
    heavy = ("transformers", "open_clip", "pytorch_lightning", "torchvision", "diffusers")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
