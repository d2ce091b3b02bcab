"""hallusr: from one 8x8 face, a 64x64 reconstruction and as many other plausible faces as you like.

An independent implementation of the method of

    Mohamed Abid, Ihsen Hedhli, Christian Gagné,
    "A generative model for hallucinating diverse versions of super resolution images".

Section, equation and figure numbers are that paper's, and the sections stand in its order: image
space, DS; 2.1 (3)-(7); 2.2 (8), (9); 2.3 (10), (11); 3.1 (12); 3.2 (1), (2); 4.2. 4.1: train.py.

Notation (N images, K samples, C channels, C0 = widths[0] of them at LR size; h x w is LR's size,
H x W = scale * h x scale * w HR's, but in the docstring of a block that of what comes in)

    paper       here            shape             range
    ----------  --------------  ----------------  ------------------------------------------------
    I^LR        lr              (N, 3, h, w)      [-1, 1], on the 256 levels of an 8-bit image
    I^HR        hr              (N, 3, H, W)      [-1, 1]
    I^SR        sr              (N, 3, H, W)      unbounded, about [-1, 1]: G's image at z = 0
    I^H_z       hallucination   (N, 3, H, W)      the same, at z ~ N(0, I)
    g           gradient        (N, 3, H, W)      [0.001, 2 sqrt 2] of images, unbounded from G
    z           z               (N, z_dim, h, w)  m = z_dim; N(0, I) at every pixel, or all zero
    DS          downscale       -> (N, 3, h, w)   box average
    F           excess          (N, 3, h, w)      grey levels of disagreement with LR, >= 0
    phi_i       PerceptualLoss  a VGG-16 layer    features after a ReLU
    D_I, D_g    Discriminator   -> (N, 1, h, w)   logits: > 0 says real
    r           2 / 255         one grey level    from one 8-bit level in [-1, 1] to the next

What G makes and D judges are lists over resolutions, from coarse (2h x 2w) to fine. Where the code
is not the print, the line says so: S1-S7 correct slips, C1-C23 fill silences, D1-D13 are
deviations, each a setting; `--preset paper --data FOLDER` has none. The README lists them all.

Copying: a piece takes along the names after "Needs" in its docstring, and these their own. What is
called require... or check... only raises clear errors: take it too, or delete its lines.
"""
import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as fn  # not F, which is the paper's excess
from torchvision.models import AlexNet_Weights, VGG16_Weights, alexnet, vgg16

# ---- Clear errors for wrong arguments -----------------------------------------------------------

def require(condition: bool, message: str):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_floats(x: torch.Tensor, name: str = "image"):
    """Raise ValueError for uint8 and the like: 0-255 would be clamped, and score as perfect."""
    require(x.is_floating_point(), f"{name} must be floats in [-1, 1], got {x.dtype}: from_levels "
                                   "makes them from 8-bit values")


def require_images(x: torch.Tensor, name: str = "image", channels: int | None = None):
    """Raise ValueError unless x is a batch of float images, (N, C, H, W)."""
    require(x.ndim == 4 and channels in (None, x.shape[1]),
            f"{name} must have shape (N, {channels or 'C'}, H, W), got {tuple(x.shape)}")
    require_floats(x, name)


def require_same(a: torch.Tensor, b: torch.Tensor, names: str):
    """Raise ValueError unless both tensors have one shape: broadcasting would hide a mistake."""
    require(a.shape == b.shape,
            f"{names} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def check_architecture(widths: tuple, scale: int, blocks: int):
    """Raise ValueError unless widths, scale and blocks fit together."""
    require(scale >= 2 and scale & (scale - 1) == 0,
            f"scale must be a power of two, 2 or more, got {scale}")
    needed = scale.bit_length()
    require(len(widths) == needed and all(width >= 1 for width in widths),
            f"widths needs {needed} positive numbers for scale {scale}, got {widths}")
    require(blocks >= 1, f"blocks must be 1 or more, got {blocks}")


# ---- Image space: levels, DS, enlargement -------------------------------------------------------

def to_levels(x: torch.Tensor) -> torch.Tensor:
    """Floats (else ValueError), clamped to [-1, 1], to 8-bit values 0, 1, ..., 255, as floats."""
    require_floats(x)
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round()  # bfloat16 has too few digits


def from_levels(levels: torch.Tensor) -> torch.Tensor:
    """8-bit values 0-255, uint8 or float, to floats in [-1, 1]. Any shape."""
    return levels.float() / 127.5 - 1


def quantize(x: torch.Tensor) -> torch.Tensor:
    """The nearest 8-bit level of [-1, 1], as saving to a file would give; any shape.

    Its slope is exactly 1 everywhere (straight-through, section 3.1): rounding is flat, its true
    slope is zero and nothing could learn through it. Values beyond [-1, 1] are clamped in the
    forward pass only. Source: the rounding of (12). Needs: to_levels, from_levels.
    """
    # S5: the 256 levels are (2 k - 255) / 255; multiples of r would lie half a level beside them.
    rounded = from_levels(to_levels(x.detach()))
    return x - x.detach() + rounded  # 0 + rounded forward, 1 + 0 backward


def downscale(x: torch.Tensor, factor: int = 8) -> torch.Tensor:
    """DS of (9): every factor x factor block becomes its mean. (N, C, H, W) -> (N, C, H/f, W/f).

    Not rounded: LR itself is quantize(downscale(hr)) (S4), or the true image would have F > 0.
    A box, as the paper names no kernel (C5); D3 and drawn faces need one. Needs: nothing.
    Raises ValueError when the sides are not multiples of factor.
    """
    require_images(x)
    require(factor >= 1 and x.shape[-2] % factor == 0 and x.shape[-1] % factor == 0,
            f"image sides must be multiples of {factor}, got {x.shape[-2]} x {x.shape[-1]}")
    return fn.avg_pool2d(x, factor)


def upscale_nearest(x: torch.Tensor, factor: int = 8) -> torch.Tensor:
    """Repeat every pixel, so that downscale undoes it. (N, C, h, w) -> (N, C, h*f, w*f)."""
    return fn.interpolate(x, (x.shape[-2] * factor, x.shape[-1] * factor), mode="nearest")


def upscale_bicubic(lr: torch.Tensor, factor: int = 8) -> torch.Tensor:
    """Table 1's baseline, clamped to [-1, 1]. (N, C, h, w) -> (N, C, h*f, w*f)."""
    # torch's kernel has a = -0.75; others have -0.5 and give slightly other scores.
    return fn.interpolate(lr, scale_factor=factor, mode="bicubic").clamp(-1, 1)


def scale_between(image: torch.Tensor, lr: torch.Tensor) -> int:
    """The factor from lr's size to image's. Raises ValueError when there is no single one."""
    require_images(image, channels=3)
    require_images(lr, "lr", channels=3)
    factor = image.shape[-1] // lr.shape[-1]
    require(image.shape == (len(lr), 3, lr.shape[-2] * factor, lr.shape[-1] * factor),
            f"there must be one image for each lr, its sides one multiple of lr's, got "
            f"{tuple(image.shape)} and {tuple(lr.shape)}")
    return factor


# ---- 2.1 Image reconstruction -------------------------------------------------------------------

def image_gradient(x: torch.Tensor) -> torch.Tensor:
    """Length of the gradient at every pixel, per channel: edges bright, flat areas near 0.

    Floats (N, C, H, W), else ValueError -> (N, C, H, W), for [-1, 1] in [0.001, 2 sqrt 2].
    """
    require_images(x)
    # C6: the border is repeated, as zeros would draw a frame around every image. 1e-6 stands under
    # the root, whose slope is infinite at 0: one flat area would turn all weights into NaN.
    padded = fn.pad(x, (1, 1, 1, 1), mode="replicate")
    g_x = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]  # (3) I(x+1, y) - I(x-1, y)
    g_y = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]  # (4) I(x, y+1) - I(x, y-1)
    return (g_x.square() + g_y.square() + 1e-6).sqrt()      # (5)


# How many modules of torchvision's VGG-16 end with the named ReLU.
VGG_LAYERS = {"relu1_2": 4, "relu2_2": 9, "relu3_3": 16, "relu4_3": 23}


class PerceptualLoss(nn.Module):
    """L_percp of (6): mean absolute difference of VGG-16 features.

    forward(sr (N, 3, H, W), hr (N, 3, H, W)), both around [-1, 1], returns a scalar >= 0;
    embed(x) gives the features alone, (N, C, H', W').
    `layer` names phi_i, which the paper leaves open (C16); relu2_2 is what (6)'s source, Johnson et
    al., use for super-resolution. Only the layers up to it are kept, frozen. Weights: torchvision's
    VGG16 IMAGENET1K_V1, downloaded once to its cache. Needs: VGG_LAYERS, pretrained_features.
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

    def embed(self, x):
        require_images(x, channels=3)
        return self.features((x - self.mean) / self.std)

    def forward(self, sr, hr):
        require_same(sr, hr, "sr and hr")
        phi_sr = self.embed(sr)                                            # (N, C, H', W')
        with torch.no_grad():
            phi_hr = self.embed(hr)                                        # (N, C, H', W')
        # S6: "Euclidean" in the sentence, norm 1 in the formula, which holds. C2: a mean, so that
        # weights hold for any size; a sum (131,072 times it at relu2_2 of 64x64) drowns L_adv.
        return (phi_sr.float() - phi_hr.float()).abs().mean()              # (6)


def gradient_loss(g_sr: torch.Tensor, g_hr: torch.Tensor) -> torch.Tensor:
    """L_grad of (7): mean absolute error of the gradient image. Two equal shapes -> scalar >= 0."""
    require_same(g_sr, g_hr, "g_sr and g_hr")
    return (g_sr - g_hr).abs().mean()  # (7), where the text says mean and the formula a norm (C2)


# ---- 2.2 Image hallucination --------------------------------------------------------------------

def draw_z(shape: tuple, z_shared: float, rng: torch.Generator) -> torch.Tensor:
    """Noise for G: z(p) = s v + sqrt(1 - s^2) u(p), with v for all LR pixels and u for each one.

    shape (..., z_dim, h, w), s = z_shared in [0, 1] -> that shape, N(0, I) at every pixel p for any
    s, drawn with rng. s = 1 is the paper's one vector of z_dim numbers (S7); s = 0 a map in which
    one eye may change without the other (D1). Raises ValueError for another s, or without h, w.
    """
    require(0 <= z_shared <= 1, f"z_shared must be in [0, 1], got {z_shared}")
    require(len(shape) >= 3, f"shape must be (..., z_dim, h, w), got {shape}")  # or faces share v
    u = torch.randn(shape, generator=rng)                                  # (..., z_dim, h, w)
    v = torch.randn((*shape[:-2], 1, 1), generator=rng)                    # (..., z_dim, 1, 1)
    return z_shared * v + (1 - z_shared ** 2) ** 0.5 * u


def diversity_loss(g1, g2, z1, z2, tau: float = 1.0) -> torch.Tensor:
    """L_z of (8), to be *maximised*: how far the gradient images move per step in z, at most tau.

    g1, g2 (N, C, H, W) are G's gradients at z1, z2, (N, ...) both, for the same LR -> scalar in
    [0, tau]. Without it G may ignore z: D asks of each image alone whether it is plausible. A pair
    beyond tau has no slope. Raises ValueError for different shapes, unequal N or tau <= 0.
    """
    require(tau > 0, f"tau must be positive, got {tau}")
    require_same(g1, g2, "g1 and g2")
    require_same(z1, z2, "z1 and z2")
    require(len(g1) == len(z1), f"expected a z for each g, got {len(z1)} and {len(g1)}")
    # C3: both distances are mean absolute differences, as in the diversity-sensitive GAN that (8)
    # comes from. Two people's photographs, at the mean distance of z, give 0.15: 1 never binds.
    moved = (g1 - g2).abs().flatten(1).mean(1)                             # (N,)
    apart = (z1 - z2).abs().flatten(1).mean(1) + 1e-5                      # (N,)
    return (moved / apart).clamp(max=tau).mean()                           # (8)


def project_onto_lr(image: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
    """(9) with eps = 0: the closest image that shrinks to lr, every block shifted by one constant.

    (N, 3, H, W), (N, 3, h, w) -> (N, 3, H, W) with downscale(result) == lr, up to the digits: of a
    bfloat16 image half a grey level (G's stays float32). So a loss on downscale(result) has no
    slope in image. Clamping or rounding to 8 bits may move it again, and it holds for the box alone
    (C5). Needs: downscale, upscale_nearest, scale_between. Raises ValueError unless sizes fit.
    """
    factor = scale_between(image, lr)
    return image + upscale_nearest(lr - downscale(image, factor), factor)


# ---- 2.3 Overall objective ----------------------------------------------------------------------

def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """What D_I and D_g minimise: -log D(real) - log(1 - D(fake)), D = sigmoid(logits).

    Any two shapes (real and fake may differ in number), means over each (C23) -> scalar >= 0;
    2 log 2 = 1.386 when D cannot tell. softplus(-l) is -log sigmoid(l), without overflow.
    """
    # S1: printed is one formula for both players, -log(1 - D(real)) - log D(fake), which is right
    # for G; a D that minimised it would learn to call real images fake.
    return fn.softplus(-real_logits).mean() + fn.softplus(fake_logits).mean()


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """L_adv for G, non-saturating: -log D(fake) (S1). Any shape -> scalar >= 0, log 2 at parity.

    Not log(1 - D(fake)): that is flat where D is sure, which is where G must learn most.
    """
    return fn.softplus(-fake_logits).mean()


def r1_penalty(logits: torch.Tensor, images: list[torch.Tensor]) -> torch.Tensor:
    """R1: squared length of D's slope at real images; weigh it by half its gamma, not (10)'s.

    logits (N, 1, h, w) of these images, real ones that had requires_grad set when D saw them ->
    scalar >= 0, itself differentiable. Run D in float32, without autocast (C22). backward() adds to
    the images' own .grad: detach them anew each step. Keeps D from becoming steep around the data,
    where it would throw G back and forth. Source: section 2.3, Mescheder et al.
    """
    # C12: an image's logit is the mean of its map (for the sum, R1 would be (h w)^2 times as
    # large); the slope is that with respect to all resolutions together, not to F.
    per_image = logits.mean((1, 2, 3))                                     # (N,)
    slopes = torch.autograd.grad(per_image.sum(), images, create_graph=True)
    return sum(slope.square().sum((1, 2, 3)).mean() for slope in slopes)


def reconstruction_loss(percp, grad, adv_g, adv_i, gamma: float = 10.0, beta: float = 0.1):
    """(10), minimised at z = 0, from the four scalar losses."""
    return gamma * (percp + grad) + beta * (adv_g + adv_i)                 # (10)


def hallucination_loss(adv_g, adv_i, l_z, alpha: float = 1.0):
    """(11), minimised at z ~ N(0, I), from three scalars."""
    return adv_g + adv_i - alpha * l_z  # (11); S2: printed with a plus, though L_z is maximised


# ---- 3.1 Conditioning ---------------------------------------------------------------------------

def excess(image: torch.Tensor, lr: torch.Tensor, eps: float = 0.1) -> torch.Tensor:
    """F of (12): by how many grey levels the shrunken image misses LR, beyond eps.

    (N, 3, H, W) unbounded, (N, 3, h, w) on 8-bit levels -> (N, 3, h, w), >= 0; zero for the true
    HR image, and for all of G's with D3. The slope passes the rounding, see quantize. Needs:
    quantize, downscale, scale_between. Raises ValueError when the sizes do not fit, or eps < 0.
    """
    require(eps >= 0, f"eps must be >= 0, got {eps}")
    shrunk = quantize(downscale(image, scale_between(image, lr)))          # (N, 3, h, w)
    # In grey levels the least error has F = 0.9: D_I's weights need not grow to see it. Errors
    # are whole levels: eps = 0.1 permits none, and in the units of (9) would be 12.75 (C19).
    r = 2 / 255
    return fn.relu((shrunk - lr).abs() / r - eps)                          # (12)


# ---- 3.2 Architecture: blocks -------------------------------------------------------------------

def activation(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU with leak 0.2, in all networks (section 4.1)."""
    return fn.leaky_relu(x, 0.2)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, started so that it also keeps the signal's variance.

    Without normalisation layers (the paper names none, C7) the start is all that keeps 20 layers
    from fading or exploding: He initialisation for a leak of 0.2.
    """
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, a=0.2)
    nn.init.zeros_(conv.bias)
    return conv


def near_zero(conv: nn.Conv2d) -> nn.Conv2d:
    """Start a layer at a tenth of its weights, bias 0: what it is added to dominates at first."""
    nn.init.zeros_(conv.bias)
    conv.weight.data.mul_(0.1)
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
        return x + self.conv2(activation(self.conv1(x)))                   # (N, C, H, W)


def output_head(channels: int) -> nn.Sequential:
    """One domain's own convolution in an UpBlock (C8), and its projection to 3 channels.

    Needs: conv3x3, near_zero.
    """
    return nn.Sequential(conv3x3(channels, channels), nn.LeakyReLU(0.2),
                         near_zero(nn.Conv2d(channels, 3, 1)))


class UpBlock(nn.Module):
    """Double the size; return the features and the pictures read off them, one for each domain.

    One convolution is shared by the domains, which makes the image use the structure that the
    gradient teaches; then each domain has a head of its own. The skip connection (the enlarged
    picture of the resolution below) keeps the low frequencies, so that a block adds detail only.
    Another output of G needs a line in `skip` here and a start in Generator.forward; what it is
    compared with, and its D, belong in train.py.
    Source: Fig. 3. Needs: output_head, conv3x3, activation.
    forward(features (N, in_channels, H, W), pictures {"image" and, with gradient_branch,
    "gradient": (N, 3, H, W)}) returns the same two at 2H x 2W, features with out_channels.
    """

    def __init__(self, in_channels: int, out_channels: int, gradient_branch: bool = True):
        super().__init__()
        self.skip = {"image": 1.0}
        if gradient_branch:
            self.skip["gradient"] = 0.5  # twice as large, the same edge is half as steep
        self.shared = conv3x3(in_channels, out_channels)
        self.heads = nn.ModuleDict({domain: output_head(out_channels) for domain in self.skip})

    def forward(self, features, pictures):
        # Nearest, then a convolution: a transposed convolution leaves checkerboards (C7).
        features = fn.interpolate(features, scale_factor=2, mode="nearest")  # (N, in,  2H, 2W)
        features = activation(self.shared(features))                         # (N, out, 2H, 2W)
        # Bilinear: G starts as smooth enlargement and has no squares to unlearn (C7).
        larger = {domain: factor * fn.interpolate(pictures[domain], scale_factor=2, mode="bilinear")
                  for domain, factor in self.skip.items()}                   # (N, 3,   2H, 2W) each
        return features, {domain: larger[domain] + head(features)
                          for domain, head in self.heads.items()}            # (N, 3,   2H, 2W) each


class DownBlock(nn.Module):
    """Halve the size: UpBlock's mirror, for one domain.

    A 1x1 convolution lifts the picture of this resolution to features and adds them to those that
    come from the finer one (C9); two convolutions and average pooling follow. Source: section 3.2.
    Needs: conv3x3, activation. Raises ValueError when picture and features do not fit.
    forward(picture (N, 3, H, W), features (N, in, H, W), None at the finest) -> (N, out, H/2, W/2).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.from_pixels = nn.Conv2d(3, in_channels, 1)
        self.conv1 = conv3x3(in_channels, in_channels)
        self.conv2 = conv3x3(in_channels, out_channels)

    def forward(self, picture, features=None):
        x = activation(self.from_pixels(picture))                          # (N, in,  H,   W)
        if features is not None:
            require_same(x, features, "a picture lifted to features, and those of the finer one,")
            x = x + features                                               # (N, in,  H,   W)
        x = activation(self.conv1(x))                                      # (N, in,  H,   W)
        x = activation(self.conv2(x))                                      # (N, out, H,   W)
        return fn.avg_pool2d(x, 2)                                         # (N, out, H/2, W/2)


# ---- 3.2 Architecture: generator and discriminators ---------------------------------------------

class Generator(nn.Module):
    """G of (1) and (2): LR and z to the image and its gradient, at every resolution.

    widths are the channels at LR size and after each doubling, coarse to fine: one more number than
    scale has doublings. hard_consistency corrects the image to LR at every resolution (D3).
    gradient_branch=False leaves the gradient output out (D10). size and z_shared change no layer:
    they say which images and which z (see draw_z) it is trained for; any LR size can go in.
    The attribute `settings` holds these arguments: they and the weights are a saved generator.
    Source: Fig. 2. Needs: ResidualBlock, UpBlock, conv3x3, image_gradient, project_onto_lr.

    forward(lr (N, 3, h, w) in [-1, 1], z (N, z_dim, h, w)) returns {"image": list, "gradient":
    list}, coarse to fine, (N, 3, 2h, 2w) ... (N, 3, scale*h, scale*w), unbounded: clamp to show.
    Raises ValueError for widths, scale or blocks that do not fit, wrong shapes or channels.
    """

    def __init__(self, size: int = 64, scale: int = 8, z_dim: int = 64, z_shared: float = 1.0,
                 widths: tuple = (128, 96, 64, 32), blocks: int = 8,
                 hard_consistency: bool = False, gradient_branch: bool = True):
        super().__init__()
        check_architecture(widths, scale, blocks)
        require(z_dim >= 1, f"z_dim must be 1 or more, got {z_dim}")
        self.settings = dict(size=size, scale=scale, z_dim=z_dim, z_shared=z_shared,
                             widths=tuple(widths), blocks=blocks,
                             hard_consistency=hard_consistency, gradient_branch=gradient_branch)
        self.z_dim, self.scale, self.hard_consistency = z_dim, scale, hard_consistency
        self.head = conv3x3(3 + z_dim, widths[0])
        # C4: z must not drown LR's three channels; with equal weights it did.
        self.head.weight.data[:, 3:] *= 0.1
        self.trunk = nn.Sequential(*(ResidualBlock(widths[0]) for _ in range(blocks)))
        self.up_blocks = nn.ModuleList(UpBlock(*pair, gradient_branch)
                                       for pair in zip(widths, widths[1:]))

    def forward(self, lr, z):
        require_images(lr, "lr", channels=3)
        expected = (len(lr), self.z_dim, *lr.shape[-2:])
        require(z.shape == expected, f"z must have shape {expected}, got {tuple(z.shape)}")
        features = self.head(torch.cat([lr, z], 1))                        # (N, C0, h, w)
        features = self.trunk(features)                                    # (N, C0, h, w)
        # Fig. 3's skip needs a start, unnamed in the paper (C7): LR and its own gradient, which
        # blocks without the gradient branch pass over.
        pictures = {"image": lr, "gradient": image_gradient(lr)}           # (N, 3,  h, w) each
        resolutions = []
        for block in self.up_blocks:
            features, pictures = block(features, pictures)                 # each twice as large
            if self.hard_consistency:  # D3
                pictures["image"] = project_onto_lr(pictures["image"], lr) # DS(image) = LR
            resolutions.append(pictures)
        return {domain: [made[domain] for made in resolutions] for domain in pictures}


@torch.no_grad()
def sample(generator: nn.Module, lr: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The finest image alone, as it would be saved: (N, 3, H, W) on 8-bit levels of [-1, 1].

    lr (N, 3, h, w), z (N, z_dim, h, w): zero to reconstruct, else from draw_z. Needs: quantize.
    """
    return quantize(generator(lr, z)["image"][-1])


def pyramid(x: torch.Tensor, resolutions: int = 3) -> list[torch.Tensor]:
    """An image at every resolution, coarse to fine: for 64x64 and 3, 16x16, 32x32 and x itself.

    The real counterpart of G's outputs (section 3.2, C11). Needs: downscale.
    Raises ValueError when the sides are not multiples of 2^(resolutions - 1).
    """
    return [downscale(x, 2 ** level) for level in reversed(range(1, resolutions))] + [x]


class Discriminator(nn.Module):
    """D_I with excess_channels=3, D_g with 0: G mirrored, one domain, a map of logits.

    forward(pictures, excess=None): the list of all resolutions, coarse to fine, as G returns it and
    `pyramid` makes it from real images; for D_I also F of (12), (N, 3, h, w), zero for real images.
    F is concatenated at the last block (section 3.1, C21). Returns logits (N, 1, h, w), one per LR
    pixel: no linear layer (section 3.2), so any size works.
    Source: sections 3.1 and 3.2. Needs: DownBlock, ResidualBlock.
    Raises ValueError for a wrong number of pictures, unequal N, or another excess than said.
    """

    def __init__(self, widths: tuple = (128, 96, 64, 32), scale: int = 8, blocks: int = 8,
                 excess_channels: int = 0):
        super().__init__()
        check_architecture(widths, scale, blocks)
        self.excess_channels = excess_channels
        mirrored = widths[::-1]  # fine to coarse
        self.down_blocks = nn.ModuleList(DownBlock(*pair) for pair in zip(mirrored, mirrored[1:]))
        self.trunk = nn.Sequential(*(ResidualBlock(widths[0]) for _ in range(blocks - 1)))
        self.last_block = ResidualBlock(widths[0] + excess_channels)       # C21
        self.to_logits = nn.Conv2d(widths[0] + excess_channels, 1, 3, padding=1)  # C7

    def forward(self, pictures, excess=None):
        require(len(pictures) == len(self.down_blocks),
                f"expected pictures at {len(self.down_blocks)} resolutions, got {len(pictures)}")
        features = None
        for block, picture in zip(self.down_blocks, reversed(pictures)):
            require_images(picture, "picture", channels=3)
            features = block(picture, features)                            # (N, C, H/2, W/2)
        features = self.trunk(features)                                    # (N, C0, h, w)
        excess = features[:, :0] if excess is None else excess  # D_g: none  (N, 0 or 3, h, w)
        expected = (len(features), self.excess_channels, *features.shape[-2:])
        require(excess.shape == expected,
                f"excess must have shape {expected}, got {tuple(excess.shape)}")
        features = torch.cat([features, excess], 1)                        # (N, C0 (+ 3), h, w)
        return self.to_logits(self.last_block(features))                   # (N, 1, h, w)


# ---- 4.2 Metrics: on 8-bit images (LPIPS alone does not round) ----------------------------------

def psnr(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB on 8-bit RGB. Two (N, C, H, W) in [-1, 1] -> (N,).

    Infinite where both agree. Needs: to_levels. Raises ValueError for different shapes.
    """
    require_same(image, truth, "image and truth")
    error = (to_levels(image) - to_levels(truth)).square().mean((1, 2, 3))
    return 10 * torch.log10(255 ** 2 / error)


def lr_psnr(image: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
    """Is it true to its LR? PSNR of the saved image, shrunk and rounded, against lr -> (N,) in dB.

    (N, 3, H, W), (N, 3, h, w). NTIRE's challenge demands 45 dB. Infinite where exact.
    Needs: psnr, quantize, downscale, scale_between. Raises ValueError unless sizes are multiples.
    """
    return psnr(downscale(quantize(image), scale_between(image, lr)), lr)


def mean_decibel(db: torch.Tensor) -> torch.Tensor:
    """Mean over the first dimension of the errors behind dB values, in dB: finite if any is."""
    return -10 * torch.log10((10 ** (-db / 10)).mean(0))


def ssim(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Structural similarity on 8-bit RGB. Two (N, C, H, W) in [-1, 1], H, W >= 11 -> (N,) <= 1.

    Wang et al. 2004: 11x11 Gaussian window of sigma 1.5, whole windows only, K = 0.01 and 0.03.
    The mean over windows and channels. Needs: to_levels. ValueError for unequal or small sides.
    """
    require_same(image, truth, "image and truth")
    require(min(image.shape[-2:]) >= 11, f"SSIM needs sides of 11, got {tuple(image.shape[-2:])}")
    offsets = torch.arange(11, device=image.device) - 5.0
    window = torch.softmax(-offsets.square() / (2 * 1.5 ** 2), 0).double() # a Gaussian of sum 1

    def local_mean(x):
        x = x.flatten(0, 1)[:, None]                                       # (N*C, 1, H, W)
        return fn.conv2d(fn.conv2d(x, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

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

    forward(a, b): two (N, 3, H, W) in [-1, 1] -> (N,) >= 0; with_map(a, b) -> that and a
    map (N, H, W) of it, each layer enlarged to the image. It neither clamps nor rounds: G's images
    go through quantize first. Source: section 4.2, Zhang et al. 2018; AlexNet from
    torchvision, 1152 learned channel weights from the authors (BSD-2). Raises ValueError for
    different shapes or sides under 31, FileNotFoundError without weights.
    Needs: pretrained_features, cached_weights.
    """

    URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
           "lpips/weights/v0.1/alex.pth")
    FILE = "lpips_v0.1_alex.pth"

    def __init__(self):
        super().__init__()
        self.features = pretrained_features(alexnet, AlexNet_Weights.IMAGENET1K_V1, 12)
        names = [f"lin{i}.model.1.weight" for i in range(5)]
        state = cached_weights(self.URL, names, self.FILE)
        for i, name in enumerate(names):
            self.register_buffer(f"weight{i}", state[name])
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def unit_features(self, x):
        """Features after each of the five ReLUs, every pixel's channel vector made length 1."""
        x = (x - self.mean) / self.std
        found = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, a, b):
        return self.with_map(a, b)[0]                                      # (N,)

    def with_map(self, a, b):
        require_same(a, b, "a and b")
        require_images(a, "a", channels=3)
        require_images(b, "b", channels=3)
        require(min(a.shape[-2:]) >= 31, f"AlexNet needs sides of 31, got {tuple(a.shape[-2:])}")
        distance = maps = 0.0
        for i, (x, y) in enumerate(zip(self.unit_features(a), self.unit_features(b))):
            layer = fn.conv2d((x - y).square(), getattr(self, f"weight{i}"))
            distance = distance + layer.mean((1, 2, 3))
            maps = maps + fn.interpolate(layer, size=a.shape[-2:], mode="bilinear")[:, 0]
        return distance, maps                                              # (N,), (N, H, W)


def frechet_distance(mean_a, cov_a, mean_b, cov_b) -> torch.Tensor:
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)), squared distance of two Gaussians.

    Means (..., d) and covariances A, B (..., d, d), in double -> (...), >= 0 up to rounding.
    Source: Dowson and Landau 1982; of features, Heusel et al. 2017. ValueError for NaN in A or B.
    """
    product = cov_a @ cov_b  # not symmetric, but A^(1/2) B A^(1/2) has the same eigenvalues: >= 0
    require(product.isfinite().all(), "images or their covariances hold NaN or infinity")
    roots = torch.linalg.eigvals(product).real.clamp(min=0).sqrt()
    traces = (cov_a + cov_b).diagonal(dim1=-2, dim2=-1)
    return (mean_a - mean_b).square().sum(-1) + traces.sum(-1) - 2 * roots.sum(-1)


class Realism(nn.Module):
    """Does this look like a photograph? 0 for the same photographs, thousands for a blur.

    forward(images (N, 3, H, W)) -> scalar: Fréchet distance of VGG-16 features (relu3_3) to those
    of `photographs` (M, 3, H, W), in each of 4x4 regions, then the mean; [-1, 1], sides of 16 or
    more. A region holds an eye; but a missing detail costs more than a torn one, so look as well.
    Few images score worse than many: compare equal N, M, sizes, and alignment. No slope.
    Needs: PerceptualLoss, frechet_distance, quantize. Raises ValueError for fewer than 2 images.
    """

    def __init__(self, photographs: torch.Tensor):
        super().__init__()
        self.phi = PerceptualLoss("relu3_3").to(photographs.device)
        self.known = self.gaussians(photographs)

    def forward(self, images):
        return frechet_distance(*self.gaussians(images), *self.known).mean()

    @torch.no_grad()
    def gaussians(self, images):
        """One for each region, over all images and positions: means (16, C), covariances."""
        require(len(images) >= 2 and min(images.shape[-2:]) >= 16,
                f"realism needs 2 images or more, of 16x16 or more, got {tuple(images.shape)}")
        maps = torch.cat([self.phi.embed(quantize(part)).cpu() for part in images.split(50)])
        cells = [cell for rows in maps.tensor_split(4, 2) for cell in rows.tensor_split(4, 3)]
        points = (cell.movedim(1, 3).flatten(0, 2).double() for cell in cells)  # one at a time
        pairs = [(x.mean(0), x.T.cov()) for x in points]                   # x (N h' w', C)
        return tuple(torch.stack(values) for values in zip(*pairs))


def diversity_score(maps: torch.Tensor) -> torch.Tensor:
    """NTIRE's diversity score: how much better the best sample per pixel is than the best sample.

    maps (K, N, H, W): LPIPS.with_map of K samples against the truth -> (N,) in [0, 100]. 0 when all
    samples are alike. Noise can raise it too: read it beside LPIPS.
    Source: NTIRE 2021. Raises ValueError unless maps has four dimensions.
    """
    require(maps.ndim == 4, f"maps must have shape (K, N, H, W), got {tuple(maps.shape)}")
    best_sample = maps.mean((2, 3)).min(0).values                          # (N,)
    best_pixels = maps.min(0).values.mean((1, 2))                          # (N,)
    return 100 * (best_sample - best_pixels) / best_sample.clamp(min=1e-12)  # no 0 / 0


def std_map(samples: torch.Tensor) -> torch.Tensor:
    """Where is the model unsure? Standard deviation over samples, in grey levels 0-255.

    Floats (K, N, 3, H, W), else ValueError -> (N, 3, H, W). Divides by K. Needs: to_levels.
    """
    require(samples.ndim == 5, f"samples must be (K, N, 3, H, W), got {tuple(samples.shape)}")
    return to_levels(samples).std(0, correction=0)


# ---- Files: a generator's checkpoint, and pretrained weights ------------------------------------

@contextmanager
def whole_file(path: str | Path):
    """A name to write to that becomes `path` when the block ends well: there is never half a file.

    When the block fails, or the disk is full, nothing is left behind and `path` is as it was.
    Raises OSError, naming the file, when it cannot be written.
    """
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise OSError(f"could not write {path}: {error}".partition("\n")[0]) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, generator: Generator, **training):
    """Write a generator (pass the running average), its settings and whatever training adds.

    `training` holds plain values and state dicts only, so that plain torch.load reads the file.
    Needs: whole_file, Generator. Raises OSError when it cannot be written.
    """
    payload = {"hallusr": 3, "settings": generator.settings, "generator": generator.state_dict()}
    with whole_file(path) as temporary:
        torch.save(payload | training, temporary)


def load_checkpoint(path: str | Path) -> dict:
    """The whole content of a checkpoint, on the CPU.

    Raises FileNotFoundError, or ValueError for a damaged file or one that is not ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged or malicious pickle can end in nearly any of them
        raise ValueError(f"{path} is damaged or no checkpoint") from error
    require(isinstance(content, dict) and "hallusr" in content,
            f"{path} is not a hallusr checkpoint")
    require(content["hallusr"] == 3, f"{path} is of format {content['hallusr']}, this version reads"
                                     " format 3: sample it with the version that made it")
    require({"settings", "generator"} <= set(content), f"{path} holds no generator")
    return content


def load_generator(path: str | Path, device: str = "cpu") -> Generator:
    """The trained G (its running average) of a checkpoint, in eval mode, ready to sample.

    Its `note` says what whoever samples should know, or "". Needs: Generator, load_checkpoint,
    load_weights. Raises FileNotFoundError, or ValueError for a file that is damaged or not ours.
    """
    content = load_checkpoint(path)
    wanted, found = set(Generator().settings), set(content["settings"])
    require(wanted == found, f"{path} has other settings than this version's: "
                             f"{sorted(wanted ^ found)} in one alone")
    generator = Generator(**content["settings"])
    load_weights(generator, content["generator"], path)
    generator.note = content.get("note", "")
    return generator.to(device).eval().requires_grad_(False)


def load_weights(module: nn.Module, state: dict, path: str | Path):
    """module.load_state_dict with one clear ValueError in place of pages of keys, or for NaN."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} holds another architecture than expected: {first}") from error
    bad = [name for name, weight in module.state_dict().items() if not weight.isfinite().all()]
    require(not bad, f"{path} is spoiled: {''.join(bad[:1])} holds NaN or infinity")


def pretrained_features(build, weights, end: int) -> nn.Sequential:
    """The first `end` modules of a network's `features`, frozen. Needs: cached_weights."""
    with torch.device("meta"):  # the shape alone: the rest of the network never takes memory
        features = build().features[:end]
    wanted = {name: "features." + name for name in features.state_dict()}
    state = cached_weights(weights.url, wanted.values())
    features.load_state_dict({name: state[wanted[name]] for name in wanted}, assign=True)
    features.to(memory_format=torch.channels_last)  # the layout in which convolutions are fastest
    return features.eval().requires_grad_(False)


def cached_weights(url: str, names, file: str | None = None) -> dict:
    """The state dict at url, downloaded once to torch.hub's cache (as `file`), with these names.

    Raises FileNotFoundError when it is not to be had, ValueError when it is damaged or another.
    """
    file = file or url.rsplit("/", 1)[-1]
    place = Path(torch.hub.get_dir()) / "checkpoints" / file
    try:
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", file_name=file,
                                                   weights_only=True)
        return {name: state[name] for name in names}
    except OSError as error:
        raise FileNotFoundError("pretrained weights could not be downloaded: fetch "
                                f"{url} and save it as {place}") from error
    except Exception as error:  # what a damaged file ends in depends on where it is damaged
        raise ValueError(f"the pretrained weights in {place} are damaged: delete that file, and "
                         "it is downloaded again") from error
