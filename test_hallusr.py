"""Values and gradient directions against independent references; then the scripts as users do.

CPU, no network. What needs pretrained weights skips where torch.hub's cache does not have them.
"""
import csv
import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import save_image

import hallusr
import sample
import train
from hallusr import (LPIPS, Config, Discriminator, DownBlock, Generator, PerceptualLoss,
                     ResidualBlock, UpBlock)

HERE = Path(__file__).parent
TINY = dict(size=16, scale=4, z_dim=5, widths=(8, 6, 4), blocks=1, d_blocks=1, batch=2,
            perceptual="pixels")
TINY_FLAGS = ("--size 32 --scale 4 --z-dim 5 --widths 8,6,4 --blocks 1 --d-blocks 1 --batch 2 "
              "--steps 2 --warmup 0 --perceptual pixels --log-every 1 --val-every 2 --val-faces 4 "
              "--sketches 20 --device cpu --no-amp")
needs_lpips = pytest.mark.skipif(not LPIPS.at_hand(), reason="LPIPS weights are not in TORCH_HOME")
VGG_FILE = Path(torch.hub.get_dir()) / "checkpoints/vgg16-397923af.pth"
needs_vgg = pytest.mark.skipif(not VGG_FILE.is_file(), reason="VGG-16 is not in TORCH_HOME")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # these networks are too small to share out


def images(*shape):
    return torch.rand(*shape) * 2 - 1


def levels(*shape):
    """Random images on 8-bit levels."""
    return torch.randint(0, 256, shape) / 127.5 - 1


def slope(function, x):
    """d function / d x, at x."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


# ---- Image space ------------------------------------------------------------------------------


def test_quantize_rounds_to_8_bit_levels():
    x = torch.tensor([-1.3, -1.0, -1 + 0.9 / 127.5, 0.0031, 1.0, 7.0])
    expected = torch.tensor([0.0, 0.0, 1.0, 128.0, 255.0, 255.0]) / 127.5 - 1
    assert torch.equal(hallusr.quantize(x), expected)
    assert torch.equal(hallusr.quantize(expected), expected)


def test_quantize_has_gradient_exactly_one():
    assert torch.equal(slope(hallusr.quantize, torch.linspace(-2, 2, 99)), torch.ones(99))


def test_downscale_is_the_block_mean():
    x = images(2, 3, 8, 12)
    expected = torch.empty(2, 3, 2, 3)
    for i in range(2):
        for j in range(3):
            expected[:, :, i, j] = x[:, :, 4 * i:4 * i + 4, 4 * j:4 * j + 4].mean((2, 3))
    torch.testing.assert_close(hallusr.downscale(x, 4), expected)


def test_upscale_nearest_repeats_and_is_undone_by_downscale():
    x = images(1, 3, 2, 2)
    large = hallusr.upscale_nearest(x, 4)
    assert torch.equal(large[0, 0, :4, 4:], x[0, 0, 0, 1].expand(4, 4))
    torch.testing.assert_close(hallusr.downscale(large, 4), x)


def test_pyramid_runs_coarse_to_fine():
    x = images(2, 3, 16, 16)
    coarse, middle, fine = hallusr.pyramid(x, 3)
    assert fine is x and middle.shape == (2, 3, 8, 8)
    torch.testing.assert_close(coarse[0, 0, 0, 0], x[0, 0, :4, :4].mean())


def test_project_onto_lr_shifts_blocks_to_lr():
    image, lr = images(2, 3, 16, 16), levels(2, 3, 4, 4)
    projected = hallusr.project_onto_lr(image, lr)
    shift = (projected - image)[1, 2, 4:8, 8:12]
    expected = lr[1, 2, 1, 2] - image[1, 2, 4:8, 8:12].mean()
    torch.testing.assert_close(shift, expected.expand(4, 4))
    torch.testing.assert_close(hallusr.downscale(projected, 4), lr)


def test_image_gradient_against_loops():
    x = images(1, 2, 5, 6)
    expected = torch.empty_like(x)
    for c in range(2):
        for i in range(5):
            for j in range(6):
                g_x = x[0, c, i, min(j + 1, 5)] - x[0, c, i, max(j - 1, 0)]
                g_y = x[0, c, min(i + 1, 4), j] - x[0, c, max(i - 1, 0), j]
                expected[0, c, i, j] = math.sqrt(g_x ** 2 + g_y ** 2 + 1e-6)
    torch.testing.assert_close(hallusr.image_gradient(x), expected)


def test_image_gradient_of_a_ramp_and_its_slope_on_flat_areas():
    ramp = torch.linspace(0, 1, 11).expand(1, 1, 11, 11)
    torch.testing.assert_close(hallusr.image_gradient(ramp)[0, 0, 5, 1:-1],
                               torch.full((9,), 0.2), atol=1e-4, rtol=0)
    assert torch.equal(slope(hallusr.image_gradient, torch.zeros(1, 1, 4, 4)),
                       torch.zeros(1, 1, 4, 4))
    assert torch.autograd.gradcheck(hallusr.image_gradient,
                                    images(1, 1, 4, 4).double().requires_grad_())


# ---- Networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, widths, size", [(8, (8, 6, 4, 4), (8, 8)), (4, (8, 6, 4), (3, 5)),
                                                 (2, (4, 4), (1, 1))])
@pytest.mark.parametrize("hard", [False, True])
def test_generator_shapes_at_every_scale(scale, widths, size, hard):
    G = Generator(5, widths, scale, blocks=2, hard_consistency=hard)
    lr = levels(2, 3, *size)
    made, gradients = G(lr, torch.randn(2, 5, *size))
    factors = [2 ** (i + 1) for i in range(len(widths) - 1)]
    for image, gradient, factor in zip(made, gradients, factors, strict=True):
        assert image.shape == gradient.shape == (2, 3, size[0] * factor, size[1] * factor)
        exact = torch.allclose(hallusr.downscale(image, factor), lr, atol=1e-5)
        assert exact == hard


def test_z_changes_every_pixel_block_of_the_image():
    G = Generator(5, (8, 6, 4), 4, blocks=1)
    lr, z = levels(1, 3, 4, 4), torch.randn(2, 1, 5, 4, 4)
    first, second = (G(lr, latent)[0][-1] for latent in z)
    assert (hallusr.downscale((first - second).abs(), 4) > 0).all()


def test_z_of_one_pixel_changes_the_image_around_it():
    G = Generator(5, (8, 6, 4), 4, blocks=1)
    lr, z = levels(1, 3, 12, 12), torch.randn(1, 5, 12, 12)
    other = z.clone()
    other[..., 2, 9] += 1
    moved = hallusr.downscale((G(lr, z)[0][-1] - G(lr, other)[0][-1]).abs().sum(1, True), 4)[0, 0]
    assert moved[2, 9] > 0.1 * moved.max()
    assert moved[8:].max() == 0 and moved[:, :4].max() == 0  # out of the convolutions' reach


def test_residual_block_is_x_plus_two_convolutions_and_starts_near_the_identity():
    block, x = ResidualBlock(6), torch.randn(2, 6, 5, 5)
    h = F.leaky_relu(F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1), 0.2)
    expected = x + F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    torch.testing.assert_close(block(x), expected)
    assert (block(x) - x).std() < 0.3


def test_convolutions_keep_variance_at_the_start():
    x = torch.randn(8, 64, 16, 16)
    for _ in range(10):
        x = hallusr.activation(hallusr.conv3x3(64, 64)(x))
    assert 0.3 < x.square().mean() < 3


def test_up_block_adds_detail_to_the_enlarged_image():
    block = UpBlock(6, 4)
    features, image, gradient = torch.randn(2, 6, 4, 4), images(2, 3, 4, 4), images(2, 3, 4, 4)
    torch.nn.init.zeros_(block.to_image.weight)
    torch.nn.init.zeros_(block.to_gradient.weight)
    new, larger, larger_gradient = block(features, image, gradient)
    assert new.shape == (2, 4, 8, 8)
    torch.testing.assert_close(larger, F.interpolate(image, scale_factor=2, mode="bilinear"))
    torch.testing.assert_close(larger_gradient * 2,
                               F.interpolate(gradient, scale_factor=2, mode="bilinear"))


def test_up_block_shares_features_between_the_domains():
    block = UpBlock(6, 4)
    inputs = torch.randn(2, 6, 4, 4), images(2, 3, 4, 4), images(2, 3, 4, 4)
    for domain, own, other in ((1, block.image_conv, block.gradient_conv),
                               (2, block.gradient_conv, block.image_conv)):
        block.zero_grad(set_to_none=True)
        block(*inputs)[domain].sum().backward()
        assert block.shared.weight.grad.abs().sum() > 0 and own.weight.grad.abs().sum() > 0
        assert other.weight.grad is None


def test_down_block_against_plain_convolutions():
    block, image, finer = DownBlock(4, 6), images(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    h = F.leaky_relu(F.conv2d(image, block.from_image.weight, block.from_image.bias), 0.2) + finer
    h = F.leaky_relu(F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1), 0.2)
    h = F.leaky_relu(F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1), 0.2)
    means = h.view(2, 6, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(block(image, finer), means)
    torch.testing.assert_close(block(image), block(image, torch.zeros_like(finer)))


@pytest.mark.parametrize("channels", [0, 3])
def test_discriminator_sees_every_scale_and_the_condition(channels):
    D = Discriminator((8, 6, 4), 4, 1, channels)
    pyramid = [x.requires_grad_() for x in hallusr.pyramid(images(2, 3, 16, 16), 2)]
    condition = torch.rand(2, 3, 4, 4, requires_grad=True) if channels else None
    logits = D(pyramid, condition)
    assert logits.shape == (2, 1, 4, 4)
    logits.sum().backward()
    for seen in [*pyramid, condition][:2 + bool(channels)]:
        assert seen.grad.abs().sum() > 0


def test_every_parameter_takes_part():
    G, D = Generator(5, (8, 6, 4), 4, 2), Discriminator((8, 6, 4), 4, 2, 3)
    made, gradients = G(levels(2, 3, 4, 4), torch.randn(2, 5, 4, 4))
    logits = D(made, torch.rand(2, 3, 4, 4))
    (logits.square().sum() + sum(g.square().sum() for g in gradients)).backward()
    for name, parameter in [*G.named_parameters(), *D.named_parameters()]:
        assert parameter.grad.abs().sum() > 0, name


def test_discriminator_judges_each_image_by_itself():
    D = Discriminator((8, 6, 4), 4, 1)
    batch = hallusr.pyramid(images(3, 3, 16, 16), 2)
    torch.testing.assert_close(D([x[1:2] for x in batch]), D(batch)[1:2])


# ---- Conditioning and losses ------------------------------------------------------------------


def test_the_true_image_has_no_excess():
    hr = levels(4, 3, 16, 16)
    lr = hallusr.quantize(hallusr.downscale(hr, 8))
    assert torch.equal(hallusr.consistency(hr, lr, 0.1, 8), torch.zeros(4, 3, 2, 2))


def test_excess_counts_grey_levels_and_pulls_towards_lr():
    lr = torch.zeros(1, 3, 2, 2) + 129 / 127.5 - 1
    image = hallusr.upscale_nearest(lr + 3 / 127.5, 4)
    excess = hallusr.consistency(image, lr, 0.1, 4)
    torch.testing.assert_close(excess, torch.full_like(lr, 2.9), atol=1e-3, rtol=0)
    direction = slope(lambda x: hallusr.consistency(x, lr, 0.1, 4), image)
    torch.testing.assert_close(direction, torch.full_like(image, 127.5 / 16))


def test_gradient_loss():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 4.0], [0.0, 4.5]])
    assert hallusr.gradient_loss(a, b).item() == pytest.approx((0 + 2 + 3 + 0.5) / 4)
    assert torch.equal(slope(lambda x: hallusr.gradient_loss(x, b), a).sign(),
                       torch.tensor([[0.0, -1.0], [1.0, -1.0]]))


def test_diversity_loss_by_hand_and_its_direction():
    g1, g2 = torch.zeros(2, 1, 1, 2), torch.tensor([[0.2, 0.4], [9.0, 9.0]]).view(2, 1, 1, 2)
    z1, z2 = torch.zeros(2, 2), torch.tensor([[1.0, -2.0], [1.0, 1.0]])
    expected = (0.3 / 1.5 + 1.0) / 2  # the second pair is cut at tau = 1
    assert hallusr.diversity_loss(g1, g2, z1, z2, 1.0).item() == pytest.approx(expected, rel=1e-4)
    direction = slope(lambda g: hallusr.diversity_loss(g1, g, z1, z2), g2)
    assert (direction[0] > 0).all() and (direction[1] == 0).all()  # further apart is more


def test_adversarial_pair_against_sigmoids():
    real, fake = torch.randn(3, 1, 2, 2), torch.randn(5, 1, 2, 2)
    expected = -torch.sigmoid(real).log().mean() - (1 - torch.sigmoid(fake)).log().mean()
    torch.testing.assert_close(hallusr.discriminator_loss(real, fake), expected)
    torch.testing.assert_close(hallusr.generator_loss(fake), -torch.sigmoid(fake).log().mean())


def test_adversarial_pair_pulls_apart_and_back_and_never_overflows():
    logits = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4])
    zero = torch.zeros(1)
    assert (slope(lambda x: hallusr.discriminator_loss(x, zero), logits) <= 0).all()  # real up
    assert (slope(lambda x: hallusr.discriminator_loss(zero, x), logits) >= 0).all()  # fake down
    assert (slope(hallusr.generator_loss, logits) <= 0).all()                         # fake up
    assert slope(hallusr.generator_loss, logits)[0].item() == pytest.approx(-1 / 5)   # never flat
    assert torch.isfinite(hallusr.discriminator_loss(logits, logits))


def test_r1_of_a_linear_discriminator_is_its_squared_weight():
    x = [images(4, 3, 2, 2).requires_grad_(), images(4, 3, 4, 4).requires_grad_()]
    a, b = torch.randn(3, 2, 2, requires_grad=True), torch.randn(3, 4, 4)
    logits = (x[0] * a).sum((1, 2, 3)) + (x[1] * b).sum((1, 2, 3))
    penalty = hallusr.r1_penalty(logits.view(4, 1, 1, 1).expand(4, 1, 3, 3), x)
    torch.testing.assert_close(penalty, a.square().sum() + b.square().sum())
    torch.testing.assert_close(torch.autograd.grad(penalty, a)[0], 2 * a)


def test_objectives_weigh_their_terms():
    assert hallusr.reconstruction_loss(1.0, 2.0, 3.0, 4.0, 10.0, 0.1) == pytest.approx(30.7)
    assert hallusr.hallucination_loss(1.0, 2.0, 3.0, 0.5) == pytest.approx(1.5)
    l_z = torch.tensor(0.3)
    assert slope(lambda x: hallusr.hallucination_loss(0.0, 0.0, x, 2.0), l_z) == -2  # maximised


@needs_vgg
def test_perceptual_loss_against_plain_convolutions():
    state = torch.load(VGG_FILE, map_location="cpu")

    def relu2_2(x):
        x = ((x + 1) / 2 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        x = x / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        for i in (0, 2, 5, 7):
            x = F.max_pool2d(x, 2) if i == 5 else x
            weight, bias = state[f"features.{i}.weight"], state[f"features.{i}.bias"]
            x = F.conv2d(x, weight, bias, padding=1).relu()
        return x

    loss, sr, hr = PerceptualLoss("relu2_2"), images(2, 3, 16, 16), images(2, 3, 16, 16)
    torch.testing.assert_close(loss(sr, hr), (relu2_2(sr) - relu2_2(hr)).abs().mean())
    assert loss(hr, hr) == 0 and not any(p.requires_grad for p in loss.parameters())
    step = sr - 1e-2 * slope(lambda x: loss(x, hr), sr).sign()
    assert loss(step, hr) < loss(sr, hr)


def test_missing_weights_say_which_file_goes_where(tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(hallusr.VGG16_Weights, "get_state_dict", no_network)
    with pytest.raises(FileNotFoundError, match=f"fetch http.*vgg16.*save it as {tmp_path}"):
        PerceptualLoss()


# ---- Metrics ----------------------------------------------------------------------------------


def test_psnr_by_hand():
    truth = torch.zeros(2, 3, 4, 4) - 1
    image = truth.clone()
    image[0] += 10 / 127.5
    assert hallusr.psnr(image, truth)[0].item() == pytest.approx(20 * math.log10(255 / 10))
    assert hallusr.psnr(image, truth)[1] == math.inf


def test_lr_psnr_rounds_what_is_shrunk():
    lr = torch.zeros(1, 3, 2, 2) + 100 / 127.5 - 1
    image = hallusr.upscale_nearest(lr, 4)
    assert hallusr.lr_psnr(image + 0.4 / 127.5, lr) == math.inf
    expected = 20 * math.log10(255 / 2)
    assert hallusr.lr_psnr(image + 2 / 127.5, lr).item() == pytest.approx(expected)


def test_ssim_against_loops():
    a, b = levels(2, 3, 14, 13), levels(2, 3, 14, 13)
    b[0] = 0.7 * a[0] + 0.1
    window = torch.tensor([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)]
                           for i in range(11)], dtype=torch.double)
    window /= window.sum()
    for n in range(2):
        values = []
        for c in range(3):
            for i in range(4):
                for j in range(3):
                    x = hallusr.to_levels(a)[n, c, i:i + 11, j:j + 11].double()
                    y = hallusr.to_levels(b)[n, c, i:i + 11, j:j + 11].double()
                    m, k = (window * x).sum(), (window * y).sum()
                    v, w = (window * (x - m) ** 2).sum(), (window * (y - k) ** 2).sum()
                    cov = (window * (x - m) * (y - k)).sum()
                    c1, c2 = 6.5025, 58.5225  # (0.01 * 255)^2, (0.03 * 255)^2
                    values.append((2 * m * k + c1) * (2 * cov + c2)
                                  / ((m * m + k * k + c1) * (v + w + c2)))
        expected = torch.stack(values).mean().item()
        assert hallusr.ssim(a, b)[n].item() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(hallusr.ssim(a, a), torch.ones(2))


def test_diversity_score_by_hand():
    maps = torch.tensor([[[0.2, 0.6]], [[0.4, 0.2]]]).view(2, 1, 1, 2)  # best sample 0.3, pixels .2
    assert hallusr.diversity_score(maps).item() == pytest.approx(100 * (0.3 - 0.2) / 0.3)
    assert hallusr.diversity_score(maps[:1].expand(2, -1, -1, -1)).item() == 0


def test_pixel_std_by_hand():
    samples = torch.tensor([10.0, 14.0, 18.0, 22.0]).view(4, 1, 1, 1, 1) / 127.5 - 1
    found = hallusr.pixel_std(samples.expand(4, 2, 3, 2, 2))
    torch.testing.assert_close(found, torch.full((2,), math.sqrt(20.0)))


def test_mean_decibel_averages_errors():
    found = hallusr.mean_decibel(torch.tensor([20.0, 30.0, math.inf]))
    assert found.item() == pytest.approx(-10 * math.log10((1e-2 + 1e-3 + 0) / 3))


@needs_lpips
def test_lpips_against_plain_convolutions():
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    alexnet = torch.load(checkpoints / "alexnet-owt-7be5be79.pth", map_location="cpu")
    linear = torch.load(checkpoints / LPIPS.FILE, map_location="cpu")

    def features(x):
        x = x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        x = x / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        for i, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            x = F.max_pool2d(x, 3, 2) if i in (3, 6) else x
            weight, bias = alexnet[f"features.{i}.weight"], alexnet[f"features.{i}.bias"]
            x = F.conv2d(x, weight, bias, stride, padding).relu()
            yield F.normalize(x, dim=1, eps=1e-10)

    lpips, a, b = LPIPS(), levels(2, 3, 64, 48), levels(2, 3, 64, 48)
    distance, maps = torch.zeros(2), torch.zeros(2, 64, 48)
    for i, (x, y) in enumerate(zip(features(a), features(b))):
        weights = linear[f"lin{i}.model.1.weight"].view(-1, 1, 1)
        layer = (weights * (x - y) ** 2).sum(1)
        distance += layer.mean((1, 2))
        maps += F.interpolate(layer[:, None], (64, 48), mode="bilinear")[:, 0]
    torch.testing.assert_close(lpips(a, b), distance)
    torch.testing.assert_close(lpips.maps(a, b), maps)
    assert torch.equal(lpips(a, a), torch.zeros(2))


@needs_lpips
@pytest.mark.skipif("LPIPS_REFERENCE" not in os.environ, reason="LPIPS_REFERENCE does not name a "
                    "folder with ex_ref.png, ex_p0.png, ex_p1.png of the LPIPS authors")
def test_lpips_reproduces_the_published_pair():
    folder = Path(os.environ["LPIPS_REFERENCE"])
    truth, p0, p1 = (hallusr.from_levels(train.read_image(folder / f"ex_{name}.png"))[None]
                     for name in ("ref", "p0", "p1"))
    assert LPIPS()(truth, p0).item() == pytest.approx(0.722, abs=5e-4)
    assert LPIPS()(truth, p1).item() == pytest.approx(0.138, abs=5e-4)


class Bicubic(torch.nn.Module):
    """A stand-in generator whose scores are known: bicubic, plus z's mean as brightness."""
    scale, z_dim = 4, 5

    def forward(self, lr, z):
        image = hallusr.upscale_bicubic(lr, 4) + z.mean((1, 2, 3), keepdim=True)
        return [image], [hallusr.image_gradient(image)]


def test_evaluate_scores_what_the_generator_makes():
    hr = levels(60, 3, 16, 16)  # more than one part
    rows = hallusr.evaluate(Bicubic(), hr, samples=3)
    lr = hallusr.quantize(hallusr.downscale(hr, 4))
    torch.testing.assert_close(rows["SR"]["psnr"], rows["bicubic"]["psnr"])
    torch.testing.assert_close(rows["bicubic"]["ssim"],
                               hallusr.ssim(hallusr.upscale_bicubic(lr, 4), hr))
    assert (rows["hallucination"]["psnr"] < rows["SR"]["psnr"]).all()
    assert (rows["hallucination"]["pixel_std"] > 1).all()
    again = hallusr.evaluate(Bicubic(), hr, samples=3)
    assert torch.equal(rows["hallucination"]["psnr"], again["hallucination"]["psnr"])
    still = hallusr.evaluate(Bicubic(), hr, samples=3, temperature=0.0)
    assert torch.equal(still["hallucination"]["pixel_std"], torch.zeros(60))
    projected = hallusr.evaluate(sample.Projected(Bicubic()), 0.5 * hr, samples=3)
    exact = hallusr.summarize(projected)["SR"]["lr_psnr"]
    assert exact > 50 > hallusr.summarize(rows)["bicubic"]["lr_psnr"]


def test_upscale_bicubic_against_its_kernel():
    def weight(t):  # Keys' kernel with a = -0.75, as torch documents
        t = abs(t)
        return (1.25 * t ** 3 - 2.25 * t ** 2 + 1 if t <= 1 else
                -0.75 * (t ** 3 - 5 * t ** 2 + 8 * t - 4) if t < 2 else 0.0)
    row = torch.tensor([0.1, 0.5, -0.2, 0.3])
    expected = []
    for i in range(8):
        centre = (i + 0.5) / 2 - 0.5
        expected.append(sum(weight(centre - j) * row[min(max(j, 0), 3)] for j in range(-2, 6)))
    found = hallusr.upscale_bicubic(row.expand(1, 1, 4, 4), 2)[0, 0, 3]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert hallusr.upscale_bicubic(torch.ones(1, 1, 2, 2) * 3, 2).max() == 1


def test_contact_sheet_shows_every_column_in_order():
    lr, hr = levels(2, 3, 4, 4), levels(2, 3, 16, 16)
    z = torch.tensor([0.4, -0.4]).view(2, 1, 1, 1).expand(2, 5, 4, 4)
    sheet = hallusr.contact_sheet(Bicubic(), lr, z, hr)
    assert sheet.shape == (3, 4 * 17 + 1, 7 * 17 + 1)  # 2 faces x 2 rows; 16 pixels and a margin

    def tile(row, column):
        return sheet[:, 17 * row + 1:17 * row + 17, 17 * column + 1:17 * column + 17]
    bicubic = hallusr.upscale_bicubic(lr, 4)[1]
    brighter, darker = (hallusr.quantize(bicubic + shift) for shift in (0.4, -0.4))
    spread = (hallusr.to_levels(brighter) - hallusr.to_levels(darker)).abs() / 2 / 64
    expected = [hallusr.upscale_nearest(lr, 4)[1] / 2 + 0.5, bicubic / 2 + 0.5, None,
                brighter / 2 + 0.5, darker / 2 + 0.5, spread.clamp(max=1), hr[1] / 2 + 0.5]
    for column, picture in enumerate(expected):
        if picture is not None:
            torch.testing.assert_close(tile(2, column), picture, atol=1e-5, rtol=0)
    torch.testing.assert_close(tile(3, 6), hallusr.image_gradient(hr)[1].clamp(max=1))
    assert tile(3, 5).max() == 0


# ---- Wrong input ------------------------------------------------------------------------------


G4 = dict(z_dim=5, widths=(8, 6, 4), scale=4, blocks=1)


@pytest.mark.parametrize("call, words", [
    (lambda: Config(scale=6), "power of two.*6"),
    (lambda: Config(widths=(8, 8)), "4 positive numbers for scale 8"),
    (lambda: Config(size=60), "multiple of scale 8, got 60"),
    (lambda: Config(tau=0.0), "tau must be positive, got 0"),
    (lambda: Config(perceptual="relu9_9"), "relu2_2.*got 'relu9_9'"),
    (lambda: Generator(scale=8, widths=(8, 8)), "4 positive numbers"),
    (lambda: Generator(z_dim=0), "z_dim must be 1 or more"),
    (lambda: Generator(**G4)(images(2, 1, 4, 4), torch.randn(2, 5, 4, 4)),
     r"\(N, 3, H, W\).*2, 1, 4, 4"),
    (lambda: Generator(**G4)(images(2, 3, 4, 4), torch.randn(2, 6, 4, 4)),
     r"\(2, 5, 4, 4\), got \(2, 6, 4, 4\)"),
    (lambda: Generator(**G4)(images(2, 3, 4, 4), torch.randn(2, 5)), r"got \(2, 5\)"),
    (lambda: Discriminator((8, 6, 4), 4, 1)([images(2, 3, 16, 16)]), "2 scales, got 1"),
    (lambda: Discriminator((8, 6, 4), 4, 1, 3)(hallusr.pyramid(images(2, 3, 16, 16), 2)),
     r"condition must have shape \(2, 3, 4, 4\).*got None"),
    (lambda: Discriminator((8, 6), 2, 1, 0)([images(2, 3, 8, 8)], images(2, 3, 4, 4)),
     r"none at all for 0 channels.*got \(2, 3, 4, 4\)"),
    (lambda: train.draw_face(train.SketchFaces(1).attributes(0), 12), "multiple of 8, got 12"),
    (lambda: PerceptualLoss("relu9_9"), "relu2_2.*got 'relu9_9'"),
    (lambda: hallusr.downscale(images(1, 3, 12, 12), 8), "multiples of 8, got 12 x 12"),
    (lambda: hallusr.image_gradient(images(3, 4, 4)), r"\(N, C, H, W\), got \(3, 4, 4\)"),
    (lambda: hallusr.project_onto_lr(images(1, 3, 8, 8), images(1, 3, 4, 2)), "one multiple"),
    (lambda: hallusr.project_onto_lr(images(2, 3, 8, 8), images(1, 3, 4, 4)), "one image for each"),
    (lambda: hallusr.consistency(images(1, 3, 8, 8), images(1, 3, 2, 2), 0.1, 8), "one shape"),
    (lambda: hallusr.consistency(images(1, 3, 8, 8), images(1, 3, 1, 1), -1, 8), "eps must be"),
    (lambda: hallusr.gradient_loss(images(2, 3, 4, 4), images(1, 3, 4, 4)), "one shape"),
    (lambda: hallusr.psnr(images(2, 3, 4, 4), images(1, 3, 4, 4)), "one shape"),
    (lambda: hallusr.ssim(images(2, 3, 8, 8), images(2, 3, 8, 8)), "sides of 11"),
    pytest.param(lambda: LPIPS()(images(2, 3, 16, 16), images(2, 3, 16, 16)), "sides of 31",
                 marks=needs_lpips),
    (lambda: hallusr.diversity_score(images(2, 3, 4)), r"\(K, N, H, W\)"),
    (lambda: hallusr.pixel_std(images(2, 3, 4, 4)), r"\(K, N, 3, H, W\)"),
])
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- Checkpoints ------------------------------------------------------------------------------


def test_checkpoint_loads_with_plain_torch_and_gives_the_same_images(tmp_path):
    config = Config(**TINY)
    G = hallusr.build_generator(config).half().float()  # so that half precision loses nothing
    hallusr.save_checkpoint(tmp_path / "full.pt", config, G, step=7)
    hallusr.save_checkpoint(tmp_path / "half.pt", config, G.half())
    assert torch.load(tmp_path / "full.pt")["step"] == 7
    lr, z = levels(1, 3, 4, 4), torch.randn(1, 5, 4, 4)
    for name in ("full.pt", "half.pt"):
        loaded = hallusr.load_generator(tmp_path / name)
        assert not loaded.training and loaded.z_dim == 5
        assert torch.equal(loaded(lr, z)[0][-1], G.float()(lr, z)[0][-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.pt", "half.pt"]


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path):
    config, path = Config(**TINY), tmp_path / "last.pt"
    hallusr.save_checkpoint(path, config, hallusr.build_generator(config), step=1)
    with pytest.raises(Exception, match="pickle"):
        hallusr.save_checkpoint(path, config, hallusr.build_generator(config), step=lambda: 2)
    assert torch.load(path)["step"] == 1


def test_a_truncated_checkpoint_is_named(tmp_path):
    config, path = Config(**TINY), tmp_path / "cut.pt"
    hallusr.save_checkpoint(path, config, hallusr.build_generator(config))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut.pt is damaged"):
        hallusr.load_generator(path)


@pytest.mark.parametrize("content, words", [
    (b"not a checkpoint", "is damaged or no checkpoint"), ({"weights": 1}, "not a hallusr"),
    ({"hallusr": 2, "config": {"colour": 3}, "generator": {}}, "does not know.*colour"),
    ({"hallusr": 1, "config": {}, "generator": {}}, "is of format 1, expected 2"),
    ({"hallusr": 2, "config": {}}, "not a hallusr")])
def test_wrong_checkpoints_are_named(tmp_path, content, words):
    path = tmp_path / "bad.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"bad.pt.*{words}"):
        hallusr.load_generator(path)


def test_missing_and_foreign_architectures_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere.pt"):
        hallusr.load_generator("nowhere.pt")
    wider = hallusr.build_generator(Config(**TINY | dict(widths=(9, 6, 4))))
    hallusr.save_checkpoint(tmp_path / "other.pt", Config(**TINY), wider)
    with pytest.raises(ValueError, match="other.pt holds another architecture"):
        hallusr.load_generator(tmp_path / "other.pt")


# ---- Training ---------------------------------------------------------------------------------


def run_training(out, *flags):
    """train.py in this process; returns the content of last.pt."""
    train.main(shlex.split(TINY_FLAGS) + ["--out", str(out), *flags])
    return torch.load(Path(out) / "last.pt")


def test_resumed_training_is_equal_bit_by_bit(tmp_path):
    whole = run_training(tmp_path / "whole", "--steps", "6", "--r1-every", "2")
    run_training(tmp_path / "part", "--steps", "3", "--r1-every", "2")
    train.main(["--resume", str(tmp_path / "part/last.pt"), "--steps", "6", "--device", "cpu"])
    resumed = torch.load(tmp_path / "part/last.pt")
    assert whole["step"] == resumed["step"] == 6
    for name in ("generator", "G", "D"):
        for key, value in whole[name].items():
            assert torch.equal(value, resumed[name][key]), key
    rows = [(tmp_path / f"{run}/log.csv").read_text().splitlines() for run in ("whole", "part")]
    for a, b in zip(*rows, strict=True):
        a, b = a.split(","), b.split(",")
        assert a[:1] + a[2:] == b[:1] + b[2:]  # all columns but images_per_s


@pytest.mark.parametrize("frozen, moving", [("lr_g", "D"), ("lr_d", "G")])
def test_each_step_moves_its_own_player_and_the_right_way(tmp_path, frozen, moving):
    rates = dict(lr_g=2e-3, lr_d=2e-3) | {frozen: 1e-30}
    flags = f"--steps 60 --batch 8 --lr-g {rates['lr_g']} --lr-d {rates['lr_d']} --beta 1 --tie 0"
    content = run_training(tmp_path, *flags.split(), "--gamma", "0", "--alpha", "0")
    fresh = train.Networks(Config(**TINY, hard_consistency=True), "cpu")
    for name in ("G", "D"):
        before, after = getattr(fresh, name).state_dict(), content[name]
        same = [torch.allclose(before[key], after[key], rtol=0, atol=1e-20) for key in before]
        assert not all(same) if name == moving else all(same), name
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))

    def change(value):
        early, late = rows[:5], rows[-5:]
        return (sum(map(value, late)) - sum(map(value, early))) / 5
    for which in ("I", "g"):
        if moving == "D":  # real above fake, more and more
            assert change(lambda row: float(row[f"D_{which}_real"])
                          - float(row[f"D_{which}_fake"])) > 0.02
        else:  # G raises what a fixed D says of its images
            assert change(lambda row: float(row[f"D_{which}_fake"])) > 0.02


def test_the_first_steps_teach_reconstruction_alone(tmp_path):
    content = run_training(tmp_path / "alone", "--steps", "3", "--warmup", "3")
    start = train.Networks(Config(**TINY, hard_consistency=True), "cpu")
    for key, weight in start.D.state_dict().items():
        assert torch.equal(weight, content["D"][key])
    before, after = start.G.head.weight, content["G"]["head.weight"]
    assert torch.equal(before[:, 3:], after[:, 3:])  # what z passes through
    assert not torch.equal(before[:, :3], after[:, :3])
    run_training(tmp_path / "then", "--steps", "3", "--warmup", "2")
    with (tmp_path / "then/log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["D_I_real"] != "" for row in rows] == [False, False, True]
    assert all(row["L_percp"] for row in rows)


def test_the_first_steps_go_down_their_loss():
    config = Config(**TINY, gamma=2.0, pixel=5.0, tie=3.0)
    nets, hr = train.Networks(config, "cpu"), levels(2, 3, 16, 16)
    lr = hallusr.quantize(hallusr.downscale(hr, 4))
    made, gradients = nets.G(lr, torch.zeros(2, 5, 4, 4))
    image, gradient = made[-1], gradients[-1]
    pixels = (image - hr).abs().mean()  # perceptual="pixels": (6) is the same
    edges = (gradient - hallusr.image_gradient(hr)).abs().mean()
    tie = (gradient - hallusr.image_gradient(image)).abs().mean()
    loss = 2 * (pixels + edges) + 5 * pixels + 3 * tie
    expected = torch.autograd.grad(loss, nets.G.trunk[0].conv1.weight)[0]
    still = torch.autocast("cpu", enabled=False)
    train.warmup_step(nets, torch.nn.L1Loss(), still, config, hr)
    torch.testing.assert_close(nets.G.trunk[0].conv1.weight.grad, expected)


def test_running_average_follows_and_forgets():
    nets = train.Networks(Config(**TINY), "cpu")
    before = [p.clone() for p in nets.ema.parameters()]
    with torch.no_grad():
        for parameter in nets.G.parameters():
            parameter.add_(1)
    nets.update_ema(0.9, step=10_000)
    for old, average in zip(before, nets.ema.parameters()):
        torch.testing.assert_close(average, old + 0.1)
    nets.update_ema(0.9, step=0)  # a tenth is kept of the very first weights
    for old, average in zip(before, nets.ema.parameters()):
        torch.testing.assert_close(average, old + 0.1 * 0.1 + 0.9)


def test_the_best_row_is_found_among_missing_values(tmp_path):
    table = train.Table(tmp_path / "valid.csv", 0)
    for step, row in enumerate([{"psnr": 20.0}, {"psnr": 21.0, "lpips": 0.3}, {"psnr": 19.0}]):
        table.write({"step": step} | row)
    assert not table.last_is_best("psnr", 1) and table.last_is_best("psnr", -1)
    assert table.last_is_best("psnr", 1, warmup=1) and not table.last_is_best("psnr", 1, warmup=2)
    again = train.Table(tmp_path / "valid.csv", start=1)
    assert [row["psnr"] for row in again.rows] == ["20.0", "21.0"]
    assert again.last_is_best("lpips", -1)


class Oracle(torch.nn.Module):
    """Knows what LR hides: draws one of the four faces, chosen by the signs of z."""
    scale, z_dim = 8, 2

    def forward(self, lr, z):
        faces = train.SketchFaces(len(lr), 64, seed=1)
        chosen = [dict(smiling=bool(a > 0), glasses=bool(b > 0)) for a, b in z[:, :, 0, 0]]
        drawn = [train.draw_face(faces.attributes(i) | kind) for i, kind in enumerate(chosen)]
        return [torch.stack(drawn)], None


def test_what_was_hidden_is_counted(capsys):
    train.report_hidden(Oracle(), Config(z_dim=2), "cpu", faces=10, samples=120)
    printed = capsys.readouterr().out
    smiles, glasses = map(int, re.findall(r"(\d+)% \(", printed))
    assert 45 < smiles < 55 and 45 < glasses < 55 and "4.0 of the 4" in printed


def test_photos_are_cropped_upright(tmp_path):
    picture = torch.zeros(3, 40, 60)
    picture[0, :, 10:50] = 1.0  # the centre square is red
    save_image(picture, tmp_path / "wide.png")
    assert train.read_photo(tmp_path / "wide.png", 20).view(3, -1).unique(dim=1).T.tolist() == [
        [255, 0, 0]]
    turned = Image.new("RGB", (4, 2))
    turned.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees: top left goes to the top right
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = train.read_image(tmp_path / "turned.png")
    assert upright.shape == (3, 4, 2) and upright[0, 0].tolist() == [0, 255]


def test_it_learns_a_batch_by_heart(tmp_path):
    for i in range(4):
        save_image(train.SketchFaces(4, 32)[i] / 255, tmp_path / f"{i}.png")
    run_training(tmp_path / "run", "--data", str(tmp_path), "--val", str(tmp_path), "--batch", "4",
                 "--steps", "200", "--widths", "24,16,12", "--val-every", "200",
                 "--log-every", "50", "--lr-g", "2e-3", "--lr-d", "2e-3", "--ema", "0.9")
    scores = (tmp_path / "run/valid.csv").read_text().splitlines()
    row = dict(zip(scores[0].split(","), map(float, scores[-1].split(","))))
    assert row["SR_psnr"] > row["bicubic_psnr"] + 2
    assert row["hallucination_pixel_std"] > 0.5


def test_batches_are_a_function_of_seed_and_step():
    faces = torch.randint(0, 256, (20, 3, 16, 16)).to(torch.uint8)
    config = Config(**TINY)
    first, again = (train.batch_at(faces, config, 3, "cpu") for _ in range(2))
    other = train.batch_at(faces, config, 4, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[1], other[1]) and not torch.equal(first[1], first[2])
    known = torch.cat([faces, faces.flip(-1)])
    assert all((hallusr.to_levels(face) == known).all((1, 2, 3)).any() for face in first[0])


def test_small_faces_hide_mouth_and_glasses():
    faces = train.SketchFaces(8, 64)
    for i in range(8):
        kinds = [train.draw_face(faces.attributes(i) | dict(smiling=s, glasses=g))
                 for s in (True, False) for g in (True, False)]
        stacked = hallusr.quantize(torch.stack(kinds))
        small = hallusr.quantize(hallusr.downscale(stacked, 8))
        assert (small - small[:1]).abs().max() < 1.5 / 127.5  # one grey level, by rounding
        assert all((stacked[a] - stacked[b]).abs().max() > 0.15 for a in range(4) for b in range(a))
    assert torch.equal(faces[3], train.SketchFaces(8, 64)[3])


def test_nan_stops_training_and_overwrites_nothing(tmp_path, monkeypatch):
    run_training(tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(train, "diversity_loss", lambda *_: torch.tensor(math.nan))
    with pytest.raises(FloatingPointError, match="L_z became nan"):
        train.main(["--resume", str(tmp_path / "last.pt"), "--steps", "9", "--val-every", "1",
                    "--log-every", "100", "--device", "cpu"])
    assert (tmp_path / "last.pt").read_bytes() == before


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, monkeypatch):
    update = train.Networks.update_ema

    def break_a_weight(nets, decay, step):
        update(nets, decay, step)
        nets.D_g.to_logits.bias.data.fill_(math.inf)
    monkeypatch.setattr(train.Networks, "update_ema", break_a_weight)
    with pytest.raises(FloatingPointError, match="a weight became inf by step 1"):
        run_training(tmp_path, "--steps", "1")
    assert not (tmp_path / "last.pt").exists()


def test_a_run_is_never_overwritten(tmp_path, monkeypatch):
    run_training(tmp_path / "mine")
    with pytest.raises(ValueError, match="mine holds a run already"):
        run_training(tmp_path / "mine")
    with pytest.raises(ValueError, match="has its 2 steps already"):
        train.main(["--resume", str(tmp_path / "mine/last.pt"), "--device", "cpu"])
    run_training(tmp_path / "other")
    with pytest.raises(ValueError, match="other holds a run already"):
        train.main(["--resume", str(tmp_path / "mine/last.pt"), "--out", str(tmp_path / "other")])
    monkeypatch.chdir(tmp_path)
    assert train.find_out(train.parse_arguments(["--data", "x/mine"])) == Path("runs/mine")
    Path("runs/mine").mkdir(parents=True)
    assert train.find_out(train.parse_arguments(["--data", "x/mine"])) == Path("runs/mine-2")


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path, monkeypatch, capsys):
    report = train.Report.add

    def add_then_interrupt(self, **values):
        report(self, **values)
        if self.count == 1:
            train.signal.raise_signal(train.signal.SIGINT)
    monkeypatch.setattr(train.Report, "add", add_then_interrupt)
    content = run_training(tmp_path, "--steps", "9", "--log-every", "5")
    assert content["step"] == 1
    assert f"python train.py --resume {tmp_path / 'last.pt'}\n" in capsys.readouterr().out


def test_every_setting_is_a_flag_that_overrides_the_preset():
    for item in fields(Config):
        assert item.metadata["help"].endswith(")")  # ends with its source
    def settings(words):
        return train.prepare(train.parse_arguments(shlex.split(words)))
    config = settings("--data x --tie 0.5 --no-hard-consistency")
    assert (config.tie, config.hard_consistency, config.lr_g) == (0.5, False, 5e-4)
    assert settings("--data x --preset paper") == Config()
    assert train.deviations(Config()) == [] and len(train.deviations(settings("--data x"))) == 6


def test_resume_takes_data_and_settings_from_the_run(tmp_path):
    run_training(tmp_path, "--alpha", "3")
    arguments = train.parse_arguments(["--resume", str(tmp_path / "last.pt"), "--steps", "7"])
    config = train.prepare(arguments)
    assert (config.alpha, config.steps, arguments.sketches) == (3.0, 7, 20)
    assert arguments.out == tmp_path


def test_celeba_uses_the_official_split(monkeypatch):
    def celeba(root, split, target_type, transform):
        return [(transform(Image.new("RGB", (178, 218), (200, 10, 30))), None)]
    monkeypatch.setattr(train, "CelebA", celeba)
    arguments = train.parse_arguments(["--data", "celeba", "--root", "data"])
    faces, _ = train.load_faces(arguments, Config(**TINY))
    assert faces.shape == (1, 3, 16, 16) and faces.dtype == torch.uint8
    assert faces[0, :, 5, 5].tolist() == [200, 10, 30]


# ---- The scripts, as users run them -----------------------------------------------------------


def run_here(command, folder, monkeypatch, capsys):
    """Run a command line in a folder, in this process; returns what it printed."""
    python, script, *words = shlex.split(command)
    assert python == "python"
    monkeypatch.chdir(folder)
    {"train.py": train, "sample.py": sample}[script].main(words)
    return capsys.readouterr().out


def run_script(command, folder):
    """The same in a process of its own; returns (exit code, all it printed)."""
    python, script, *words = shlex.split(command)
    assert python == "python"
    done = subprocess.run([sys.executable, str(HERE / script), *words], cwd=folder, timeout=300,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with photos, an LR image and a tiny trained run, as the README's commands expect."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "assets").symlink_to(HERE / "assets")
    for name in ("photos", "more_photos", "VAL"):
        (folder / name).mkdir()
        for i in range(4):
            save_image(torch.rand(3, 70, 64 + i), folder / name / f"{i}.png")
    save_image(torch.rand(3, 70, 80), folder / "me.jpg")
    save_image(torch.rand(3, 8, 8), folder / "small.png")
    train.main(shlex.split(TINY_FLAGS) + ["--out", str(folder / "runs/photos")])
    return folder


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [part.split("#")[0].strip() for line in lines for part in line.split("&&")]
    return sorted({command for command in commands if command.startswith("python ")})


@pytest.mark.parametrize("command", readme_commands())
def test_readme_command(command, workplace, tmp_path, monkeypatch, capsys):
    if "train.py" in command:
        flags = TINY_FLAGS if "--resume" not in command else "--steps 3 --device cpu --no-amp"
        command += f" {flags} --out {tmp_path}"
    elif "--evaluate" in command and not LPIPS.at_hand():
        pytest.skip("LPIPS weights are not in TORCH_HOME")
    if "--data celeba" in command:
        with pytest.raises(FileNotFoundError, match="no CelebA below data"):
            run_here(command, workplace, monkeypatch, capsys)
    else:
        command = command.replace("500:1000", "1:3")
        printed = run_here(command, workplace, monkeypatch, capsys)
        done = "images/s;" if "--benchmark" in command else "written to|grid.png"
        assert re.search(done, printed)


def test_both_scripts_run_on_their_own(workplace, tmp_path):
    code, printed = run_script(f"python train.py {TINY_FLAGS} --out {tmp_path}", workplace)
    assert code == 0 and (tmp_path / "grid.png").exists(), printed
    checkpoint = tmp_path / "last.pt"
    code, printed = run_script(f"python sample.py me.jpg --checkpoint {checkpoint}", workplace)
    assert code == 0 and (workplace / "samples/me/grid.png").exists(), printed


def test_sample_writes_what_it_promises(workplace, monkeypatch, capsys):
    printed = run_here("python sample.py me.jpg --checkpoint runs/photos/last.pt --samples 3 "
                       "--project --walk --out made", workplace, monkeypatch, capsys)
    assert "LR of 8x8 pixels, from its centre square, resized to 32" in printed
    names = {path.name for path in (workplace / "made/me").iterdir()}
    assert names == {"grid.png", "lr.png", "sr.png", "hallucination_1.png", "hallucination_2.png",
                     "hallucination_3.png", "mean.png", "std.png", "walk.gif"}
    made = [train.read_image(workplace / f"made/me/hallucination_{k}.png") for k in (1, 2, 3)]
    assert not torch.equal(made[0], made[1]) and made[0].shape == (3, 32, 32)
    mean, std = (train.read_image(workplace / f"made/me/{name}.png") for name in ("mean", "std"))
    stacked = torch.stack(made).float()
    torch.testing.assert_close(mean.float(), stacked.mean(0), atol=0.51, rtol=0)
    expected = (stacked.std(0, correction=0) / 64 * 255).clamp(max=255)
    torch.testing.assert_close(std.float(), expected, atol=0.51, rtol=0)
    with Image.open(workplace / "made/me/walk.gif") as walk:
        assert walk.n_frames > 20 and walk.size == (96, 96)


def test_a_sample_of_an_lr_file_shrinks_to_that_file(workplace, monkeypatch, capsys):
    printed = run_here("python sample.py small.png --lr --checkpoint runs/photos/last.pt "
                       "--samples 2 --project --out made", workplace, monkeypatch, capsys)
    assert "LR of 8x8 pixels, as it is" in printed
    made = hallusr.from_levels(train.read_image(workplace / "made/small/hallucination_2.png"))
    lr = hallusr.from_levels(train.read_image(workplace / "small.png"))
    assert hallusr.lr_psnr(made[None], lr[None]) > 30


def test_the_model_of_the_repository_is_true_to_its_input_and_diverse():
    generator = hallusr.load_generator(HERE / "assets/faces64.pt")
    lr = torch.stack([hallusr.from_levels(train.read_image(path))
                      for path in sorted((HERE / "assets").glob("face[1-6].png"))])
    shape = (len(lr), generator.z_dim, *lr.shape[-2:])
    made = torch.stack([hallusr.sample(generator, lr, torch.randn(shape))
                        for _ in range(4)])
    assert (torch.stack([hallusr.lr_psnr(image, lr) for image in made]) > 35).all()
    assert (hallusr.pixel_std(made) > 4).all()


@needs_lpips
def test_evaluate_writes_json_with_every_row(workplace):
    sample.main(["--evaluate", str(workplace / "photos"), "--slice", "1:3", "--samples", "2",
                 "--checkpoint", str(workplace / "runs/photos/last.pt"),
                 "--out", str(workplace / "scores")])
    found = json.loads((workplace / "scores/evaluate.json").read_text())
    assert found["n"] == 2 and list(found["rows"]) == ["bicubic", "SR", "hallucination"]
    assert {"psnr", "ssim", "lpips", "lr_psnr", "pixel_std",
            "diversity"} == set(found["rows"]["hallucination"])


@pytest.mark.parametrize("command, words", [
    ("python train.py --data photos --perceptual pixels --size 128",
     "is 64x70 pixels, expected at least 128x128"),
    ("python train.py --data empty --perceptual pixels",
     "expected at least 2 images .* below empty, found 0"),
    ("python train.py --scale 3", "power of two.*got 3"),
    ("python train.py --preset paper --resume runs/photos/last.pt", "no --preset"),
    ("python train.py --resume nowhere.pt", "no checkpoint at nowhere.pt"),
    ("python sample.py photos --checkpoint runs/photos/last.pt", "photos cannot be read"),
    ("python sample.py --lr --checkpoint runs/photos/last.pt", "name at least one"),
    ("python sample.py me.jpg --lr --checkpoint runs/photos/last.pt", "80x70 pixels, LR has 32"),
    ("python sample.py me.jpg photos/me.jpg --checkpoint runs/photos/last.pt", "have one name"),
])
def test_mistakes_are_named(command, words, workplace, monkeypatch, capsys):
    (workplace / "empty").mkdir(exist_ok=True)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run_here(command, workplace, monkeypatch, capsys)


@pytest.mark.parametrize("command, words, expected", [
    ("python train.py --data nowhere --perceptual pixels", "^train.py: no folder nowhere$", 1),
    ("python train.py --widths a,b", "argument --widths: invalid counts value: 'a,b'", 2),
    ("python sample.py me.jpg --checkpoint me.jpg", "^sample.py: me.jpg is damaged or no", 1),
])
def test_mistakes_end_with_one_sentence(command, words, expected, workplace):
    code, printed = run_script(command, workplace)
    assert code == expected and re.search(words, printed, re.M) and "Traceback" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_named():
    with pytest.raises(ValueError, match="finds no GPU"):
        train.find_device("cuda")
