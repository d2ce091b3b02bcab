"""hallusr: from one 8x8 face to a 64x64 reconstruction and many other plausible faces.

The method of Abid, Hedhli and Gagné, "A generative model for hallucinating diverse
versions of super resolution images", in the order of the paper, whose section and
equation numbers stand at the lines. assets/PAPER.md lists where the code differs.
Default arguments are those of --preset paper. Training (section 4.1) is in train.py.

    paper       here            shape              range
    ----------  --------------  -----------------  -----------------------------------
    I^LR        lr              (N, 3, h, w)       [-1, 1], on 256 levels as in a file
    I^HR        hr              (N, 3, H, W)       [-1, 1], not [0, 1]; H = scale * h
    I^SR        sr              (N, 3, H, W)       about [-1, 1]: G's image at z = 0
    I^H_z       h1, h2          (N, 3, H, W)       the same, at z ~ N(0, I)
    g           gradient        (N, 3, H, W)       >= 0 of images; from G any
    z           z               (N, z_dim, h, w)   N(0, I) at every LR pixel, or zero
    DS          downscale       -> (N, 3, h, w)    box average
    F           excess          -> (N, 3, h, w)    grey levels beyond eps by which LR is missed
    D_I, D_g    Discriminator   -> (N, 1, h, w)    logits: > 0 says "a photograph"

To copy a piece, take along the imports and what its docstring names after "Needs".
Statements that begin with require or check_ may go: they stop wrong arguments, some of
which would give a wrong number without a word.
"""
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as fn  # not F, which is the paper's condition for D_I
from torchvision.models import AlexNet_Weights, VGG16_Weights, alexnet, vgg16

# ---- Image space: 8-bit levels, shrinking, enlarging ---------------------------------

def to_levels(x: torch.Tensor) -> torch.Tensor:
    """Floats, clamped to [-1, 1], as 8-bit values 0, 1, ..., 255 (still floats)."""
    require_floats(x)
    # bfloat16 has too few digits for 256 levels. Detached: to learn through it fails
    # loudly, not silently with slope 0.
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round()


def from_levels(levels: torch.Tensor) -> torch.Tensor:
    """8-bit values 0-255, uint8 or float, as floats in [-1, 1]. Any shape."""
    return levels.float() / 127.5 - 1


def quantize(x: torch.Tensor) -> torch.Tensor:
    """The nearest 8-bit level of [-1, 1], as saving to a file would give. Any shape.

    The rounding of (12), "to the closest colour value". Needs: to_levels, from_levels.
    """
    rounded = from_levels(to_levels(x))
    # Rounding, and clamping beyond [-1, 1], are flat: no slope. This is `rounded`
    # forward, with slope 1 backward: section 3.1's straight-through estimator.
    return x - x.detach() + rounded


def downscale(x: torch.Tensor, factor: int) -> torch.Tensor:
    """DS of (9): block means. (N, C, H, W) -> (N, C, H/factor, W/factor)."""
    require_images(x)
    require(factor >= 1 and x.shape[-2] % factor == 0 and x.shape[-1] % factor == 0,
            f"image sides must be multiples of {factor}, got {x.shape[-2]} x {x.shape[-1]}")
    # Not rounded yet: LR itself is quantize(downscale(hr)), as every LR file is.
    return fn.avg_pool2d(x, factor)


def upscale_nearest(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Repeat every pixel, so that downscale undoes it. (N, C, h, w) -> (N, C, H, W)."""
    size = (x.shape[-2] * factor, x.shape[-1] * factor)
    # Plain "nearest" takes a wrong neighbour by some factors.
    return fn.interpolate(x, size, mode="nearest-exact")


def scale_between(image: torch.Tensor, lr: torch.Tensor) -> int:
    """The factor from lr's size to image's. Raises ValueError when there is none."""
    require_images(image, channels=3)
    require_images(lr, "lr", channels=3)
    factor = image.shape[-1] // lr.shape[-1]
    require(image.shape == (lr.shape[0], 3, lr.shape[-2] * factor, lr.shape[-1] * factor),
            "there must be one image for each lr, its sides one multiple of lr's, got "
            f"{tuple(image.shape)} and {tuple(lr.shape)}")
    return factor


def pyramid(x: torch.Tensor, resolutions: int) -> list[torch.Tensor]:
    """An image at every resolution, coarse to fine, as G makes them. Needs: downscale."""
    return [downscale(x, 2 ** level) for level in reversed(range(resolutions))]


# ---- 2.1 Image reconstruction --------------------------------------------------------

def image_gradient(x: torch.Tensor) -> torch.Tensor:
    """Length of the gradient at every pixel, per channel: edges are bright.

    (N, C, H, W) -> the same shape; of images in [-1, 1], in [0.001, 2 sqrt 2].
    """
    require_images(x)
    # The border is repeated: zeros would draw a frame around the image.
    padded = fn.pad(x, (1, 1, 1, 1), mode="replicate")
    g_x = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]  # (3) I(x+1, y) - I(x-1, y)
    g_y = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]  # (4) I(x, y+1) - I(x, y-1)
    # Without 1e-6 the root is infinitely steep at 0: to learn from a flat area gives NaN.
    return (g_x.square() + g_y.square() + 1e-6).sqrt()      # (5)


# The leading modules of torchvision's VGG-16, up to and including the named ReLU.
VGG_LAYERS = {"relu1_2": 4, "relu2_2": 9, "relu3_3": 16, "relu4_3": 23}
VGG_CHANNELS = [64, 128, 256, 512]  # of each; a layer's map is half as large as the one before


class PerceptualLoss(nn.Module):
    """L_percp of (6): mean absolute difference of VGG-16's features.

    forward(sr, hr), both (N, 3, H, W) around [-1, 1], returns a scalar. embed(x) lists
    the features after every layer of VGG_LAYERS up to this one.
    OSError where the weights cannot be downloaded. Needs: VGG_LAYERS, pretrained_features.
    """

    def __init__(self, layer: str = "relu2_2"):
        super().__init__()
        # phi_i, which the paper leaves open. Its source, Johnson et al., has relu2_2.
        require(layer in VGG_LAYERS, f"layer must be one of {list(VGG_LAYERS)}, got {layer!r}")
        weights = VGG16_Weights.IMAGENET1K_V1
        self.features = pretrained_features(vgg16, weights, VGG_LAYERS[layer])
        # ImageNet's statistics are published for [0, 1]; our images are in [-1, 1].
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float32)
        std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float32)
        self.register_buffer("mean", (mean * 2 - 1).view(1, 3, 1, 1))
        self.register_buffer("std", (std * 2).view(1, 3, 1, 1))

    def embed(self, x):
        require_images(x, channels=3)
        x = (x - self.mean) / self.std
        found = []
        for end, layer in enumerate(self.features, start=1):
            x = layer(x)
            if end in VGG_LAYERS.values():
                found.append(x)                                 # (N, C, H', W')
        return found

    def forward(self, sr, hr):
        require_same(sr, hr, "sr and hr")
        phi_sr = self.embed(sr)[-1]                             # (N, C, H', W')
        phi_hr = self.embed(hr)[-1].detach()                    # (N, C, H', W')
        # (6) prints a sum; a mean has a weight that holds for every image size.
        return (phi_sr.float() - phi_hr.float()).abs().mean()   # (6)


def gradient_loss(g_sr: torch.Tensor, g_hr: torch.Tensor) -> torch.Tensor:
    """L_grad of (7): mean absolute error. Two equal shapes -> scalar."""
    require_same(g_sr, g_hr, "g_sr and g_hr")
    return (g_sr - g_hr).abs().mean()                           # (7)


# ---- 2.2 Image hallucination ---------------------------------------------------------

def draw_z(shape: tuple, z_shared: float, rng: torch.Generator) -> torch.Tensor:
    """Noise for G, N(0, I) at every LR pixel. shape (..., z_dim, h, w) -> that shape.

    z_shared in [0, 1] is the deviation of the part that all pixels of a face share: at 1,
    as in the paper, z is one vector of z_dim numbers; at 0, every pixel has its own.
    """
    require(0 <= z_shared <= 1, f"z_shared must be in [0, 1], got {z_shared}")
    require(len(shape) >= 3, f"shape must be (..., z_dim, h, w), got {shape}")
    own = torch.randn(shape, generator=rng, dtype=torch.float32)
    shared = torch.randn((*shape[:-2], 1, 1), generator=rng, dtype=torch.float32)
    # Squares of the two factors add up to 1: the variance stays 1.
    return z_shared * shared + (1 - z_shared ** 2) ** 0.5 * own


def diversity_loss(g1, g2, z1, z2, tau: float = 1.0) -> torch.Tensor:
    """L_z of (8), to be *maximised*: how far the gradient moves per step in z.

    g1, g2 (N, C, H, W) are G's gradients at z1, z2 (N, ...), of the same LR -> scalar.
    """
    require(tau > 0, f"tau must be positive, got {tau}")
    require_same(g1, g2, "g1 and g2")
    require_same(z1, z2, "z1 and z2")
    require(g1.shape[0] == z1.shape[0],
            f"expected a z for each g, got {z1.shape[0]} and {g1.shape[0]}")
    # D only asks whether an image is plausible: G could please it and ignore z.
    # Absolute values, as a root of squares has no slope (NaN) where g1 equals g2.
    moved = (g1 - g2).abs().flatten(1).mean(1)                  # (N,)
    apart = (z1 - z2).abs().flatten(1).mean(1) + 1e-5           # (N,), never 0
    # The paper bounds the ratio for stability: beyond tau a pair has no slope any more.
    return (moved / apart).clamp(max=tau).mean()                # (8)


def energy_score(a, b, truth) -> torch.Tensor:
    """Two samples' mean distance to the truth, less half that between the two.

    a, b, truth (N, C, H, W), images or features of them -> scalar, to be minimised: not in
    the paper. With independent samples it is least, on average, where at every place they
    vary as the truth does (Gneiting and Raftery 2007).
    """
    require_same(a, b, "two samples")
    require_same(a, truth, "a sample and the truth")

    def distance(p, q):
        # The channels at one place are one vector. The 1e-6 gives the root a slope at 0.
        return ((p - q).square().mean(1) + 1e-6).sqrt().mean()
    # A ruin in one sample costs nothing, so rare ones remain; in both it costs much.
    return (distance(a, truth) + distance(b, truth) - distance(a, b)) / 2


def project_onto_lr(image: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
    """(9) with eps = 0, by construction: the closest image that shrinks to lr.

    image (N, 3, H, W), lr (N, 3, h, w) -> (N, 3, H, W). Clamping or rounding it may
    move it away again. Needs: downscale, upscale_nearest, scale_between.
    """
    factor = scale_between(image, lr)
    missing = lr - downscale(image, factor)                     # (N, 3, h, w)
    # One constant for each block: the details inside stay.
    return image + upscale_nearest(missing, factor)             # (N, 3, H, W)


# ---- 2.3 Overall objective -----------------------------------------------------------

def discriminator_loss(real_logits, fake_logits) -> torch.Tensor:
    """L_adv for D_I and D_g: -log D(real) - log(1 - D(fake)), D = sigmoid(logits).

    Two tensors of any shapes -> scalar; 2 log 2 = 1.386 when D cannot tell.
    """
    # The paper prints -log(1 - D(real)) - log D(fake) for both players. That is G's: a
    # D that minimised it would learn to call photographs fake.
    real = fn.softplus(-real_logits).mean()  # softplus(-l) is -log sigmoid(l)
    fake = fn.softplus(fake_logits).mean()
    return real + fake


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """L_adv for G: -log D(fake). Any shape -> scalar; log 2 when D cannot tell."""
    # "Non-saturating": log(1 - D(fake)) would be flat just where D is sure.
    return fn.softplus(-fake_logits).mean()


def r1_penalty(logits: torch.Tensor, images: list[torch.Tensor]) -> torch.Tensor:
    """R1: the squared slope of D at photographs, which keeps D smooth around them.

    logits (N, 1, h, w) that D gave for images, which had requires_grad set -> scalar.
    Weigh it by half of R1's own gamma, which is not (10)'s.
    """
    # The mean logit: with the sum, R1 would grow with the map of logits.
    per_image = logits.mean((1, 2, 3))                          # (N,)
    slopes = torch.autograd.grad(per_image.sum(), images, create_graph=True)
    return sum(slope.square().sum((1, 2, 3)).mean() for slope in slopes)


def reconstruction_loss(percp, grad, adv_g, adv_i, gamma=10.0, beta=0.1):
    """(10), minimised at z = 0, from four scalars."""
    return gamma * (percp + grad) + beta * (adv_g + adv_i)      # (10)


def hallucination_loss(adv_g, adv_i, l_z, alpha=1.0):
    """(11), minimised at z ~ N(0, I), from three scalars."""
    # Printed with a plus; but L_z is to be maximised, the rest minimised.
    return adv_g + adv_i - alpha * l_z                          # (11)


# ---- 3.1 Conditioning ----------------------------------------------------------------

def excess(image: torch.Tensor, lr: torch.Tensor, eps: float = 12.75) -> torch.Tensor:
    """F of (12): by how many grey levels, beyond eps, the shrunken image misses LR.

    image (N, 3, H, W), lr (N, 3, h, w) rounded to 8 bits -> (N, 3, h, w), 0 for the true
    image. For D_I, in training; lr_psnr is the score.
    The image is not clamped first, so F does not see what saving it would clip.
    Needs: quantize, to_levels, from_levels, downscale, scale_between.
    """
    require(eps >= 0, f"eps must be >= 0, got {eps}")
    shrunk = downscale(image, scale_between(image, lr))         # (N, 3, h, w)
    # In grey levels, D_I sees a small error without large weights.
    r = 2 / 255
    # Section 4.1 puts eps = 0.1 in here. It would permit nothing: errors are whole
    # levels. Section 4.2 puts it in (9), on [-1, 1]: 0.1 / r = 12.75 levels.
    return fn.relu((quantize(shrunk) - lr).abs() / r - eps)     # (12)


# ---- 3.2 Architecture: blocks, generator, discriminators -----------------------------

def activation(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU with leak 0.2, in all networks (section 4.1)."""
    return fn.leaky_relu(x, 0.2)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size and, behind an activation, the variance."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    # The paper names no normalisation: the start alone keeps 20 layers from exploding.
    nn.init.kaiming_normal_(conv.weight, a=0.2)
    nn.init.zeros_(conv.bias)
    return conv


def near_zero(conv: nn.Conv2d) -> nn.Conv2d:
    """Start a layer at a tenth: at first, what it is added to dominates."""
    nn.init.zeros_(conv.bias)
    conv.weight.data.mul_(0.1)
    return conv


class ResidualBlock(nn.Module):
    """x plus two convolutions of x (Fig. 2). Needs: conv3x3, near_zero, activation."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        # Near the identity at first, so that any number of blocks can be trained.
        self.conv2 = near_zero(conv3x3(channels, channels))

    def forward(self, x):
        h = activation(self.conv1(x))                           # (N, C, H, W)
        return x + self.conv2(h)                                # (N, C, H, W)


def output_head(channels: int) -> nn.Sequential:
    """A domain's convolution and 1x1 projection (Fig. 3). Needs: conv3x3, near_zero."""
    own = conv3x3(channels, channels)
    to_pixels = near_zero(nn.Conv2d(channels, 3, 1))
    return nn.Sequential(own, nn.LeakyReLU(0.2), to_pixels)


class UpBlock(nn.Module):
    """Enlarge features twofold, with the image and the gradient read off them (Fig. 3).

    forward takes features (N, in, H, W), image and gradient (N, 3, H, W), and returns
    all three, twice as large. Needs: ResidualBlock, output_head, conv3x3, near_zero,
    activation.
    """

    def __init__(self, in_channels: int, out_channels: int, blocks: int = 0):
        super().__init__()
        # Shared: what the gradient teaches of structure, the image can use.
        self.shared = conv3x3(in_channels, out_channels)
        # Fig. 3's "convolution block" may hold more than one convolution.
        self.blocks = nn.Sequential(*[ResidualBlock(out_channels) for _ in range(blocks)])
        self.image_head = output_head(out_channels)
        self.gradient_head = output_head(out_channels)

    def forward(self, features, image, gradient):
        # Nearest, then a convolution: a transposed one leaves a checkerboard.
        features = fn.interpolate(features, scale_factor=2)     # (N, in,  2H, 2W)
        features = activation(self.shared(features))            # (N, out, 2H, 2W)
        features = self.blocks(features)                        # (N, out, 2H, 2W)
        # The skip keeps low frequencies such as colour: the heads only add detail.
        image = fn.interpolate(image, scale_factor=2, mode="bilinear")
        image = image + self.image_head(features)               # (N, 3,   2H, 2W)
        # Twice as large, the same edge is half as steep.
        gradient = fn.interpolate(gradient, scale_factor=2, mode="bilinear") / 2
        gradient = gradient + self.gradient_head(features)      # (N, 3,   2H, 2W)
        return features, image, gradient


class DownBlock(nn.Module):
    """Halve the size: UpBlock's mirror, for one domain (section 3.2).

    forward takes this resolution's picture (N, 3 or more, H, W) and the features from the
    finer one (N, in, H, W), None at the finest. Needs: conv3x3, activation.
    """

    def __init__(self, in_channels: int, out_channels: int, picture_channels: int = 3):
        super().__init__()
        self.from_pixels = nn.Conv2d(picture_channels, in_channels, 1)
        self.conv1 = conv3x3(in_channels, in_channels)
        self.conv2 = conv3x3(in_channels, out_channels)

    def forward(self, picture, features=None):
        x = activation(self.from_pixels(picture))               # (N, in,  H,   W)
        if features is not None:
            require_same(x, features, "features of a picture and of the finer one")
            x = x + features                                    # (N, in,  H,   W)
        x = activation(self.conv1(x))                           # (N, in,  H,   W)
        x = activation(self.conv2(x))                           # (N, out, H,   W)
        return fn.avg_pool2d(x, 2)                              # (N, out, H/2, W/2)


def channels_at(width: int, scale: int) -> list[int]:
    """Channels at LR's size and after each doubling; for 8x 4, 3, 2, 1 times width."""
    return [width * times for times in range(scale.bit_length(), 0, -1)]


class Generator(nn.Module):
    """G of (1) and (2): LR and z to an image and a gradient (Fig. 2).

    forward(lr (N, 3, h, w) in [-1, 1], z (N, z_dim, h, w)) returns lists, coarse to
    fine: {"image": [(N, 3, 2h, 2w), ..., (N, 3, H, W)], "gradient": the same}. They are
    unbounded. Any LR size goes in: `size` and `z_shared` say what it is trained for.
    Needs: ResidualBlock, UpBlock, output_head, conv3x3, near_zero, activation,
    channels_at, image_gradient, project_onto_lr, downscale, upscale_nearest,
    scale_between.
    """

    def __init__(self, size: int = 64, scale: int = 8, z_dim: int = 64,
                 z_shared: float = 1.0, width: int = 32, blocks: int = 8,
                 fine_blocks: int = 0, hard_consistency: bool = False):
        super().__init__()
        check_architecture(width, scale, blocks)
        require(z_dim >= 1, f"z_dim must be 1 or more, got {z_dim}")
        # These and the weights are all that a saved generator needs.
        self.settings = dict(size=size, scale=scale, z_dim=z_dim, z_shared=z_shared,
                             width=width, blocks=blocks, fine_blocks=fine_blocks,
                             hard_consistency=hard_consistency)
        self.scale = scale
        self.z_dim = z_dim
        self.hard_consistency = hard_consistency
        channels = channels_at(width, scale)

        self.first_conv = conv3x3(3 + z_dim, channels[0])
        # Otherwise z, with more channels than LR, would drown it.
        self.first_conv.weight.data[:, 3:] *= 0.1
        self.trunk = nn.Sequential(*[ResidualBlock(channels[0]) for _ in range(blocks)])
        self.up_blocks = nn.ModuleList(
            UpBlock(more, fewer, fine_blocks) for more, fewer in zip(channels, channels[1:]))

    def forward(self, lr, z):
        require_images(lr, "lr", channels=3)
        expected = (lr.shape[0], self.z_dim, *lr.shape[-2:])
        require(z.shape == expected, f"z must have shape {expected}, got {tuple(z.shape)}")
        features = torch.cat([lr, z], 1)                        # (N, 3 + z_dim, h, w)
        features = self.first_conv(features)                    # (N, C, h, w)
        features = self.trunk(features)                         # (N, C, h, w)

        # Where Fig. 3's skip connections start: LR and LR's own gradient.
        image = lr                                              # (N, 3, h, w)
        gradient = image_gradient(lr)                           # (N, 3, h, w)
        made = {"image": [], "gradient": []}
        for up_block in self.up_blocks:
            features, image, gradient = up_block(features, image, gradient)
            if self.hard_consistency:
                # Not in the paper: DS(image) = LR at once, so F has nothing to teach.
                image = project_onto_lr(image, lr)
            made["image"].append(image)                         # (N, 3, 2h, 2w), ...
            # At a random z, no loss ties it to the image: only layers that both share.
            made["gradient"].append(gradient)                   # (N, 3, 2h, 2w), ...
        return made


@torch.no_grad()
def sample(generator: nn.Module, lr: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The finest image alone, as saved: (N, 3, H, W), rounded to 8 bits.

    Needs: quantize, to_levels, from_levels.
    """
    return quantize(generator(lr, z)["image"][-1])


def beside_features(images: list[torch.Tensor], phi: nn.Module) -> list[torch.Tensor]:
    """Each image with VGG-16's features of the finest as more channels: not in the paper.

    Images (N, 3, 2h, 2w), ..., (N, 3, H, W) -> the same with VGG_CHANNELS more, 64 at the
    finest. phi: a PerceptualLoss of as many VGG_LAYERS as images.
    """
    # A discriminator of pixels is slow to see what is wrong with a face, one that sees a
    # trained network's features is not (Projected GAN, Sauer et al. 2021).
    features = phi.embed(images[-1])
    return [torch.cat(both, 1) for both in zip(images, reversed(features))]


class Discriminator(nn.Module):
    """D_I or D_g: G mirrored, for one domain, all resolutions at once (section 3.2).

    forward takes pictures as G returns them, a list from coarse to fine, and returns
    logits (N, 1, h, w): no linear layer, one logit for each LR pixel. D_I has
    condition_channels = 3 and also takes F of (12), (N, 3, h, w), 0 for a photograph.
    with_vgg: its pictures are those of `beside_features`.
    Needs: VGG_CHANNELS, DownBlock, ResidualBlock, conv3x3, near_zero, activation, channels_at.
    """

    def __init__(self, width: int = 32, scale: int = 8, blocks: int = 8,
                 condition_channels: int = 0, with_vgg: bool = False):
        super().__init__()
        check_architecture(width, scale, blocks)
        channels = channels_at(width, scale)
        mirrored = channels[::-1]  # fine to coarse
        require(scale <= 16 or not with_vgg, f"VGG-16 has too few layers for scale {scale}")
        added = VGG_CHANNELS if with_vgg else [0] * len(mirrored)
        self.down_blocks = nn.ModuleList(
            DownBlock(fewer, more, 3 + features)
            for fewer, more, features in zip(mirrored, mirrored[1:], added))
        self.trunk = nn.Sequential(*[ResidualBlock(channels[0]) for _ in range(blocks - 1)])
        self.last_block = ResidualBlock(channels[0] + condition_channels)
        self.to_logits = nn.Conv2d(channels[0] + condition_channels, 1, 3, padding=1)

    def forward(self, pictures, condition=None):
        features = None
        for down_block, picture in zip(self.down_blocks, reversed(pictures), strict=True):
            features = down_block(picture, features)            # (N, C, H/2, W/2)
        features = self.trunk(features)                         # (N, C, h, w)
        if condition is not None:
            # Section 3.1: F joins "at the last block".
            features = torch.cat([features, condition], 1)      # (N, C + 3, h, w)
        features = self.last_block(features)                    # (N, C (+ 3), h, w)
        return self.to_logits(features)                         # (N, 1, h, w)


# ---- 4.2 Metrics: all but LPIPS round images to 8 bits first -------------------------

def psnr(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, on 8-bit RGB. Infinite where both agree.

    Two (N, C, H, W) in [-1, 1] -> (N,). Needs: to_levels.
    """
    require_images(truth, "truth", bounded=True)
    require_same(image, truth, "image and truth")
    error = (to_levels(image) - to_levels(truth)).square().mean((1, 2, 3))
    return 10 * torch.log10(255 ** 2 / error)                   # (N,)


def lr_psnr(image: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
    """Is an image true to its LR? PSNR of the shrunken image. NTIRE 2021 asks 45 dB.

    (N, 3, H, W), (N, 3, h, w) -> (N,). Needs: psnr, quantize, to_levels, from_levels,
    downscale, scale_between.
    """
    shrunk = downscale(quantize(image), scale_between(image, lr))
    return psnr(shrunk, lr)                                     # (N,)


def ssim(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) on 8-bit RGB, 1 where both agree.

    Two (N, C, H, W) in [-1, 1], sides of 11 or more -> (N,). Window 11x11, Gaussian of
    sigma 1.5, whole windows only; K = 0.01 and 0.03. Needs: to_levels.
    """
    require_images(truth, "truth", bounded=True)
    require_same(image, truth, "image and truth")
    offsets = torch.arange(11, dtype=torch.double) - 5
    window = torch.softmax(-offsets.square() / (2 * 1.5 ** 2), 0)  # its sum is 1

    def local_mean(x):
        x = x.flatten(0, 1)[:, None]                            # (N*C, 1, H, W)
        x = fn.conv2d(x, window.view(1, 1, 11, 1))              # (N*C, 1, H-10, W)
        return fn.conv2d(x, window.view(1, 1, 1, 11))           # (N*C, 1, H-10, W-10)

    # Variances are small differences of large squares: float32 would lose them. On the
    # CPU, as not every device has float64.
    a = to_levels(image).cpu().double()
    b = to_levels(truth).cpu().double()
    mean_a = local_mean(a)
    mean_b = local_mean(b)
    var_a = local_mean(a * a) - mean_a.square()
    var_b = local_mean(b * b) - mean_b.square()
    cov = local_mean(a * b) - mean_a * mean_b
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).view(len(image), -1).mean(1).to(image.device, torch.float)


class LPIPS(nn.Module):
    """Learned perceptual distance, v0.1 on AlexNet (Zhang et al. 2018): 0 where equal.

    forward(a, b): two (N, 3, H, W) in [-1, 1], sides of 31 or more -> (N,). It does not
    round: quantize G's images first.
    OSError where the weights (the authors' own, BSD-2) cannot be downloaded.
    Needs: pretrained_features.
    """

    URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
           "lpips/weights/v0.1/alex.pth")
    FILE = "lpips_v0.1_alex.pth"

    def __init__(self):
        super().__init__()
        self.features = pretrained_features(alexnet, AlexNet_Weights.IMAGENET1K_V1, 12)
        state = torch.hub.load_state_dict_from_url(
            self.URL, map_location="cpu", file_name=self.FILE, weights_only=True)
        for i in range(5):
            self.register_buffer(f"weight{i}", state[f"lin{i}.model.1.weight"])
        mean = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float32)
        std = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float32)
        self.register_buffer("mean", mean.view(1, 3, 1, 1))
        self.register_buffer("std", std.view(1, 3, 1, 1))

    def unit_features(self, x):
        """Features after each of five ReLUs, every pixel's vector made length 1."""
        x = (x - self.mean) / self.std
        found = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                length = x.square().sum(1, keepdim=True).sqrt()
                found.append(x / (length + 1e-10))
        return found

    def forward(self, a, b):
        require_same(a, b, "a and b")
        require_images(a, "a", channels=3)
        require_images(b, "b", channels=3)
        require(min(a.shape[-2:]) >= 31, f"AlexNet needs sides of 31, got {tuple(a.shape[-2:])}")
        distance = 0.0
        for i, (x, y) in enumerate(zip(self.unit_features(a), self.unit_features(b))):
            # A weighted sum over channels, with weights learned from people's answers.
            weight = getattr(self, f"weight{i}")                # (1, C, 1, 1)
            layer = fn.conv2d((x - y).square(), weight)         # (N, 1, H', W')
            distance = distance + layer.mean((1, 2, 3))         # (N,)
        return distance


def frechet_distance(mean_a, cov_a, mean_b, cov_b) -> torch.Tensor:
    """Squared distance of two Gaussians (Dowson and Landau 1982; Heusel et al. 2017).

    |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)): means (..., d) and covariances
    (..., d, d), in double -> (...).
    """
    product = cov_a @ cov_b
    require(product.isfinite().all(), "images or their covariances hold NaN or infinity")
    # A B has the eigenvalues of A^(1/2) B A^(1/2): real, and none below 0.
    roots = torch.linalg.eigvals(product).real.clamp(min=0).sqrt()
    traces = (cov_a + cov_b).diagonal(dim1=-2, dim2=-1).sum(-1)
    return (mean_a - mean_b).square().sum(-1) + traces - 2 * roots.sum(-1)


class Realism(nn.Module):
    """Do images look like photographs? 0 for the same ones, thousands for a blur.

    forward(images (N, 3, H, W)) -> scalar: the Fréchet distance of VGG-16's relu3_3 to
    that of photographs (M, 3, H, W), in each of 4x4 regions, then the mean. Few images
    score worse than many: compare equal N and M. It minds a missing detail more than a
    torn one: look as well. Needs: PerceptualLoss, VGG_LAYERS, pretrained_features,
    frechet_distance, quantize, to_levels, from_levels.
    """

    def __init__(self, photographs: torch.Tensor):
        super().__init__()
        require_floats(photographs, "photographs", bounded=True)
        self.phi = PerceptualLoss("relu3_3").to(photographs.device)
        self.known = self.gaussians(photographs)

    def forward(self, images):
        return frechet_distance(*self.gaussians(images), *self.known).mean()

    @torch.no_grad()
    def gaussians(self, images):
        """One Gaussian a region, over all images: (16, C) and (16, C, C)."""
        shape = tuple(images.shape)
        require(len(images) >= 2 and min(images.shape[-2:]) >= 16,
                f"realism needs 2 images or more, of 16x16 or more, got {shape}")
        # 50 at a time fit any memory.
        maps = [self.phi.embed(quantize(part))[-1].cpu() for part in images.split(50)]
        means = []
        covariances = []
        for rows in torch.cat(maps).tensor_split(4, 2):
            for region in rows.tensor_split(4, 3):              # (N, C, H'/4, W'/4)
                points = region.movedim(1, 3).flatten(0, 2)     # (N H'/4 W'/4, C)
                means.append(points.double().mean(0))
                covariances.append(points.double().T.cov())
        return torch.stack(means), torch.stack(covariances)


@torch.no_grad()
def two_sample_auc(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How well can a classifier tell two sets apart? 0.5: not at all, 1: always.

    Features (N, d) and (M, d) -> scalar: how often a row of a scores above one of b, when
    the other half of both was learned from (Lopez-Paz and Oquab 2017).
    """
    require(len(a) > 1 and len(b) > 1, f"AUC needs 2 rows of each, got {len(a)} and {len(b)}")
    rows = torch.cat([a, b]).cpu().double()                     # (N + M, d)
    require(rows.isfinite().all(), "images or features hold NaN or infinity")
    is_a = torch.arange(len(rows)) < len(a)                     # (N + M,)
    even = torch.cat([torch.arange(len(a)), torch.arange(len(b))]) % 2 == 0
    aucs = []
    for known in (even, ~even):
        # A feature may be constant: 1e-9 avoids 0 / 0.
        std = rows[known].std(0, correction=0).clamp(min=1e-9)
        x = (rows - rows[known].mean(0)) / std                  # (N + M, d)
        # Ridge regression in its dual form: there are far fewer rows than features.
        kernel = x @ x[known].T / x.shape[1]                    # (N + M, n)
        # A row with itself gives about 1, and the ridge is a hundredth of that: ten times
        # more or less makes no difference.
        ridge = 0.01 * torch.eye(kernel.shape[1], dtype=torch.double)
        labels = 2 * is_a[known].double() - 1                   # (n,)
        score = kernel @ torch.linalg.solve(kernel[known] + ridge, labels)
        above = score[is_a & ~known][:, None] - score[~is_a & ~known]
        aucs.append((above.sign().mean() + 1) / 2)              # a tie counts a half
    return (aucs[0] + aucs[1]) / 2


class TwoSampleAUC(nn.Module):
    """Can a classifier tell images from photographs? 0.5: it cannot, 1: always.

    forward(images (N, 3, H, W)) -> scalar, against photographs (M, 3, H, W): by means and
    deviations of VGG-16's relu1_2, relu2_2 and relu3_3 in 4x4 regions. Compare equal N
    and M. Needs: two_sample_auc, PerceptualLoss, VGG_LAYERS, pretrained_features,
    quantize, to_levels, from_levels.
    """

    def __init__(self, photographs: torch.Tensor):
        super().__init__()
        require_floats(photographs, "photographs", bounded=True)
        self.phi = PerceptualLoss("relu3_3").to(photographs.device)
        self.known = self.describe(photographs)

    def forward(self, images):
        return two_sample_auc(self.describe(images), self.known)

    @torch.no_grad()
    def describe(self, images):
        """One row of features for each image: (N, 14336)."""
        require_images(images, channels=3)
        rng = torch.Generator().manual_seed(0)  # the same images, the same number
        rows = []
        for part in images.split(50):
            # Four grey levels hide the traces of JPEG, which only photographs have.
            noise = 4 / 127.5 * torch.randn(part.shape, generator=rng, dtype=torch.float32)
            found = []
            for x in self.phi.embed(quantize(part) + noise.to(part.device)):
                mean = fn.adaptive_avg_pool2d(x, 4)             # (N, C, 4, 4)
                variance = fn.adaptive_avg_pool2d(x.square(), 4) - mean.square()
                found += [mean, variance.clamp(min=0).sqrt()]
            rows.append(torch.cat(found, 1).flatten(1).cpu())
        return torch.cat(rows)


def std_map(samples: torch.Tensor) -> torch.Tensor:
    """Where is the model unsure? Standard deviation over samples, in grey levels.

    samples (K, N, 3, H, W) -> (N, 3, H, W). Divides by K. Needs: to_levels.
    """
    require_floats(samples, "samples", bounded=True)
    require(samples.ndim == 5, f"samples must be (K, N, 3, H, W), got {tuple(samples.shape)}")
    return to_levels(samples).std(0, correction=0)


def spread_and_error(samples: torch.Tensor, truth: torch.Tensor) -> tuple:
    """Do samples differ from each other as much as from the truth? Then both are equal.

    samples (K, N, 3, H, W), truth (N, 3, H, W) -> their variance and the squared error
    of their mean, times K / (K + 1), (N,) each, in squared grey levels. The root of the
    ratio of their means is the spread-skill ratio (Fortin et al. 2014), below 1 where
    samples are too much alike. Needs: to_levels.
    """
    require_samples(samples, truth)
    samples = to_levels(samples)
    variance = samples.var(0, correction=1).mean((1, 2, 3))     # (N,)
    error = (samples.mean(0) - to_levels(truth)).square().mean((1, 2, 3))
    # A mean of few samples errs more than one of many, by variance / K.
    K = len(samples)
    return variance, error * K / (K + 1)                        # (N,), (N,)


def rank_histogram(samples: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """How often does the true value exceed r of K samples, r = 0 ... K? (Hamill 2001)

    samples (K, N, 3, H, W), truth (N, 3, H, W) -> (N, K + 1) of sum 1, flat where the
    model is calibrated. The two ends are true values outside all samples: too high
    where samples are too much alike. Needs: to_levels.
    """
    require_samples(samples, truth)
    samples = to_levels(samples)
    truth = to_levels(truth)
    below = (samples < truth).sum(0)                            # (N, 3, H, W)
    equal = (samples == truth).sum(0)                           # (N, 3, H, W)
    shares = []
    for rank in range(len(samples) + 1):
        # A value that equals two samples may have three ranks: a third to each.
        possible = (below <= rank) & (rank <= below + equal)
        shares.append((possible.float() / (equal + 1)).mean((1, 2, 3)))
    return torch.stack(shares, 1)


# ---- Files: a generator's checkpoint, and pretrained weights -------------------------

def save_checkpoint(path: str | Path, generator: nn.Module, **training):
    """Write a generator (pass the running average), its settings and `training`.

    Plain values and state dicts only: torch.load reads it. There is never half a file:
    when it cannot be written, OSError says so, and `path` is as it was.
    """
    require(isinstance(generator, Generator), "expected a Generator, got a "
            f"{type(generator).__name__}: pass the module that it wraps")
    require_finite(generator, f"{path} stays as it was")
    content = {"hallusr": 4, "settings": generator.settings,
               "generator": generator.state_dict()}
    target = os.path.realpath(path)  # a link stays one: what it points to is written
    temporary = Path(f"{target}.tmp")
    try:
        torch.save(content | training, temporary)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch's word for a full disk
        raise OSError(f"could not write {path}: {error}".partition("\n")[0]) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict:
    """All of a checkpoint, on the CPU. Raises ValueError for a file that is none."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:  # it names the file that is missing
        raise
    except Exception as error:  # a damaged pickle can end in nearly any of them
        raise ValueError(f"{path} is damaged or no checkpoint") from error
    require(isinstance(content, dict) and content.get("hallusr") == 4,
            f"{path} is no checkpoint of this version of hallusr")
    return content


def load_generator(path: str | Path, device: str = "cpu") -> Generator:
    """The trained G (its running average) of a checkpoint, ready to sample.

    ValueError for a file that is no checkpoint. Needs: load_checkpoint, load_weights,
    Generator, ResidualBlock, UpBlock, output_head, conv3x3, near_zero, activation,
    channels_at, image_gradient, project_onto_lr, downscale, upscale_nearest, scale_between.
    """
    content = load_checkpoint(path)
    generator = Generator(**content["settings"]).float()  # whatever torch's default is
    load_weights(generator, content["generator"], path)
    return generator.to(device).eval().requires_grad_(False)


def load_weights(module: nn.Module, state: dict, path: str | Path):
    """module.load_state_dict, but one clear ValueError for wrong keys or NaN."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} holds another architecture: {first}") from error
    require_finite(module, f"{path} is spoiled")


def pretrained_features(build, weights, end: int) -> nn.Sequential:
    """The first `end` modules of a torchvision network's `features`, frozen."""
    with torch.device("meta"):  # the network's shape, without its memory
        features = build().features[:end]
    state = torch.hub.load_state_dict_from_url(weights.url, map_location="cpu",
                                               weights_only=True, check_hash=True)
    own = {name: state["features." + name] for name in features.state_dict()}
    features.load_state_dict(own, assign=True)
    features.to(memory_format=torch.channels_last)  # convolutions are fastest so
    return features.eval().requires_grad_(False)


# ---- Clear errors for wrong arguments ------------------------------------------------

def require(condition: bool, message: str):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_finite(module: nn.Module, verdict: str):
    """Raise ValueError, naming it, for a weight that is NaN or infinite."""
    for name, weight in module.state_dict().items():
        require(weight.isfinite().all(), f"{verdict}: {name} holds NaN or infinity")


def require_floats(x: torch.Tensor, name: str = "image", bounded: bool = False):
    """Raise ValueError for integers and, where bounded, for floats of 0-255."""
    expected = f"{name} must be floats in [-1, 1]"
    remedy = "from_levels makes them from 8-bit values"
    require(x.is_floating_point(), f"{expected}, got {x.dtype}: {remedy}")
    # Clamped, they would score as perfect. Only what is compared with is bounded: a
    # network's images overshoot.
    if bounded:
        require((x.abs() <= 2).all(), f"{expected}, got {x.abs().max():g}: {remedy}")


def require_images(x: torch.Tensor, name: str = "image", channels: int | None = None,
                   bounded: bool = False):
    """Raise ValueError unless x is a batch of float images, (N, C, H, W)."""
    expected = f"(N, {channels or 'C'}, H, W)"
    require(x.ndim == 4 and channels in (None, x.shape[1]),
            f"{name} must have shape {expected}, got {tuple(x.shape)}")
    require_floats(x, name, bounded)


def require_same(a: torch.Tensor, b: torch.Tensor, names: str):
    """Raise ValueError unless both have one shape: broadcasting would hide a mistake."""
    require(a.shape == b.shape,
            f"{names} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def require_samples(samples: torch.Tensor, truth: torch.Tensor):
    """Raise ValueError unless there are two samples or more of each true image."""
    fits = samples.ndim == 5 and samples.shape[1:] == truth.shape
    require(fits and len(samples) >= 2,
            "expected samples (K, N, 3, H, W), K of 2 or more, and truth (N, 3, H, W), "
            f"got {tuple(samples.shape)} and {tuple(truth.shape)}")
    require_floats(truth, "truth", bounded=True)
    require(samples.isfinite().all(), "samples hold NaN or infinity")


def check_architecture(width: int, scale: int, blocks: int):
    """Raise ValueError unless a network can be built of these."""
    require(scale >= 2 and scale & (scale - 1) == 0,
            f"scale must be a power of two, 2 or more, got {scale}")
    require(width >= 1, f"width must be 1 or more, got {width}")
    require(blocks >= 1, f"blocks must be 1 or more, got {blocks}")
