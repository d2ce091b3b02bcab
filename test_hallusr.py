"""Values and gradient directions against independent references; then the scripts as users do.

CPU, no network. What needs pretrained weights skips where torch.hub's cache does not have them.
"""
import ast
import contextlib
import copy
import importlib.machinery
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as fn
from PIL import Image, ImageCms
from torchvision.utils import save_image

import hallusr
import sample
import train
from hallusr import LPIPS, Discriminator, Generator, PerceptualLoss, ResidualBlock, UpBlock
from train import PRESETS, Config, possibilities

if "HALLUSR_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or the scripts would take a GPU that is here
HERE = Path(__file__).parent
G4 = dict(size=16, scale=4, z_dim=5, width=3, blocks=1)
TINY = dict(**G4, d_blocks=1, batch=2, perceptual="pixels")
TINY_FLAGS = ("--size 16 --scale 4 --z-dim 5 --width 3 --blocks 1 --d-blocks 1 --batch 2 "
              "--steps 2 --warmup 0 --perceptual pixels --log-every 1 --val-every 2 --val-faces 4 "
              "--drawn 20 --device cpu --no-amp --decay 0 --no-d-features")
CACHE = Path(torch.hub.get_dir()) / "checkpoints"
HAS_LPIPS = all((CACHE / name).is_file() for name in ("alexnet-owt-7be5be79.pth", LPIPS.FILE))
needs_lpips = pytest.mark.skipif(not HAS_LPIPS, reason="LPIPS weights are not in TORCH_HOME")
VGG_FILE = CACHE / "vgg16-397923af.pth"
needs_vgg = pytest.mark.skipif(not VGG_FILE.is_file(), reason="VGG-16 is not in TORCH_HOME")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(),
                               reason="no GPU, or HALLUSR_GPU is not set")


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    """Runs on photos score with weights that are at hand, and never fetch them."""
    if not (HAS_LPIPS and VGG_FILE.is_file()):
        monkeypatch.setattr(train, "metrics_against", lambda photographs: {})


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """No weights are at hand, and none can be fetched."""
    def no_network(*arguments, **options):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)


@pytest.fixture(autouse=True)
def a_short_end(monkeypatch):
    """At its end a run on drawn faces looks for the eyes of four faces, not of a hundred."""
    monkeypatch.setattr(train, "possibilities", lambda count, size: possibilities(4, size))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # these networks are too small to share out
    # Under `nohup pytest &` they may be ignored, here and in what is started from here.
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL,
             signal.SIGHUP: signal.SIG_DFL}
    before = {name: signal.signal(name, handler) for name, handler in usual.items()}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def tiny(**changes):
    """Small networks with the paper's settings, but for these."""
    return Config(**PRESETS["paper"] | TINY | changes)


def images(*shape):
    return torch.rand(*shape) * 2 - 1


def levels(*shape):
    """Random images on 8-bit levels."""
    return torch.randint(0, 256, shape) / 127.5 - 1


def slope(function, x):
    """d function / d x, at x."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


# ---- Copying ----------------------------------------------------------------------------------


class WithoutChecks(ast.NodeTransformer):
    """Deletes the statements that the header of hallusr.py says may be deleted."""

    def visit_Expr(self, statement):
        name = getattr(getattr(statement.value, "func", None), "id", "")
        return None if name.startswith(("require", "check_")) else statement


BODY = WithoutChecks().visit(ast.parse((HERE / "hallusr.py").read_text())).body
IMPORTS = [node for node in BODY if isinstance(node, ast.Import | ast.ImportFrom)]
PIECES = {node.name: node for node in BODY if isinstance(node, ast.FunctionDef | ast.ClassDef)
          and not node.name.startswith(("require", "check_"))}
CONSTANTS = {node.targets[0].id: node for node in BODY if isinstance(node, ast.Assign)}


def needs(name):
    """What a docstring names to copy along."""
    text = re.search(r"Needs:\s+([^.]*)\.", ast.get_docstring(PIECES[name]) or "")
    return set(re.split(r",\s+", text[1])) if text else set()


def copied(wanted):
    """A module of nothing but the imports and the pieces of these names."""
    nodes = [node for other, node in (CONSTANTS | PIECES).items() if other in wanted]
    module = ModuleType("copied")
    exec(compile(ast.Module(IMPORTS + nodes, []), "copied.py", "exec"), vars(module))
    return module


@pytest.fixture
def random_weights(monkeypatch):
    """VGG-16, AlexNet and LPIPS with random weights in place of a download."""
    def load(url, **_):
        if "lpips" in url:
            return {f"lin{i}.model.1.weight": torch.rand(1, channels, 1, 1)
                    for i, channels in enumerate((64, 192, 384, 256, 256))}
        with torch.device("meta"):
            network = hallusr.vgg16() if "vgg16" in url else hallusr.alexnet()
        shapes = {name: weight.shape for name, weight in network.features.state_dict().items()}
        return {f"features.{name}": torch.randn(shape) / shape[1:].numel() ** 0.5
                for name, shape in shapes.items()}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)


def checkpoint(path, save=hallusr.save_checkpoint):
    save(path, Generator(**G4, hard_consistency=True))
    return path


def square_and_leaf(x):
    leaf = x.clone().requires_grad_()
    return leaf.square(), [leaf]


X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
LR, Z = X[:, :, ::8, ::8], torch.ones(2, 5, 4, 4)
CALLS = {
    "to_levels": lambda m, _: m.to_levels(X),
    "from_levels": lambda m, _: m.from_levels(X),
    "quantize": lambda m, _: m.quantize(X),
    "downscale": lambda m, _: m.downscale(X, 4),
    "upscale_nearest": lambda m, _: m.upscale_nearest(X, 4),
    "pyramid": lambda m, _: m.pyramid(X, 3),
    "image_gradient": lambda m, _: m.image_gradient(X),
    "PerceptualLoss": lambda m, _: m.PerceptualLoss()(X, X),
    "gradient_loss": lambda m, _: m.gradient_loss(X, X),
    "draw_z": lambda m, _: m.draw_z((5, 4, 4), 0.5, torch.Generator()),
    "diversity_loss": lambda m, _: m.diversity_loss(X, X, LR, LR),
    "energy_score": lambda m, _: m.energy_score(X, X + 1, X),
    "project_onto_lr": lambda m, _: m.project_onto_lr(X, LR),
    "discriminator_loss": lambda m, _: m.discriminator_loss(X, X),
    "generator_loss": lambda m, _: m.generator_loss(X),
    "r1_penalty": lambda m, _: m.r1_penalty(*square_and_leaf(X)),
    "reconstruction_loss": lambda m, _: m.reconstruction_loss(1, 2, 3, 4),
    "hallucination_loss": lambda m, _: m.hallucination_loss(1, 2, 3),
    "excess": lambda m, _: m.excess(X, LR),
    "activation": lambda m, _: m.activation(X),
    "conv3x3": lambda m, _: m.conv3x3(3, 4)(X),
    "near_zero": lambda m, _: m.near_zero(torch.nn.Conv2d(3, 4, 3))(X),
    "ResidualBlock": lambda m, _: m.ResidualBlock(3)(X),
    "output_head": lambda m, _: m.output_head(3)(X),
    "UpBlock": lambda m, _: m.UpBlock(3, 4, 1)(X, X, X),
    "DownBlock": lambda m, _: m.DownBlock(3, 4)(X, m.DownBlock(3, 3).from_pixels(X)),
    "channels_at": lambda m, _: m.channels_at(3, 4),
    "Generator": lambda m, _: m.Generator(**G4, hard_consistency=True)(LR, Z),
    "sample": lambda m, _: m.sample(Generator(**G4), LR, Z),
    "beside_features": lambda m, _: m.beside_features([X], PerceptualLoss("relu1_2")),
    "Discriminator": lambda m, _: m.Discriminator(3, 8, 2, 3, True)(
        hallusr.beside_features(hallusr.pyramid(X, 3), PerceptualLoss("relu3_3")), LR),
    "psnr": lambda m, _: m.psnr(X, X),
    "lr_psnr": lambda m, _: m.lr_psnr(X, LR),
    "ssim": lambda m, _: m.ssim(X, X),
    "LPIPS": lambda m, _: m.LPIPS()(X, X),
    "frechet_distance": lambda m, _: m.frechet_distance(X[:, 0, 0], X[:, 0], X[:, 1, 0], X[:, 1]),
    "Realism": lambda m, _: m.Realism(X)(X),
    "two_sample_auc": lambda m, _: m.two_sample_auc(X[0, 0], X[0, 1]),
    "TwoSampleAUC": lambda m, _: m.TwoSampleAUC(X)(X),
    "std_map": lambda m, _: m.std_map(X[None]),
    "spread_and_error": lambda m, _: m.spread_and_error(torch.stack([X, X]), X),
    "rank_histogram": lambda m, _: m.rank_histogram(torch.stack([X, X]), X),
    "save_checkpoint": lambda m, folder: checkpoint(folder / "a", m.save_checkpoint),
    "load_checkpoint": lambda m, folder: m.load_checkpoint(checkpoint(folder / "a")),
    "load_generator": lambda m, folder: m.load_generator(checkpoint(folder / "a"))(LR, Z),
    "load_weights": lambda m, _: m.load_weights(m.nn.ReLU(), {}, "a"),
    "pretrained_features": lambda m, _: m.pretrained_features(m.vgg16, m.VGG16_Weights.DEFAULT, 2),
    "scale_between": lambda m, _: m.scale_between(X, LR)}


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_runs_with_what_its_docstring_names_and_not_without(name, random_weights, tmp_path):
    use = CALLS[name]
    use(copied(needs(name) | {name}), tmp_path)
    for left_out in needs(name):
        with pytest.raises(NameError, match=left_out):
            use(copied(needs(name) - {left_out} | {name}), tmp_path)


# ---- Image space ------------------------------------------------------------------------------


def test_quantize_rounds_to_8_bit_levels():
    x = torch.tensor([-1.3, -1.0, -1 + 0.9 / 127.5, 0.0031, 1.0, 7.0])
    expected = torch.tensor([0.0, 0.0, 1.0, 128.0, 255.0, 255.0]) / 127.5 - 1
    assert torch.equal(hallusr.quantize(x), expected)
    assert torch.equal(hallusr.quantize(expected), expected)
    coarse = torch.tensor([-0.4921875, -0.486328125], dtype=torch.bfloat16)
    assert hallusr.to_levels(coarse).tolist() == [65, 65]  # 64.746, 65.493; in bfloat16 64, 66


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


def test_upscale_nearest_repeats_by_every_factor():
    x = torch.randn(1, 1, 2, 3)
    for factor in range(1, 257):
        expected = x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        assert torch.equal(hallusr.upscale_nearest(x, factor), expected), factor


def test_pyramid_runs_coarse_to_fine():
    x = images(2, 3, 16, 16)
    coarse, middle, fine = hallusr.pyramid(x, 3)
    assert torch.equal(fine, x) and middle.shape == (2, 3, 8, 8)
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


@pytest.mark.parametrize("scale, channels, size", [
    (8, [12, 9, 6, 3], (8, 8)), (4, [9, 6, 3], (3, 5)), (2, [6, 3], (1, 1))])
@pytest.mark.parametrize("hard", [False, True])
def test_generator_shapes_at_every_scale(scale, channels, size, hard):
    G = Generator(scale=scale, z_dim=5, width=3, blocks=2, hard_consistency=hard)
    found = [G.first_conv.out_channels] + [block.shared.out_channels for block in G.up_blocks]
    assert found == channels
    lr = levels(2, 3, *size)
    made = G(lr, torch.randn(2, 5, *size))
    factors = [2 ** (i + 1) for i in range(len(channels) - 1)]
    for image, gradient, factor in zip(made["image"], made["gradient"], factors, strict=True):
        assert image.shape == gradient.shape == (2, 3, size[0] * factor, size[1] * factor)
        exact = torch.allclose(hallusr.downscale(image, factor), lr, atol=1e-5)
        assert exact == hard


class AsModule(torch.nn.Module):
    """torch.export takes modules alone."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize("make, shapes", [
    (lambda: Generator(**G4), [(3, 4, 4), (5, 4, 4)]),
    (lambda: Generator(**G4, hard_consistency=True), [(3, 4, 4), (5, 4, 4)]),
    (lambda: hallusr.excess, [(3, 16, 16), (3, 4, 4)]),
    (lambda: hallusr.diversity_loss, [(3, 8, 8), (3, 8, 8), (5, 4, 4), (5, 4, 4)]),
    (lambda: hallusr.energy_score, [(3, 8, 8)] * 3),
    (lambda: partial(hallusr.pyramid, resolutions=3), [(3, 8, 8)]),
    pytest.param(PerceptualLoss, [(3, 8, 8), (3, 8, 8)], marks=needs_vgg),
    pytest.param(LPIPS, [(3, 32, 32), (3, 32, 32)], marks=needs_lpips)])
def test_what_is_exported_takes_any_batch(make, shapes):
    module, batch = AsModule(make()), torch.export.Dim("batch")
    dynamic = (tuple({0: batch} for _ in shapes),)
    exported = torch.export.export(module, tuple(images(2, *shape) for shape in shapes),
                                   dynamic_shapes=dynamic).module()
    other = [images(5, *shape) for shape in shapes]
    torch.testing.assert_close(exported(*other), module(*other))


def test_an_exported_discriminator_takes_any_batch():
    D, batch = Discriminator(3, 4, 1, 3), {0: torch.export.Dim("batch")}
    inputs = [([images(n, 3, 8, 8), images(n, 3, 16, 16)], images(n, 3, 4, 4)) for n in (2, 5)]
    exported = torch.export.export(D, inputs[0], dynamic_shapes=([batch, batch], batch)).module()
    torch.testing.assert_close(exported(*inputs[1]), D(*inputs[1]))


def test_z_of_one_pixel_changes_the_image_around_it():
    G, lr, z = Generator(**G4), levels(1, 3, 12, 12), torch.randn(1, 5, 12, 12)
    other = z.clone()
    other[..., 2, 9] += 1
    here, there = (G(lr, latent)["image"][-1] for latent in (z, other))
    moved = hallusr.downscale((here - there).abs().sum(1, True), 4)[0, 0]
    assert moved[2, 9] > 0.1 * moved.max()
    assert moved[8:].max() == 0 and moved[:, :4].max() == 0  # out of the convolutions' reach


def test_residual_block_is_x_plus_two_convolutions_and_starts_near_the_identity():
    block, x = ResidualBlock(6), torch.randn(2, 6, 5, 5)
    h = fn.leaky_relu(fn.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1), 0.2)
    expected = x + fn.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    torch.testing.assert_close(block(x), expected)
    assert (block(x) - x).std() < 0.3


def test_convolutions_keep_variance_at_the_start():
    x = torch.randn(8, 64, 16, 16)
    for _ in range(10):
        x = hallusr.activation(hallusr.conv3x3(64, 64)(x))
    assert 0.3 < x.square().mean() < 3


def plain(module, name, x, padding=1):
    """One of a module's convolutions, by its name, as torch's function."""
    weights = dict(module.named_parameters())
    return fn.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)


@pytest.mark.parametrize("blocks", [0, 2])
def test_up_block_adds_detail_from_shared_features_to_the_enlarged_pictures(blocks):
    block, features = UpBlock(6, 4, blocks), torch.randn(2, 6, 4, 4)
    image, gradient = images(2, 3, 4, 4), images(2, 3, 4, 4)
    new, larger_image, larger_gradient = block(features, image, gradient)
    doubled = features.repeat_interleave(2, 2).repeat_interleave(2, 3)
    shared = fn.leaky_relu(plain(block, "shared", doubled), 0.2)
    for i in range(blocks):
        hidden = fn.leaky_relu(plain(block, f"blocks.{i}.conv1", shared), 0.2)
        shared = shared + plain(block, f"blocks.{i}.conv2", hidden)
    torch.testing.assert_close(new, shared)
    for picture, larger, head, steepness in (
            (image, larger_image, "image_head", 1.0),
            (gradient, larger_gradient, "gradient_head", 0.5)):
        skip = fn.interpolate(picture, scale_factor=2, mode="bilinear")
        detail = fn.leaky_relu(plain(block, f"{head}.0", shared), 0.2)
        detail = plain(block, f"{head}.2", detail, padding=0)
        torch.testing.assert_close(larger, steepness * skip + detail)


@pytest.mark.parametrize("channels", [0, 3])
def test_discriminator_against_plain_convolutions_F_enters_the_last_block(channels):
    D = Discriminator(3, 4, 3, condition_channels=channels)
    for weight in D.parameters():  # biases start at 0, where their place would not show
        torch.nn.init.normal_(weight, std=0.3)

    def residual(name, x):
        return x + plain(D, f"{name}.conv2", fn.leaky_relu(plain(D, f"{name}.conv1", x), 0.2))

    coarse, fine, F = images(2, 3, 8, 8), images(2, 3, 16, 16), torch.rand(2, channels, 4, 4)
    h = 0
    for i, picture in enumerate((fine, coarse)):
        h = fn.leaky_relu(plain(D, f"down_blocks.{i}.from_pixels", picture, padding=0), 0.2) + h
        for name in ("conv1", "conv2"):
            h = fn.leaky_relu(plain(D, f"down_blocks.{i}.{name}", h), 0.2)
        h = (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
    h = residual("trunk.1", residual("trunk.0", h))
    expected = plain(D, "to_logits", residual("last_block", torch.cat([h, F], 1)))
    torch.testing.assert_close(D([coarse, fine], F if channels else None), expected,
                               rtol=1e-4, atol=1e-5)


# ---- Conditioning and losses ------------------------------------------------------------------


def test_z_is_one_vector_a_map_or_something_between():
    def draw(shape, shared):
        return hallusr.draw_z(shape, shared, torch.Generator().manual_seed(3))
    one = draw((2, 5, 4, 4), 1.0)
    assert torch.equal(one, one[..., :1, :1].expand(2, 5, 4, 4)) and len(one.unique()) == 10
    by_torch = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw((2, 5, 4, 4), 0.0), by_torch)
    many = draw((40_000, 2, 1, 2), 0.7).flatten(1)  # two numbers at each of two pixels
    pixels = torch.tensor([[1.0, 0.7 ** 2], [0.7 ** 2, 1.0]])
    torch.testing.assert_close(many.T.cov(), torch.block_diag(pixels, pixels), atol=0.03, rtol=0)
    assert many.mean(0).abs().max() < 0.03


def test_the_true_image_has_no_excess():
    hr = levels(4, 3, 16, 16)
    lr = hallusr.quantize(hallusr.downscale(hr, 8))
    assert torch.equal(hallusr.excess(hr, lr, 0.1), torch.zeros(4, 3, 2, 2))


def test_excess_counts_grey_levels_and_pulls_towards_lr():
    lr = torch.zeros(1, 3, 2, 2) + 129 / 127.5 - 1
    image = hallusr.upscale_nearest(lr + 3 / 127.5, 4)
    excess = hallusr.excess(image, lr, 0.1)
    torch.testing.assert_close(excess, torch.full_like(lr, 2.9), atol=1e-3, rtol=0)
    direction = slope(lambda x: hallusr.excess(x, lr, 0.1), image)
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


def test_energy_score_by_hand_and_its_direction():
    truth = torch.zeros(1, 2, 1, 2)
    a = torch.tensor([[3.0, 0.0], [4.0, 0.0]]).view(1, 2, 1, 2)  # 3, 4 at one place, 0 beside
    b = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).view(1, 2, 1, 2)
    root = 2 ** 0.5
    near = (5 / root / 2 + (5 / root + 1 / root) / 2) / 2  # a mean over two places each
    apart = 1 / root / 2
    expected = near - apart / 2
    assert hallusr.energy_score(a, b, truth).item() == pytest.approx(expected, abs=2e-3)
    outwards = slope(lambda x: hallusr.energy_score(x, b, truth), a)
    assert outwards[0, 1, 0, 0] > 0  # where both are off, less is better
    both = torch.zeros(1, 1, 1, 1)
    alike = slope(lambda x: hallusr.energy_score(x, both + 1, both), both + 0.9)
    assert alike.item() > 0  # towards the truth, and away from the other
    assert slope(lambda x: hallusr.energy_score(x, both, both), both).isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_energy_score_of_gaussians_against_its_closed_form(scale):
    # E|X - Y| of two Gaussians of variances s² and 1 is sqrt(2 (s² + 1) / pi).
    a, b, truth = torch.randn(3, 100_000, 1, 1, 1)
    found = hallusr.energy_score(scale * a, scale * b, truth).item()
    expected = (2 * (scale ** 2 + 1) / math.pi) ** 0.5 - scale / math.pi ** 0.5
    assert found == pytest.approx(expected, abs=0.01)  # least at 1, where samples are as truths


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


def vgg_by_hand(features, x, blocks):
    """relu1_2, relu2_2, relu3_3 of images, or the first of them, by torch's functions."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x / 2 + 0.5 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    found = []
    for block in ((0, 2), (5, 7), (10, 12, 14))[:blocks]:
        x = fn.max_pool2d(x, 2) if found else x
        for i in block:
            x = plain(features, str(i), x).relu()
        found.append(x)
    return found


def beside_vgg_by_hand(features, pictures):
    """Two resolutions of an image, each with the layer of VGG-16 that is as large."""
    first, second = vgg_by_hand(features, pictures[1], 2)
    return [torch.cat([pictures[0], second], 1), torch.cat([pictures[1], first], 1)]


def test_perceptual_loss_against_plain_convolutions(random_weights):
    loss, sr, hr = PerceptualLoss("relu2_2"), images(2, 3, 16, 16), images(2, 3, 16, 16)
    phi_sr, phi_hr = (vgg_by_hand(loss.features, x, 2)[1] for x in (sr, hr))
    torch.testing.assert_close(loss(sr, hr), (phi_sr - phi_hr).abs().mean())
    assert loss(hr, hr) == 0 and not any(p.requires_grad for p in loss.parameters())
    step = sr - 1e-2 * slope(lambda x: loss(x, hr), sr).sign()
    assert loss(step, hr) < loss(sr, hr)


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


SCORES = [  # of images (N, 3, 32, 32) and as many others: eight that are bounded, one that rounds
    hallusr.psnr, hallusr.ssim,
    lambda a, b: hallusr.lr_psnr(a, b[:, :, ::4, ::4]),
    lambda a, b: hallusr.std_map(torch.stack([a, b])),
    lambda a, b: torch.stack(hallusr.spread_and_error(torch.stack([a, -a]), b)),
    lambda a, b: hallusr.rank_histogram(torch.stack([a, -a]), b),
    pytest.param(lambda a, b: hallusr.Realism(b)(a), marks=needs_vgg),
    pytest.param(lambda a, b: hallusr.TwoSampleAUC(b)(a), marks=needs_vgg),
    lambda a, b: hallusr.two_sample_auc(a.flatten(1), b.flatten(1)),
    pytest.param(lambda a, b: LPIPS()(a, b), marks=needs_lpips),
    pytest.param(lambda a, b: PerceptualLoss()(a, b), marks=needs_vgg)]


@pytest.mark.parametrize("score", [hallusr.to_levels, *SCORES[:9]])
def test_a_score_that_rounds_is_no_loss_and_says_so(score):
    image = images(2, 3, 32, 32).requires_grad_()
    others = () if score is hallusr.to_levels else (images(2, 3, 32, 32),)
    with pytest.raises(RuntimeError, match="does not require grad"):
        score(image, *others).sum().backward()


@pytest.mark.parametrize("score", SCORES[:8])
def test_floats_of_another_range_are_refused_and_an_overshoot_is_not(score):
    score(*[1.9 * images(2, 3, 32, 32)] * 2)
    for factor in (3, 255):
        with pytest.raises(ValueError, match="floats in.*got (3|255): from_levels makes"):
            score(*[factor * torch.ones(2, 3, 32, 32)] * 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("score", SCORES)
def test_half_precision_is_scored_as_its_float32_values(score, dtype):
    a, b = images(2, 9, 3, 32, 32).to(dtype)
    torch.testing.assert_close(score(a, b), score(a.float(), b.float()))


@pytest.mark.parametrize("score", SCORES)
def test_a_programs_default_dtype_changes_no_score(larger_program, score):
    a, b = images(2, 9, 3, 32, 32)
    expected = score(a, b)
    larger_program()
    found = score(a, b)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("layer", hallusr.VGG_LAYERS)
def test_a_vgg_layer_is_what_its_name_says(layer):
    with torch.device("meta"):
        features = hallusr.vgg16().features[:hallusr.VGG_LAYERS[layer]]
    kinds = [type(module).__name__ for module in features]
    block, number = map(int, layer[4:].split("_"))
    pools = [i for i, kind in enumerate(kinds) if kind == "MaxPool2d"]
    assert len(pools) == block - 1
    assert kinds[(pools or [-1])[-1] + 1:] == ["Conv2d", "ReLU"] * number


def test_pixel_std_by_hand():
    samples = torch.tensor([10.0, 14.0, 18.0, 22.0]).view(4, 1, 1, 1, 1) / 127.5 - 1
    found = hallusr.std_map(samples.expand(4, 2, 3, 2, 2)).mean((1, 2, 3))
    torch.testing.assert_close(found, torch.full((2,), math.sqrt(20.0)))


@pytest.mark.parametrize("K", [2, 4, 10])
def test_spread_equals_error_where_truth_and_samples_are_of_one_distribution(K):
    made = hallusr.from_levels(128 + 25 * torch.randn(K + 1, 6, 3, 64, 64))
    samples, truth = made[1:], made[0]
    variance, error = hallusr.spread_and_error(samples, truth)
    assert variance.shape == error.shape == (6,)
    assert (variance.mean() / error.mean()).sqrt().item() == pytest.approx(1, abs=0.02)
    ranks = hallusr.rank_histogram(samples, truth)
    torch.testing.assert_close(ranks.mean(0), torch.full((K + 1,), 1 / (K + 1)), atol=0.01, rtol=0)
    torch.testing.assert_close(ranks.sum(1), torch.ones(6))


def test_ranks_and_errors_by_hand():
    samples = hallusr.from_levels(torch.tensor([10., 20., 30.]).view(3, 1, 1, 1, 1))
    def ranks(value):
        truth = hallusr.from_levels(torch.tensor(value)).view(1, 1, 1, 1)
        return hallusr.rank_histogram(samples, truth)[0].tolist()
    assert ranks(5.) == [1, 0, 0, 0] and ranks(25.) == [0, 0, 1, 0] and ranks(31.) == [0, 0, 0, 1]
    assert ranks(10.) == [0.5, 0.5, 0, 0]  # a tie is shared by the ranks that it may have
    found = hallusr.spread_and_error(samples, hallusr.from_levels(torch.full((1, 1, 1, 1), 26.)))
    assert [value.item() for value in found] == pytest.approx([100, 36 * 3 / 4])


def test_spread_scores_are_summed_up_over_faces():
    exact = torch.tensor([20.0, math.inf])  # 100 dB in PSNR, in LR-PSNR an error of 0
    rows = {"hallucination": {"psnr": exact, "lr_psnr": exact,
                              "variance": torch.tensor([1.0, 3.0]),
                              "error": torch.tensor([6.0, 10.0]), "ranks": torch.ones(2, 4) / 4,
                              "outside": torch.tensor([50.0, 40.0])}}
    found = sample.summarize(rows)["hallucination"]
    assert found == pytest.approx({"psnr": 60, "lr_psnr": 23.0103, "outside": 45.0, "spread": 0.5})
    rows["hallucination"]["error"] = torch.zeros(2)  # a model that knows everything
    assert sample.summarize(rows)["hallucination"]["spread"] == math.inf


def test_mean_decibel_averages_errors():
    found = sample.mean_decibel(torch.tensor([20.0, 30.0, math.inf]))
    assert found.item() == pytest.approx(-10 * math.log10((1e-2 + 1e-3 + 0) / 3))


@pytest.mark.parametrize("length, most", [(9, 4), (7, 5), (199, 100), (3, 8), (5, 5)])
def test_photos_are_spread_over_their_folder(length, most):
    found = sample.evenly(length, most)
    gaps = {b - a for a, b in zip(found, found[1:])}
    assert found[0] == 0 and len(found) == min(most, length) and found[-1] < length
    assert max(gaps) - min(gaps) <= 1 and length - found[-1] <= max(gaps) + 1


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    a, b, mean = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0]), torch.ones(3)
    found = hallusr.frechet_distance(mean, a.diag().double(), 3 * mean, b.diag().double())
    assert found.item() == pytest.approx(3 * 2 ** 2 + 1 + 0 + 4)  # roots 1, 2, 3 and 2, 2, 1
    # Of a 2x2 matrix M with positive eigenvalues, trace(M^(1/2))^2 = trace M + 2 det(M)^(1/2).
    root = torch.randn(2, 5, 2, 2, dtype=torch.float64)  # five pairs that do not commute
    a, b = (x @ x.mT for x in root)
    cross = (a @ b).diagonal(dim1=-2, dim2=-1).sum(-1) + 2 * (a @ b).det().sqrt()
    expected = (a + b).diagonal(dim1=-2, dim2=-1).sum(-1) - 2 * cross.sqrt()
    zero = torch.zeros(5, 2, dtype=torch.float64)
    torch.testing.assert_close(hallusr.frechet_distance(zero, a, zero, b), expected)
    torch.testing.assert_close(hallusr.frechet_distance(zero, a, zero, a), zero[:, 0], atol=1e-6,
                               rtol=0)


class PooledColours(PerceptualLoss):
    """Stands in for VGG-16: features that can be written down, at a quarter of the size."""

    def __init__(self, layer):
        torch.nn.Module.__init__(self)
        assert layer == "relu3_3"

    def embed(self, x):
        return [x, fn.avg_pool2d(x, 4)]


def test_realism_is_the_mean_over_regions(monkeypatch):
    monkeypatch.setattr(hallusr, "PerceptualLoss", PooledColours)
    made, photographs = levels(70, 3, 32, 48), 0.5 * levels(60, 3, 32, 48)  # maps of 8 x 12
    distances = []
    for top in range(0, 8, 2):
        for left in range(0, 12, 3):
            fits = []
            for images_ in (made, hallusr.quantize(photographs)):
                points = torch.stack([images_[n, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4].mean((1, 2))
                                      for n in range(len(images_)) for y in range(top, top + 2)
                                      for x in range(left, left + 3)]).double()
                off = points - points.mean(0)
                fits.append((points.mean(0), off.T @ off / (len(points) - 1)))
            (mean_a, a), (mean_b, b) = fits
            values, vectors = torch.linalg.eigh(a)  # the symmetric form, with a's own root
            root = vectors @ values.sqrt().diag() @ vectors.T
            cross = torch.linalg.eigvalsh(root @ b @ root).sqrt().sum()
            distances.append((mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * cross)
    realism = hallusr.Realism(photographs)
    torch.testing.assert_close(realism(made), sum(distances) / 16)
    assert realism(photographs.flip(0)).abs() < 1e-6
    with pytest.raises(ValueError, match=r"2 images or more.*got \(1, 3"):
        realism(made[:1])
    for spoiled in (math.nan, math.inf):  # the library for eigenvalues would end the process
        made[0, 0, 0, 0] = spoiled
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            realism(made)


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("N, M", [(2000, 2000), (1001, 2500)])
def test_auc_of_two_gaussians_is_the_closed_form(distance, N, M):
    direction = fn.normalize(torch.randn(3), dim=0)
    a, b = torch.randn(N, 3) + distance * direction, torch.randn(M, 3)
    scale, shift = torch.tensor([1e-3, 1.0, 1e3]), torch.tensor([5.0, 0.0, -7.0])
    expected = torch.special.ndtr(torch.tensor(distance / math.sqrt(2))).item()
    found = hallusr.two_sample_auc(scale * (a + shift), scale * (b + shift))
    assert found.item() == pytest.approx(expected, abs=0.03)  # chance's deviation is below 0.01


def test_auc_against_a_ridge_in_its_primal_form_and_a_loop_over_pairs():
    a, b = torch.randn(11, 4).double() + 0.7, torch.randn(9, 4).double()
    a[:, 3] = b[:, 3] = 0.1  # tells nothing
    b[:4] = a[:4]            # ties
    a[:, 0], b[:, 0] = a[:, 0] / 1e5, b[:, 0] / 1e5
    found = []
    for half in (0, 1):
        known = torch.cat([a[half::2], b[half::2]])
        labels = torch.tensor([1.0] * len(a[half::2]) + [-1.0] * len(b[half::2])).double()
        mean, std = known[:, :3].mean(0), known[:, :3].std(0, correction=0)
        x = (known[:, :3] - mean) / std
        weights = torch.linalg.solve(x.T @ x + 4 * 0.01 * torch.eye(3).double(), x.T @ labels)
        wins = []
        for one in a[1 - half::2]:
            for other in b[1 - half::2]:
                ahead = ((one - other)[:3] / std * weights).sum()
                wins.append(0.5 if ahead.abs() < 1e-9 else float(ahead > 0))
        found.append(sum(wins) / len(wins))
    assert 0.5 in wins
    assert hallusr.two_sample_auc(a, b).item() == pytest.approx(sum(found) / 2, abs=1e-9)


def test_auc_is_a_half_where_nothing_differs_and_1_where_all_does():
    a = torch.randn(10, 30)
    assert hallusr.two_sample_auc(torch.ones(6, 2), torch.ones(8, 2)) == 0.5
    assert hallusr.two_sample_auc(a, a).item() == pytest.approx(0.5, abs=0.1)
    assert hallusr.two_sample_auc(a + 9, a) == hallusr.two_sample_auc(a, a + 9) == 1


def test_auc_describes_an_image_by_regions_of_three_layers(random_weights):
    photographs, made = levels(6, 3, 16, 32), images(53, 3, 16, 32)
    auc = hallusr.TwoSampleAUC(photographs)
    rng = torch.Generator().manual_seed(0)
    noise = torch.cat([torch.randn(n, 3, 16, 32, generator=rng) for n in (50, 3)])
    x = hallusr.quantize(made) + 4 * 2 / 255 * noise
    expected = []
    for x in vgg_by_hand(auc.phi.features, x, 3):
        height, width = x.shape[2] // 4, x.shape[3] // 4
        means, deviations = torch.empty(2, *x.shape[:2], 4, 4)
        for i in range(4):
            for j in range(4):
                region = x[:, :, i * height:(i + 1) * height, j * width:(j + 1) * width]
                means[:, :, i, j] = region.mean((2, 3))
                deviations[:, :, i, j] = region.std((2, 3), correction=0)
        expected += [means.flatten(1), deviations.flatten(1)]
    found = auc.describe(made)
    assert found.shape == (53, 2 * 16 * (64 + 128 + 256))
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-4, atol=3e-3)
    assert auc(made) == hallusr.two_sample_auc(found, auc.describe(photographs))
    for wrong, words in ((images(2, 5, 3, 16, 16), r"\(N, 3, H, W\)"), (made[:, :1], r"\(N, 3"),
                         (math.nan * made, "hold NaN"), (made[:1], "2 rows of each, got 1 and 6")):
        with pytest.raises(ValueError, match=words):
            auc(wrong)


@needs_lpips
def test_lpips_against_plain_convolutions():
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    alexnet = torch.load(checkpoints / "alexnet-owt-7be5be79.pth", map_location="cpu")
    linear = torch.load(checkpoints / LPIPS.FILE, map_location="cpu")

    def features(x):
        x = x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        x = x / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        for i, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            x = fn.max_pool2d(x, 3, 2) if i in (3, 6) else x
            weight, bias = alexnet[f"features.{i}.weight"], alexnet[f"features.{i}.bias"]
            x = fn.conv2d(x, weight, bias, stride, padding).relu()
            yield fn.normalize(x, dim=1, eps=1e-10)

    lpips, a, b = LPIPS(), levels(2, 3, 64, 48), levels(2, 3, 64, 48)
    distance = torch.zeros(2)
    for i, (x, y) in enumerate(zip(features(a), features(b))):
        weights = linear[f"lin{i}.model.1.weight"].view(-1, 1, 1)
        layer = (weights * (x - y) ** 2).sum(1)
        distance += layer.mean((1, 2))
    torch.testing.assert_close(lpips(a, b), distance)
    assert torch.equal(lpips(a, a), torch.zeros(2))


@needs_lpips
@pytest.mark.skipif("LPIPS_REFERENCE" not in os.environ, reason="LPIPS_REFERENCE does not name a "
                    "folder with ex_ref.png, ex_p0.png, ex_p1.png of the LPIPS authors")
def test_lpips_reproduces_the_published_pair():
    folder = Path(os.environ["LPIPS_REFERENCE"])
    truth, p0, p1 = (hallusr.from_levels(sample.read_image(folder / f"ex_{name}.png"))[None]
                     for name in ("ref", "p0", "p1"))
    assert LPIPS()(truth, p0).item() == pytest.approx(0.722, abs=5e-4)
    assert LPIPS()(truth, p1).item() == pytest.approx(0.138, abs=5e-4)


class Bicubic(torch.nn.Module):
    """A stand-in generator whose scores are known: bicubic, plus z's mean as brightness."""
    scale, z_dim, settings = 4, 5, {"z_shared": 0.0}

    def forward(self, lr, z):
        shift = z.mean((1, 2, 3), keepdim=True)
        image = sample.upscale_bicubic(lr, 4) + shift
        return {"image": [image], "gradient": [hallusr.image_gradient(image * (1 + shift))]}


def test_evaluate_scores_what_the_generator_makes():
    hr = levels(60, 3, 16, 16)  # more than one part
    rows = sample.evaluate(Bicubic(), hr, samples=3)
    lr = hallusr.quantize(hallusr.downscale(hr, 4))
    torch.testing.assert_close(rows["SR"]["psnr"], rows["bicubic"]["psnr"])
    torch.testing.assert_close(rows["bicubic"]["ssim"],
                               hallusr.ssim(sample.upscale_bicubic(lr, 4), hr))
    assert (rows["hallucination"]["psnr"] < rows["SR"]["psnr"]).all()
    assert (rows["hallucination"]["pixel_std"] > 1).all()
    still = sample.evaluate(Bicubic(), hr, samples=3, temperature=0.0)
    assert torch.equal(still["hallucination"]["pixel_std"], torch.zeros(60))


def test_judges_see_all_images_of_a_row_at_once_and_of_hallucinations_the_first():
    hr = levels(60, 3, 16, 16)  # more than one part
    rows = sample.evaluate(Bicubic(), hr, 3, realism=torch.mean, auc=lambda x: x[55, 0, 2, 3])
    lr = hallusr.quantize(hallusr.downscale(hr, 4))
    z = hallusr.draw_z((3, 60, 5, 4, 4), 0.0, torch.Generator().manual_seed(0))
    expected = {"bicubic": hallusr.quantize(sample.upscale_bicubic(lr, 4)),
                "SR": hallusr.sample(Bicubic(), lr, torch.zeros(60, 5, 4, 4)),
                "hallucination": hallusr.sample(Bicubic(), lr, z[0])}
    for row, made in expected.items():
        torch.testing.assert_close(rows[row]["realism"], made.mean())
        assert rows[row]["auc"] == made[55, 0, 2, 3]


def test_upscale_bicubic_against_its_kernel():
    dot = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]).expand(1, 1, 5, 5)
    expected = [-0.03515625, -0.10546875, 0.26171875, 0.87890625]  # Keys', a = -0.75, at 1.75 ...
    assert sample.upscale_bicubic(dot, 2)[0, 0, 4, 1:5].tolist() == pytest.approx(expected)
    assert sample.upscale_bicubic(torch.ones(1, 1, 2, 2) * 3, 2).max() == 1


def test_contact_sheet_shows_every_column_in_order():
    lr, hr = levels(2, 3, 4, 4), levels(2, 3, 16, 16)
    z = torch.tensor([0.4, -0.4]).view(2, 1, 1, 1).expand(2, 5, 4, 4)
    sheet = sample.contact_sheet(Bicubic(), lr, z, hr)
    assert sheet.shape == (3, 4 * 17 + 1, 7 * 17 + 1)  # 2 faces x 2 rows; 16 pixels and a margin

    def tile(row, column):
        return sheet[:, 17 * row + 1:17 * row + 17, 17 * column + 1:17 * column + 17]
    bicubic = sample.upscale_bicubic(lr, 4)[1]
    brighter, darker = (hallusr.quantize(bicubic + shift) for shift in (0.4, -0.4))
    spread = (hallusr.to_levels(brighter) - hallusr.to_levels(darker)).abs() / 2 / 64
    expected = [hallusr.upscale_nearest(lr, 4)[1] / 2 + 0.5, bicubic / 2 + 0.5,
                hallusr.quantize(bicubic) / 2 + 0.5,
                brighter / 2 + 0.5, darker / 2 + 0.5, spread.clamp(max=1), hr[1] / 2 + 0.5]
    for column, picture in enumerate(expected):
        torch.testing.assert_close(tile(2, column), picture, atol=1e-5, rtol=0)
    torch.testing.assert_close(tile(3, 6), hallusr.image_gradient(hr)[1].clamp(max=1))
    assert tile(3, 5).max() == 0
    for column, z in ((2, 0.0), (3, 0.4), (4, -0.4)):  # the stand-in's own, of unbounded images
        own = hallusr.image_gradient((sample.upscale_bicubic(lr, 4) + z) * (1 + z))[1]
        torch.testing.assert_close(tile(3, column), own.clamp(max=1))


# ---- Wrong input ------------------------------------------------------------------------------


@pytest.mark.parametrize("call, words", [
    (lambda: train.check_config(tiny(width=0)), "width must be 1 or more, got 0"),
    (lambda: train.check_config(tiny(size=62)), "multiple of scale 4, got 62"),
    (lambda: Discriminator(3, 32, 1, 3, True), "too few layers for scale 32"),
    (lambda: train.check_config(tiny(learning_rate_g=math.nan)),
     r"learning_rate_g must be in \[0, inf\], got nan"),
    (lambda: train.check_config(tiny(batch=0)), r"batch must be in \[1, inf\], got 0"),
    (lambda: train.check_config(tiny(d_blocks=0)), "blocks must be 1 or more, got 0"),
    (lambda: Generator(scale=12), "power of two.*12"),
    (lambda: Generator(z_dim=0), "z_dim must be 1 or more"),
    (lambda: Generator(**G4)(images(2, 1, 4, 4), torch.randn(2, 5, 4, 4)),
     r"\(N, 3, H, W\).*2, 1, 4, 4"),
    (lambda: Generator(**G4)(images(2, 3, 4, 4), torch.randn(2, 6, 4, 4)),
     r"\(2, 5, 4, 4\), got \(2, 6, 4, 4\)"),
    (lambda: Discriminator(3, 4, 1)([images(2, 3, 16, 16)]), "shorter"),
    (lambda: Discriminator(3, 4, 1)([images(1, 3, 8, 8), images(2, 3, 16, 16)]),
     "one shape.*1, 6, 8, 8.*2, 6, 8, 8"),
    (lambda: hallusr.diversity_loss(*images(2, 2, 3, 4, 4), *torch.randn(2, 1, 5)), "a z for"),
    (lambda: hallusr.diversity_loss(*images(2, 2, 3, 4, 4), torch.randn(1, 5), torch.randn(2, 5)),
     "z1 and z2 must have one shape"),
    (lambda: hallusr.draw_z((1, 5, 4, 4), 1.1, None), r"z_shared must be in \[0, 1\], got 1.1"),
    (lambda: hallusr.draw_z((4, 5), 1.0, None), r"\(..., z_dim, h, w\), got \(4, 5\)"),
    (lambda: train.check_config(tiny(decay=3.0)), r"decay must be in \[0, 1\], got 3"),
    (lambda: sample.parse_arguments(["--temperature", "inf"]), "--temperature inf is no scale"),
    (lambda: sample.parse_arguments(["--seed", "20000000000000"]), "seed must be in"),
    (lambda: sample.parse_arguments(["--slice", "1:2"]), "--slice and --others go with"),
    (lambda: sample.parse_arguments(["--lr", "--evaluate", "x"]), "--evaluate makes LR itself"),
    (lambda: train.main(["--val", "x", "--device", "cpu"]), "--val goes with a folder of photos"),
    (lambda: train.main(["--size", "64", "--device", "cpu"]), "LR of drawn faces must be 4x4 or"),
    *[(lambda flag=flag: train.prepare(["--resume", "a/last.pt", flag, "paper"]),
       "no --preset, --init or --out") for flag in ("--preset", "--init", "--out")],
    (lambda: train.prepare(["--resume", "best.pt"]), "takes a run's last.pt, got .*best.pt"),
    (lambda: hallusr.save_checkpoint("a.pt", torch.nn.ReLU()), "expected a Generator, got a ReLU"),
    (lambda: PerceptualLoss("relu9_9"), "relu2_2.*got 'relu9_9'"),
    (lambda: hallusr.rank_histogram(math.nan * images(2, 1, 3, 4, 4), images(1, 3, 4, 4)),
     "samples hold NaN"),
    (lambda: hallusr.psnr(images(1, 3, 4, 4), math.nan * images(1, 3, 4, 4)), "got nan"),
    (lambda: hallusr.downscale(images(1, 3, 12, 12), 8), "multiples of 8, got 12 x 12"),
    (lambda: hallusr.image_gradient(images(3, 4, 4)), r"\(N, C, H, W\), got \(3, 4, 4\)"),
    (lambda: hallusr.project_onto_lr(images(2, 3, 8, 8), images(1, 3, 4, 4)), "one image for each"),
    (lambda: hallusr.excess(images(1, 3, 8, 8), images(1, 3, 2, 4)), "one multiple of lr's"),
    (lambda: hallusr.excess(images(1, 3, 8, 8), images(1, 3, 1, 1), -1), "eps must be"),
    (lambda: hallusr.diversity_loss(*images(2, 2, 3, 4, 4), *torch.randn(2, 2, 5), 0.0),
     "tau must be positive, got 0.0"),
    (lambda: hallusr.gradient_loss(images(2, 3, 4, 4), images(1, 3, 4, 4)), "one shape"),
    (lambda: hallusr.psnr(images(2, 3, 4, 4), images(1, 3, 4, 4)), "one shape"),
    (lambda: hallusr.psnr(*images(2, 5, 2, 3, 4, 4)), r"\(N, C, H, W\), got \(5, 2, 3, 4, 4\)"),
    (lambda: hallusr.ssim(*images(2, 5, 2, 3, 16, 16)), r"\(N, C, H, W\), got \(5, 2, 3, 16, 16\)"),
    (lambda: hallusr.lr_psnr(images(5, 2, 3, 8, 8), images(5, 2, 3, 4, 4)), r"\(N, 3, H, W\), got"),
    (lambda: hallusr.std_map(images(5, 4, 2, 3, 4, 4)), r"\(K, N, 3, H, W\), got"),
    (lambda: hallusr.spread_and_error(images(5, 4, 2, 3, 4, 4), images(4, 2, 3, 4, 4)), "truth .N"),
    pytest.param(lambda: LPIPS()(*images(2, 5, 2, 3, 32, 32)), r"\(N, 3, H, W\), got",
                 marks=needs_lpips),
    pytest.param(lambda: hallusr.Realism(images(5, 2, 3, 32, 32)), r"\(N, 3, H, W\), got",
                 marks=needs_vgg),
    pytest.param(lambda: LPIPS()(images(2, 3, 16, 16), images(2, 3, 16, 16)), "sides of 31",
                 marks=needs_lpips),
    (lambda: hallusr.spread_and_error(images(1, 2, 3, 4, 4), images(2, 3, 4, 4)), "K of 2 or more"),
    (lambda: hallusr.rank_histogram(images(4, 2, 3, 4, 4), images(1, 3, 4, 4)), "K of 2 or more"),
])
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def either_side(compare):
    grey = torch.zeros(2, 3, 32, 32)
    return [lambda x: compare(x, grey), lambda x: compare(grey, x)]


@pytest.mark.parametrize("reads", [
    [hallusr.image_gradient, hallusr.quantize, lambda x: hallusr.downscale(x, 8),
     lambda x: hallusr.pyramid(x, 3),
     lambda x: hallusr.std_map(x[None]),
     lambda x: Generator(**G4)(x, torch.randn(2, 5, 32, 32))],
    *map(either_side, [hallusr.psnr, hallusr.ssim, hallusr.lr_psnr, hallusr.excess]),
    pytest.param(either_side(lambda a, b: LPIPS()(a, b)), marks=needs_lpips, id="LPIPS")])
def test_bytes_are_no_images(reads):
    for read in reads:
        read(images(2, 3, 32, 32))
        with pytest.raises(ValueError, match="floats in.*uint8: from_levels makes"):
            read(torch.full((2, 3, 32, 32), 255).to(torch.uint8))


# ---- Checkpoints ------------------------------------------------------------------------------


def test_checkpoint_loads_with_plain_torch_and_gives_the_same_images(tmp_path):
    G = Generator(**G4, z_shared=0.25).half().float()  # so that half precision loses nothing
    hallusr.save_checkpoint(tmp_path / "full.pt", G, step=7)
    hallusr.save_checkpoint(tmp_path / "half.pt", G.half())
    assert torch.load(tmp_path / "full.pt")["step"] == 7
    lr, z = levels(1, 3, 4, 4), torch.randn(1, 5, 4, 4)
    for name in ("full.pt", "half.pt"):
        loaded = hallusr.load_generator(tmp_path / name)
        assert not loaded.training and loaded.z_dim == 5
        assert loaded.settings == dict(**G4, z_shared=0.25, fine_blocks=0,
                                       hard_consistency=False)
        assert torch.equal(loaded(lr, z)["image"][-1], G.float()(lr, z)["image"][-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.pt", "half.pt"]


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def larger_program(request):
    """Switches to the default dtype of a program that our file was copied into, and back."""
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(torch.float32)


def test_a_programs_default_dtype_is_not_the_generators(larger_program, tmp_path):
    hallusr.save_checkpoint(tmp_path / "G.pt", Generator(**G4))
    G, lr = hallusr.load_generator(tmp_path / "G.pt"), levels(1, 3, 4, 4)
    z = hallusr.draw_z((1, 5, 4, 4), 0.5, torch.Generator().manual_seed(1))
    larger_program()
    loaded = hallusr.load_generator(tmp_path / "G.pt")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    same_z = hallusr.draw_z((1, 5, 4, 4), 0.5, torch.Generator().manual_seed(1))
    assert same_z.dtype == torch.float32 and torch.equal(same_z, z)
    assert torch.equal(hallusr.sample(loaded, lr, same_z), hallusr.sample(G, lr, z))


def save_text(path, text, error=None):
    """save_checkpoint with a stand-in for torch.save; returns where that was told to write."""
    told = []

    def save(content, place):
        told.append(Path(place))
        told[0].write_text(text)
        if error:
            raise error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        hallusr.save_checkpoint(path, Generator(**G4))
    return told[0]


@pytest.mark.parametrize("error, seen, words", [
    (OSError(28, "Disk full"), OSError, "could not write .*name: .*Disk full$"),
    (RuntimeError("disk full\nframe #0"), OSError, "could not write .*name: disk full$"),
    (KeyError("z"), KeyError, "z"), (KeyboardInterrupt(), KeyboardInterrupt, "^$")])
def test_a_file_is_whole_or_as_it_was(error, seen, words, tmp_path):
    def files():
        return {path.name: path.read_text() for path in tmp_path.iterdir()}
    before = {}
    for text in ("the first time there is none", "then there is an old one"):
        with pytest.raises(seen, match=words):
            save_text(tmp_path / "name", "hal", error)
        assert files() == before
        save_text(tmp_path / "name", text)
        before = {"name": text}
        assert files() == before


@pytest.mark.parametrize("old", [None, "an old one"])
@pytest.mark.parametrize("points_to", ["../far/file", "second", "{}/far/file"])
def test_a_link_to_other_storage_stays_one(old, points_to, tmp_path):
    near, far = tmp_path / "near", tmp_path / "far"
    near.mkdir()
    far.mkdir()
    (near / "name").symlink_to(points_to.format(tmp_path))
    (near / "second").symlink_to("../far/file")
    if old:
        (far / "file").write_text(old)
    with pytest.raises(OSError, match="could not write .*near/name: "):
        save_text(near / "name", "hal", OSError(28, "Disk full"))
    assert [path.read_text() for path in far.iterdir()] == ([old] if old else [])
    # A file can not be moved from one disk to another.
    assert save_text(near / "name", "new").parent == far
    assert (far / "file").read_text() == "new" and len(list(far.iterdir())) == 1
    assert {path.name for path in near.iterdir() if path.is_symlink()} == {"name", "second"}
    assert len(list(near.iterdir())) == 2


@pytest.mark.parametrize("spoil, words", [
    (lambda _: b"not a checkpoint", "is damaged or no checkpoint"),
    (lambda _: b"PK\x03\x04 cut short", "is damaged or no checkpoint"),
    (lambda good: good | {"hallusr": 3}, "no checkpoint of this version"),
    (lambda good: good["settings"].update(width=4), "holds another architecture:"),
    (lambda good: good["generator"]["trunk.0.conv2.weight"][0, 0, 1, 1].fill_(math.inf),
     "is spoiled: trunk.0.conv2.weight holds NaN or infinity")])
def test_wrong_checkpoints_are_named(spoil, words, tmp_path):
    path = tmp_path / "bad.pt"
    hallusr.save_checkpoint(path, Generator(**G4))
    good = torch.load(path)
    found = spoil(good)
    bad = found if isinstance(found, (bytes, dict)) else good  # spoilt in place
    path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
    with pytest.raises(ValueError, match=f"bad.pt.*{words}"):
        hallusr.load_generator(path)


# ---- Training ---------------------------------------------------------------------------------


def test_drawn_faces_train_on_one_thread(tmp_path):
    torch.set_num_threads(2)
    run_training(tmp_path, "--steps", "1")
    assert torch.get_num_threads() == 1


def run_training(out, *flags):
    """train.py in this process; returns the content of last.pt."""
    train.main(shlex.split(TINY_FLAGS) + ["--out", str(out), *flags])
    return torch.load(Path(out) / "last.pt")


def table(path):
    """The rows of a table, without the one column that no two runs share."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "images_per_s"}
            for row in rows]


@pytest.mark.parametrize("spoil", [
    None, lambda path: path.unlink(), lambda path: path.write_text('{"step": 1, "SR_psnr": Infin')])
def test_resumed_training_is_equal_bit_by_bit_whatever_became_of_its_tables(spoil, tmp_path):
    flags = ["--r1-every", "2", "--val-every", "3", "--warmup", "1"]
    whole = run_training(tmp_path / "whole", "--steps", "6", *flags)
    run_training(tmp_path / "part", "--steps", "3", *flags)
    for path in (tmp_path / "part").glob("*.jsonl") if spoil else ():
        spoil(path)
    train.main(["--resume", str(tmp_path / "part/last.pt"), "--steps", "6", "--device", "cpu"])
    resumed = torch.load(tmp_path / "part/last.pt")
    assert whole["step"] == resumed["step"] == 6
    for name in ("generator", "G", "D_I", "D_g"):
        for key, value in whole[name].items():
            assert torch.equal(value, resumed[name][key]), key
    log, valid = (table(tmp_path / "whole" / name) for name in ("log.jsonl", "valid.jsonl"))
    assert [row["step"] for row in log + valid] == [1, 2, 3, 4, 5, 6, 3, 6]
    assert [("L_z" in row) + ("R1" in row) for row in log] == [0, 1, 2, 1, 2, 1]
    if not spoil:
        assert log == table(tmp_path / "part/log.jsonl")
        assert valid == table(tmp_path / "part/valid.jsonl")


def loss_of_d(D, real, fakes, F, r1_weight, beta, shown):
    """-log D(real) - log(1 - D(fake)) + R1, one image at a time; F is None for D_g.

    D is shown what the function `shown` makes of pictures.
    """
    none = None if F is None else torch.zeros_like(F[0][:1])
    loss, share = 0.0, (beta / (1 + beta), 1 / (1 + beta))
    for n in range(2):
        pictures = [picture[n:n + 1].detach().requires_grad_() for picture in real]
        logits = D(shown(pictures), none)
        steep = torch.autograd.grad(logits.mean(), pictures, create_graph=True)
        r1 = sum(gradient.square().sum() for gradient in steep)
        loss = loss - torch.sigmoid(logits).log().mean() / 2 + r1_weight * r1 / 2
        for k, fake in enumerate(fakes):
            seen = shown([picture[n:n + 1].detach() for picture in fake])
            logits = D(seen, None if F is None else F[k][n:n + 1].detach())
            loss = loss - share[k] * (1 - torch.sigmoid(logits)).log().mean() / 2
    return loss


def bare_copies(nets):
    """D_I and D_g with the same weights."""
    copies = {"image": Discriminator(3, 4, 1, 3, nets.phi is not None),
              "gradient": Discriminator(3, 4, 1)}
    copies["image"].load_state_dict(nets.D_I.state_dict())
    copies["gradient"].load_state_dict(nets.D_g.state_dict())
    return copies


def pairs_apart(h1, h2, z1, z2):
    """(8) before its ceiling and mean: one number for each pair."""
    return torch.stack([(a - b).abs().mean() / ((y - z).abs().mean() + 1e-5)
                        for a, b, y, z in zip(h1["gradient"][-1], h2["gradient"][-1], z1, z2)])


def energy(truth, one, two):
    """The energy score of vectors of channels, in deviations of the truth."""
    def distance(a, b):
        return ((a - b) ** 2).mean(1).add(1e-6).pow(0.5).mean()
    near = (distance(one, truth) + distance(two, truth)) / 2
    return (near - distance(one, two) / 2) / truth.std()


def assert_left(module, gradients):
    """A step left these gradients in a module."""
    found = tuple(weight.grad for weight in module.parameters())
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-6)


def share_won(real, fake):
    """Of all pairs, in how many has the real one more? A tie is half a win."""
    won = 0.0
    for a in real.mean((1, 2, 3)).tolist():
        for b in fake.mean((1, 2, 3)).tolist():
            won += 1.0 if a > b else 0.5 if a == b else 0.0
    return won / len(real) / len(fake)


@pytest.mark.parametrize("step, every, times", [(5, 1, 1), (7, 1, 1), (8, 4, 4), (7, 4, 0),
                                                (4, 1, None)])  # the last is of the warm-up
@pytest.mark.parametrize("beta, features", [(0.5, False), (0.0, False), (0.5, True)])
def test_a_step_of_both_players_goes_down_their_losses(step, every, times, beta, features,
                                                       random_weights):
    config = tiny(gamma=2.0, beta=beta, alpha=3.0, energy=4.0, pixel=5.0, eps=0.3, warmup=5,
                  r1_gamma=6.0, r1_every=every, learning_rate_g=1e-30, learning_rate_d=1e-3,
                  steps=10, d_features=features)
    kind = {None: "warm-up", 0: "plain"}.get(times, "with R1")
    nets, playing, edges = train.Networks(config, "cpu"), times is not None, hallusr.image_gradient
    nets.follow_schedule(config, step)
    hr, z1, z2 = levels(2, 3, 16, 16), *torch.randn(2, 2, 5, 4, 4)
    lr = hallusr.quantize(hallusr.downscale(hr, 4))
    sr, h1, h2 = [nets.G(lr, z) for z in (torch.zeros_like(z1), z1, z2)]
    F = [hallusr.excess(x["image"][-1], lr, 0.3) for x in (sr, h1)]
    assert all((x > 0).any() for x in F)
    real = {"image": [hallusr.downscale(hr, 2), hr]}
    real["gradient"] = [edges(picture) for picture in real["image"]]
    l_z = pairs_apart(h1, h2, z1, z2)
    config = replace(config, tau=l_z.mean().item())  # one of the two is cut
    vgg = partial(beside_vgg_by_hand, nets.phi.features) if features else list
    shown = {"image": vgg, "gradient": list}
    Ds = {"image": nets.D_I, "gradient": nets.D_g}
    before, calls = bare_copies(nets), []
    hook = nets.D_I.register_forward_hook(lambda _, __, logits: calls.append(len(logits)))
    terms = train.training_step(nets, config, hr, z1, z2, kind)
    hook.remove()
    assert all(term.shape == () and not term.requires_grad for term in terms.values())
    judged = 2 if beta else 1  # of z1's image, and of the reconstruction
    assert calls == ([2] * (1 + judged + bool(times) + judged) if playing else [])
    after = bare_copies(nets)
    for domain, D in Ds.items():
        old, new = before[domain], after[domain]
        assert torch.equal(new.to_logits.weight, old.to_logits.weight) != playing
        if playing:
            batch = real[domain], [sr[domain], h1[domain]], F if domain == "image" else None
            loss = loss_of_d(old, *batch, times * 6 / 2, beta, shown[domain])
            assert loss_of_d(new, *batch, times * 6 / 2, beta, shown[domain]) < loss
            assert_left(D, torch.autograd.grad(loss, list(old.parameters())))
            condition = [torch.zeros_like(F[1]), F[1]] if domain == "image" else [None, None]
            on_real, on_h = [old(shown[domain](x[domain]), given)
                             for x, given in zip((real, h1), condition)]
            torch.testing.assert_close(terms[f"D_{domain}_real"], on_real.mean())
            torch.testing.assert_close(terms[f"D_{domain}_fake"], on_h.mean())  # without SR's
            assert terms[f"D_{domain}_auc"].item() == share_won(on_real, on_h)

    # G has not moved, D has: what is left in G is its objective against the D just improved.
    def adversarial(x, k):
        return sum(-torch.sigmoid(D(shown[domain](x[domain]), F[k] if domain == "image" else None))
                   .log().mean() for domain, D in after.items())
    pixels = (sr["image"][-1] - hr).abs().mean()  # perceptual="pixels": (6) is the same
    loss = 2 * pixels + 5 * pixels
    loss = loss + 2 * (sr["gradient"][-1] - real["gradient"][-1]).abs().mean()
    if playing:
        loss = loss + beta * adversarial(sr, 0)                                 # (10)
        loss = loss + adversarial(h1, 1) - 3 * l_z.clamp(max=config.tau).mean()  # (11)
        scores = [energy(*seen) for domain in Ds for seen in
                  zip(*(shown[domain](x[domain]) for x in (real, h1, h2)))]
        loss = loss + 4 * sum(scores) / 4  # two domains at two resolutions
        torch.testing.assert_close(terms["L_z"], l_z.clamp(max=config.tau).mean())
    assert_left(nets.G, torch.autograd.grad(loss, list(nets.G.parameters())))


@pytest.fixture
def photos(tmp_path):
    """A folder of four photographs of 32x32, of which one is held out, and one of two more."""
    folders = []
    for name, amount in (("photos", 4), ("more", 2)):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        for i in range(amount):
            save_image(torch.rand(3, 32, 32), folders[-1] / f"{i}.png")
    return folders


def train_on(photos, out, *flags):
    return run_training(out, "--data", str(photos[0]), "--val", str(photos[1]), "--size", "32",
                        *flags)


def scored(monkeypatch, rows):
    """Validations give these rows of spread, realism and AUC, one after another."""
    values = iter(rows)
    monkeypatch.setattr(train, "metrics_against", lambda photographs: {"realism": None})
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(train, "summarize", lambda _: {
        "hallucination": dict(zip(("spread", "realism", "auc"), next(values)))})


def test_what_a_step_is_depends_on_its_number_alone():
    config = tiny(warmup=3, r1_every=4)
    kinds = [train.kind_of(config, step) for step in range(10)]
    assert kinds == ["warm-up"] * 3 + ["plain", "with R1"] + ["plain"] * 3 + ["with R1", "plain"]
    assert {train.kind_of(tiny(), step) for step in range(5)} == {"with R1"}  # the paper's


def test_auc_of_d_against_a_loop_over_pairs():
    real, fake = torch.randn(2, 5, 1, 4, 4)
    real[0] = fake[1]  # a tie
    found = train.terms_of_D({"image": real}, {"image": fake})["D_image_auc"].mean().item()
    assert found == pytest.approx(share_won(real, fake), abs=1e-6) and 0.1 < found < 0.9


def test_running_average_follows_and_forgets():
    nets = train.Networks(tiny(), "cpu")
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


@pytest.mark.parametrize("warmup, scores, best", [                    # spread, realism, AUC
    (0, [(0.90, 90.0, 0.8), (0.85, 70.0, 0.9), (0.8, 80.0, 0.85)], 4),  # 72, 63, 68
    (0, [(0.90, 90.0, 0.8), (0.85, 80.0, 0.95), (0.9, 100.0, 0.7)], 6),  # 72, 76, 70
    (0, [(0.80, 500.0, 1.0), (0.79, 1.0, 0.5), (0.1, 1.0, 0.5)], 2),  # all alike is no gain
    (0, [(0.50, 1.0, 0.5), (1.50, 500.0, 1.0), (0.7, 1.0, 0.5)], 4),
    (0, [(0.50, 10.0, 0.5), (0.40, 9.0, 0.5), (0.7, 9.5, 0.5)], 4),  # the least where none is wide
    (4, [(0.90, 1.0, 0.5), (0.90, 1.0, 0.5), (0.9, 9.0, 0.5)], 6)])  # later than the warm-up
def test_spread_realism_and_auc_decide_what_is_best(warmup, scores, best, tmp_path, photos,
                                                    monkeypatch):
    scored(monkeypatch, scores)
    train_on(photos, tmp_path / "run", "--steps", "6", "--warmup", str(warmup))
    assert torch.load(tmp_path / "run/best.pt")["step"] == best


def test_a_resumed_run_knows_the_best_before(tmp_path, photos, monkeypatch):
    scored(monkeypatch, [(0.9, 90.0, 0.5), (0.9, 70.0, 0.5), (0.9, 80.0, 0.5)])  # at 2, 4 and 6
    train_on(photos, tmp_path / "run", "--steps", "4")
    train.main(["--resume", str(tmp_path / "run/last.pt"), "--steps", "6", "--device", "cpu"])
    assert torch.load(tmp_path / "run/best.pt")["step"] == 4


# Eyes look in 16 directions, and opposite to each is the one 8 further on.
@pytest.mark.parametrize("size", [32, 64])
def test_a_small_face_hides_where_the_eyes_look_and_nothing_else(size):
    faces = possibilities(20, size)
    assert torch.equal(faces, hallusr.quantize(faces)) and faces.abs().max() <= 1
    for side in (4, 2):
        small = fn.avg_pool2d(faces.flatten(0, 1), size // side)
        small = hallusr.to_levels(hallusr.quantize(small)).view(16, 20, -1)
        assert (small.amax(0) - small.amin(0)).max() <= 1  # one grey level, by rounding
    # What all share cancels out in the deviation from the mean: dark is where the eyes look.
    darker = (faces.mean(0) - faces).mean(2).clamp(min=0).mean(1)        # (16, H, W)
    axis = (torch.arange(size) + 0.5) / size
    x = (darker.sum(1) * axis).sum(1) / darker.sum((1, 2)) - 4 / 8
    y = (darker.sum(2) * axis).sum(1) / darker.sum((1, 2)) - 3 / 8
    angles = (torch.arange(16) - 1.5) * 2 * math.pi / 16
    assert (torch.stack([x, y], 1) * torch.stack([angles.cos(), angles.sin()], 1)).sum(1).min() > 0
    turned = torch.atan2(y, x) - angles
    assert torch.atan2(turned.sin(), turned.cos()).abs().max() < 0.35  # less than from one to next
    random = torch.rand(5, 7)
    assert torch.equal(train.draw_faces(random[3:4], size)[0], train.draw_faces(random, size)[3])


@pytest.mark.parametrize("size", [32, 64])
def test_opposite_gazes_are_equally_far_apart(size):
    faces = possibilities(20, size).flatten(0, 1)
    seen = hallusr.image_gradient(fn.avg_pool2d(faces, size // 16)).unflatten(0, (16, 20))
    apart = (seen[:8] - seen[8:]).square().mean(2).sqrt().mean((1, 2, 3))
    middle = (apart.min() + apart.max()) / 2
    assert ((apart - middle).abs() < 0.1 * middle).all() and middle > 0.05


def stand_in(make):
    """A generator of 8x whose image is make(lr, z)."""
    def generator(lr, z):
        return {"image": [make(lr, z)]}
    generator.scale = 8
    generator.z_dim = 5
    generator.settings = {"z_shared": 1.0}
    return generator


def test_the_count_at_the_end_of_a_run_shows_a_perfect_sampler_as_perfect():
    truth = possibilities(80, 32)
    oracle = stand_in(lambda lr, z: truth[
        (16 * torch.special.ndtr(z[:, 0, 0, 0])).long().clamp(max=15), torch.arange(80)])
    found = sample.directions_found(oracle, truth)
    assert found == pytest.approx(4 * (1 - 0.75 ** 10), abs=0.15)  # 3.77


def test_nothing_simpler_finds_more_than_one_direction():
    truth = possibilities(30, 32)
    noise = stand_in(lambda lr, z: truth.mean(0) + 0.1 * torch.randn(30, 3, 32, 32))
    bicubic = stand_in(lambda lr, z: sample.upscale_bicubic(lr, 8))
    mean = stand_in(lambda lr, z: truth.mean(0))
    one = stand_in(lambda lr, z: truth[torch.arange(30) % 16, torch.arange(30)])
    stand_ins = {"one answer": (one, 1.0), "noise": (noise, 0.0), "bicubic": (bicubic, 0.0),
                 "mean": (mean, 0.0), "untrained": (Generator(32, 8, 5, 1.0, 3, 1), 0.0)}
    for name, (generator, expected) in stand_ins.items():
        found = sample.directions_found(generator, truth)
        assert found == pytest.approx(expected), name


def test_calibration_by_hand():
    def flat(levels_):
        return hallusr.from_levels(torch.tensor(levels_)).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    # One face, grey of level 5 k for direction k, and four hallucinations of it.
    truth = flat([5.0 * k for k in range(16)])[:, None]
    values = iter([2.0, 21.0, 22.0, 255.0])
    found = sample.directions_found(stand_in(lambda lr, z: flat([next(values)])), truth, samples=4)
    # 2: by 0 (right), 38 from its opposite. 21 and 22: by 4 (down), 39 and 38. 255: by 15
    # (up), but 180 from it, and 220 from its opposite: not clear, as 180^2 > 220^2 / 2.
    assert found == 2.0


def test_a_run_says_where_its_hallucinations_look(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "directions_found", lambda *_: 3.456)
    run_training(tmp_path)
    assert "look in 3.46 of four\ndirections" in capsys.readouterr().out


def test_it_learns_a_batch_by_heart(tmp_path):
    for i in range(4):
        save_image(train.draw_faces(torch.rand(1, 7), 32) / 2 + 0.5, tmp_path / f"{i}.png")
    shutil.copytree(tmp_path, tmp_path / "same")
    run_training(tmp_path / "run", "--data", str(tmp_path), "--val", str(tmp_path / "same"),
                 "--size", "32", "--batch", "4",
                 "--steps", "200", "--width", "8", "--val-every", "200",
                 "--log-every", "50", "--learning-rate-g", "2e-3", "--learning-rate-d", "2e-3",
                 "--ema", "0.9", "--energy", "5")
    row = table(tmp_path / "run/valid.jsonl")[-1]
    assert row["SR_psnr"] > row["bicubic_psnr"] + 2
    assert row["hallucination_pixel_std"] > 0.5


def test_batches_are_a_function_of_seed_and_step():
    faces = torch.randint(0, 256, (20, 3, 16, 16)).to(torch.uint8)
    config = tiny()
    first, again = (train.batch_at(faces, config, 3, "cpu") for _ in range(2))
    other = train.batch_at(faces, config, 4, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[1], other[1]) and not torch.equal(first[1], first[2])


def test_batches_draw_every_face_and_its_mirror_and_differ_by_seed():
    faces = torch.zeros(5, 3, 16, 16).byte()
    for i in range(5):
        faces[i, :, :, :8] = 10 * i + 5
    config, seen = tiny(), set()
    for step in range(60):
        for face in hallusr.to_levels(train.batch_at(faces, config, step, "cpu")[0]):
            seen.add((face[0, 0, 0].item(), face[0, 0, -1].item()))
    assert seen == {pair for value in range(5, 50, 10) for pair in ((value, 0), (0, value))}
    other = train.batch_at(faces, replace(config, seed=1), 0, "cpu")[1]
    same = [train.batch_at(faces, config, step, "cpu")[1] for step in (0, 1)]
    assert not any(torch.equal(other, z) for z in same)


def test_batches_share_noise_between_pixels_as_the_setting_says():
    config = tiny(z_shared=0.5, batch=4000)
    _, z1, _ = train.batch_at(torch.zeros(2, 3, 16, 16).byte(), config, 0, "cpu")
    shared = (z1[..., 0, 0] * z1[..., 3, 3]).mean().item()
    assert shared == pytest.approx(0.5 ** 2, abs=0.03)


def test_nan_stops_training_and_overwrites_nothing(tmp_path, monkeypatch):
    run_training(tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    real = train.diversity_loss
    monkeypatch.setattr(train, "diversity_loss", lambda *given: math.nan * real(*given))
    with pytest.raises(FloatingPointError, match="L_z became nan"):
        train.main(["--resume", str(tmp_path / "last.pt"), "--steps", "9", "--val-every", "1",
                    "--log-every", "100", "--device", "cpu"])
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_run_is_never_overwritten(tmp_path, monkeypatch):
    run_training(tmp_path / "mine")
    with pytest.raises(ValueError, match="mine holds a run already"):
        run_training(tmp_path / "mine")
    with pytest.raises(ValueError, match="last.pt is done: raise --steps"):
        train.main(["--resume", str(tmp_path / "mine/last.pt"), "--device", "cpu"])
    for name in ("best.pt", "valid.jsonl"):
        (tmp_path / name[:4]).mkdir()
        (tmp_path / name[:4] / name).touch()
        with pytest.raises(ValueError, match="holds a run already"):
            run_training(tmp_path / name[:4])


def test_init_starts_from_a_trained_generator(tmp_path):
    run_training(tmp_path / "first")
    first = tmp_path / "first/last.pt"
    # At rates of 0 nothing moves, and what G starts from can be seen at the end.
    still = ["--learning-rate-g", "0", "--learning-rate-d", "0", "--seed", "1"]
    run_training(tmp_path / "second", "--init", str(first), *still)
    given = torch.load(first)["generator"]
    found = torch.load(tmp_path / "second/last.pt")
    for name, weight in given.items():
        assert torch.equal(found["G"][name], weight)
        assert torch.allclose(found["generator"][name], weight, atol=1e-6)
    words = ["--data", str(tmp_path), "--init", str(first)]
    assert train.prepare(words)[1].warmup == 0
    assert train.prepare([*words, "--warmup", "7"])[1].warmup == 7
    with pytest.raises(ValueError, match="first/last.pt has the settings .*: 5.* this run .*: 6"):
        run_training(tmp_path / "third", "--init", str(first), "--z-dim", "6")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_saves_and_says_how_to_resume(name, tmp_path, monkeypatch, capsys):
    step_done = train.Report.step_done

    def interrupt_first(self, step, terms):
        signal.raise_signal(getattr(signal, name))
        return step_done(self, step, terms)
    monkeypatch.setattr(train.Report, "step_done", interrupt_first)
    content = run_training(tmp_path, "--steps", "9", "--log-every", "5")
    assert content["step"] == 1
    assert [row["step"] for row in table(tmp_path / "valid.jsonl")] == [1]
    assert (tmp_path / "grid.png").exists()
    assert f"python train.py --resume {tmp_path / 'last.pt'}\n" in capsys.readouterr().out


def test_ctrl_c_while_validating_takes_no_further_step(tmp_path, monkeypatch):
    validate = train.Report.validate

    def interrupted(self):
        signal.raise_signal(signal.SIGINT)
        validate(self)
    monkeypatch.setattr(train.Report, "validate", interrupted)
    assert run_training(tmp_path, "--steps", "9", "--val-every", "3")["step"] == 3


def test_a_second_ctrl_c_kills(tmp_path, monkeypatch):
    seen, step_done = [], train.Report.step_done

    def interrupt(self, step, terms):
        seen.append(signal.getsignal(signal.SIGINT))
        signal.raise_signal(signal.SIGINT)
        seen.append(signal.getsignal(signal.SIGINT))
        return step_done(self, step, terms)
    monkeypatch.setattr(train.Report, "step_done", interrupt)
    run_training(tmp_path)
    assert seen[0].__func__ is train.Report.interrupt and seen[1:] == [signal.SIG_DFL]
    # Afterwards they are the caller's again.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_clock_that_stands_still_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "time", SimpleNamespace(
        perf_counter=lambda: 5.0, strftime=time.strftime))
    assert run_training(tmp_path)["step"] == 2
    assert all(math.isfinite(json.loads(line)["images_per_s"])
               for line in (tmp_path / "log.jsonl").read_text().splitlines())


@pytest.mark.parametrize("warmup, left", [  # a step of a minute, four once D_I and D_g play
    (3, ["10.0 min left, warm-up", "9.0 min left, warm-up", "1.0 min left", "0.0 min left"]),
    (9, [f"{n}.0 min left, warm-up" for n in (4, 3, 1)] + ["0.0 min left"])])
def test_speed_and_means_are_of_the_steps_since_the_last_line_without_validation(
        warmup, left, tmp_path, monkeypatch, capsys):
    clock = torch.tensor(100.0)

    def a_minute(*given):
        return {"L": clock.add_(60)}  # as a CUDA graph, to the same place each time
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=clock.item,
                                                       strftime=time.strftime))
    monkeypatch.setattr(train, "training_step", a_minute)
    monkeypatch.setattr(train.Report, "validate", a_minute)
    run_training(tmp_path, "--steps", "5", "--log-every", "2", "--val-every", "4",
                 "--warmup", str(warmup))
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [row["images_per_s"] for row in rows] == pytest.approx([2 / 60] * 4)
    assert [row["L"] for row in rows] == [160, 220, 310, 460]  # steps 1, 2, 3-4, 5
    assert re.findall("about (.*)  L ", capsys.readouterr().out) == left


def one_step(nets, config, device, step):
    hr, z1, z2 = train.batch_at(torch.zeros(3, 3, 16, 16).byte(), config, step, device)
    nets.follow_schedule(config, step)
    terms = train.training_step(nets, config, hr, z1, z2, train.kind_of(config, step))
    nets.update_ema(config.ema, step)
    return terms


def networks_on_meta(config, monkeypatch):
    """There a value that is asked for, or a tensor of another device, is an error."""
    adam = torch.optim.Adam  # the meta device has neither its fused kind nor autocast
    monkeypatch.setattr(torch.optim, "Adam",
                        lambda weights, **options: adam(weights, **options | {"fused": False}))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return train.Networks(config, "meta", amp=False)


@pytest.mark.parametrize("changes", [{}, dict(d_features=True, hard_consistency=True, beta=0.0,
                                              energy=1.0, decay=1.0)])
def test_an_update_neither_waits_for_the_device_nor_mixes_devices(changes, random_weights,
                                                                  monkeypatch):
    config = tiny(warmup=1, r1_every=2, pixel=1.0, **changes)
    nets = networks_on_meta(config, monkeypatch)
    assert [train.kind_of(config, step) for step in range(3)] == ["warm-up", "plain", "with R1"]
    for step in range(3):
        terms = one_step(nets, config, "meta", step)
        assert all(value.device.type == "meta" for value in terms.values())
    asks = [lambda: terms["L_z"].item(), lambda: bool(terms["L_z"] > 0),
            lambda: nets.G.first_conv.bias[nets.G.first_conv.bias > 0],
            lambda: nets.G.first_conv.bias + torch.zeros(9)]  # on the CPU
    for ask in asks:
        with pytest.raises(RuntimeError):
            ask()


def test_rates_reach_the_step_through_tensors_that_stay():
    # As on a GPU; the plain numbers beside them are computed here.
    config = tiny(steps=4, decay=1.0, alpha=3.0, tau=100.0, beta=0.0,
                  learning_rate_g=1e-3, learning_rate_d=2e-3)
    by_tensor, by_number = train.Networks(config, "cpu"), train.Networks(config, "cpu")
    optimizers = [by_tensor.opt_G, by_tensor.opt_D]
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = torch.zeros((), dtype=torch.float64)
    places = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    pointers = [place.data_ptr() for place in places]
    batch = levels(2, 3, 16, 16), *torch.randn(2, 2, 5, 4, 4)
    for step, factor in ((1, 0.1 ** 0.25), (3, 0.1 ** 0.75)):
        by_tensor.follow_schedule(config, step)
        by_number.opt_G.param_groups[0]["lr"] = 1e-3 * factor
        by_number.opt_D.param_groups[0]["lr"] = 2e-3 * factor
        for nets in (by_tensor, by_number):
            train.training_step(nets, config, *batch, "with R1")
    found = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    assert [place.data_ptr() for place in found] == pointers
    assert [place.item() for place in found] == pytest.approx([1e-3 * factor, 2e-3 * factor])
    fresh = train.Networks(config, "cpu")
    for name in ("G", "D_I", "D_g"):
        for new, other, old in zip(*(getattr(nets, name).parameters()
                                     for nets in (by_tensor, by_number, fresh))):
            torch.testing.assert_close(new, other, rtol=1e-6, atol=1e-8)
            assert not torch.equal(new, old)


class GraphsOnTheCPU:
    """torch.cuda's graphs without a GPU: recording computes nothing, replay runs the step.

    As on a GPU, a replay reads and writes where the recording did. `events` says what happened.
    """

    def __init__(self, step, monkeypatch, fails=False):
        self.real, self.fails, self.events, self.recording = step, fails, [], None
        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = dict(Stream=lambda: stream, current_stream=lambda: stream,
                     graph_pool_handle=lambda: "pool", CUDAGraph=SimpleNamespace,
                     stream=lambda one: contextlib.nullcontext(), graph=self.graph)
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        assert pool == "pool"
        self.recording = graph
        try:
            yield
        except RuntimeError:  # on a GPU, ending the recording then fails too
            raise RuntimeError("capture failed due to a previous error")
        finally:
            self.recording = None

    def step(self, *given):
        kind = given[-1]
        if self.recording is None:
            self.events.append(("usual", kind))
            return self.real(*given)
        if self.fails:
            raise RuntimeError("operation not permitted\nCompile with TORCH_USE_CUDA_DSA")
        terms = {}

        def replay():
            self.events.append(("replay", kind))
            for name, value in self.real(*given).items():
                terms.setdefault(name, torch.zeros(())).copy_(value)
        self.recording.replay = replay
        return terms


def test_a_graph_of_each_kind_of_step_is_recorded_and_replayed(monkeypatch):
    config = tiny(warmup=5, r1_every=2, steps=15, decay=0.5, learning_rate_g=1e-3)
    faces = torch.randint(0, 256, (9, 3, 16, 16)).byte()
    plain, graphed = train.Networks(config, "cpu"), train.Networks(config, "cpu")
    graphs = GraphsOnTheCPU(partial(train.training_step, graphed, config), monkeypatch)
    replayed = train.GraphedStep(graphs.step)
    for step in range(15):
        batch, kind = train.batch_at(faces, config, step, "cpu"), train.kind_of(config, step)
        for nets in (plain, graphed):
            nets.follow_schedule(config, step)
        expected = train.training_step(plain, config, *batch, kind)
        found = replayed(*batch, kind)
        assert expected == found, step  # tensors of one number each
    for name in ("G", "D_I", "D_g"):
        pairs = zip(getattr(plain, name).parameters(), getattr(graphed, name).parameters())
        assert all(torch.equal(a, b) for a, b in pairs)
    for kind in ("warm-up", "plain", "with R1"):
        ways = [way for way, of in graphs.events if of == kind]
        assert ways == ["usual"] * 3 + ["replay"] * 2


def test_what_cannot_be_recorded_says_what_to_do(monkeypatch):
    graphs = GraphsOnTheCPU(lambda *given: {}, monkeypatch, fails=True)
    step = train.GraphedStep(graphs.step)
    for _ in range(2):
        step(*torch.zeros(3, 1), "plain")
    with pytest.raises(ValueError, match="^no CUDA graph of a step 'plain', go on with --no-graph: "
                                         "operation not permitted$"):
        step(*torch.zeros(3, 1), "plain")


def test_the_gpu_is_chosen_by_its_number(monkeypatch):
    # set_device refuses "cuda" alone. A network's weights know where they are.
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device))
    where = torch.device("cuda:1")
    weight = SimpleNamespace(device=where)
    nets = SimpleNamespace(G=SimpleNamespace(parameters=lambda: iter([weight])))
    arguments = SimpleNamespace(device="cuda", graph=False)
    report = SimpleNamespace(finish=lambda: None)
    train.train(tiny(steps=3), arguments, nets, report, None, 3)
    assert [device.index for device in chosen] == [1]


def test_a_checkpoint_of_a_gpu_goes_on_here_with_this_devices_options(tmp_path):
    run_training(tmp_path / "whole", "--steps", "4")
    content, path = run_training(tmp_path / "part"), tmp_path / "part/last.pt"
    for name in ("opt_G", "opt_D"):  # as a GPU's Adam has it, on which a graph was recorded
        content[name]["param_groups"][0] |= {"lr": torch.tensor(0.5), "capturable": True}
    torch.save(content, path)
    flags = ["--resume", str(path), "--steps", "4", "--device", "cpu"]
    train.main(flags)
    whole, found = torch.load(tmp_path / "whole/last.pt"), torch.load(path)
    for name in ("generator", "G", "D_I", "D_g"):
        assert all(torch.equal(value, found[name][key]) for key, value in whole[name].items())
    assert found["opt_G"]["param_groups"] == whole["opt_G"]["param_groups"]


# With a GPU and HALLUSR_GPU=1 in the environment. Sums on a GPU come in any order: five digits.


@needs_gpu
@pytest.mark.parametrize("preset", ["paper", "photos"])
@pytest.mark.parametrize("kind", ["warm-up", "plain", "with R1"])
def test_a_replayed_step_is_a_plain_step(preset, kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # Hard consistency would leave some biases no gradient but rounding, which Adam makes large.
    config = Config(**PRESETS[preset] | TINY | dict(hard_consistency=False))
    graphed, plain = train.Networks(config, "cuda"), train.Networks(config, "cuda")
    replayed = train.GraphedStep(partial(train.training_step, graphed, config))
    faces = torch.randint(0, 256, (9, 3, 16, 16)).byte()
    digits = dict(rtol=2e-5, atol=1e-5)
    for step in range(5):
        batch = train.batch_at(faces, config, step, "cuda")
        for name in ("G", "D_I", "D_g", "opt_G", "opt_D"):  # from one state
            state = copy.deepcopy(getattr(graphed, name).state_dict())
            getattr(plain, name).load_state_dict(state)
        for nets in (graphed, plain):
            nets.follow_schedule(config, step)
        assert (kind in replayed.graphs) == (step >= 3)
        found = {name: value.clone() for name, value in replayed(*batch, kind).items()}
        expected = train.training_step(plain, config, *batch, kind)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **digits, msg=f"{name}, step {step}")
        for name in ("G", "D_I", "D_g"):
            state = getattr(graphed, name).state_dict()
            for key, value in getattr(plain, name).state_dict().items():
                torch.testing.assert_close(state[key], value, **digits)


def run_on(device, out, *flags):
    """run_training on a device, in float32 with all its digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        train.main(shlex.split(TINY_FLAGS) + ["--out", str(out), "--device", device, *flags])
    return torch.load(Path(out) / "last.pt", map_location="cpu")


@needs_gpu
def test_200_steps_over_the_end_of_a_warm_up_end_as_plain_steps_do(tmp_path):
    flags = "--steps 200 --warmup 100 --r1-every 4 --batch 8 --log-every 50 --val-every 999"
    ends = {}
    for how in ("--graph", "--no-graph"):
        run_on("cuda", tmp_path / how, *flags.split(), how)
        ends[how] = table(tmp_path / how / "log.jsonl")[-1]
    for name in ("L_percp", "L_grad", "L_pixel", "L_z"):
        assert ends["--graph"][name] == pytest.approx(ends["--no-graph"][name], rel=0.02), name


@needs_gpu
def test_ctrl_c_and_resume_on_a_gpu(tmp_path, monkeypatch, capsys):
    step_done = train.Report.step_done

    def interrupt_the_8th(self, step, terms):
        if step == 8:  # a replay
            signal.raise_signal(signal.SIGINT)
        return step_done(self, step, terms)
    with monkeypatch.context() as patch:
        patch.setattr(train.Report, "step_done", interrupt_the_8th)
        assert run_on("cuda", tmp_path, "--steps", "16", "--val-every", "99")["step"] == 8
    assert f"python train.py --resume {tmp_path / 'last.pt'}\n" in capsys.readouterr().out
    train.main(["--resume", str(tmp_path / "last.pt"), "--device", "cuda"])
    content = torch.load(tmp_path / "last.pt", map_location="cpu")
    assert content["step"] == 16 and content["opt_G"]["state"][0]["step"] == 16
    assert [row["step"] for row in table(tmp_path / "log.jsonl")] == list(range(1, 17))


@needs_gpu
@pytest.mark.parametrize("first, second", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_another_device(first, second, tmp_path):
    flags = ["--no-hard-consistency", "--val-every", "99"]
    whole = run_on("cpu", tmp_path / "whole", "--steps", "8", *flags)["G"]
    begun = run_on(first, tmp_path / "part", "--steps", "4", *flags)["G"]
    train.main(["--resume", str(tmp_path / "part/last.pt"), "--steps", "8", "--device", second])
    found = torch.load(tmp_path / "part/last.pt", map_location="cpu")
    assert found["step"] == 8 and found["opt_D"]["state"][0]["step"] == 8

    def apart(state):
        return torch.cat([(whole[key] - state[key]).abs().flatten() for key in whole]).mean()
    # The last four steps moved a weight by about 1e-3 each.
    assert apart(found["G"]) < 0.02 * apart(begun)


@needs_gpu
def test_a_second_run_in_one_process_is_as_the_first(tmp_path):
    rows = []
    for name in ("first", "second"):
        run_on("cuda", tmp_path / name, "--steps", "6")
        rows.append(table(tmp_path / name / "log.jsonl"))
    for one, other in zip(*rows):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-3)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_a_run_stays_on_the_gpu_that_it_was_given(tmp_path):
    with torch.cuda.device(0):  # at the end, the program's current GPU is its own again
        before = torch.cuda.memory_allocated(0)
        run_on("cuda:1", tmp_path, "--steps", "6")
        assert torch.cuda.memory_allocated(0) == before
    assert torch.load(tmp_path / "last.pt")["G"]["first_conv.weight"].device.index == 1


def test_rates_decay_to_a_tenth_at_the_end():
    config = tiny(learning_rate_g=1.0, learning_rate_d=2.0, decay=0.4, steps=100)
    nets, rates = train.Networks(config, "cpu"), []
    for step in (0, 60, 80, 100):
        nets.follow_schedule(config, step)
        rates.append([opt.param_groups[0]["lr"] for opt in (nets.opt_G, nets.opt_D)])
    assert rates[0] == rates[1] == [1.0, 2.0]
    assert rates[2] == pytest.approx([0.1 ** 0.5, 2 * 0.1 ** 0.5])
    assert rates[3] == pytest.approx([0.1, 0.2])


def test_samples_are_of_z_0_and_of_noise_as_the_model_knows_it(tmp_path):
    seen = []
    class Spy(Bicubic):
        settings = {"z_shared": 0.5, "size": 16}
        def forward(self, lr, z):
            seen.append(z)
            return super().forward(lr, z)
    save_image(torch.rand(3, 4, 4), tmp_path / "small.png")
    sample.write_samples(Spy(), str(tmp_path / "small.png"), SimpleNamespace(
        lr=True, device="cpu", seed=7, samples=3, temperature=2.0, out=str(tmp_path), walk=False))
    rng = torch.Generator().manual_seed(7)
    z = torch.cat([hallusr.draw_z((1, 5, 4, 4), 0.5, rng) for _ in range(2 + 3)])[2:]  # 2: walk
    assert torch.equal(torch.cat(seen[:4]), torch.cat([torch.zeros(1, 5, 4, 4), 2 * z]))


def test_settings_reach_the_networks():
    config = tiny(size=24, z_shared=0.3, blocks=3, fine_blocks=1, d_blocks=2,
                  hard_consistency=True)
    nets = train.Networks(config, "cpu")
    assert nets.G.settings == dict(size=24, scale=4, z_dim=5, z_shared=0.3, width=3, blocks=3,
                                   fine_blocks=1, hard_consistency=True)
    assert len(nets.G.trunk) == 3
    assert [len(up_block.blocks) for up_block in nets.G.up_blocks] == [1, 1]
    assert [len(D.trunk) + 1 for D in (nets.D_I, nets.D_g)] == [2, 2]  # its last block takes F
    assert nets.phi is None  # VGG-16 is not asked for


def test_adam_has_the_betas_of_section_4_1():
    nets = train.Networks(tiny(), "cpu")
    assert [one.param_groups[0]["betas"] for one in (nets.opt_G, nets.opt_D)] == [(0.0, 0.9)] * 2


def test_logits_and_r1_are_float32_under_bfloat16(monkeypatch):
    seen = {}
    for name in ("r1_penalty", "discriminator_loss", "generator_loss"):
        def spy(logits, *rest, name=name, real=getattr(hallusr, name)):
            seen.setdefault(name, set()).add(logits.dtype)
            return real(logits, *rest)
        monkeypatch.setattr(train, name, spy)
    config = tiny()
    inside = []  # R1's D must not run in bfloat16 at all
    real = hallusr.Discriminator.forward
    monkeypatch.setattr(hallusr.Discriminator, "forward", lambda self, *given: (
        inside.append((given[0][0].requires_grad, torch.is_autocast_enabled("cpu"))),
        real(self, *given))[1])
    train.training_step(train.Networks(config, "cpu", amp=True), config, levels(2, 3, 16, 16),
                        *torch.randn(2, 2, 5, 4, 4), "with R1")
    assert seen == dict.fromkeys(seen, {torch.float32}) and len(seen) == 3
    assert (True, False) in inside and (False, True) in inside


@pytest.mark.parametrize("ending", ["png", "jpg", "tiff"])  # Pillow itself turns a TIFF
@pytest.mark.parametrize("orientation, shape, corner", [
    (1, (2, 4), (0, 0)), (2, (2, 4), (0, 3)), (3, (2, 4), (1, 3)), (4, (2, 4), (1, 0)),
    (5, (4, 2), (0, 0)), (6, (4, 2), (0, 1)), (7, (4, 2), (3, 1)), (8, (4, 2), (3, 0))])
def test_a_photo_is_turned_upright_once(orientation, shape, corner, ending, tmp_path):
    picture, exif = Image.new("RGB", (32, 16)), Image.Exif()
    picture.paste((255, 0, 0), (0, 0, 8, 8))  # 4x2 blocks, of which the first is red
    exif[0x0112] = orientation  # EXIF's own table says where row 0 and column 0 are
    picture.save(tmp_path / f"photo.{ending}", exif=exif, quality=100, subsampling=0)
    found = sample.read_image(tmp_path / f"photo.{ending}")[0, 4::8, 4::8]
    assert found.shape == shape and found[corner] > 250 and (found > 5).sum() == 1


def test_a_photos_centre_is_cropped_and_shrunk_as_pillow_does(tmp_path):
    save_image(torch.rand(3, 48, 72), tmp_path / "photo.png")
    with Image.open(tmp_path / "photo.png") as photo:
        expected = photo.convert("RGB").crop((12, 0, 60, 48)).resize((16, 16), Image.BICUBIC)
    expected = sample.v2.functional.pil_to_tensor(expected).int()
    found = sample.read_photo(tmp_path / "photo.png", 16).int()
    assert (found - expected).abs().max() <= 2


def load_names(folder, *flags, name=lambda path: path.name):
    """The names of the photos that --data FOLDER trains on, and of those held out."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "read_photos",
                      lambda paths, size: kept.append(set(map(name, paths))))
        arguments, _, _ = train.prepare(["--data", str(folder), *flags])
        train.load_faces(arguments, tiny())
    return kept


def test_a_photo_that_joins_moves_no_other_from_training_to_validation(tmp_path):
    for i in range(300):
        (tmp_path / f"{i}.png").touch()
        if i in (1, 2, 5, 50, 299):
            trained, held_out = load_names(tmp_path)
            assert held_out and not trained & held_out and len(trained | held_out) == i + 1
            if i > 1:
                assert not before & held_out
            before = trained
    assert 5 < len(held_out) < 30


def test_faces_to_validate_on_come_from_the_whole_folder(tmp_path):
    # Sorted by path, the first of them may all be of one kind.
    for name in ("mine/x", "mine/y", *(f"val/{i}" for i in range(8))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").touch()
    words = "--val", str(tmp_path / "val"), "--val-faces", "4"
    _, held_out = load_names(tmp_path / "mine", *words)
    assert held_out == {"0.png", "2.png", "4.png", "6.png"}


def test_photos_to_validate_on_and_grids_of_runs_are_not_trained_on(tmp_path):
    for folder in ("a", "a/val", "a/run"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            (tmp_path / folder / f"{folder[2:]}{i}.png").touch()
    for name in ("run/grid.png", "run/last.pt", "run/log.jsonl", "grid.png"):
        (tmp_path / "a" / name).touch()
    photos = {"0.png", "1.png", "2.png", "run0.png", "run1.png", "run2.png", "grid.png"}
    assert load_names(tmp_path / "a", "--val", str(tmp_path / "a/val")) == [
        photos, {"val0.png", "val1.png", "val2.png"}]
    with pytest.raises(ValueError, match="are among those to validate on"):
        load_names(tmp_path / "a", "--val", str(tmp_path / "a"))


def test_images_of_16_or_32_bits_and_broken_ones_are_refused(tmp_path):
    for mode, name in (("I;16", "grey.png"), ("I;16B", "grey.tiff"), ("I", "I.tiff"),
                       ("F", "F.tiff")):
        Image.new(mode, (3, 3)).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} cannot be read.*mode {mode[0]}.*not 8-bit"):
            sample.read_image(tmp_path / name)
    save_image(torch.rand(3, 40, 40), tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    for spoiled in (whole[:300], whole[:60] + b"????" + whole[64:]):
        (tmp_path / "cut.png").write_bytes(spoiled)
        with pytest.raises(ValueError, match="cut.png cannot be read"):
            sample.read_image(tmp_path / "cut.png")


def patch_of(path, colour=None, **options):
    """Write one flat patch, return what is read: three numbers."""
    if colour is not None:
        Image.new(options.pop("mode", "RGB"), (4, 4), colour).save(path, **options)
    found = sample.read_image(path)
    assert (found == found[:, :1, :1]).all()
    return found[:, 0, 0].tolist()


def test_a_photo_with_a_colour_profile_is_converted_to_srgb(tmp_path, capsys):
    # sRGB's own, but that its red is our green, its green our blue and its blue our red.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in zip((b"rXYZ", b"gXYZ", b"bXYZ", b"last"), (b"last", b"rXYZ", b"gXYZ", b"bXYZ")):
        profile = profile.replace(old, new)
    found = patch_of(tmp_path / "phone.png", (180, 140, 110), icc_profile=profile)
    assert found == pytest.approx([110, 180, 140], abs=1)
    assert patch_of(tmp_path / "bad.png", (180, 140, 110), icc_profile=b"none") == [180, 140, 110]
    assert "bad.png: its colour profile is not used" in capsys.readouterr().out


def test_transparent_parts_lie_on_white(tmp_path):
    half = (90, 30, 60, 128)  # a little more than half of it, the rest white
    blend = [(128 * value + 127 * 255) / 255 for value in half[:3]]
    assert patch_of(tmp_path / "a.png", half, mode="RGBA") == pytest.approx(blend, abs=1)
    assert patch_of(tmp_path / "b.png", (0, 0), mode="LA") == [255] * 3
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    palette.save(tmp_path / "c.png", transparency=1)
    assert patch_of(tmp_path / "c.png") == [255] * 3
    palette.save(tmp_path / "d.png")
    assert patch_of(tmp_path / "d.png") == [200, 10, 10]


def test_broken_metadata_beside_the_orientation_does_not_matter(tmp_path):
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((0, 0), (255, 0, 0))
    fields = struct.pack("<HHI4sHHIHH", 0x0100, 2, 4, b"wide", 0x0112, 3, 1, 6, 0)  # no number
    exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 2) + fields + bytes(4)
    picture.save(tmp_path / "phone.jpg", exif=exif, quality=100, subsampling=0)
    found = sample.read_image(tmp_path / "phone.jpg")
    assert found.shape == (3, 4, 2) and found[0, 0, 1] > 150 > found[0, 0, 0]


def test_photos_of_a_folder_are_those_a_person_would_count(tmp_path, capsys):
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for place in (folder / ".ipynb_checkpoints", folder / "deep", folder / "album.jpg", elsewhere):
        place.mkdir(parents=True)
    for name in ("a.png", "b.jfif", "._a.png", ".ipynb_checkpoints/a.png", "deep/c.JPG",
                 "notes.txt", "film.mpg", "letter.eps", "d.h5", "d.wmf", "album.jpg/e.webp"):
        (folder / name).touch()
    (elsewhere / "f.bmp").touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked_twice").symlink_to(elsewhere)
    (folder / "deep/loop").symlink_to(folder)
    (folder / "z.png").symlink_to(folder / "a.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    found = [path.relative_to(folder).as_posix() for path in sample.list_photos(folder)]
    assert found == ["a.png", "album.jpg/e.webp", "b.jfif", "deep/c.JPG", "linked/f.bmp"]
    assert capsys.readouterr().out == f"{folder}: 5 photos; 8 other files left out\n"


@pytest.mark.parametrize("ending", sorted(sample.ENDINGS))
def test_pillow_reads_what_counts_as_a_photo(ending, tmp_path):
    if ending not in Image.registered_extensions():
        pytest.skip("this Pillow was built without it")
    path = tmp_path / f"photo{ending.upper()}"
    Image.new("L" if ending == ".pgm" else "RGB", (16, 16), "white").save(path)
    shutil.copy(path, tmp_path / f"second{ending}")
    photos = sample.list_photos(tmp_path)
    assert len(photos) == 2 and (sample.read_photos(photos, 16) > 250).all()


def test_a_folder_that_can_not_be_read_is_named_and_not_passed_over(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/2.png", "a/locked/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    real = os.scandir
    def scandir(place):
        if os.path.basename(place) == "locked":
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="a/locked"):
        sample.list_photos(tmp_path / "a")


def test_a_photo_is_held_out_or_not_however_its_path_is_spelt():
    windows = PureWindowsPath("deep\\f\u00fcr.jpg")
    mac = PurePosixPath("deep/fu\u0308r.jpg")  # the same letter of two characters
    linux = PurePosixPath("deep/f\u00fcr.jpg")
    expected = zlib.crc32("deep/f\u00fcr.jpg".encode())
    assert [train.path_hash(path) for path in (windows, mac, linux)] == [expected] * 3


@pytest.mark.parametrize("script, words", [
    ("train", ["--data", ""]), ("train", ["--resume", ""]), ("train", ["--out", ""]),
    ("sample", ["--evaluate", ""]), ("sample", [""])])
def test_an_empty_path_is_refused(script, words, capsys):
    parse = {"train": train.prepare, "sample": sample.parse_arguments}[script]
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2 and "expected a path, got an empty word" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert train.prepare(["--data", "~/faces"])[0].data == "/home/me/faces"
    assert sample.parse_arguments(["--out", "~/x"]).out == "/home/me/x"


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError("memory")])
def test_too_little_memory_is_one_sentence(error):
    def fail():
        raise error
    with pytest.raises(SystemExit, match="out of memory: lower --batch or --samples") as ended:
        sample.run_as_script(fail)
    assert "\n" not in str(ended.value)
    with pytest.raises(RuntimeError, match="another kind"):
        def fault():
            raise RuntimeError("another kind")
        sample.run_as_script(fault)


def test_ctrl_c_ends_a_script_without_a_traceback():
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as ended:
        sample.run_as_script(interrupted)
    assert ended.value.code == 130


def test_spoiled_weights_replace_no_good_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    generator = Generator(**G4)
    hallusr.save_checkpoint(path, generator)
    good = path.read_bytes()
    generator.first_conv.bias.data[3] = math.inf
    with pytest.raises(ValueError, match="last.pt stays as it was: first_conv.bias holds NaN or"):
        hallusr.save_checkpoint(path, generator)
    assert path.read_bytes() == good


def test_scripts_run_without_docstrings(tmp_path):
    done = subprocess.run([sys.executable, "-OO", str(HERE / "train.py"), "--help"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_exact_images_leave_scores_finite():
    exact = torch.tensor([math.inf, math.inf])
    rows = {"bicubic": {"psnr": torch.tensor([20.0, math.inf]), "lr_psnr": exact}}
    found = sample.summarize(rows)["bicubic"]
    assert found == pytest.approx({"psnr": 60.0, "lr_psnr": 100.0})


def test_a_photo_of_400_megapixels_is_refused_before_it_takes_memory(tmp_path):
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""))
    with pytest.raises(ValueError, match="huge.png cannot be read.*400000000 pixels"):
        sample.read_image(tmp_path / "huge.png")


def test_a_small_folder_trains_though_one_face_gives_no_realism(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(train, "metrics_against", None)  # called, it would fail
    run_training(tmp_path / "run", "--data", str(photos[0]), "--size", "32")
    row = table(tmp_path / "run/valid.jsonl")[0]
    assert row["faces"] == 1 and "hallucination_psnr" in row and "hallucination_realism" not in row


def test_a_run_without_weights_of_lpips_ends_before_it_trains(empty_cache, tmp_path, photos,
                                                              monkeypatch):
    monkeypatch.setattr(train, "metrics_against", sample.metrics_against)
    with pytest.raises(OSError, match="no network"):
        train_on(photos, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def start(script, *words, **options):
    """The script in a process of its own, still running."""
    return subprocess.Popen([sys.executable, str(HERE / script), *words], text=True, **options,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


@pytest.mark.parametrize("pressed", [[], [signal.SIGINT]])  # as of `| head`; as of `| tee`, Ctrl-C
def test_a_reader_that_leaves_ends_a_run_that_is_saved(pressed, tmp_path):
    words = shlex.split(f"{TINY_FLAGS} --steps 100000 --log-every 1 --val-every 100000")
    process = start("train.py", *words, "--out", str(tmp_path))
    while not process.stdout.readline().startswith("step 1 "):
        assert process.poll() is None
    process.stdout.close()  # the next line finds no reader
    for number in pressed:
        process.send_signal(number)
    assert process.wait(timeout=120) == 1 and process.stderr.read() == ""
    assert torch.load(tmp_path / "last.pt")["step"] >= 1


def test_every_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    claims = []
    for second, data in enumerate(("x/mine", "x/mine", None)):
        monkeypatch.setattr(time, "strftime", lambda form: f"-{second}")
        asked = SimpleNamespace(resume=None, out=None, data=data)
        claims.append(str(train.run_folder(asked)))
    assert claims == ["runs/mine-0", "runs/mine-1", "runs/drawn-2"]
    with pytest.raises(FileExistsError):  # begun in the same second, nothing saved yet
        train.run_folder(asked)


def test_a_folder_that_can_not_be_is_named_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    (tmp_path / "taken").touch()
    for out in (tmp_path / "taken", tmp_path / "taken/below", Path("/dev/null/out")):
        with pytest.raises(SystemExit, match=f"^train.py: [^\n]*'{out}'$"):
            sample.run_as_script(lambda: run_training(out))


def test_programs_compute_float32_with_all_its_digits_on_a_gpu(monkeypatch):
    found = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    sample.run_as_script(lambda: found.append(torch.backends.cudnn.allow_tf32))
    assert found == [False]


def test_a_full_disk_takes_the_picture_not_the_checkpoint(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train, "save_image", full)
    with pytest.raises(OSError, match="No space left"):
        run_training(tmp_path)
    assert torch.load(tmp_path / "last.pt")["step"] == 2  # written before the picture


def test_a_resumed_run_takes_the_rate_of_its_step(tmp_path):
    run_training(tmp_path, "--decay", "1")
    train.main(["--resume", str(tmp_path / "last.pt"), "--steps", "4", "--device", "cpu"])
    rate = torch.load(tmp_path / "last.pt")["opt_G"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(2e-3 * 0.1 ** 0.75)  # three of four steps are over


def test_photos_of_one_name_are_split_and_alike_wherever_their_folder_is(tmp_path):
    kept = []
    for place in ("here", "else/where"):
        for i in range(60):  # each in a folder of its own, as some collections come
            (tmp_path / place / f"{i}").mkdir(parents=True)
            (tmp_path / place / f"{i}/face.png").touch()
        kept.append(load_names(tmp_path / place, name=lambda path: path.parent.name))
    (trained, held_out), again = kept
    assert [trained, held_out] == again and not trained & held_out
    assert 1 < len(held_out) < 15 and len(trained | held_out) == 60


def test_a_run_knows_its_photos_from_anywhere(tmp_path, monkeypatch, capsys):
    for name in ("one", "two", "three"):
        save_image(torch.rand(3, 16, 16), tmp_path / f"{name}.png")
        (tmp_path / "val").mkdir(exist_ok=True)
        save_image(torch.rand(3, 16, 16), tmp_path / f"val/{name}.png")
    monkeypatch.chdir(tmp_path)
    run = run_training(tmp_path / "run", "--data", ".", "--val", "val")["run"]
    assert (run["data"], run["val"]) == (str(tmp_path), str(tmp_path / "val"))
    save_image(torch.rand(3, 16, 16), tmp_path / "four.png")
    monkeypatch.chdir("/")
    capsys.readouterr()
    train.main(["--resume", str(tmp_path / "run/last.pt"), "--steps", "3", "--device", "cpu"])
    assert "4 faces of 16x16 to train on, 3 to" in capsys.readouterr().out


def settings_of(words):
    return train.prepare(shlex.split(words))[1]


def test_the_paper_preset_has_the_papers_numbers():
    paper = dict(scale=8, blocks=8, d_blocks=8, gamma=10.0, beta=0.1, alpha=1.0, eps=0.1 * 127.5,
                 energy=0.0, pixel=0.0, warmup=0, r1_every=1, learning_rate_g=1e-4, decay=0.0,
                 batch=8, z_shared=1.0, hard_consistency=False)
    config = settings_of("--data photos --preset paper")
    assert {name: getattr(config, name) for name in paper} == pytest.approx(paper)
    assert settings_of("--preset paper") == config


def test_a_preset_is_a_column_and_every_setting_a_flag(capsys):
    for words, preset in (("", "drawn"), ("--data x", "photos"), ("--preset photos", "photos")):
        assert asdict(settings_of(words)) == PRESETS[preset]
    for name, *values, section, meaning in train.SETTINGS:
        assert len({type(value) for value in values}) == 1, name
        assert re.match(r"open|[234](\.\d)?|Fig\. \d|\(\d+\)", section) and meaning, name
    config = settings_of("--data x --energy 0.5 --no-hard-consistency --width 9 "
                         "--perceptual relu1_2")
    assert (config.energy, config.hard_consistency, config.width) == (0.5, False, 9)
    assert (config.perceptual, config.learning_rate_g) == ("relu1_2", 5e-4)
    assert settings_of("--data x --energy 0").energy == 0
    with pytest.raises(SystemExit) as ended:
        train.prepare(["--help"])
    assert ended.value.code == 0 and "--z-shared" in capsys.readouterr().out


@pytest.mark.parametrize("words, warmup", [
    ("--data x", 3000), ("--data x --steps 5000", 2500), ("--data x --steps 300", 150),
    ("--data x --steps 300 --warmup 300", 300), ("--steps 900", 450), ("", 500)])
def test_a_short_run_has_a_short_warm_up(words, warmup):
    assert settings_of(words).warmup == warmup


@pytest.mark.parametrize("flags, expected", [
    ("", "nothing"), ("--blocks 4", "blocks 4 (8)"), ("--perceptual pixels --learning-rate-d 1e-4",
     "perceptual pixels (relu2_2), learning_rate_d 0.0001 (0.0004)"),
    ("--alpha 4 --batch 32 --hard-consistency", "hard_consistency True (False), alpha 4.0 (1.0), "
     "batch 32 (8)")])
def test_a_run_says_what_it_does_not_do_as_the_paper(flags, expected, monkeypatch, capsys):
    monkeypatch.setattr(train, "Networks", None)  # it says so before it builds them
    with pytest.raises(TypeError):
        train.main(shlex.split(f"--data x --preset paper --device cpu {flags}"))
    assert capsys.readouterr().out == f"differs from --preset paper in: {expected}\n"


def test_resume_takes_data_and_settings_from_the_run(tmp_path):
    run_training(tmp_path, "--alpha", "3")
    arguments, config, _ = train.prepare(["--resume", str(tmp_path / "last.pt"), "--steps", "7"])
    assert (config.alpha, config.steps, arguments.drawn) == (3.0, 7, 20)
    assert train.run_folder(arguments) == tmp_path
    with pytest.raises(ValueError, match="--resume keeps --val-faces"):
        train.prepare(["--resume", str(tmp_path / "last.pt"), "--steps", "7", "--val-faces", "3"])


def test_training_does_not_go_on_from_what_is_no_run(tmp_path):
    content, path = run_training(tmp_path), tmp_path / "last.pt"
    content["D_g"]["to_logits.bias"].fill_(math.nan)
    torch.save(content, path)
    with pytest.raises(ValueError, match="last.pt is spoiled: to_logits.bias holds NaN"):
        train.main(["--resume", str(path), "--steps", "7", "--device", "cpu"])
    hallusr.save_checkpoint(path, Generator(**G4))
    with pytest.raises(ValueError, match="last.pt is of another version, or a generator alone: "
                                         "--init starts from that"):
        train.main(["--resume", str(path), "--steps", "7", "--device", "cpu"])


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
    for name in ("photos", "more_photos", "VAL", "img_align_celeba", "val"):
        (folder / name).mkdir()
        for i in range(4):
            save_image(torch.rand(3, 70, 64 + i), folder / name / f"{i}.png")
    save_image(torch.rand(3, 70, 80), folder / "me.jpg")
    save_image(torch.rand(3, 8, 8), folder / "small.png")
    flags = f"{TINY_FLAGS} --size 32 --z-shared 0.7 --data {folder / 'photos'}"
    with pytest.MonkeyPatch.context() as patch:  # it need not be scored
        patch.setattr(train, "metrics_against", lambda photographs: {})
        train.main([*shlex.split(flags), "--out", str(folder / "runs/photos")])
    return folder


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = {part.split("#")[0].strip() for line in lines for part in line.split("&&")}
    return sorted(command for command in commands if command.startswith("python ")
                  and "benchmark" not in command)


def test_the_readme_makes_the_checkpoints_that_it_names():
    words = " ".join(readme_commands())
    named = set(re.findall(r"(\S+)/last\.pt", words))
    assert named and named <= set(re.findall(r"--out (\S+)", words))


@pytest.mark.parametrize("command", readme_commands())
def test_readme_command(command, workplace, tmp_path, monkeypatch, capsys):
    if "--resume" in command:
        shutil.copytree(workplace / "runs/photos", tmp_path / "photos")
        command = command.replace("runs/photos", str(tmp_path / "photos"))
        command += " --steps 3 --device cpu --no-amp"
    elif "train.py" in command:
        flags = TINY_FLAGS + (" --size 32" if "--init" in command else "")  # as its G
        command += f" {flags} --out {tmp_path}"
    if ("--evaluate" in command and not HAS_LPIPS) or (
            re.search("--evaluate|--d-features", command) and not VGG_FILE.is_file()):
        pytest.skip("the weights of LPIPS or VGG-16 are not in TORCH_HOME")
    command = command.replace("500:1000", "1:3").replace("TRAIN", "more_photos")
    command = command.replace("FIRST/", "runs/photos/")
    printed = run_here(command, workplace, monkeypatch, capsys)
    assert re.search("written to|grid.png", printed)


def test_both_scripts_run_on_their_own(workplace, tmp_path):
    code, printed = run_script(f"python train.py {TINY_FLAGS} --out {tmp_path}", workplace)
    assert code == 0 and (tmp_path / "grid.png").exists(), printed
    checkpoint = tmp_path / "last.pt"
    code, printed = run_script(f"python sample.py me.jpg --checkpoint {checkpoint}", workplace)
    assert code == 0 and (workplace / "samples/me/grid.png").exists(), printed


def test_a_cpu_computes_in_float32_unless_asked():
    for words, expected in (([], False), (["--no-amp"], False), (["--amp"], True)):
        arguments = train.prepare(["--device", "cpu", *words])[0]
        assert train.Networks(tiny(), "cpu", arguments.amp).amp is expected
    # A checkpoint keeps the question: another device may answer it otherwise.
    assert train.prepare(["--device", "cpu"])[0].amp is None


def test_sigterm_ends_a_run_well(tmp_path):
    words = shlex.split(f"{TINY_FLAGS} --steps 100000 --log-every 1 --val-every 100000")
    process = start("train.py", *words, "--out", str(tmp_path))
    while not process.stdout.readline().startswith("step 1 "):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == "" and "stopped and saved" in out
    assert torch.load(tmp_path / "last.pt")["step"] >= 1 and (tmp_path / "grid.png").exists()


def test_a_reader_of_samples_that_leaves_is_no_error(tmp_path):
    command = f"{sys.executable} {HERE / 'sample.py'} --out {tmp_path} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""


def test_a_terminal_that_is_gone_is_one_sentence(tmp_path):
    ours, its = os.openpty()
    process = subprocess.Popen([sys.executable, str(HERE / "sample.py"), "--out", str(tmp_path)],
                               stdout=its, stderr=subprocess.PIPE, text=True)
    os.close(its)
    os.close(ours)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and errors == "sample.py: [Errno 5] Input/output error\n"


def test_scripts_run_where_stdout_is_a_notebooks(monkeypatch):
    seen = []
    notebook = SimpleNamespace(write=seen.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", notebook)
    sample.run_as_script(lambda: print("all is well"))
    assert "all is well" in seen


def test_the_benchmark_prints_what_a_step_costs(workplace):
    code, printed = run_script(f"python .ci/benchmark {TINY_FLAGS}", workplace)
    assert code == 0 and re.search(r"ms per step, [\d.]+ images/s; data", printed), printed


def test_the_benchmark_counts_each_step_once_however_often_it_calls_g(monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = importlib.machinery.SourceFileLoader("benchmark", str(HERE / ".ci/benchmark"))
    spec = importlib.util.spec_from_loader("benchmark", loader)
    benchmark = importlib.util.module_from_spec(spec)
    loader.exec_module(benchmark)
    nets, config = train.Networks(tiny(), "cpu"), tiny()
    times = benchmark.Times(nets, "cpu")
    for step in range(3):
        one_step(nets, config, "cpu", step)
        times.mark("EMA")
        times.end_step()
    assert {part: len(ms) for part, ms in times.ms.items()} == dict.fromkeys(times.ms, 3)
    assert all(value > 0 for ms in times.ms.values() for value in ms)


def test_sample_writes_what_it_promises(workplace, monkeypatch, capsys):
    printed = run_here("python sample.py me.jpg --checkpoint runs/photos/last.pt --samples 3 "
                       "--walk --out made", workplace, monkeypatch, capsys)
    assert "LR of 8x8 pixels, from its centre square, resized to 32" in printed
    names = {path.name for path in (workplace / "made/me").iterdir()}
    assert names == {"grid.png", "lr.png", "sr.png", "hallucination_1.png", "hallucination_2.png",
                     "hallucination_3.png", "mean.png", "std.png", "walk.gif", "source.txt"}
    made = [sample.read_image(workplace / f"made/me/hallucination_{k}.png") for k in (1, 2, 3)]
    assert not torch.equal(made[0], made[1]) and made[0].shape == (3, 32, 32)
    mean, std = (sample.read_image(workplace / f"made/me/{name}.png") for name in ("mean", "std"))
    stacked = torch.stack(made).float()
    torch.testing.assert_close(mean.float(), stacked.mean(0), atol=0.51, rtol=0)
    expected = (stacked.std(0, correction=0) / 64 * 255).clamp(max=255)
    torch.testing.assert_close(std.float(), expected, atol=0.51, rtol=0)
    with Image.open(workplace / "made/me/walk.gif") as walk:
        assert walk.n_frames > 20 and walk.size == (96, 96)


def test_a_sample_of_an_lr_file_shrinks_to_that_file(workplace, monkeypatch, capsys):
    printed = run_here("python sample.py small.png --lr --checkpoint runs/photos/last.pt "
                       "--samples 2 --out made", workplace, monkeypatch, capsys)
    assert "LR of 8x8 pixels, as it is; learnt on 8x8" in printed
    made = hallusr.from_levels(sample.read_image(workplace / "made/small/hallucination_2.png"))
    lr = hallusr.from_levels(sample.read_image(workplace / "small.png"))
    assert hallusr.lr_psnr(made[None], lr[None]) > 30


def sampled(workplace, monkeypatch, capsys, words):
    """What `python sample.py small.png --lr` and words write: {name: float image (3, 32, 32)}."""
    run_here("python sample.py small.png --lr --checkpoint runs/photos/last.pt --out flags "
             + words, workplace, monkeypatch, capsys)
    return {path.stem: hallusr.from_levels(sample.read_image(path))
            for path in (workplace / "flags/small").glob("*.png")}


def test_flags_of_sampling_do_what_they_say(workplace, monkeypatch, capsys):
    plain = sampled(workplace, monkeypatch, capsys, "--samples 2")
    again = sampled(workplace, monkeypatch, capsys, "--samples 2")
    assert torch.equal(again["grid"], plain["grid"])
    walks = []
    for words in ("--samples 2 --walk", "--samples 3 --walk"):
        more = sampled(workplace, monkeypatch, capsys, words)
        with Image.open(workplace / "flags/small/walk.gif") as walk:
            walks.append(sample.v2.functional.pil_to_tensor(walk.convert("RGB")))
    assert torch.equal(more["hallucination_2"], plain["hallucination_2"])
    assert torch.equal(*walks)
    other = sampled(workplace, monkeypatch, capsys, "--samples 2 --seed 1")
    assert not torch.equal(other["hallucination_1"], plain["hallucination_1"])
    still = sampled(workplace, monkeypatch, capsys, "--samples 2 --temperature 0")
    assert torch.equal(still["hallucination_1"], still["sr"])
    assert not torch.equal(plain["hallucination_1"], plain["sr"])


def test_samples_replace_their_photos_own_and_touch_nothing_else(workplace, monkeypatch, capsys):
    for name in ("n1/one.png", "n2/one.png", "n1/two.png"):
        (workplace / name).parent.mkdir(exist_ok=True)
        shutil.copy(workplace / "small.png", workplace / name)
    folder, foreign = workplace / "shared/one", workplace / "shared/two"
    foreign.mkdir(parents=True)
    words = "python sample.py {} --lr --checkpoint runs/photos/last.pt --out shared --samples "
    run_here(words.format("n1/one.png") + "3 --walk", workplace, monkeypatch, capsys)
    for name in ("mine.png", "hallucination_x.png"):
        (folder / name).touch()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for other in ("n2/one.png", "n1/two.png"):
        with pytest.raises(ValueError, match=f"/{other[3:6]} holds something else than results of "
                                             f".*{other}: name another --out"):
            run_here(words.format(other) + "2", workplace, monkeypatch, capsys)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not list(foreign.iterdir())
    run_here(words.format("./n2/../n1/one.png") + "11", workplace, monkeypatch, capsys)
    assert {path.name for path in folder.glob("hallucination_*")} == {
        "hallucination_x.png", *(f"hallucination_{k:02}.png" for k in range(1, 12))}
    assert (folder / "mine.png").exists() and not (folder / "walk.gif").exists()


def test_a_name_of_dots_leads_nowhere_else(workplace):
    words = SimpleNamespace(out=str(workplace / "shared/deep"))
    for name, folder in (("...png", "."), ("..png", "."), (".me.png", "me"), ("a.b.png", "a.b")):
        found = sample.results_folder(str(workplace / name), words)
        assert found == workplace / "shared/deep" / folder
        shutil.rmtree(workplace / "shared")


def test_the_model_of_the_repository_is_true_to_its_input_and_diverse():
    generator = hallusr.load_generator(HERE / "assets/faces64.pt")
    lr = torch.stack([hallusr.from_levels(sample.read_image(path))
                      for path in sorted((HERE / "assets").glob("face[1-6].png"))])
    z = hallusr.draw_z((4, len(lr), generator.z_dim, *lr.shape[-2:]),
                       generator.settings["z_shared"], torch.Generator().manual_seed(0))
    made = torch.stack([hallusr.sample(generator, lr, latent) for latent in z])
    assert (torch.stack([hallusr.lr_psnr(image, lr) for image in made]) > 35).all()
    assert (hallusr.std_map(made).mean((1, 2, 3)) > 4).all()


@needs_lpips
def test_evaluate_writes_json_with_every_row(workplace, capsys):
    (workplace / "scores").mkdir(exist_ok=True)
    (workplace / "scores/evaluate_photos_last.json").write_text("of another folder")
    sample.main(["--evaluate", str(workplace / "photos"), "--slice", "1:3", "--samples", "2",
                 "--checkpoint", str(workplace / "runs/photos/last.pt"),
                 "--out", str(workplace / "scores")])
    assert "photos_last.json in place of earlier scores" in capsys.readouterr().out
    found = json.loads((workplace / "scores/evaluate_photos_last.json").read_text())
    said = found["arguments"]
    assert said["evaluate"] == os.path.realpath(workplace / "photos") and said["samples"] == 2
    assert said["checkpoint"] == str(workplace / "runs/photos/last.pt") and said["seed"] == 0
    assert found["n"] == 2 and list(found["rows"]) == ["bicubic", "SR", "hallucination"]
    assert {"psnr", "ssim", "lpips", "lr_psnr", "pixel_std", "spread",
            "outside"} == set(found["rows"]["hallucination"])
    assert len(found["ranks"]) == 3 and sum(found["ranks"]) == pytest.approx(1)


@needs_lpips
@needs_vgg
def test_realism_is_measured_against_others_spread_over_their_folder(workplace, monkeypatch,
                                                                     capsys):
    for i in range(9):
        (workplace / "others").mkdir(exist_ok=True)
        save_image(torch.rand(3, 32, 32), workplace / f"others/{i}.png")
    seen = []
    for judge in (sample.Realism, sample.TwoSampleAUC):
        monkeypatch.setattr(judge, "__init__", lambda self, photos, init=judge.__init__: (
            seen.append(photos), init(self, photos))[1])
    sample.main(["--evaluate", str(workplace / "photos"), "--others", str(workplace / "others"),
                 "--samples", "1", "--checkpoint", str(workplace / "runs/photos/last.pt"),
                 "--out", str(workplace / "scores")])
    expected = [sample.read_photo(workplace / f"others/{i}.png", 32) for i in (0, 2, 4, 6)]
    assert len(seen) == 2 and seen[0] is seen[1]
    assert torch.equal(seen[0], hallusr.from_levels(torch.stack(expected)))
    assert "realism and auc: against 4 photos (below 50" in capsys.readouterr().out
    rows = json.loads((workplace / "scores/evaluate_photos_last.json").read_text())["rows"]
    assert all(row["realism"] > 0 and 0 <= row["auc"] <= 1 for row in rows.values())


@pytest.mark.parametrize("command, words", [
    ("python train.py --data photos --perceptual pixels --no-d-features --size 128",
     "is 64x70 pixels, expected at least 128x128"),
    ("python train.py --data empty --perceptual pixels --no-d-features",
     "expected at least 2 images below .*empty, found 0"),
    ("python train.py --resume no/last.pt", "No such file or directory: '/.*no/last.pt'"),
    ("python sample.py photos --checkpoint runs/photos/last.pt", "photos cannot be read"),
    ("python sample.py --lr --checkpoint runs/photos/last.pt", "--lr goes with images"),
    ("python sample.py me.jpg --lr --checkpoint runs/photos/last.pt", "80x70 pixels, LR has 32"),
    ("python sample.py --evaluate photos --others .", "--others names the same folder"),
])
def test_mistakes_are_named(command, words, workplace, monkeypatch, capsys):
    (workplace / "empty").mkdir(exist_ok=True)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run_here(command, workplace, monkeypatch, capsys)


@pytest.mark.parametrize("command, words, expected", [
    ("python train.py --data nowhere --perceptual pixels --no-d-features",
     "^train.py: .*No such file or directory: .*nowhere'$", 1),
    ("python train.py --width a", "argument --width: invalid int value: 'a'", 2),
    ("python sample.py me.jpg --checkpoint me.jpg", "^sample.py: /.*me.jpg is damaged or no", 1),
])
def test_mistakes_end_with_one_sentence(command, words, expected, workplace):
    code, printed = run_script(command, workplace)
    assert code == expected and re.search(words, printed, re.M) and "Traceback" not in printed


@pytest.mark.parametrize("name", ["cuda:99", "mps", "gpu"])
def test_a_missing_device_is_named(name):
    with pytest.raises(ValueError, match=f"^--device {name}: torch finds no such device here$"):
        sample.find_device(name)


def test_auto_is_the_accelerator_that_torch_finds(monkeypatch):
    there = SimpleNamespace(is_available=lambda: True,
                            current_accelerator=lambda: torch.device("mps"))
    monkeypatch.setattr(torch, "accelerator", there, raising=False)
    assert sample.find_device("auto") == "mps"
    monkeypatch.delattr(torch, "accelerator")  # before torch 2.6
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sample.find_device("auto") == "cpu"
