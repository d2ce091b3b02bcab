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
import statistics
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps  # Pillow comes with torchvision
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CelebA
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.utils import save_image

from hallusr import (LPIPS, RECOMMENDED, Config, Discriminator, PerceptualLoss, build_generator,
                     consistency, contact_sheet, discriminator_loss, diversity_loss, downscale,
                     evaluate, from_levels, generator_loss, gradient_loss, hallucination_loss,
                     image_gradient, load_checkpoint, load_weights, project_onto_lr, pyramid,
                     quantize, r1_penalty, reconstruction_loss, require, sample, save_checkpoint,
                     summarize, to_levels)

# ---- Training -----------------------------------------------------------------------------------


def train(config: Config, arguments, perceptual, faces, valid):
    """Train until config.steps or Ctrl-C. Logs, pictures and checkpoints go to arguments.out."""
    nets = Networks(config, arguments.device)
    start = resume(nets, config, arguments)
    if arguments.compile:
        nets.compile()
    report = (Stopwatch if arguments.benchmark else Report)(config, arguments, nets, valid, start)
    amp = autocast(arguments)

    for step in range(start, config.steps):
        hr, z1, z2 = batch_at(faces, config, step, arguments.device)
        if step < config.warmup:  # a face first, then its variants (D14; 0 as printed)
            terms = warmup_step(nets, perceptual, amp, config, hr)
        else:
            terms = adversarial_step(nets, perceptual, amp, config, hr, z1, z2, step)
        nets.update_ema(config.ema, step)
        report.add(**terms)
        if report.after(step + 1):
            break
    report.goodbye()


def warmup_step(nets, perceptual, amp, config: Config, hr) -> dict:
    """A first step (D14): (10) without its L_adv, no D, no z. Returns the terms for the log."""
    lr = quantize(downscale(hr, config.scale))
    z = torch.zeros(len(lr), config.z_dim, *lr.shape[-2:], device=lr.device)
    with amp:
        all_I, all_g = nets.G(lr, z)
        l_percp = perceptual(all_I[-1], hr)
    l_grad = gradient_loss(all_g[-1], image_gradient(hr))
    l_pixel = (all_I[-1] - hr).abs().mean()                    # D13
    tie = gradient_loss(all_g[-1], image_gradient(all_I[-1]))  # D10
    recons = reconstruction_loss(l_percp, l_grad, 0, 0, config.gamma, config.beta)
    descend(nets.opt_G, recons + config.pixel * l_pixel + config.tie * tie)
    return dict(L_percp=l_percp, L_grad=l_grad, L_pixel=l_pixel, tie=tie)


def adversarial_step(nets, perceptual, amp, config: Config, hr, z1, z2, step: int) -> dict:
    """One step of both players, D first. Returns the terms for the log."""
    G, D_I, D_g, B, levels = nets.G, nets.D_I, nets.D_g, len(hr), len(config.widths) - 1
    lr = quantize(downscale(hr, config.scale))
    real_I = pyramid(hr, levels)
    real_g = [image_gradient(image) for image in real_I]
    zero = torch.zeros_like(lr)

    # G once, three versions of every face: (1) the reconstruction at z = 0, (2) at z1 and z2.
    with amp:  # lists over scales, of (3B, 3, ., .)
        all_I, all_g = G(lr.repeat(3, 1, 1, 1), torch.cat([torch.zeros_like(z1), z1, z2]))
    sr, h1, h2 = all_I[-1].chunk(3)                                           # (B, 3, H, W) each
    g_sr, g1, g2 = all_g[-1].chunk(3)                                         # (B, 3, H, W) each
    # D judges SR and z1, 2B images; z2 is there for the distance in (8).
    fake_I, fake_g = first(2 * B, all_I), first(2 * B, all_g)
    excess = consistency(fake_I[-1], lr.repeat(2, 1, 1, 1), config.eps, config.scale)  # F

    # D step: minimise -log D(real) - log(1 - D(fake)) for D_I and D_g, with R1 now and then.
    with amp:  # logits (3B, 1, h, w): B real, then 2B fake
        both_I = D_I(join(real_I, fake_I), torch.cat([zero, excess.detach()])).float()
        both_g = D_g(join(real_g, fake_g)).float()
    D_loss = (discriminator_loss(both_I[:B], both_I[B:])
              + discriminator_loss(both_g[:B], both_g[B:]))
    r1 = torch.zeros((), device=hr.device)
    if step % config.r1_every == 0:  # seldom, but then with the weight of all steps (D7)
        r1 = config.r1_every * (r1_of(D_I, real_I, zero) + r1_of(D_g, real_g))
    descend(nets.opt_D, D_loss + config.r1_gamma / 2 * r1)

    # G step: minimise (10) for z = 0 plus (11) for z1, against the D just improved.
    nets.D.requires_grad_(False)  # G needs the slope through D, nobody needs D's own now
    with amp:
        l_percp = perceptual(sr, hr)
        sr_I, h_I = D_I(fake_I, excess).float().chunk(2)
        sr_g, h_g = D_g(fake_g).float().chunk(2)
    l_grad = gradient_loss(g_sr, real_g[-1])
    l_pixel = (sr - hr).abs().mean()                           # D13
    l_z = diversity_loss(g1, g2, z1, z2, config.tau)
    recons = reconstruction_loss(l_percp, l_grad, generator_loss(sr_g), generator_loss(sr_I),
                                 config.gamma, config.beta)
    halluc = hallucination_loss(generator_loss(h_g), generator_loss(h_I), l_z, config.alpha)
    tie = gradient_loss(all_g[-1], image_gradient(all_I[-1]))  # D10
    descend(nets.opt_G, recons + halluc + config.pixel * l_pixel + config.tie * tie)
    nets.D.requires_grad_(True)
    return dict(D_I_real=both_I[:B], D_I_fake=both_I[B:], D_g_real=both_g[:B],
                D_g_fake=both_g[B:], R1=r1, L_percp=l_percp, L_grad=l_grad, L_pixel=l_pixel,
                L_z=l_z, tie=tie, F=excess, image_moves=(h1 - h2).abs() * 127.5)


def autocast(arguments):
    """bfloat16 inside convolutions where --amp says so; master weights and losses stay float32."""
    return torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.amp)


def descend(optimizer, loss: torch.Tensor):
    """One step of one player down its loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def first(count: int, images: list) -> list:
    """The first `count` of the batch, at every scale."""
    return [image[:count] for image in images]


def join(real: list, fake: list) -> list:
    """Real, then fake images at every scale in one batch for D; nothing here flows back to G."""
    return [torch.cat([r, f.detach()]) for r, f in zip(real, fake)]


def r1_of(D, images: list, condition=None) -> torch.Tensor:
    """R1 of one discriminator at real images, in float32: two derivatives need the digits."""
    images = [image.detach().requires_grad_() for image in images]
    logits = D.forward(images, condition)  # not D(...): torch.compile can not differentiate twice
    return r1_penalty(logits, images)


def make_perceptual(config: Config) -> torch.nn.Module:
    """(6), or L1 on pixels where the settings say so (D12)."""
    pixels = config.perceptual == "pixels"
    return torch.nn.L1Loss() if pixels else PerceptualLoss(config.perceptual)


def resume(nets: Networks, config: Config, arguments) -> int:
    """Load --resume, if given; return the step to go on with."""
    if not arguments.resume:
        return 0
    content = load_checkpoint(arguments.resume)[1]  # on the CPU, where Adam counts its steps
    require("opt_G" in content, f"{arguments.resume} holds a generator alone: it can be sampled, "
                                "but training cannot go on from it")
    require(content["step"] < config.steps, f"{arguments.resume} has its {content['step']} steps "
                                            "already: ask for more with --steps")
    nets.load(content, arguments.resume)
    return content["step"]


# ---- The networks and their state ---------------------------------------------------------------


class Networks:
    """G, its running average, D_I, D_g and the two optimisers: all that a checkpoint holds."""

    def __init__(self, config: Config, device):
        torch.manual_seed(config.seed)
        shape = (config.widths, config.scale, config.d_blocks)
        self.G = build_generator(config)
        self.ema = copy.deepcopy(self.G).requires_grad_(False)
        self.D_I = Discriminator(*shape, condition_channels=3)
        self.D_g = Discriminator(*shape)
        self.D = torch.nn.ModuleList([self.D_I, self.D_g])
        for module in (self.G, self.ema, self.D):  # the layout in which convolutions are fastest
            module.to(device, memory_format=torch.channels_last)
        betas = (0.0, 0.9)  # section 4.1: no momentum, or each player overshoots the other
        self.opt_G = torch.optim.Adam(self.G.parameters(), config.lr_g, betas, fused=True)
        self.opt_D = torch.optim.Adam(self.D.parameters(), config.lr_d, betas, fused=True)

    def compile(self):
        """torch.compile, in place, of all that the loop calls."""
        for network in (self.G, self.D_I, self.D_g):
            network.compile()

    def state(self) -> dict:
        """State dicts of all but the running average, which the checkpoint has as `generator`."""
        return {name: getattr(self, name).state_dict() for name in ("G", "D", "opt_G", "opt_D")}

    def load(self, content: dict, path):
        """Take up a checkpoint. Learning rates stay those of the settings, not of the file."""
        load_weights(self.ema, content["generator"], path)
        load_weights(self.G, content["G"], path)
        load_weights(self.D, content["D"], path)
        for name in ("opt_G", "opt_D"):
            optimizer = getattr(self, name)
            rate = optimizer.defaults["lr"]
            optimizer.load_state_dict(content[name])
            optimizer.param_groups[0]["lr"] = rate

    @torch.no_grad()
    def update_ema(self, decay: float, step: int):
        """Follow G; faster in the first steps, to forget the poor first weights."""
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


def read_photo(path: str | Path, size: int) -> torch.Tensor:
    """A photo's centre square, resized: uint8 (3, size, size).

    Raises ValueError, naming the file, when it is no image or smaller than size.
    """
    image = read_image(path)
    side = min(image.shape[-2:])
    require(side >= size, f"{path} is {image.shape[2]}x{image.shape[1]} pixels, expected at least "
                          f"{size}x{size}")
    square = v2.functional.center_crop(image, [side, side])
    return v2.functional.resize(square, [size, size], v2.InterpolationMode.BICUBIC, antialias=True)


def read_image(path: str | Path) -> torch.Tensor:
    """Any image file, upright, as uint8 RGB (3, H, W).

    Raises ValueError, naming the file, when it can not be read. Pillow comes with torchvision.
    """
    try:
        with Image.open(path) as image:
            return v2.functional.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


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


def stack(dataset: Dataset, most: int | None = None) -> torch.Tensor:
    """The dataset, or its first `most` items, as one tensor. CelebA's are (image, label) pairs."""
    faces, wanted = None, min(len(dataset), most or len(dataset))
    for i in range(wanted):
        item = dataset[i]
        image = item[0] if isinstance(item, tuple) else item
        if faces is None:  # filled in place: a list and its stack would take twice the memory
            faces = torch.empty(wanted, *image.shape, dtype=image.dtype)
        faces[i] = image
    return faces


class FolderFaces(Dataset):
    """Every image below a folder, centre-cropped and resized: (3, size, size) uint8 each.

    Raises FileNotFoundError for a missing folder or one without at least two images.
    """

    def __init__(self, folder: str | Path, size: int):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        self.paths = sorted(path for path in Path(folder).rglob("*")
                            if path.suffix.lower() in IMG_EXTENSIONS)
        self.size = size
        if len(self.paths) < 2:
            raise FileNotFoundError(f"expected at least 2 images ({' '.join(IMG_EXTENSIONS)}) "
                                    f"below {folder}, found {len(self.paths)}")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return read_photo(self.paths[i], self.size)


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
    mirrored = torch.rand(config.batch, generator=rng) < 0.5
    small = config.size // config.scale
    z1, z2 = torch.randn(2, config.batch, config.z_dim, small, small, generator=rng)
    hr = faces[chosen]
    hr[mirrored] = hr[mirrored].flip(-1)
    return from_levels(hr.to(device)), z1.to(device), z2.to(device)


# ---- Reporting: log line and CSV row, validation, pictures, checkpoints -------------------------


class Table:
    """A CSV file that grows by rows; a resumed run drops what the lost steps had written."""

    def __init__(self, path: Path, start: int):
        self.path, self.rows = path, []
        if start and path.is_file():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]

    def write(self, row: dict):
        self.rows.append(row)
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)

    def last_is_best(self, name: str, sign: int, warmup: int = 0) -> bool:
        """Is the last value the largest (sign 1) or the smallest (sign -1) since the warm-up?"""
        rows = [row for row in self.rows if int(row["step"]) > warmup]
        values = [sign * float(row[name]) for row in rows if row.get(name) not in (None, "")]
        return bool(values) and values[-1] == max(values)


class Report:
    """All that happens beside the loop. It reads the device only when a line is due."""

    def __init__(self, config: Config, arguments, nets: Networks, valid, start: int):
        self.config, self.arguments, self.nets, self.start = config, arguments, nets, start
        self.out = Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.log_table = Table(self.out / "log.csv", start)
        self.valid_table = Table(self.out / "valid.csv", start)
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
        """Collect tensors of one step; each is logged as its mean over the interval."""
        self.count += 1
        for name, value in values.items():
            self.terms.setdefault(name, []).append(value.detach().mean())

    def after(self, step: int) -> bool:
        """Whatever is due after this many steps. True when the loop is to end."""
        self.done = step == self.config.steps
        finished = self.done or self.stop  # read once: Ctrl-C may come while the rest of this runs
        due = finished or step % self.arguments.val_every == 0
        if sys.stdout.isatty():
            print(f"\r{step}/{self.config.steps}  {self.eta(step)} left ", end="", flush=True)
        if due or step % self.arguments.log_every == 0:
            self.log(step)  # also what keeps NaN out of a checkpoint
        if self.done or due and not finished:
            self.validate(step)
        if due:
            self.save("last.pt", step)
        if step == self.config.warmup:  # from here on a step takes longer, and so does the rest
            self.start, self.began = step, time.time()
        return finished

    def eta(self, step: int) -> str:
        """Time left at the pace since the start."""
        seconds = (time.time() - self.began) / (step - self.start) * (self.config.steps - step)
        return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"

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
        print(f"{clear_line()}step {step}  {pace:.1f} images/s  eta {self.eta(step)}  {text}",
              flush=True)
        self.log_table.write({"step": step, "images_per_s": pace} | means)
        self.terms, self.count, self.since = {}, 0, time.time()

    def validate(self, step: int):
        """Score the running average on the validation faces, draw the grid, keep the best."""
        began, nets, arguments = time.time(), self.nets, self.arguments
        rows = summarize(evaluate(nets.ema, self.valid, 4, self.lpips))
        for name, row in rows.items():
            print(f"  {name:13}  " + "  ".join(f"{key} {row[key]:.3f}" for key in row), flush=True)
        self.valid_table.write({"step": step} | {
            f"{name}_{key}": value for name, row in rows.items() for key, value in row.items()})
        hr = self.valid[:6]
        lr = quantize(downscale(hr, self.config.scale))
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(6, self.config.z_dim, *lr.shape[-2:], generator=rng)
        save_image(contact_sheet(nets.ema, lr, z.to(arguments.device), hr), self.out / "grid.png")
        name, sign = ("SR_lpips", -1) if self.lpips else ("SR_psnr", 1)
        if self.valid_table.last_is_best(name, sign, self.config.warmup):
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
        save_checkpoint(self.out / name, self.config, self.nets.ema, **self.nets.state(),
                        step=step, run=run)


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
    latents = torch.randn(shape, generator=rng).to(device)
    with torch.no_grad():
        images = torch.stack([sample(generator, lr, z) for z in latents])
    nearest = (images[:, None] - variants).square().mean((3, 4, 5)).argmin(1)  # (samples, faces)
    found = sum((nearest == kind).any(0).float().mean().item() for kind in range(4))
    print(f"hidden in LR, seen in {samples} hallucinations of {faces} faces: smiles "
          f"{(nearest < 2).float().mean():.0%} (drawn: 50%), glasses "
          f"{(nearest % 2 == 0).float().mean():.0%} (drawn: 50%), "
          f"{found:.1f} of the 4 possible faces each")


# ---- Benchmark ----------------------------------------------------------------------------------


class Stopwatch:
    """In Report's place for --benchmark: times the loop as it is, through hooks on its parts.

    The second step is counted in FLOP instead: one without R1, which torch's counter can not see
    through, so that rates are of steps without it.
    """

    SKIPPED, TIMED = 4, 16

    def __init__(self, config: Config, arguments, nets: Networks, valid, start: int):
        self.config, self.arguments, self.nets = config, arguments, nets
        self.times = {"data": [], "generator": [], "D step": [], "G step": [], "EMA": []}
        nets.G.register_forward_pre_hook(lambda *_: self.mark("data"))
        nets.G.register_forward_hook(lambda *_: self.mark("generator"))
        nets.opt_D.register_step_post_hook(lambda *_: self.mark("D step"))
        nets.opt_G.register_step_post_hook(lambda *_: self.mark("G step"))
        self.last, self.counter = now(arguments.device), FlopCounterMode(display=False)
        require(1 < config.r1_every < self.SKIPPED + self.TIMED, "--benchmark needs steps with and "
                f"without R1: --r1-every from 2 to {self.SKIPPED + self.TIMED - 1}")

    def mark(self, part: str):
        """The time since the last mark was spent on this part."""
        self.last, before = now(self.arguments.device), self.last
        self.times[part].append(1e3 * (self.last - before))

    def add(self, **values):
        pass

    def after(self, step: int) -> bool:
        self.mark("EMA")
        if step == 1:
            self.counter.__enter__()
        if step == 2:
            self.counter.__exit__(None, None, None)
        return False

    def goodbye(self):
        """Print the table. R1 is what its D step took longer, spread over all steps."""
        every, timed = self.config.r1_every, range(self.SKIPPED, self.SKIPPED + self.TIMED)
        without = [step for step in timed if step % every]
        ms = {part: statistics.median(times[step] for step in without)
              for part, times in self.times.items()}
        plain = sum(ms.values())
        with_r1 = [self.times["D step"][step] for step in timed if step % every == 0]
        ms["R1"] = (statistics.median(with_r1) - ms["D step"]) / every
        step = plain + ms["R1"]
        print(f"{step:.0f} ms per step, {1e3 * self.config.batch / step:.2f} images/s; "
              + ", ".join(f"{part} {time:.1f}" for part, time in ms.items()))
        percp = time_of(self.perceptual_step(), self.arguments.device)
        print(f"of these, the perceptual loss {percp:.1f}; 'generator' is the forward pass alone")
        self.report_rate("step without R1", self.counter.get_total_flops(), plain)
        for batch in (1, 64):
            lr = torch.zeros(batch, 3, *2 * [self.config.size // self.config.scale])
            z = torch.zeros(batch, self.config.z_dim, *lr.shape[-2:])
            inputs = lr.to(self.arguments.device), z.to(self.arguments.device)
            with autocast(self.arguments), FlopCounterMode(display=False) as count:
                sample(self.nets.ema, *inputs)
            with autocast(self.arguments):
                ms = time_of(lambda: sample(self.nets.ema, *inputs), self.arguments.device)
            self.report_rate(f"sampling {batch}", count.get_total_flops(), ms)
        print(f"peak memory {peak_memory(self.arguments.device) / 2 ** 30:.2f} GiB")

    def perceptual_step(self):
        """(6) forward and backward, as in the G step."""
        loss = make_perceptual(self.config).to(self.arguments.device)
        sr, hr = torch.rand(2, self.config.batch, 3, self.config.size, self.config.size,
                            device=self.arguments.device)
        sr.requires_grad_()

        def step():
            with autocast(self.arguments):
                value = loss(sr, hr)
            value.backward()
        return step

    def report_rate(self, name: str, flop: float, ms: float):
        """Achieved FLOP/s, and its share of a dense matrix product's in the same arithmetic."""
        dtype = torch.bfloat16 if self.arguments.amp else torch.float32
        side = 8192 if self.arguments.device == "cuda" else 2048
        a = torch.randn(side, side, device=self.arguments.device, dtype=dtype)
        best = 2 * side ** 3 / time_of(lambda: a @ a, self.arguments.device)
        print(f"{name}: {ms:.1f} ms, {flop / 1e12:.4f} TFLOP, {flop / ms / 1e6:.0f} GFLOP/s, "
              f"{flop / ms / best:.0%} of a {dtype} matrix product's {best / 1e6:.0f}")


def now(device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_of(function, device, repeats: int = 10) -> float:
    """Median time of a call in ms, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        began = now(device)
        function()
        times.append(1e3 * (now(device) - began))
    return statistics.median(times[1:])


def peak_memory(device) -> int:
    """Bytes: of the GPU, or of this process with its data."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # absent on Windows, where this line says so
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- Command line -------------------------------------------------------------------------------


# A small network for a first look without data or weights: minutes on two CPU cores.
SKETCH_SETTINGS = dict(widths=(64, 48, 32, 16), blocks=4, d_blocks=4, perceptual="pixels",
                       pixel=0.0, warmup=0, r1_gamma=10.0, steps=1000)


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
    run.add_argument("--benchmark", action="store_true", help="time 16 steps, then stop")
    run.add_argument("--log-every", type=count, metavar="STEPS", help="a log line (default: 50)")
    run.add_argument("--val-every", type=count, metavar="STEPS",
                     help="validation, grid and checkpoint (default: 500)")
    run.add_argument("--val-faces", type=count, metavar="N",
                     help="validate on the first N validation faces (default: 128)")
    method = parser.add_argument_group("the method (defaults: the paper's; presets change some)")
    for item in fields(Config):
        flag, text = "--" + item.name.replace("_", "-"), f"{item.metadata['help']}: {item.default}"
        if isinstance(item.default, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(item.default, tuple):
            how = dict(type=counts, metavar="N,N,...")
        else:
            how = dict(type=type(item.default), metavar=type(item.default).__name__.upper())
        method.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)
    return parser.parse_args(words)


def count(word: str) -> int:
    """A positive whole number; argparse turns the ValueError into a sentence with this name."""
    require(int(word) > 0, f"{word} is not positive")
    return int(word)


def counts(words: str) -> tuple:
    """Positive whole numbers with commas between them."""
    return tuple(count(word) for word in words.split(","))


# What a resumed run takes from its checkpoint unless told otherwise.
RUN_DEFAULTS = dict(data="sketches", val=None, sketches=4000, root="data", val_faces=128, amp=None,
                    log_every=50, val_every=500)


def prepare(arguments) -> Config:
    """Fill in what was not said: from the resumed run, or the defaults; return the settings.

    Settings are the preset's (or the resumed run's), then what sketches bring, then the flags.
    """
    if arguments.resume:
        require(arguments.preset is None, "--resume has the settings of its run: no --preset")
        config, content = load_checkpoint(arguments.resume)
        run = RUN_DEFAULTS | content.get("run", {})
    else:
        config = Config() if arguments.preset == "paper" else replace(Config(), **RECOMMENDED)
        run = RUN_DEFAULTS
    for name, value in run.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.data == "sketches" and not arguments.resume:
        config = replace(config, **SKETCH_SETTINGS)
    names = {item.name for item in fields(Config)}
    config = replace(config, **{k: v for k, v in vars(arguments).items() if k in names})
    if arguments.benchmark:
        require(not arguments.resume, "--benchmark starts afresh: no --resume")
        config = replace(config, steps=Stopwatch.SKIPPED + Stopwatch.TIMED, warmup=0)
    arguments.device = find_device(arguments.device)
    if arguments.amp is None:
        arguments.amp = has_bfloat16(arguments.device)
    arguments.out = find_out(arguments)
    return config


def find_out(arguments) -> Path:
    """Where results go; never where they would overwrite those of another run."""
    home = Path(arguments.resume).parent if arguments.resume else None
    if arguments.out or home:
        out = Path(arguments.out or home)
        mine = arguments.benchmark or (home and home.resolve() == out.resolve())
        require(mine or not (out / "last.pt").exists(),
                f"{out} holds a run already: go on with --resume, or name another --out")
        return out
    first = Path("runs") / Path(arguments.data).resolve().name
    numbered = (first.with_name(f"{first.name}-{k}") for k in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if not path.exists())


def deviations(config: Config) -> list[str]:
    """Which of the optional deviations, D9 to D14 and D16, these settings turn on."""
    rates = (config.lr_g, config.lr_d) != (Config().lr_g, Config().lr_d)
    on = {"D9 hard consistency": config.hard_consistency, f"D10 tie {config.tie:g}": config.tie,
          f"D11 learning rates {config.lr_g:g}, {config.lr_d:g}": rates,
          "D12 L1 on pixels for (6)": config.perceptual == "pixels",
          f"D13 L1 on pixels beside (6), {config.pixel:g}": config.pixel,
          f"D14 {config.warmup} steps without D": config.warmup,
          f"D16 {config.d_blocks} blocks in D": config.d_blocks != config.blocks}
    return [name for name, active in on.items() if active]


def find_device(name: str) -> str:
    """cpu or cuda; auto is cuda where there is one. Raises ValueError for a missing GPU."""
    require(name != "cuda" or torch.cuda.is_available(), "--device cuda: torch finds no GPU here")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def has_bfloat16(device: str) -> bool:
    """Does the device multiply in bfloat16 itself? Emulated, it would be slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = getattr(torch.cpu, "get_capabilities", dict)()  # absent before torch 2.11: say no
    return bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def main(words=None):
    arguments = parse_arguments(words)
    config = prepare(arguments)
    print(f"deviations beside D1-D8, D15 and D17: {', '.join(deviations(config)) or 'none'}")
    print(", ".join(f"{name} {value}" for name, value in asdict(config).items()))
    torch.backends.cudnn.allow_tf32 = False  # where float32 is meant (R1), float32 it is
    perceptual = make_perceptual(config).to(arguments.device)  # first: weights may be missing
    if config.steps <= config.warmup:
        print(f"the reconstruction alone is learnt: z comes in after {config.warmup} steps")
    faces, valid = load_faces(arguments, config)
    print(f"{len(faces)} faces of {config.size}x{config.size} to train on, {len(valid)} to validate"
          f" on; {arguments.device}, {'bfloat16' if arguments.amp else 'float32'}", flush=True)
    train(config, arguments, perceptual, faces, valid)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
