"""hallusr: from one 8x8 face, a 64x64 reconstruction and as many other plausible faces as you like.

An independent implementation, in one file, of

    Mohamed Abid, Ihsen Hedhli, Christian Gagné,
    "A generative model for hallucinating diverse versions of super resolution images".

Equation, figure and section numbers, here and in headings, are that paper's. Read it from top to
bottom: networks come before the losses, and `train.py` puts the pieces together in one loop.

Notation (N images; h x w is the small size, H x W = scale * h x scale * w the large one; K is the
number of samples, C a number of channels, C0 = widths[0] the one at LR size)

    paper       here            shape             range
    ----------  --------------  ----------------  ------------------------------------------------
    I^LR        lr              (N, 3, h, w)      [-1, 1], on the 256 levels of an 8-bit image
    I^HR        hr              (N, 3, H, W)      [-1, 1]
    I^SR        sr              (N, 3, H, W)      unbounded, about [-1, 1]; G's image at z = 0
    I^H_z       hallucination   (N, 3, H, W)      the same, at z ~ N(0, I)
    g           gradient        (N, 3, H, W)      [0.001, 2 sqrt 2] of images, unbounded from G
    z           z               (N, z_dim, h, w)  N(0, I), or all zero to reconstruct
    DS          downscale       -> (N, 3, h, w)   box average
    F           excess          (N, 3, h, w)      grey levels of disagreement with LR, >= 0
    phi_i       PerceptualLoss  a VGG-16 layer    features after a ReLU
    D_I, D_g    Discriminator   -> (N, 1, h, w)   logits: > 0 says real
    r           2 / 255         one grey level    the distance of two 8-bit levels in [-1, 1]

Lists "at every scale" run from coarse (2h x 2w) to fine. In the code, F is torch.nn.functional.

Deviations from the paper. The first group holds under both presets: there the print contradicts
itself or is silent, or the change costs little and helps (D7, D8, D15).

    D1  L_adv is printed once, as -log(1 - D(real)) - log D(fake): right for G, but D would learn
        to call real images fake. Here each player has its own: discriminator_loss, generator_loss.
    D2  (11) adds alpha L_z although L_z is to be maximised. Here it is subtracted.
    D3  The adversarial terms name I^SR only. Here D_I and D_g judge I^SR and I^H_z, each image
        with its own F; otherwise D_I(I^H_z, F) of section 3.1 would never be used.
    D4  LR is rounded to 8 bits, as a file would be. Otherwise even the true HR image has F > 0.
    D5  The "closest colour value" is one of the 256 levels; multiples of r lie half a level off.
    D6  (3)-(5) repeat the border pixel, and 1e-6 stands under the root: a zero border would draw a
        frame around every image, and the root's slope is infinite where an image is flat.
    D7  R1 is taken every 16th step with 16 times its weight: the same average, a fraction of the
        work (StyleGAN2's lazy regularisation).
    D8  A running average of G's weights (EMA) samples and is scored; the paper does not say.
    D15 z is a map, z_dim numbers for every LR pixel, not one vector (m = z_dim h w): the same
        vector at every pixel moved all faces alike, and a mouth never without the eyes.
    D17 F enters D_I before the residual blocks, where features first have LR's size, and not "at
        the last block": what D_I sees of F it should also be able to weigh.

The second group is off in Config(), the paper as printed; RECOMMENDED turns on all but D12.

    D9  hard_consistency: G subtracts its disagreement with LR at every scale, so that (9) holds
        by construction. With the soft F alone, training failed in two ways: D_I told fakes by F
        alone, or G stayed at plain upsampling to keep F at 0.
    D10 tie: adds |g - grad(I)| of all that G makes. Nothing printed forces its gradient output to
        be the gradient of its image, so L_z could be earned in g while the image ignores z.
    D11 lr_g and lr_d are both 5e-4, so that hours suffice. The paper has 1e-4 for G and TTUR (two
        time-scale update rule: another rate for D), whose rate it does not give.
    D12 perceptual = "pixels": L1 on pixels in place of VGG features, for runs without weights.
    D13 pixel: adds L1 on pixels at z = 0. VGG features alone leave PSNR lower than it can be.
    D14 warmup: the first steps minimise (10) without L_adv, so D meets faces, not blurs.
    D16 d_blocks: fewer residual blocks in D_I and D_g than section 3.2's "like the generator".

Silent in the paper, and chosen here: every norm in (6)-(8) is a mean absolute difference, so that
weights hold for any size; (6)-(8) and F act on the finest scale alone; DS is a box average; (10)
and (11) are minimised in one step of G.

Copying: "Needs" in a docstring lists the names that belong to a piece. Functions called require...
and check... only raise clear errors: take them along, or delete the lines that call them.
"""
from __future__ import annotations

import os
import pickle
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import AlexNet_Weights, VGG16_Weights, alexnet, vgg16
from torchvision.utils import make_grid

# ---- Settings -----------------------------------------------------------------------------------


def setting(default, source: str, meaning: str):
    """A dataclass field that carries where its value comes from and what it means."""
    return field(default=default, metadata={"help": f"{meaning} ({source})"})


@dataclass(frozen=True)
class Config:
    """The numbers of the method. The defaults are the paper's wherever it gives one.

    Source: section 4.1 where a field says so; "ours" marks what the paper leaves open.
    Raises ValueError when two fields contradict each other.
    """

    size: int = setting(64, "ours", "side of the large image, in pixels")
    scale: int = setting(8, "section 4.1", "how many times smaller LR is, a power of two")
    z_dim: int = setting(4, "ours, D15", "numbers of the noise z at every LR pixel")
    widths: tuple = setting((128, 96, 64, 32), "ours", "channels at each scale, coarse to fine")
    blocks: int = setting(8, "Fig. 2", "residual blocks in G")
    d_blocks: int = setting(8, "section 3.2", "residual blocks in each discriminator (D16)")
    hard_consistency: bool = setting(False, "ours, D9", "make DS(image) = LR inside G")
    perceptual: str = setting("relu2_2", "ours", "VGG-16 layer of (6), or 'pixels' (D12)")
    gamma: float = setting(10.0, "section 4.1", "weight of perceptual and gradient loss in (10)")
    beta: float = setting(0.1, "section 4.1", "weight of the adversarial losses in (10)")
    alpha: float = setting(1.0, "section 4.1", "weight of the diversity loss in (11)")
    tau: float = setting(1.0, "ours", "ceiling of the diversity loss (8)")
    eps: float = setting(0.1, "section 4.1", "free disagreement with LR in (12), in grey levels")
    tie: float = setting(0.0, "ours, D10", "weight of |g - grad(I)|")
    pixel: float = setting(0.0, "ours, D13", "weight of L1 on pixels at z = 0, beside (10)")
    warmup: int = setting(0, "ours, D14", "first steps, of G at z = 0 without D")
    r1_gamma: float = setting(10.0, "ours", "R1 weight; another gamma than (10)'s")
    r1_every: int = setting(16, "ours, D7", "steps from one R1 penalty to the next")
    lr_g: float = setting(1e-4, "section 4.1", "Adam's learning rate for G")
    lr_d: float = setting(4e-4, "ours", "Adam's learning rate for D_I and D_g: TTUR, D faster")
    ema: float = setting(0.999, "ours, D8", "decay of the running average of G")
    batch: int = setting(8, "section 4.1", "faces per step")
    steps: int = setting(100_000, "ours", "training steps")
    seed: int = setting(0, "ours", "seed of weights, batches and noise")

    def __post_init__(self):
        check_architecture(self.widths, self.scale, min(self.blocks, self.d_blocks))
        require(self.size >= 11 and self.size % self.scale == 0,  # SSIM's window is 11 wide
                f"size must be 11 or more and a multiple of scale {self.scale}, got {self.size}")
        for name in ("batch", "steps", "r1_every", "tau", "lr_g", "lr_d"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("gamma", "beta", "alpha", "eps", "tie", "pixel", "warmup", "r1_gamma", "seed"):
            require(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)}")
        require(0 <= self.ema < 1, f"ema must be in [0, 1), got {self.ema}")
        require(self.perceptual in ("pixels", *VGG_LAYERS),
                f"perceptual must be 'pixels' or one of {list(VGG_LAYERS)}, "
                f"got {self.perceptual!r}")


# What to change for a run of hours: D9-D11, D13, D14, D16, and two choices that are ours anyway.
RECOMMENDED = dict(hard_consistency=True, tie=1.0, lr_g=5e-4, lr_d=5e-4, pixel=50.0, warmup=3000,
                   d_blocks=2, perceptual="relu3_3", r1_gamma=1.0)


def require(condition: bool, message: str):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_images(x: torch.Tensor, name: str = "image"):
    """Raise ValueError unless x is a batch of images: shape (N, 3, H, W)."""
    require(x.ndim == 4 and x.shape[1] == 3,
            f"{name} must have shape (N, 3, H, W), got {tuple(x.shape)}")


def require_same(a: torch.Tensor, b: torch.Tensor, names: str):
    """Raise ValueError unless both tensors have one shape: broadcasting would hide a mistake."""
    require(a.shape == b.shape, f"{names} must have one shape, got {tuple(a.shape)} and "
                                f"{tuple(b.shape)}")


def check_architecture(widths: tuple, scale: int, blocks: int):
    """Raise ValueError unless widths, scale and blocks fit together."""
    require(scale >= 2 and scale & (scale - 1) == 0,
            f"scale must be a power of two, 2 or more, got {scale}")
    doublings = scale.bit_length() - 1
    require(len(widths) == doublings + 1 and all(width >= 1 for width in widths),
            f"widths needs {doublings + 1} positive numbers for scale {scale}, got {widths}")
    require(blocks >= 1, f"blocks must be 1 or more, got {blocks}")


# ---- Image space: levels, DS, scales ------------------------------------------------------------


def to_levels(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to the 8-bit values 0, 1, ..., 255, as floats; beyond is clamped. Any shape."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round()


def from_levels(levels: torch.Tensor) -> torch.Tensor:
    """8-bit values 0-255, uint8 or float, to floats in [-1, 1]. Any shape."""
    return levels.float() / 127.5 - 1


def quantize(x: torch.Tensor) -> torch.Tensor:
    """The nearest 8-bit level of [-1, 1], as saving to a file would give; any shape.

    The gradient is exactly 1 everywhere (straight-through, section 3.1): rounding is flat, its true
    gradient is zero and nothing could learn through it. Values beyond [-1, 1] are clamped in the
    forward pass only. Source: the rounding of (12); D5. Needs: to_levels, from_levels.
    """
    rounded = from_levels(to_levels(x.detach()))
    return x - x.detach() + rounded  # 0 + rounded forward, 1 + 0 backward


def downscale(x: torch.Tensor, factor: int = 8) -> torch.Tensor:
    """DS of (9): every factor x factor block becomes its mean. (N, C, H, W) -> (N, C, H/f, W/f).

    Not rounded: LR itself is quantize(downscale(hr)) (D4).
    Raises ValueError when the sides are not multiples of factor.
    """
    require(x.ndim == 4, f"image must have shape (N, C, H, W), got {tuple(x.shape)}")
    require(factor >= 1 and x.shape[-2] % factor == 0 and x.shape[-1] % factor == 0,
            f"image sides must be multiples of {factor}, got {x.shape[-2]} x {x.shape[-1]}")
    return F.avg_pool2d(x, factor)


def upscale_nearest(x: torch.Tensor, factor: int = 8) -> torch.Tensor:
    """Repeat every pixel factor x factor times, so that downscale(upscale_nearest(x)) == x.

    (N, C, h, w) -> (N, C, h*f, w*f). Raises ValueError unless x has four dimensions.
    """
    require(x.ndim == 4 and factor >= 1,
            f"image must have shape (N, C, h, w) and factor >= 1, got {tuple(x.shape)}, {factor}")
    return F.interpolate(x, scale_factor=factor, mode="nearest")


def upscale_bicubic(lr: torch.Tensor, factor: int = 8) -> torch.Tensor:
    """Table 1's baseline, clamped to [-1, 1]. (N, C, h, w) -> (N, C, h*f, w*f).

    torch's kernel has a = -0.75; other libraries may use -0.5 and give slightly other scores.
    """
    return F.interpolate(lr, scale_factor=factor, mode="bicubic").clamp(-1, 1)


def pyramid(x: torch.Tensor, levels: int = 3) -> list[torch.Tensor]:
    """The image at every scale, coarse to fine: for 64x64 and 3 levels, 16x16, 32x32 and x itself.

    These are the real counterparts of G's outputs (section 3.2: images at each scale).
    Raises ValueError when the sides are not multiples of 2^(levels - 1).
    """
    return [downscale(x, 2 ** level) for level in reversed(range(1, levels))] + [x]


def project_onto_lr(image: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
    """The closest image that shrinks to lr exactly: every block is shifted by one constant.

    (N, 3, H, W), (N, 3, h, w) -> (N, 3, H, W) with downscale(result) == lr, up to float error;
    clamping or 8-bit rounding afterwards may move it again. Source: (9) with eps = 0, D9.
    Needs: downscale, upscale_nearest, scale_between.
    Raises ValueError unless there is an image for each lr, its sides one multiple of lr's.
    """
    factor = scale_between(image, lr)
    return image + upscale_nearest(lr - downscale(image, factor), factor)


def scale_between(image: torch.Tensor, lr: torch.Tensor) -> int:
    """The factor from lr's size to image's. Raises ValueError when there is no single one."""
    require_images(image)
    require_images(lr, "lr")
    factor = image.shape[-1] // lr.shape[-1]
    require(image.shape == (len(lr), 3, lr.shape[-2] * factor, lr.shape[-1] * factor),
            f"there must be one image for each lr, its sides one multiple of lr's, got "
            f"{tuple(image.shape)} and {tuple(lr.shape)}")
    return factor


# ---- 2.1 The image gradient ---------------------------------------------------------------------


def image_gradient(x: torch.Tensor) -> torch.Tensor:
    """Length of the gradient at every pixel, per channel: edges bright, flat areas near 0.

    (N, C, H, W) in [-1, 1] -> (N, C, H, W) in [0.001, 2 sqrt 2]. Source: (3)-(5), D6.
    Raises ValueError unless x has four dimensions.
    """
    require(x.ndim == 4, f"image must have shape (N, C, H, W), got {tuple(x.shape)}")
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    g_x = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]  # (3) I(x+1, y) - I(x-1, y)
    g_y = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]  # (4) I(x, y+1) - I(x, y-1)
    return (g_x.square() + g_y.square() + 1e-6).sqrt()      # (5)


# ---- 3.2 Architecture: blocks -------------------------------------------------------------------


def activation(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU with leak 0.2, in both networks (section 4.1)."""
    return F.leaky_relu(x, 0.2)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, started so that it also keeps the signal's variance.

    Without normalisation layers (the paper names none) the start is all that keeps 20 layers from
    fading or exploding: He initialisation for a leak of 0.2.
    """
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, a=0.2)
    nn.init.zeros_(conv.bias)
    return conv


def near_zero(conv: nn.Conv2d) -> nn.Conv2d:
    """Start a layer at a tenth of its weights, bias 0: what it is added to dominates at first."""
    nn.init.zeros_(conv.bias)
    with torch.no_grad():
        conv.weight.mul_(0.1)
    return conv


class ResidualBlock(nn.Module):
    """x plus two convolutions of x; shape (N, channels, H, W) in and out.

    Starts near the identity, so that any number of blocks is trainable from the first step.
    Source: Fig. 2. Needs: conv3x3, near_zero, activation.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = near_zero(conv3x3(channels, channels))

    def forward(self, x):
        h = activation(self.conv1(x))          # (N, C, H, W)
        return x + self.conv2(h)               # (N, C, H, W)


class UpBlock(nn.Module):
    """Double the size; return the features and the image and gradient read off them.

    One convolution is shared by both domains, which makes the image use the structure that the
    gradient teaches; then each domain has a convolution of its own and a 1x1 projection to pixels.
    The skip connection (the enlarged image of the scale below) keeps the low frequencies, so that
    a block adds detail only. Source: Fig. 3. Needs: conv3x3, near_zero, activation.

    forward(features (N, in_channels, H, W), image (N, 3, H, W), gradient (N, 3, H, W))
    returns the same three at 2H x 2W, features with out_channels.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.shared = conv3x3(in_channels, out_channels)
        self.image_conv = conv3x3(out_channels, out_channels)
        self.gradient_conv = conv3x3(out_channels, out_channels)
        self.to_image = near_zero(nn.Conv2d(out_channels, 3, 1))
        self.to_gradient = near_zero(nn.Conv2d(out_channels, 3, 1))

    def forward(self, features, image, gradient):
        # Nearest, then a convolution: a transposed convolution leaves checkerboards.
        features = F.interpolate(features, scale_factor=2, mode="nearest") # (N, in,  2H, 2W)
        features = activation(self.shared(features))                       # (N, out, 2H, 2W)
        image_detail = self.to_image(activation(self.image_conv(features)))
        gradient_detail = self.to_gradient(activation(self.gradient_conv(features)))
        image = self.enlarge(image) + image_detail                         # (N, 3,   2H, 2W)
        # Halved: twice as large, the same edge is half as steep.
        gradient = self.enlarge(gradient) / 2 + gradient_detail            # (N, 3,   2H, 2W)
        return features, image, gradient

    @staticmethod
    def enlarge(x):
        """The skip. Bilinear: G starts as smooth enlargement and has no blocks to unlearn."""
        return F.interpolate(x, scale_factor=2, mode="bilinear")


class DownBlock(nn.Module):
    """Halve the size: UpBlock's mirror, for one domain.

    A 1x1 convolution lifts the image of this scale to features and adds them to those that come
    from the finer scale; two convolutions and average pooling follow. Source: section 3.2.
    Needs: conv3x3, activation.

    forward(image (N, 3, H, W), features (N, in_channels, H, W) or None at the finest scale)
    returns (N, out_channels, H/2, W/2).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.from_image = nn.Conv2d(3, in_channels, 1)
        self.conv1 = conv3x3(in_channels, in_channels)
        self.conv2 = conv3x3(in_channels, out_channels)

    def forward(self, image, features=None):
        h = activation(self.from_image(image))                             # (N, in,  H,   W)
        h = h if features is None else h + features                        # (N, in,  H,   W)
        h = activation(self.conv1(h))                                      # (N, in,  H,   W)
        h = activation(self.conv2(h))                                      # (N, out, H,   W)
        return F.avg_pool2d(h, 2)                                          # (N, out, H/2, W/2)


# ---- 3.2 Architecture: generator and discriminators ---------------------------------------------


class Generator(nn.Module):
    """G of (1) and (2): LR and z to the image and its gradient, at every scale.

    widths are the channels at LR size and after each doubling, coarse to fine: one more number than
    scale has doublings. hard_consistency corrects the image to LR at every scale (D9).
    Works for any LR size; `z_dim` and `scale` are attributes.
    Source: Fig. 2. Needs: ResidualBlock, UpBlock, conv3x3, image_gradient, project_onto_lr.

    forward(lr (N, 3, h, w) in [-1, 1], z (N, z_dim, h, w)) returns (images, gradients): two lists,
    coarse to fine, (N, 3, 2h, 2w) ... (N, 3, scale*h, scale*w), unbounded (clamp to show or save).
    Raises ValueError for wrong settings, shapes or channels.
    """

    def __init__(self, z_dim: int = 4, widths: tuple = (128, 96, 64, 32), scale: int = 8,
                 blocks: int = 8, hard_consistency: bool = False):
        super().__init__()
        check_architecture(widths, scale, blocks)
        require(z_dim >= 1, f"z_dim must be 1 or more, got {z_dim}")
        self.z_dim, self.scale, self.hard_consistency = z_dim, scale, hard_consistency
        self.head = conv3x3(3 + z_dim, widths[0])
        with torch.no_grad():  # z must not drown LR; with equal weights it did
            self.head.weight[:, 3:] *= 0.1
        self.trunk = nn.Sequential(*(ResidualBlock(widths[0]) for _ in range(blocks)))
        self.up_blocks = nn.ModuleList(UpBlock(*pair) for pair in zip(widths, widths[1:]))

    def forward(self, lr, z):
        require_images(lr, "lr")
        expected = (len(lr), self.z_dim, *lr.shape[-2:])
        require(z.shape == expected, f"z must have shape {expected}, got {tuple(z.shape)}")
        # Every LR pixel has noise of its own (D15): an eye can change while the mouth stays.
        features = self.head(torch.cat([lr, z], 1))                        # (N, C0, h, w)
        features = self.trunk(features)                                    # (N, C0, h, w)
        # Fig. 3's skip needs a start, which the paper does not name: LR and its own gradient.
        image, gradient = lr, image_gradient(lr)                           # (N, 3, h, w)
        images, gradients = [], []
        for block in self.up_blocks:
            features, image, gradient = block(features, image, gradient)   # each twice as large
            if self.hard_consistency:
                image = project_onto_lr(image, lr)                         # DS(image) = LR
            images.append(image)
            gradients.append(gradient)
        return images, gradients                                           # coarse to fine


@torch.no_grad()
def sample(generator: nn.Module, lr: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The finest image alone, as it would be saved: (N, 3, H, W) on 8-bit levels of [-1, 1].

    lr (N, 3, h, w), z (N, z_dim, h, w): zero to reconstruct, N(0, I) to hallucinate.
    """
    return quantize(generator(lr, z)[0][-1])


class Discriminator(nn.Module):
    """D_I with condition_channels=3, D_g with 0: G mirrored, one domain, a map of logits.

    forward(images, condition=None): the list of all scales, coarse to fine, as G returns it and
    `pyramid` makes it from real images; for D_I also F of (12), shape (N, 3, h, w), zero for real
    images. It is concatenated after the last DownBlock (D17), where the features have LR's size.
    Returns logits (N, 1, h, w), one per LR pixel: no linear layer (section 3.2), so any size works.
    Source: sections 3.1 and 3.2. Needs: DownBlock, ResidualBlock, conv3x3, activation.
    Raises ValueError for a wrong number of scales, or a missing, misshapen or unwanted condition.
    """

    def __init__(self, widths: tuple = (128, 96, 64, 32), scale: int = 8, blocks: int = 8,
                 condition_channels: int = 0):
        super().__init__()
        check_architecture(widths, scale, blocks)
        self.condition_channels = condition_channels
        fine_to_coarse = tuple(reversed(widths))
        pairs = zip(fine_to_coarse, fine_to_coarse[1:])
        self.down_blocks = nn.ModuleList(DownBlock(*pair) for pair in pairs)
        self.head = conv3x3(widths[0] + condition_channels, widths[0])
        self.trunk = nn.Sequential(*(ResidualBlock(widths[0]) for _ in range(blocks)))
        self.to_logits = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, images, condition=None):
        require(len(images) == len(self.down_blocks),
                f"expected images at {len(self.down_blocks)} scales, got {len(images)}")
        features = None
        for block, image in zip(self.down_blocks, reversed(images)):
            require_images(image)
            features = block(image, features)                              # (N, C, H/2, W/2)
        expected = (len(features), self.condition_channels, *features.shape[-2:])
        found = None if condition is None else tuple(condition.shape)
        require(found == (expected if self.condition_channels else None),
                f"condition must have shape {expected} (none at all for 0 channels), got {found}")
        if self.condition_channels:
            features = torch.cat([features, condition], 1)                 # (N, C0 + 3, h, w)
        features = activation(self.head(features))                         # (N, C0, h, w)
        return self.to_logits(self.trunk(features))                        # (N, 1, h, w)


# ---- 3.1 Conditioning ---------------------------------------------------------------------------


def consistency(image: torch.Tensor, lr: torch.Tensor, eps: float = 0.1,
                factor: int = 8) -> torch.Tensor:
    """F of (12): by how many grey levels the shrunken image misses LR, beyond eps.

    (N, 3, H, W) unbounded, (N, 3, h, w) on 8-bit levels -> (N, 3, h, w), >= 0; zero for the true
    HR image. The gradient passes the rounding (see quantize). One grey level is r = 2/255, so F is
    near 1 for a visible error: D_I's weights need not grow to see it.
    Raises ValueError when shapes and factor do not fit, or eps < 0.
    """
    require(eps >= 0, f"eps must be >= 0, got {eps}")
    shrunk = quantize(downscale(image, factor))
    require_same(shrunk, lr, "downscaled image and lr")
    r = 2 / 255
    return F.relu((shrunk - lr).abs() / r - eps)                           # (12)


# ---- 2.1 Losses: reconstruction -----------------------------------------------------------------

# How many modules of torchvision's VGG-16 end with the named ReLU.
VGG_LAYERS = {"relu1_2": 4, "relu2_2": 9, "relu3_3": 16, "relu4_3": 23}


class PerceptualLoss(nn.Module):
    """L_percp of (6): mean absolute difference of VGG-16 features.

    forward(sr (N, 3, H, W), hr (N, 3, H, W)), both around [-1, 1], returns a scalar >= 0.
    `layer` names phi_i; relu2_2 is what (6)'s source, Johnson et al., use for super-resolution.
    Only the layers up to it are kept, frozen. Weights: torchvision's VGG16 IMAGENET1K_V1, from
    torch.hub's cache or the internet. Needs: VGG_LAYERS, pretrained_features, missing_weights.
    Raises ValueError for an unknown layer or different shapes, FileNotFoundError without weights.
    """

    def __init__(self, layer: str = "relu2_2"):
        super().__init__()
        require(layer in VGG_LAYERS, f"layer must be one of {list(VGG_LAYERS)}, got {layer!r}")
        self.features = pretrained_features(vgg16, VGG16_Weights.IMAGENET1K_V1, VGG_LAYERS[layer])
        # ImageNet's statistics are of images in [0, 1]; ours are in [-1, 1].
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", (mean * 2 - 1).view(1, 3, 1, 1))
        self.register_buffer("std", (std * 2).view(1, 3, 1, 1))

    def forward(self, sr, hr):
        require_same(sr, hr, "sr and hr")
        phi_sr = self.features((sr - self.mean) / self.std)                # (N, C, H', W')
        with torch.no_grad():
            phi_hr = self.features((hr - self.mean) / self.std)            # (N, C, H', W')
        return (phi_sr.float() - phi_hr.float()).abs().mean()              # (6)


def pretrained_features(build, weights, end: int) -> nn.Sequential:
    """The first `end` modules of a torchvision network's `features`, pretrained and frozen.

    Raises FileNotFoundError, naming the file and its place, when the weights are not to be had.
    """
    with torch.device("meta"):  # the shape alone: the rest of the network never takes memory
        features = build().features[:end]
    try:
        state = weights.get_state_dict(progress=True, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileNotFoundError(missing_weights(weights.url)) from error
    wanted = {name: state["features." + name] for name in features.state_dict()}
    features.load_state_dict(wanted, assign=True)
    return features.eval().requires_grad_(False)


def missing_weights(url: str, name: str | None = None) -> str:
    """One sentence: which file is missing and where to put it."""
    place = Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rsplit("/", 1)[-1])
    return f"pretrained weights could not be downloaded: fetch {url} and save it as {place}"


def gradient_loss(g_sr: torch.Tensor, g_hr: torch.Tensor) -> torch.Tensor:
    """L_grad of (7): mean absolute error of the gradient image. Two equal shapes -> scalar >= 0."""
    require_same(g_sr, g_hr, "g_sr and g_hr")
    return (g_sr - g_hr).abs().mean()                                      # (7)


# ---- 2.2 Losses: hallucination ------------------------------------------------------------------


def diversity_loss(g1: torch.Tensor, g2: torch.Tensor, z1: torch.Tensor, z2: torch.Tensor,
                   tau: float = 1.0) -> torch.Tensor:
    """L_z of (8), to be *maximised*: how far the gradient images move per step in z, at most tau.

    g1, g2 (N, C, H, W) are G's gradients at z1, z2, (N, ...) both, for the same LR -> scalar in
    [0, tau]. Both distances are mean absolute differences, as in the diversity-sensitive GAN that
    (8) comes from. Without it G may ignore z: nothing else in the loss rewards a difference.
    Raises ValueError for different shapes or tau <= 0.
    """
    require(tau > 0, f"tau must be positive, got {tau}")
    require_same(g1, g2, "g1 and g2")
    require_same(z1, z2, "z1 and z2")
    moved = (g1 - g2).abs().mean((1, 2, 3))                                # (N,)
    apart = (z1 - z2).abs().flatten(1).mean(1) + 1e-5                      # (N,)
    return (moved / apart).clamp(max=tau).mean()                           # (8)


# ---- 2.3 Losses: adversarial pair, R1, objectives -----------------------------------------------


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """What D_I and D_g minimise: -log D(real) - log(1 - D(fake)), D = sigmoid(logits) (D1).

    Any two shapes (real and fake may differ in number) -> scalar >= 0; 2 log 2 = 1.386 when D can
    not tell. softplus(-l) is -log sigmoid(l), without overflow for any logit.
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """L_adv for G, non-saturating: -log D(fake) (D1). Any shape -> scalar >= 0, log 2 at parity.

    Not log(1 - D(fake)): that is flat where D is sure, which is where G must learn most.
    """
    return F.softplus(-fake_logits).mean()


def r1_penalty(logits: torch.Tensor, images: list[torch.Tensor]) -> torch.Tensor:
    """R1: squared length of D's gradient at real images, all scales together; weigh it gamma/2.

    logits (N, 1, h, w) of real images, which must have requires_grad set -> scalar >= 0, itself
    differentiable. An image's logit is the mean of its map: for the sum, R1 would be (h w)^2 times
    as large. Keeps D from becoming steep around the data, where it would throw G back and forth.
    Source: section 2.3, Mescheder et al.
    """
    per_image = logits.mean((1, 2, 3))                                     # (N,)
    gradients = torch.autograd.grad(per_image.sum(), images, create_graph=True)
    return sum(gradient.square().sum((1, 2, 3)).mean() for gradient in gradients)


def reconstruction_loss(percp, grad, adv_g, adv_i, gamma: float = 10.0, beta: float = 0.1):
    """(10), minimised at z = 0, from the four scalar losses."""
    return gamma * (percp + grad) + beta * (adv_g + adv_i)                 # (10)


def hallucination_loss(adv_g, adv_i, l_z, alpha: float = 1.0):
    """(11), minimised at z ~ N(0, I), from three scalars; L_z enters with a minus (D2)."""
    return adv_g + adv_i - alpha * l_z                                     # (11)


# ---- 4.2 Metrics: all on 8-bit images, one value per image --------------------------------------


def psnr(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB on 8-bit RGB. Two (N, C, H, W) in [-1, 1] -> (N,).

    Infinite where both agree. Raises ValueError for different shapes.
    """
    require_same(image, truth, "image and truth")
    error = (to_levels(image) - to_levels(truth)).square().mean((1, 2, 3))
    return 10 * torch.log10(255 ** 2 / error)


def lr_psnr(image: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
    """Is it true to its LR? PSNR of the saved image, shrunk and rounded, against lr -> (N,) in dB.

    (N, 3, H, W), (N, 3, h, w). NTIRE's challenge on learning the super-resolution space demands
    45 dB. Infinite where exact. Raises ValueError unless the sizes are multiples.
    """
    return psnr(downscale(quantize(image), scale_between(image, lr)), lr)


def ssim(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Structural similarity on 8-bit RGB. Two (N, C, H, W) in [-1, 1], H, W >= 11 -> (N,) <= 1.

    Wang et al. 2004: 11x11 Gaussian window of sigma 1.5, whole windows only, K = 0.01 and 0.03; the
    mean over windows and channels. Raises ValueError for different or too small shapes.
    """
    require_same(image, truth, "image and truth")
    require(min(image.shape[-2:]) >= 11, f"SSIM needs sides of 11, got {tuple(image.shape[-2:])}")
    offsets = torch.arange(11, device=image.device) - 5.0
    window = torch.softmax(-offsets.square() / (2 * 1.5 ** 2), 0).double() # a Gaussian of sum 1

    def local_mean(x):
        x = x.flatten(0, 1)[:, None]                                       # (N*C, 1, H, W)
        return F.conv2d(F.conv2d(x, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    # A variance is a small difference of large squares: in float32 digits would be lost.
    a, b = to_levels(image).double(), to_levels(truth).double()
    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a = local_mean(a * a) - mean_a.square()
    var_b = local_mean(b * b) - mean_b.square()
    cov = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).view(len(image), -1).mean(1).float()    # (N,)


class LPIPS(nn.Module):
    """Learned perceptual distance, v0.1 on AlexNet: 0 for equal images, about 0.5 for a blur.

    forward(a, b): two (N, 3, H, W) in [-1, 1] -> (N,) >= 0; maps(a, b) -> (N, H, W), the same
    before the mean over the image. Source: section 4.2, Zhang et al. 2018; weights of AlexNet from
    torchvision, the 1152 learned channel weights from the authors' repository (BSD-2).
    Needs: pretrained_features, missing_weights.
    Raises ValueError for different shapes or sides under 31, FileNotFoundError without weights.
    """

    URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
           "lpips/weights/v0.1/alex.pth")
    FILE = "lpips_v0.1_alex.pth"

    def __init__(self):
        super().__init__()
        self.features = pretrained_features(alexnet, AlexNet_Weights.IMAGENET1K_V1, 12)
        try:
            state = torch.hub.load_state_dict_from_url(self.URL, map_location="cpu",
                                                       file_name=self.FILE, weights_only=True)
        except OSError as error:
            raise FileNotFoundError(missing_weights(self.URL, self.FILE)) from error
        for i in range(5):
            self.register_buffer(f"weight{i}", state[f"lin{i}.model.1.weight"])
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    @classmethod
    def at_hand(cls) -> bool:
        """Are both weight files in torch.hub's cache, so that nothing has to be downloaded?"""
        place = Path(torch.hub.get_dir()) / "checkpoints"
        alexnet_file = AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
        return (place / alexnet_file).is_file() and (place / cls.FILE).is_file()

    def unit_features(self, x):
        """Features after each of the five ReLUs, every pixel's channel vector made length 1."""
        x = (x - self.mean) / self.std
        found = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def layer_maps(self, a, b):
        """Weighted squared difference at each of the five layers: (N, 1, H_l, W_l)."""
        require_same(a, b, "a and b")
        require_images(a)
        require(min(a.shape[-2:]) >= 31, f"AlexNet needs sides of 31, got {tuple(a.shape[-2:])}")
        pairs = zip(self.unit_features(a), self.unit_features(b))
        return [F.conv2d((x - y).square(), getattr(self, f"weight{i}"))
                for i, (x, y) in enumerate(pairs)]

    def forward(self, a, b):
        return sum(layer.mean((1, 2, 3)) for layer in self.layer_maps(a, b))       # (N,)

    def maps(self, a, b):
        size = a.shape[-2:]
        enlarged = [F.interpolate(layer, size=size, mode="bilinear")
                    for layer in self.layer_maps(a, b)]
        return sum(enlarged)[:, 0]                                                 # (N, H, W)


def diversity_score(maps: torch.Tensor) -> torch.Tensor:
    """NTIRE's diversity score: how much better the best sample per pixel is than the best sample.

    maps (K, N, H, W): LPIPS.maps of K samples against the truth -> (N,) in [0, 100]. 0 when all
    samples are alike. Noise can raise it too: read it beside LPIPS.
    Source: NTIRE 2021 challenge on learning the super-resolution space.
    Raises ValueError unless maps has four dimensions.
    """
    require(maps.ndim == 4, f"maps must have shape (K, N, H, W), got {tuple(maps.shape)}")
    best_sample = maps.mean((2, 3)).min(0).values                          # (N,)
    best_pixels = maps.min(0).values.mean((1, 2))                          # (N,)
    return 100 * (best_sample - best_pixels) / best_sample


def std_map(samples: torch.Tensor) -> torch.Tensor:
    """Where is the model unsure? Standard deviation over samples, in grey levels 0-255.

    samples (K, N, 3, H, W) in [-1, 1] -> (N, 3, H, W). Divides by K, not K - 1.
    Raises ValueError unless samples has five dimensions.
    """
    require(samples.ndim == 5, f"samples must be (K, N, 3, H, W), got {tuple(samples.shape)}")
    return to_levels(samples).std(0, correction=0)


def pixel_std(samples: torch.Tensor) -> torch.Tensor:
    """Mean of std_map over pixels and channels: (K, N, 3, H, W) in [-1, 1] -> (N,), grey levels."""
    return std_map(samples).mean((1, 2, 3))


@torch.no_grad()
def evaluate(generator: nn.Module, hr: torch.Tensor, samples: int = 10, lpips: LPIPS | None = None,
             seed: int = 0, temperature: float = 1.0) -> dict:
    """Table 1's rows for these images: {"bicubic" | "SR" | "hallucination": {metric: (N,)}}.

    hr (N, 3, H, W) in [-1, 1]; LR is made from it. Metrics: psnr, ssim, lr_psnr and, with `lpips`,
    lpips; a hallucination's are means over its samples, and it has pixel_std and, with `lpips`,
    diversity. seed decides z and nothing else.
    """
    lr, rng = quantize(downscale(hr, generator.scale)), torch.Generator().manual_seed(seed)
    shape = (samples, len(lr), generator.z_dim, *lr.shape[-2:])
    z = temperature * torch.randn(shape, generator=rng).to(hr.device)
    parts = [evaluate_batch(generator, *part, lpips)
             for part in zip(hr.split(50), lr.split(50), z.split(50, 1))]  # 50 fit any memory
    return {row: {name: torch.cat([part[row][name] for part in parts]) for name in metrics}
            for row, metrics in parts[0].items()}


def evaluate_batch(generator, hr, lr, z, lpips=None) -> dict:
    """`evaluate` for images that fit memory at once, with z (K, N, z_dim, h, w)."""
    rows = {"bicubic": score(quantize(upscale_bicubic(lr, generator.scale)), hr, lr, lpips),
            "SR": score(sample(generator, lr, torch.zeros_like(z[0])), hr, lr, lpips)}
    hallucinations = torch.stack([sample(generator, lr, latent) for latent in z])
    scores = [score(image, hr, lr, lpips) for image in hallucinations]
    mean = {name: torch.stack([row[name] for row in scores]).mean(0) for name in rows["SR"]}
    mean["lr_psnr"] = mean_decibel(torch.stack([row["lr_psnr"] for row in scores]))
    mean["pixel_std"] = pixel_std(hallucinations)
    if lpips is not None:
        maps = torch.stack([lpips.maps(image, hr) for image in hallucinations])
        mean["diversity"] = diversity_score(maps)
    return rows | {"hallucination": mean}


def score(image: torch.Tensor, hr: torch.Tensor, lr: torch.Tensor, lpips=None) -> dict:
    """The metrics of one image per face: {"psnr", "ssim", "lr_psnr"[, "lpips"]: (N,)}."""
    values = {"psnr": psnr(image, hr), "ssim": ssim(image, hr), "lr_psnr": lr_psnr(image, lr)}
    return values if lpips is None else values | {"lpips": lpips(image, hr)}


def mean_decibel(db: torch.Tensor) -> torch.Tensor:
    """Mean over the first dimension of the errors behind dB values, in dB.

    A mean of dB would be infinite as soon as one image is exact; this one is never larger.
    """
    return -10 * torch.log10((10 ** (-db / 10)).mean(0))


def summarize(rows: dict) -> dict:
    """Means of `evaluate` over images, as plain numbers; lr_psnr by mean_decibel."""
    def mean(name, values):
        return (mean_decibel(values) if name == "lr_psnr" else values.mean()).item()
    return {row: {name: mean(name, values) for name, values in metrics.items()}
            for row, metrics in rows.items()}


# ---- Pictures and checkpoints -------------------------------------------------------------------


@torch.no_grad()
def contact_sheet(generator: nn.Module, lr: torch.Tensor, z: torch.Tensor,
                  hr: torch.Tensor | None = None) -> torch.Tensor:
    """One picture of all that G makes, two rows per face: images above, their gradients below.

    lr (N, 3, h, w), z (K, z_dim, h, w), the same for every face, hr (N, 3, H, W) where it is known.
    Columns: LR, bicubic, SR, K hallucinations, their standard deviation (white: 64 grey levels),
    HR. The gradients of SR and hallucinations are G's own, white is 1. Returns (3, height, width)
    in [0, 1].
    """
    latents = [torch.zeros_like(z[0]), *z]
    outputs = [generator(lr, latent.expand(len(lr), -1, -1, -1)) for latent in latents]
    made = [quantize(images[-1]) for images, _ in outputs]
    spread = std_map(torch.stack(made[1:])) / 64
    enlarged = [upscale_nearest(lr, generator.scale), upscale_bicubic(lr, generator.scale)]
    known = [] if hr is None else [hr]
    above = [x / 2 + 0.5 for x in enlarged + made] + [spread] + [x / 2 + 0.5 for x in known]
    below = [image_gradient(x) for x in enlarged] + [gradients[-1] for _, gradients in outputs]
    below += [torch.zeros_like(spread)] + [image_gradient(x) for x in known]
    tiles = torch.stack([torch.stack(above, 1), torch.stack(below, 1)], 1)  # (N, 2, columns, ...)
    return make_grid(tiles.flatten(0, 2).clamp(0, 1), nrow=len(above), padding=1, pad_value=1.0)


def save_checkpoint(path: str | Path, config: Config, generator: nn.Module, **training):
    """Write settings, G (pass the EMA) and whatever else training needs, in one piece.

    `training` holds plain values and state dicts only, so that plain torch.load reads the file. It
    is first written beside `path` and then renamed: a crash never leaves half a checkpoint.
    """
    payload = {"hallusr": 2, "config": asdict(config), "generator": generator.state_dict()}
    temporary = Path(f"{path}.tmp")
    torch.save(payload | training, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, device: str = "cpu") -> tuple[Config, dict]:
    """The settings and the whole content of a checkpoint.

    Raises FileNotFoundError, or ValueError for a damaged file or one that is not ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}".splitlines()[0]) from error
    require(isinstance(content, dict) and {"hallusr", "config", "generator"} <= set(content),
            f"{path} is not a hallusr checkpoint")
    require(content["hallusr"] == 2, f"{path} is of format {content['hallusr']}, expected 2")
    known = {item.name for item in fields(Config)}
    unknown = set(content["config"]) - known
    require(not unknown, f"{path} has settings this version does not know: {sorted(unknown)}")
    return Config(**content["config"]), content


def build_generator(config: Config) -> Generator:
    """The untrained G that these settings describe."""
    return Generator(config.z_dim, config.widths, config.scale, config.blocks,
                     config.hard_consistency)


def load_generator(path: str | Path, device: str = "cpu") -> Generator:
    """The trained G (its running average) of a checkpoint, in eval mode, ready to sample.

    Its attribute `config` holds the settings it was trained with.
    Raises FileNotFoundError, or ValueError for a file that is damaged, not ours or whose weights
    do not fit its own settings.
    """
    config, content = load_checkpoint(path, device)
    generator = build_generator(config).to(device)
    load_weights(generator, content["generator"], path)
    generator.config = config
    return generator.eval().requires_grad_(False)


def load_weights(module: nn.Module, state: dict, path: str | Path):
    """module.load_state_dict with one clear ValueError in place of pages of keys."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} holds another architecture than expected: {first}") from error
