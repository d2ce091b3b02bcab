"""Train hallusr: one loop, for a CPU or one GPU.

    python train.py                      procedural faces, no data or weights needed: minutes
    python train.py --data FOLDER        any folder tree of images
    python train.py --data celeba --root DIR

Writes into --out: last.pt and best.pt (checkpoints), grid.png (look at it), log.csv, valid.csv.
Stop it with Ctrl-C at any time; `python train.py --resume OUT/last.pt` goes on exactly.
"""
from __future__ import annotations

import argparse
import copy
import csv
import itertools
import math
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision.datasets import CelebA
from torchvision.transforms import v2
from torchvision.utils import save_image

from hallusr import (LPIPS, VGG_LAYERS, Discriminator, Generator, PerceptualLoss,
                     check_architecture, discriminator_loss, diversity_loss, downscale, draw_z,
                     excess, from_levels, generator_loss, gradient_loss, hallucination_loss,
                     image_gradient, load_checkpoint, load_weights, project_onto_lr, pyramid,
                     quantize, r1_penalty, reconstruction_loss, require, sample, save_checkpoint,
                     to_levels, whole_file)
from sample import FolderFaces, contact_sheet, count, evaluate, find_device, stack, summarize

# ---- Settings -----------------------------------------------------------------------------------


def setting(default, source: str, meaning: str):
    """A dataclass field that carries what it means and which part of the paper gives its value.

    The source is "open" where the paper is silent: another value is then no deviation.
    """
    return field(default=default, metadata={"help": meaning, "source": source})


@dataclass(frozen=True)
class Config:
    """The numbers of the method. The defaults are the paper as printed, and our choice where open.

    Raises ValueError when a field is out of range or two contradict each other.
    """

    size: int = setting(64, "open", "side of the large image, in pixels (C1)")
    scale: int = setting(8, "section 4.1", "how many times smaller LR is, a power of two")
    z_dim: int = setting(64, "open", "m, the numbers of the noise z (C4)")
    z_shared: float = setting(1.0, "section 2", "share of z that all LR pixels have in common: 1 "
                              "is one vector, 0 a map (D1)")
    widths: tuple = setting((128, 96, 64, 32), "open", "channels, coarse to fine (C7)")
    blocks: int = setting(8, "Fig. 2", "residual blocks in G")
    d_blocks: int = setting(8, "section 3.2", "residual blocks in each discriminator (D9)")
    hard_consistency: bool = setting(False, "(9), (12)", "make DS(image) = LR inside G (D3)")
    explore: str = setting("branch", "(8)", "where L_z acts: on G's gradient 'branch'; or, without "
                           "branch, D_g and (7), on the image's 'gradient' or the 'image' (D10)")
    perceptual: str = setting("relu2_2", "open", "VGG-16 layer of (6), or 'pixels' (C16, D6)")
    gamma: float = setting(10.0, "section 4.1", "weight of perceptual and gradient loss in (10)")
    beta: float = setting(0.1, "section 4.1", "weight of the adversarial losses in (10)")
    alpha: float = setting(1.0, "section 4.1", "weight of the diversity loss in (11)")
    tau: float = setting(1.0, "open", "ceiling of the diversity loss (8) (C3)")
    eps: float = setting(0.1, "section 4.1", "free disagreement with LR in (12), in grey levels")
    tie: float = setting(0.0, "(10), (11)", "weight of |g - grad(I)| (D4)")
    pixel: float = setting(0.0, "(10)", "weight of L1 on pixels at z = 0 (D7)")
    warmup: int = setting(0, "section 2.3", "first steps, of G at z = 0 without D (D8)")
    r1_gamma: float = setting(10.0, "open", "R1's weight; another gamma than (10)'s (C12)")
    r1_every: int = setting(1, "section 2.3", "steps from one R1 penalty to the next (D2)")
    lr_g: float = setting(1e-4, "section 4.1", "Adam's learning rate for G (D5)")
    lr_d: float = setting(4e-4, "open", "Adam's learning rate for D_I and D_g: TTUR (C13)")
    ema: float = setting(0.999, "open", "decay of the running average of G (C14)")
    batch: int = setting(8, "section 4.1", "faces per step")
    steps: int = setting(100_000, "open", "training steps (C22)")
    seed: int = setting(0, "open", "seed of weights, batches and noise")

    def __post_init__(self):
        check_architecture(self.widths, self.scale, min(self.blocks, self.d_blocks))
        require(self.size >= 11 and self.size % self.scale == 0,  # SSIM's window is 11 wide
                f"size must be 11 or more and a multiple of scale {self.scale}, got {self.size}")
        for name in ("z_dim", "batch", "steps", "r1_every", "tau", "lr_g", "lr_d"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("gamma", "beta", "alpha", "eps", "tie", "pixel", "warmup", "r1_gamma", "seed"):
            require(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)}")
        require(0 <= self.z_shared <= 1, f"z_shared must be in [0, 1], got {self.z_shared}")
        require(0 <= self.ema < 1, f"ema must be in [0, 1), got {self.ema}")
        for name, options in (("perceptual", ("pixels", *VGG_LAYERS)),
                              ("explore", ("branch", "gradient", "image"))):
            require(getattr(self, name) in options,
                    f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r}")


# What to change for a run of hours on two CPU cores: the README's D1 to D5 and D7 to D9, and two
# choices that are ours anyway.
RECOMMENDED = dict(z_dim=4, z_shared=0.0, r1_every=16, hard_consistency=True, tie=1.0, lr_g=5e-4,
                   lr_d=5e-4, pixel=50.0, warmup=3000, d_blocks=2, perceptual="relu3_3",
                   r1_gamma=1.0)
# A small network for a first look without data or weights: minutes on two CPU cores.
SKETCHES = dict(widths=(64, 48, 32, 16), blocks=4, d_blocks=4, perceptual="pixels", pixel=0.0,
                warmup=0, r1_gamma=10.0, steps=1000)


def deviations(config: Config) -> list[str]:
    """Every setting that the paper gives and that differs here, as in "alpha 4 (paper: 1)"."""
    def plain(value):
        return f"{value:g}" if isinstance(value, float) else str(value)
    found = [f"{item.name} {plain(getattr(config, item.name))} (paper: {plain(item.default)})"
             for item in fields(Config) if item.metadata["source"] != "open"
             and getattr(config, item.name) != item.default]
    if config.perceptual == "pixels":
        found.append("perceptual pixels (paper: a layer of VGG-16)")
    if config.lr_d == config.lr_g:
        found.append(f"lr_d {plain(config.lr_d)} (paper: TTUR, another rate than G's)")
    return found


# ---- Training -----------------------------------------------------------------------------------


def train(config: Config, arguments, perceptual, faces, valid, content: dict | None = None):
    """Train until config.steps or Ctrl-C. Logs, pictures and checkpoints go to arguments.out."""
    nets = Networks(config, arguments.device)
    start = nets.load(content, arguments.resume) if content else 0
    if arguments.compile:
        nets.compile()
    report = Report(config, arguments, nets, valid, content)
    amp = autocast(arguments)

    for step in range(start, config.steps):
        hr, z1, z2 = batch_at(faces, config, step, arguments.device)
        terms = training_step(nets, perceptual, amp, config, hr, z1, z2, step)
        nets.update_ema(config.ema, step)
        report.add(**terms)
        if report.after(step + 1):
            break
    report.goodbye()


def training_step(nets, perceptual, amp, config: Config, hr, z1, z2, step: int) -> dict:
    """One step of both players, D first; in the warm-up (D8) of G alone, at z = 0.

    hr (B, 3, H, W), z1 and z2 (B, z_dim, h, w). Returns the terms for the log.
    """
    B, playing = len(hr), step >= config.warmup
    lr = quantize(downscale(hr, config.scale))
    real = {"image": pyramid(hr, len(config.widths) - 1)}
    real["gradient"] = [image_gradient(image) for image in real["image"]]  # C11

    # G once, three versions of every face: (1) the reconstruction at z = 0, (2) at z1 and z2.
    z = torch.cat([torch.zeros_like(z1), z1, z2]) if playing else torch.zeros_like(z1)
    with amp:  # {"image", "gradient"}: lists over resolutions of (3B, 3, ., .), (B, 3, ., .) alone
        made = nets.G(lr.repeat(len(z) // B, 1, 1, 1), z)
    image = made["image"][-1]                                                # (3B, 3, H, W)

    terms, l_z = {}, 0.0
    adv_sr = adv_h = {"image": 0.0, "gradient": 0.0}
    if playing:
        # D judges SR and z1, 2B images (C10); z2 is there for the distance in (8).
        fake = {domain: first(2 * B, pictures) for domain, pictures in made.items()}
        F = excess(fake["image"][-1], lr.repeat(2, 1, 1, 1), config.eps)     # (2B, 3, h, w)
        terms = update_discriminators(nets, amp, config, real, fake, F, step)
        adv_sr, adv_h = adversarial_losses(nets, amp, fake, F)
        _, g1, g2 = explored(made, config.explore).chunk(3)                  # (B, 3, H, W) each
        l_z = diversity_loss(g1, g2, z1, z2, config.tau)
        terms |= dict(L_z=l_z, image_moves=(image[B:2 * B] - image[2 * B:]).abs() * 127.5)

    # G step: minimise (10) for z = 0 plus (11) for z1, against the D just improved (C18).
    with amp:
        l_percp = perceptual(image[:B], hr)
    l_pixel = (image[:B] - hr).abs().mean()                                  # D7
    l_grad = tie = torch.zeros((), device=hr.device)
    if "gradient" in made:
        l_grad = gradient_loss(made["gradient"][-1][:B], real["gradient"][-1])
        tie = gradient_loss(made["gradient"][-1], image_gradient(image))     # D4
    recons = reconstruction_loss(l_percp, l_grad, adv_sr["gradient"], adv_sr["image"],
                                 config.gamma, config.beta)
    halluc = hallucination_loss(adv_h["gradient"], adv_h["image"], l_z, config.alpha)
    descend(nets.opt_G, recons + halluc + config.pixel * l_pixel + config.tie * tie)
    return terms | dict(L_percp=l_percp, L_grad=l_grad, L_pixel=l_pixel, tie=tie)


def update_discriminators(nets, amp, config: Config, real, fake, F, step: int) -> dict:
    """D step: minimise -log D(real) - log(1 - D(fake)) and R1, for D_I and D_g."""
    B, none = len(real["image"][-1]), torch.zeros_like(F[:len(F) // 2])
    given = {"image": torch.cat([none, F.detach()]), "gradient": None}  # F goes to D_I alone
    loss, terms = 0.0, {"excess": F}
    for domain, D in nets.D.items():
        with amp:  # logits (3B, 1, h, w): B real, then 2B fake
            logits = D(join(real[domain], fake[domain]), given[domain]).float()
        loss = loss + discriminator_loss(logits[:B], logits[B:])
        terms |= {f"D_{domain}_real": logits[:B], f"D_{domain}_fake": logits[B:]}
        if step % config.r1_every == 0:  # D2: seldom, but then with the weight of all steps
            r1 = r1_of(D, real[domain], none if domain == "image" else None)
            loss = loss + config.r1_every * config.r1_gamma / 2 * r1
            terms[f"R1_{domain}"] = r1
    descend(nets.opt_D, loss)
    return terms


def adversarial_losses(nets, amp, fake, F) -> tuple[dict, dict]:
    """L_adv of G: {domain: loss} for the reconstructions, and for the hallucinations."""
    sr, h = {}, {}
    nets.D.requires_grad_(False)  # G needs the slope through D, nobody needs D's own now
    for domain, D in nets.D.items():
        with amp:
            logits = D(fake[domain], F if domain == "image" else None).float()
        sr[domain], h[domain] = (generator_loss(half) for half in logits.chunk(2))
    nets.D.requires_grad_(True)
    return {"gradient": 0.0} | sr, {"gradient": 0.0} | h  # no D_g without the branch


def explored(made: dict, where: str) -> torch.Tensor:
    """What L_z pulls apart: G's gradient output, as printed, or what stands in for it (D10)."""
    if where == "branch":
        return made["gradient"][-1]
    return made["image"][-1] if where == "image" else image_gradient(made["image"][-1])


def autocast(arguments):
    """bfloat16 inside convolutions where --amp says so; master weights and losses stay float32."""
    return torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.amp)


def descend(optimizer, loss: torch.Tensor):
    """One step of one player down its loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def first(count: int, pictures: list) -> list:
    """The first `count` of the batch, at every resolution."""
    return [picture[:count] for picture in pictures]


def join(real: list, fake: list) -> list:
    """Real, then fake pictures at every resolution in one batch for D; nothing flows back to G."""
    return [torch.cat([r, f.detach()]) for r, f in zip(real, fake)]


def r1_of(D, pictures: list, none=None) -> torch.Tensor:
    """R1 of one discriminator at real pictures, in float32: two derivatives need the digits."""
    pictures = [picture.detach().requires_grad_() for picture in pictures]
    logits = D.forward(pictures, none)  # not D(...): torch.compile can not differentiate twice
    return r1_penalty(logits, pictures)


def make_perceptual(config: Config) -> torch.nn.Module:
    """(6), or L1 on pixels where the settings say so (D6)."""
    pixels = config.perceptual == "pixels"
    return torch.nn.L1Loss() if pixels else PerceptualLoss(config.perceptual)


# ---- The networks and their state ---------------------------------------------------------------


class Networks:
    """G, its running average, D_I, D_g and the two optimisers: all that a checkpoint holds."""

    def __init__(self, config: Config, device):
        torch.manual_seed(config.seed)
        shape, branch = (config.widths, config.scale, config.d_blocks), config.explore == "branch"
        self.G = Generator(config.size, config.scale, config.z_dim, config.z_shared, config.widths,
                           config.blocks, config.hard_consistency, branch)
        self.ema = copy.deepcopy(self.G).requires_grad_(False)
        self.D = torch.nn.ModuleDict({"image": Discriminator(*shape, excess_channels=3)})
        if branch:
            self.D["gradient"] = Discriminator(*shape)
        for module in (self.G, self.ema, self.D):  # the layout in which convolutions are fastest
            module.to(device, memory_format=torch.channels_last)
        # Section 4.1: no momentum, or each player overshoots the other. Fused: a pass less.
        options = dict(betas=(0.0, 0.9), fused=device != "meta")
        self.opt_G = torch.optim.Adam(self.G.parameters(), config.lr_g, **options)
        self.opt_D = torch.optim.Adam(self.D.parameters(), config.lr_d, **options)

    def compile(self):
        """torch.compile, in place, of all that the loop calls."""
        for network in (self.G, *self.D.values()):
            network.compile()

    def state(self) -> dict:
        """State dicts of all but the running average, which the checkpoint has as `generator`."""
        return {name: getattr(self, name).state_dict() for name in ("G", "D", "opt_G", "opt_D")}

    def load(self, content: dict, path) -> int:
        """Take up a checkpoint; return its step. Learning rates stay those of the settings."""
        load_weights(self.ema, content["generator"], path)
        load_weights(self.G, content["G"], path)
        load_weights(self.D, content["D"], path)
        for name in ("opt_G", "opt_D"):
            optimizer = getattr(self, name)
            rate = optimizer.defaults["lr"]
            optimizer.load_state_dict(content[name])
            optimizer.param_groups[0]["lr"] = rate
        return content["step"]

    @torch.no_grad()
    def update_ema(self, decay: float, step: int):
        """C14: follow G; faster in the first steps, to forget the poor first weights."""
        decay = min(decay, (1 + step) / (10 + step))
        for average, current in zip(self.ema.parameters(), self.G.parameters()):
            average.lerp_(current, 1 - decay)


# ---- Faces --------------------------------------------------------------------------------------
# Procedural, from a folder, or CelebA. All end as one uint8 tensor (N, 3, size, size): small images
# decoded once and kept in memory cost the loop nothing.


class SketchFaces(Dataset):
    """Drawn faces whose mouth and glasses an 8x8 version hides: (3, size, size) uint8 each.

    Face i is a function of (seed, i) alone; `attributes(i)` tells what was drawn.
    """

    def __init__(self, count: int, size: int = 64, seed: int = 0):
        self.count, self.size, self.seed = count, size, seed

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return to_levels(draw_face(self.attributes(i), self.size)).to(torch.uint8)

    def attributes(self, i: int) -> dict:
        """All that is random in face i. Colours are in [-1, 1], lengths in eighths of the side."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + i)

        def between(low, high):
            return low + (high - low) * torch.rand((), generator=rng).item()

        def colour(*options):
            chosen = options[torch.randint(len(options), (), generator=rng)]
            return [channel + between(-0.08, 0.08) for channel in chosen]

        return dict(
            background=[between(-0.6, 0.6) for _ in range(3)],
            skin=colour((0.4, 0.2, 0), (0.3, 0, -0.15), (0.1, -0.2, -0.4), (-0.2, -0.4, -0.5)),
            hair=colour((-0.7, -0.75, -0.8), (-0.3, -0.55, -0.7), (0.4, 0.15, -0.4), (0, 0, 0)),
            iris=colour((-0.5, -0.2, 0.3), (-0.6, -0.7, -0.8), (-0.4, 0.1, -0.4)),
            width=between(2.3, 2.9), hair_top=between(0.7, 1.5), hair_bottom=between(2.5, 7.5),
            mouth_width=between(0.8, 1.2), lips=between(0.1, 0.4),
            smiling=between(0, 1) < 0.5, glasses=between(0, 1) < 0.5)


def draw_face(attributes: dict, size: int = 64) -> torch.Tensor:
    """A face sketch, antialiased: (3, size, size) in [-1, 1], a pure function of its attributes.

    Shrunk to 8x8 (or less), faces that differ only in `smiling` and `glasses` are equal: a frown is
    the smile upside down inside one row of blocks, and the glasses' lenses shine by just as much
    as their frame darkens, block by block. Raises ValueError unless size is a multiple of 8.
    """
    require(size % 8 == 0, f"sketches are made of 8x8 blocks: size must be a multiple of 8, "
                           f"got {size}")
    a = attributes
    axis = (torch.arange(size) + 0.5) * 8 / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixel = 8 / size

    def cover(distance):  # signed distance, negative inside -> share of the pixel that is inside
        return (0.5 - distance / pixel).clamp(0, 1)

    def ellipse(cx, cy, rx, ry):
        return cover((torch.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry))

    def paint(image, colour, mask):
        return image + mask * (torch.tensor(colour).view(3, 1, 1) - image)

    shade = [channel - 0.25 for channel in a["skin"]]
    image = torch.tensor(a["background"]).view(3, 1, 1).expand(3, size, size)
    image = paint(image, a["hair"], ellipse(4, 3.6, a["width"] + 0.5, 3.6 - a["hair_top"] + 0.7))
    falls = cover(torch.maximum((x - 4).abs() - a["width"] - 0.4, y - a["hair_bottom"]))
    image = paint(image, a["hair"], falls * (y > 3.6))
    image = paint(image, shade, cover(torch.maximum((x - 4).abs() - 1.0, 6 - y)))     # the neck
    image = paint(image, a["skin"], ellipse(4, 4.2, a["width"], 3.2))
    image = paint(image, a["hair"], ellipse(4, 4.2, a["width"], 3.2) * cover(y - a["hair_top"] - 1))
    image = paint(image, shade, ellipse(4, 4.5, 0.22, 0.3))                           # the nose
    for cx in (2.5, 5.5):
        image = paint(image, (0.5, 0.5, 0.5), ellipse(cx, 3.5, 0.36, 0.24))
        image = paint(image, a["iris"], ellipse(cx, 3.5, 0.18, 0.18))
    u = (x - 4) / a["mouth_width"]
    bend = 0.5 * (0.5 - u.square()) * (1 if a["smiling"] else -1)
    lip = torch.maximum((y - 5.5 - bend).abs() - 0.13, (u.abs() - 1) * a["mouth_width"])
    image = paint(image, (a["lips"], -0.5, -0.45), cover(lip))
    return with_glasses(image, x, y, cover) if a["glasses"] else image


def with_glasses(image, x, y, cover):
    """Two dark rounded frames and a bridge, lightened inside until every block's mean is back."""
    lens = [torch.maximum((x - cx).abs(), (y - 3.5).abs()) for cx in (2.5, 5.5)]
    frame = sum(cover((d - 0.43).abs() - 0.05) for d in lens)
    bridge = cover(torch.maximum((y - 3.4).abs() - 0.07, (x - 4).abs() - 1.0))
    dark = torch.full_like(image, -0.6)
    framed = image + (frame + bridge).clamp(max=1) * (dark - image)
    return project_onto_lr(framed[None], downscale(image[None], image.shape[-1] // 8))[0]


def load_faces(arguments, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation faces, uint8 (N, 3, size, size); no face is in both."""
    if arguments.data == "sketches":
        train = SketchFaces(arguments.sketches, config.size, seed=0)
        valid = SketchFaces(arguments.val_faces, config.size, seed=1)
    elif arguments.data == "celeba":
        train, valid = (celeba(arguments.root, split, config.size) for split in ("train", "valid"))
    elif arguments.val:
        train, valid = (FolderFaces(folder, config.size)
                        for folder in (arguments.data, arguments.val))
    else:  # every 20th photo is kept away from training
        faces = stack(FolderFaces(arguments.data, config.size))
        held_out = torch.arange(len(faces)) % 20 == 0
        return faces[~held_out], faces[held_out][:arguments.val_faces]
    return stack(train), stack(valid, arguments.val_faces)


def celeba(root: str, split: str, size: int) -> Dataset:
    """torchvision's CelebA with its official split. Raises FileNotFoundError where it is not."""
    square = v2.Compose([v2.PILToTensor(), v2.CenterCrop(178),
                         v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True)])
    try:
        return CelebA(root, split, target_type=[], transform=square)
    except RuntimeError as error:
        raise FileNotFoundError(f"no CelebA below {root}: expected {root}/celeba with "
                                "img_align_celeba/ and its list_*.txt files") from error


def batch_at(faces: torch.Tensor, config: Config, step: int, device) -> tuple:
    """The faces and noise of one step: hr (B, 3, H, W) in [-1, 1], z1 and z2 (B, z_dim, h, w).

    A function of (seed, step) alone, so that a resumed run sees what an unbroken one would.
    """
    rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    chosen = torch.randint(len(faces), (config.batch,), generator=rng)
    mirrored = torch.rand(config.batch, generator=rng) < 0.5  # C15
    small = config.size // config.scale
    shape = (2, config.batch, config.z_dim, small, small)
    z1, z2 = draw_z(shape, config.z_shared, rng)
    hr = faces[chosen]
    hr[mirrored] = hr[mirrored].flip(-1)
    return from_levels(hr.to(device)), z1.to(device), z2.to(device)


# ---- Reporting: log line and CSV row, validation, pictures, checkpoints -------------------------


def write_csv(path: Path, rows: list[dict]):
    """All rows as a table, whole or not at all. It is an export: nothing reads it back."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def last_is_best(rows: list[dict], name: str, sign: int, warmup: int = 0) -> bool:
    """Is the last value the largest (sign 1) or the smallest (sign -1) since the warm-up?"""
    values = [sign * row[name] for row in rows if row["step"] > warmup and name in row]
    return bool(values) and values[-1] == max(values)


class Report:
    """All that happens beside the loop. It reads the device only when a line is due."""

    def __init__(self, config: Config, arguments, nets: Networks, valid, content: dict | None):
        self.config, self.arguments, self.nets = config, arguments, nets
        self.out = Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.start = content["step"] if content else 0
        self.log_rows, self.valid_rows = content["rows"] if content else ([], [])
        self.valid = from_levels(valid).to(arguments.device)
        self.lpips = find_lpips(config, arguments.device)
        self.terms, self.count, self.stop, self.done = {}, 0, False, False
        self.began = self.since = time.time()
        signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_):
        """The first Ctrl-C lets the step end, so that a whole one is saved; the second kills."""
        self.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def add(self, **values):
        """Collect tensors of one step; each is logged as its mean over the steps that have it."""
        self.count += 1
        for name, value in values.items():
            self.terms.setdefault(name, []).append(value.detach().mean())

    def after(self, step: int) -> bool:
        """Whatever is due after this many steps. True when the loop is to end."""
        self.done = step == self.config.steps
        finished = self.done or self.stop  # read once: Ctrl-C may come while the rest of this runs
        due = finished or step % self.arguments.val_every == 0
        if sys.stdout.isatty():
            print(f"\r{step}/{self.config.steps}  {self.eta(step)} ", end="", flush=True)
        if due or step == 1 or step % self.arguments.log_every == 0:
            self.log(step)  # also what keeps NaN out of a checkpoint
        if due:
            self.save("last.pt", step)  # first: the rest may be interrupted
            self.validate(step)
            self.save("last.pt", step)
        if step == self.config.warmup:  # from here on a step takes longer, and so does the rest
            self.start, self.began = step, time.time()
        return finished

    def eta(self, step: int) -> str:
        """Time left at the pace since the start, to the end or to that of the warm-up."""
        warming = step < self.config.warmup
        end = min(self.config.warmup, self.config.steps) if warming else self.config.steps
        seconds = int((time.time() - self.began) / max(step - self.start, 1) * (end - step))
        left = f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
        return f"{left} left" + (" of the warm-up: z means nothing yet" if warming else "")

    def log(self, step: int):
        """One line and one CSV row. Raises FloatingPointError, naming the term, at NaN or Inf."""
        means = {name: torch.stack(terms).mean().item() for name, terms in self.terms.items()}
        weights = itertools.chain(self.nets.G.parameters(), self.nets.D.parameters())
        sums = {"a weight": sum(weight.detach().sum() for weight in weights).item()}
        for name, value in (means | sums).items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} became {value} by step {step}; no checkpoint was "
                                         f"overwritten: {self.out} is as it was last saved")
        pace = self.count * self.config.batch / (time.time() - self.since)
        text = "  ".join(f"{name} {value:.3g}" for name, value in means.items())
        print(f"{clear_line()}step {step}  {pace:.1f} images/s  {self.eta(step)}  {text}",
              flush=True)
        self.log_rows.append({"step": step, "images_per_s": pace} | means)
        write_csv(self.out / "log.csv", self.log_rows)
        self.terms, self.count, self.since = {}, 0, time.time()

    def validate(self, step: int):
        """Score the running average on the validation faces, draw the grid, keep the best."""
        began, nets, arguments = time.time(), self.nets, self.arguments
        rows = summarize(evaluate(nets.ema, self.valid, 4, self.lpips))
        for name, row in rows.items():
            print(f"  {name:13}  " + "  ".join(f"{key} {row[key]:.3f}" for key in row), flush=True)
        self.valid_rows.append({"step": step} | {
            f"{name}_{key}": value for name, row in rows.items() for key, value in row.items()})
        write_csv(self.out / "valid.csv", self.valid_rows)
        hr = self.valid[:6]
        lr, rng = quantize(downscale(hr, self.config.scale)), torch.Generator().manual_seed(0)
        z = draw_z((6, self.config.z_dim, *lr.shape[-2:]), self.config.z_shared, rng)
        save_image(contact_sheet(nets.ema, lr, z.to(arguments.device), hr), self.out / "grid.png")
        name, sign = ("SR_lpips", -1) if self.lpips else ("SR_psnr", 1)
        if last_is_best(self.valid_rows, name, sign, self.config.warmup):
            self.save("best.pt", step)
        self.began += time.time() - began
        self.since += time.time() - began

    def goodbye(self):
        """The last words: how to go on, or what came of it."""
        checkpoint = shlex.quote(str(self.out / "last.pt"))
        if not self.done:
            print(f"{clear_line()}stopped and saved; go on with\n"
                  f"  python train.py --resume {checkpoint}")
        else:
            print(f"{clear_line()}done: look at {self.out / 'grid.png'}, sample with\n"
                  f"  python sample.py PHOTO --checkpoint {checkpoint}")
        if self.arguments.data == "sketches" and self.config.size <= 8 * self.config.scale:
            report_hidden(self.nets.ema, self.config, self.arguments.device)

    def save(self, name: str, step: int):
        """Write a checkpoint from which --resume goes on, with the same data."""
        run = {name: getattr(self.arguments, name) for name in RUN_DEFAULTS}
        early = step <= self.config.warmup
        note = f"after {step} steps the warm-up of {self.config.warmup} is not over: z means "
        save_checkpoint(self.out / name, self.nets.ema, **self.nets.state(), step=step, run=run,
                        config=asdict(self.config), rows=(self.log_rows, self.valid_rows),
                        note=note + "nothing yet" if early else "")


def find_lpips(config: Config, device) -> LPIPS | None:
    """The metric where it can be had without a download, or None, saying why."""
    if config.size >= 32 and LPIPS.at_hand():
        return LPIPS().to(device)
    print("LPIPS is not measured: " + ("images are smaller than 32x32" if config.size < 32 else
                                       "its weights are not in torch.hub's cache"))
    return None


def clear_line() -> str:
    """What wipes the live progress line, on a terminal."""
    return "\r\033[K" if sys.stdout.isatty() else ""


def report_hidden(generator, config: Config, device, faces: int = 100, samples: int = 10):
    """For drawn faces, what LR hides is known: do the hallucinations show all of it, or one answer?

    Each hallucination is named after the nearest of the four faces with this LR: smile or frown,
    glasses or none. Prints how often each came, and how many of the four a face got.
    """
    drawn, variants = SketchFaces(faces, config.size, seed=1), []
    for smiling in (True, False):
        for glasses in (True, False):
            options = [drawn.attributes(i) | dict(smiling=smiling, glasses=glasses)
                       for i in range(faces)]
            variants.append(torch.stack([draw_face(a, config.size) for a in options]))
    variants = torch.stack(variants).to(device)                    # (4, faces, 3, H, W)
    lr = quantize(downscale(variants[0], config.scale))
    rng = torch.Generator().manual_seed(0)
    shape = (samples, faces, config.z_dim, *lr.shape[-2:])
    latents = draw_z(shape, config.z_shared, rng).to(device)
    with torch.no_grad():
        images = torch.stack([sample(generator, lr, z) for z in latents])
    nearest = (images[:, None] - variants).square().mean((3, 4, 5)).argmin(1)  # (samples, faces)
    found = sum((nearest == kind).any(0).float().mean().item() for kind in range(4))
    print(f"hidden in LR, seen in {samples} hallucinations of {faces} faces: smiles "
          f"{(nearest < 2).float().mean():.0%} (drawn: 50%), glasses "
          f"{(nearest % 2 == 0).float().mean():.0%} (drawn: 50%), "
          f"{found:.1f} of the 4 possible faces each")


# ---- Command line -------------------------------------------------------------------------------


def parse_arguments(words=None):
    """One flag per field of Config, left out of the namespace unless given, and the run's own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    run = parser.add_argument_group("the run")
    run.add_argument("--data", metavar="sketches|celeba|FOLDER",
                     help="training faces; sketches are drawn here and now (default)")
    run.add_argument("--val", metavar="FOLDER", help="validation faces of a folder run; "
                     "without it every 20th image is held out")
    run.add_argument("--sketches", type=count, metavar="N",
                     help="how many training faces to draw (default: 4000)")
    run.add_argument("--root", help="where celeba/ lies (default: data)")
    run.add_argument("--out", help="where results go (default: a new runs/DATA, or, with --resume, "
                     "where the checkpoint lies)")
    run.add_argument("--resume", metavar="CHECKPOINT",
                     help="go on from this last.pt, with its data and its settings")
    run.add_argument("--preset", choices=("recommended", "paper"),
                     help="paper: as printed; recommended: what hours suffice for (default)")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--amp", action=argparse.BooleanOptionalAction,
                     help="bfloat16 autocast (default: where the device computes in it)")
    run.add_argument("--compile", action="store_true", help="torch.compile the networks")
    run.add_argument("--log-every", type=count, metavar="STEPS", help="a log line (default: 50)")
    run.add_argument("--val-every", type=count, metavar="STEPS",
                     help="validation, grid and checkpoint (default: 500)")
    run.add_argument("--val-faces", type=count, metavar="N",
                     help="validate on the first N validation faces (default: 128)")
    method = parser.add_argument_group(
        "the method", "defaults: --preset recommended's, and in brackets --preset paper's where "
        "that is another; drawn faces change "
        + ", ".join(f"{name} to {value}" for name, value in SKETCHES.items()))
    for item in fields(Config):
        best = RECOMMENDED.get(item.name, item.default)
        text = f"{item.metadata['help']}; {item.metadata['source']}: {best}"
        text += f" [{item.default}]" if best != item.default else ""
        if isinstance(item.default, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(item.default, tuple):
            how = dict(type=counts, metavar="N,N,...")
        else:
            how = dict(type=type(item.default), metavar=type(item.default).__name__.upper())
        method.add_argument("--" + item.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=text, **how)
    return parser.parse_args(words)


def counts(words: str) -> tuple:
    """Positive whole numbers with commas between them."""
    return tuple(count(word) for word in words.split(","))


# What a resumed run takes from its checkpoint unless told otherwise.
RUN_DEFAULTS = dict(data="sketches", val=None, sketches=4000, root="data", val_faces=128, amp=None,
                    log_every=50, val_every=500)


def prepare(arguments) -> tuple[Config, dict | None]:
    """Fill in what was not said, from the resumed run or the defaults.

    Returns the settings (the preset's or the resumed run's, then what sketches bring, then the
    flags) and the content of the checkpoint to resume.
    """
    content, run = None, RUN_DEFAULTS
    config = Config() if arguments.preset == "paper" else replace(Config(), **RECOMMENDED)
    if arguments.resume:
        require(arguments.preset is None, "--resume has the settings of its run: no --preset")
        content = load_checkpoint(arguments.resume)
        require("opt_G" in content, f"{arguments.resume} holds a generator alone: it can be "
                                    "sampled, but training cannot go on from it")
        config, run = Config(**content["config"]), content["run"]
    for name, value in run.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.data == "sketches" and not arguments.resume:
        config = replace(config, **SKETCHES)
    names = {item.name for item in fields(Config)}
    config = replace(config, **{k: v for k, v in vars(arguments).items() if k in names})
    require(not content or content["step"] < config.steps, f"{arguments.resume} has its "
            f"{content and content['step']} steps already: ask for more with --steps")
    arguments.device = find_device(arguments.device)
    if arguments.amp is None:
        arguments.amp = has_bfloat16(arguments.device)
    arguments.out = find_out(arguments)
    return config, content


def find_out(arguments) -> Path:
    """Where results go; never where they would overwrite those of another run."""
    home = Path(arguments.resume).parent if arguments.resume else None
    if arguments.out or home:
        out = Path(arguments.out or home)
        mine = home and home.resolve() == out.resolve()
        require(mine or not (out / "last.pt").exists(),
                f"{out} holds a run already: go on with --resume, or name another --out")
        return out
    first = Path("runs") / Path(arguments.data).resolve().name
    numbered = (first.with_name(f"{first.name}-{k}") for k in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if not path.exists())


def has_bfloat16(device: str) -> bool:
    """Does the device multiply in bfloat16 itself? Emulated, it would be slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = getattr(torch.cpu, "get_capabilities", dict)()  # absent before torch 2.11: say no
    return bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def main(words=None):
    arguments = parse_arguments(words)
    config, content = prepare(arguments)
    print(f"differs from the print in: {', '.join(deviations(config)) or 'nothing'}")
    print(", ".join(f"{name} {value}" for name, value in asdict(config).items()))
    torch.backends.cudnn.allow_tf32 = False  # where float32 is meant (R1), float32 it is
    perceptual = make_perceptual(config).to(arguments.device)  # first: weights may be missing
    if config.steps <= config.warmup:
        print(f"the reconstruction alone is learnt: z comes in after {config.warmup} steps")
    faces, valid = load_faces(arguments, config)
    print(f"{len(faces)} faces of {config.size}x{config.size} to train on, {len(valid)} to validate"
          f" on; {arguments.device}, {'bfloat16' if arguments.amp else 'float32'}", flush=True)
    train(config, arguments, perceptual, faces, valid, content)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
