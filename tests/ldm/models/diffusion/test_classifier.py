import copy

import pytest
import torch
from omegaconf import OmegaConf

from ldm.models.diffusion.classifier import NoisyLatentImageClassifier, natural


def folder(tmp_path, tiny, cond_stage_key="class_label", stamp="2022-01-01", **params):
    unet = {"use_spatial_transformer": False, "context_dim": None, "num_head_channels": 16, "num_heads": -1}
    options = {"first_stage_config": tiny.kl, "timesteps": 20, "unet": unet, **params}
    config = tiny.latent_diffusion(
        cond_stage_config="__is_unconditional__", cond_stage_key=cond_stage_key, **options
    )
    (tmp_path / "configs").mkdir(exist_ok=True)
    OmegaConf.save(
        OmegaConf.create({"model": copy.deepcopy(config)}), tmp_path / "configs" / f"{stamp}-project.yaml"
    )
    return tmp_path


@pytest.fixture
def classifier(tmp_path, tiny):
    pixels = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    model = NoisyLatentImageClassifier(
        folder(tmp_path, tiny, first_stage_config=pixels), num_classes=3, log_steps=2
    )
    model.learning_rate = 3e-3
    return model


def batch(n=6):
    labels = torch.arange(n) % 3
    images = (labels.float() - 1).reshape(-1, 1, 1, 1) + 0.1 * torch.randn(n, 8, 8, 3)
    return {"image": images, "class_label": labels}


def test_a_classifier_learns_to_tell_noisy_latents_apart_and_leaves_the_diffusion_model_alone(classifier):
    frozen = copy.deepcopy(classifier.diffusion_model.state_dict())
    optimizer = classifier.configure_optimizers()
    classifier.train().on_train_epoch_start()
    for _ in range(40):
        loss = classifier.training_step(batch(), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    classifier.eval().on_validation_start()
    classifier.validation_step(batch(60), 0)
    assert classifier.noisy_acc[0]["acc@1"][0] > 0.9  # chance is 1/3
    assert list(classifier.noisy_acc) == [0, 10] and classifier.noisy_acc[10]["acc@5"] == [1.0]
    assert all(torch.equal(v, frozen[k]) for k, v in classifier.diffusion_model.state_dict().items())
    assert not classifier.diffusion_model.train().training


def test_the_newest_configuration_counts_in_natural_order(tmp_path, tiny):
    for stamp, scale in (("2022-1-10", 0.25), ("2022-1-9", 9.0)):
        folder(tmp_path, tiny, stamp=stamp, scale_factor=scale)
    assert NoisyLatentImageClassifier(tmp_path, num_classes=3).diffusion_model.scale_factor == 0.25
    assert sorted(["run10", "run9", "run100"], key=natural) == ["run9", "run10", "run100"]


def test_top_k_counts_the_labels_among_the_k_likeliest(classifier):
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.1, 0.7]])
    labels = torch.tensor([2, 0])
    assert classifier.compute_top_k(logits, labels, 1) == 0.5
    assert classifier.compute_top_k(logits, labels, 2, reduction="none").tolist() == [1.0, 1.0]
    assert classifier.compute_top_k(logits, labels, 5) == 1.0
    with pytest.raises(ValueError, match="choose 'mean' or 'none'"):
        classifier.compute_top_k(logits, labels, 1, reduction="sum")


def test_pictures_show_what_is_seen_in_the_noise(classifier):
    log = classifier.log_images(batch(), N=2)
    assert list(log) == ["inputs", "labels", "inputs@t0", "pred@t0", "inputs@t10", "pred@t10"]
    assert all(pictures.shape == (2, 3, 8, 8) for pictures in log.values())


def test_maps_of_labels_are_learnt_in_the_latents_size(tmp_path, tiny):
    model = NoisyLatentImageClassifier(folder(tmp_path, tiny, cond_stage_key="segmentation"), num_classes=4)
    maps = torch.nn.functional.one_hot(torch.randint(0, 4, (2, 16, 16)), 4)
    given = {"image": torch.randn(2, 16, 16, 3), "segmentation": maps}
    assert torch.equal(model.get_conditioning(given), maps[:, ::2, ::2].permute(0, 3, 1, 2))
    loss, logits, x_noisy, targets = model.shared_step(given, t=3)
    assert logits.shape == (2, 4, 8, 8) and targets.shape == (2, 8, 8) and x_noisy.shape == (2, 3, 8, 8)
    loss.backward()
    assert model.log_images(given, N=1)["labels"].shape == (1, 3, 16, 16)


def test_a_saved_classifier_gives_the_same_answers(tmp_path, tiny, classifier):
    for p in classifier.model.parameters():
        p.data.normal_(0, 0.1)
    path = tmp_path / "classifier.ckpt"
    torch.save({"state_dict": classifier.state_dict()}, path)
    loaded = NoisyLatentImageClassifier(tmp_path, num_classes=3, ckpt_path=str(path))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 15])
    assert torch.equal(loaded.eval()(x, t), classifier.eval()(x, t))


def test_a_classifier_may_have_a_learning_rate_multiplier(tmp_path, tiny):
    multiplier = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {
            "warm_up_steps": [10],
            "f_min": [1.0],
            "f_max": [1.0],
            "f_start": [0.0],
            "cycle_lengths": [100],
        },
    }
    model = NoisyLatentImageClassifier(folder(tmp_path, tiny), num_classes=3, scheduler_config=multiplier, weight_decay=0.5)  # fmt: skip
    model.learning_rate = 1.0
    (optimizer,), (scheduler,) = model.configure_optimizers()
    assert optimizer.param_groups[0]["weight_decay"] == 0.5 and optimizer.param_groups[0]["lr"] == 0.0
    assert scheduler["interval"] == "step"


def test_a_folder_without_configuration_or_labels_of_another_kind_are_refused(tmp_path, tiny):
    with pytest.raises(FileNotFoundError, match="give the log folder"):
        NoisyLatentImageClassifier(tmp_path, num_classes=3)
    with pytest.raises(NotImplementedError, match=r"label_key='caption'.*'class_label', 'segmentation'"):
        NoisyLatentImageClassifier(folder(tmp_path, tiny, cond_stage_key="caption"), num_classes=3)
