"""Train hallusr: one loop, for a CPU or one GPU, or for several under torchrun.

    python train.py                         faces that it draws itself, no data needed: minutes
    python train.py --data FOLDER           any folder of photos: hours
    python train.py --resume OUT/last.pt    go on with a run that was stopped

Into --out go last.pt and best.pt (checkpoints), grid.png (look at it), log.csv and valid.csv.
"""
import os
import signal

if __name__ == "__main__":
    # Until there is something to save, Ctrl-C just ends the program.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # torch's threads spin while they wait, and beside a busy program stand in each
    # other's way. This must be said before torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import contextlib
import copy
import csv
import math
import shlex
import sys
import time
import timeit
import unicodedata
import zlib
from dataclasses import asdict, make_dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torchvision.utils import save_image

from hallusr import (LPIPS, Discriminator, Generator, PerceptualLoss, Realism,
                     check_architecture, discriminator_loss, diversity_loss, downscale,
                     draw_z, excess, from_levels, generator_loss, gradient_loss,
                     hallucination_loss, image_gradient, load_checkpoint, load_generator,
                     load_weights, project_onto_lr, pyramid, quantize, r1_penalty,
                     reconstruction_loss, require, sample, save_checkpoint, to_levels)
from sample import (contact_sheet, count, evaluate, evenly, find_device, list_photos,
                    path_argument, read_photos, run_as_script, summarize)

# ---- Settings: a line each -----------------------------------------------------------

# --preset chooses a column: the paper's; photos, with --data; drawn, without. The
# section is where the paper gives the value, or leaves no room for another; "open"
# where it is silent, and its column is our choice. Reasons: assets/PAPER.md.
SETTINGS = [
    # name               paper  photos drawn  section   meaning
    ("size",             64,    64,    32,    "open",   "side of the large image, pixels"),
    ("scale",            8,     8,     4,     "4.1",    "times that LR is smaller: a power of 2"),
    ("width",            32,    32,    16,    "open",   "channels at full size, more at coarser"),
    ("blocks",           8,     8,     2,     "Fig. 2", "residual blocks in G"),
    ("d_blocks",         8,     2,     2,     "3.2",    "residual blocks in each D"),
    ("z_dim",            64,    4,     4,     "open",   "numbers in z"),
    ("z_shared",         1.0,   0.7,   1.0,   "2",      "z from one vector (1) to a map (0)"),
    ("hard_consistency", False, True,  True,  "(9)",    "make DS(image) = LR inside G"),
    ("eps",              12.75, 12.75, 12.75, "4.2",    "F ignores so many grey levels"),
    ("perceptual",       "relu2_2", "relu3_3", "pixels", "open", "VGG-16 layer of (6), or pixels"),
    ("gamma",            10.0,  2.0,   5.0,   "4.1",    "weight of (6) and (7) in (10)"),
    ("beta",             0.1,   0.1,   0.1,   "4.1",    "weight of z = 0 in both players' L_adv"),
    ("alpha",            1.0,   4.0,   4.0,   "4.1",    "weight of L_z (8) in (11)"),
    ("alpha_falls",      False, False, True,  "4.1",    "alpha falls at the end, to a hundredth"),
    ("tau",              1.0,   1.0,   1.0,   "open",   "ceiling of L_z (8)"),
    ("l_z_level",        0,     1,     1,     "open",   "what (8) sees: 1 coarsest, 0 finest"),
    ("tie",              0.0,   0.0,   1.0,   "2.3",    "weight of |g - gradient of I|"),
    ("pixel",            0.0,   10.0,  0.0,   "2.3",    "weight of L1 on pixels at z = 0"),
    ("warmup",           0,     3000,  600,   "2.3",    "first steps: G alone, at z = 0"),
    ("r1_gamma",         10.0,  1.0,   10.0,  "open",   "weight of R1, not (10)'s gamma"),
    ("r1_every",         1,     16,    16,    "2.3",    "steps from one R1 to the next"),
    ("learning_rate_g",  1e-4,  5e-4,  1e-3,  "4.1",    "Adam's learning rate for G"),
    ("learning_rate_d",  4e-4,  5e-4,  1e-3,  "open",   "Adam's learning rate for D_I and D_g"),
    ("fall",             0.0,   0.33,  0.4,   "4.1",    "last share of steps: rates fall"),
    ("ema",              0.999, 0.999, 0.999, "open",   "decay of the running average of G"),
    ("batch",            8,     8,     8,     "4.1",    "faces per step"),
    ("steps",            100_000, 100_000, 2500, "open", "training steps"),
    ("seed",             0,     0,     0,     "open",   "seed of weights, batches and noise"),
]
PRESETS = {preset: {row[0]: row[column] for row in SETTINGS}
           for column, preset in enumerate(("paper", "photos", "drawn"), 1)}
Config = make_dataclass("Config", PRESETS["paper"], frozen=True)


def differences(config: Config) -> str:
    """What a run does not do as --preset paper does, for its first line."""
    def show(value):
        return f"{value:g}" if isinstance(value, float) else str(value)
    changed = [f"{name} {show(value)} ({show(PRESETS['paper'][name])})"
               for name, value in asdict(config).items() if value != PRESETS["paper"][name]]
    return ", ".join(changed) or "nothing"


# ---- One step ------------------------------------------------------------------------

def training_step(nets, config, perceptual, autocast, hr, z1, z2, step: int) -> dict:
    """One step of both discriminators, then one of G. Returns tensors for the log.

    hr (B, 3, H, W) in [-1, 1], z1 and z2 (B, z_dim, h, w); nets: Networks; perceptual:
    (6); autocast: bfloat16 or not; step counts from 0.
    """
    # LR is rounded, as a file is.
    lr = quantize(downscale(hr, config.scale))                  # (B, 3, h, w)
    images = pyramid(hr, len(nets.G.up_blocks))
    real = {"image": images, "gradient": [image_gradient(image) for image in images]}
    if step < config.warmup:
        return warmup_step(nets, config, perceptual, autocast, hr, lr, real)

    # Each is {"image", "gradient"}: lists, coarse to fine; [-1] is (B, 3, H, W).
    level = config.l_z_level or len(images)
    with autocast:
        sr = nets.G(lr, torch.zeros_like(z1))                   # (1)
        h1 = nets.G(lr, z1)                                     # (2)
        h2 = nets.G(lr, z2, level)                              # (2), as far as (8) needs
    F_h = excess(h1["image"][-1], lr, config.eps)               # (12)  (B, 3, h, w)
    F_real = torch.zeros_like(F_h)  # a photograph shrinks to its own LR exactly

    # D step: tell photographs from hallucinations. z2 serves (8) alone.
    on_real = judge(nets, autocast, real, F_real)
    on_h = judge(nets, autocast, detached(h1), F_h.detach())
    terms = {"D_image_real": on_real["image"], "D_image_fake": on_h["image"],
             "D_gradient_real": on_real["gradient"], "D_gradient_fake": on_h["gradient"]}
    loss_D = of_both(discriminator_loss, on_real, on_h)
    if config.beta:
        # D weighs the reconstruction as (10) does for G.
        F_sr = excess(sr["image"][-1], lr, config.eps)          # (12)  (B, 3, h, w)
        on_sr = judge(nets, autocast, detached(sr), F_sr.detach())
        against_sr = of_both(discriminator_loss, on_real, on_sr)
        loss_D = (loss_D + config.beta * against_sr) / (1 + config.beta)
    if step % config.r1_every == 0:
        # Seldom, and then with the weight of all steps.
        terms["R1"] = r1_of_both(nets, real, F_real)
        loss_D = loss_D + config.r1_every * config.r1_gamma / 2 * terms["R1"]
    update(nets.opt_D, loss_D)

    # G step: ask the D just improved again, with a slope that reaches G.
    on_h = judge(nets, autocast, h1, F_h)
    l_z = diversity_loss(h1["gradient"][level - 1], h2["gradient"][level - 1],
                         z1, z2, config.tau)                    # (8)
    halluc = hallucination_loss(generator_loss(on_h["gradient"]),
                                generator_loss(on_h["image"]),
                                l_z, alpha_at(config, step))    # (11)
    adv_g = adv_i = 0.0
    if config.beta:
        on_sr = judge(nets, autocast, sr, F_sr)
        adv_g = generator_loss(on_sr["gradient"])
        adv_i = generator_loss(on_sr["image"])
    fit = distances(perceptual, autocast, sr, hr, real)
    recons = reconstruction_loss(fit["L_percp"], fit["L_grad"], adv_g, adv_i,
                                 config.gamma, config.beta)     # (10)
    tie = (gradient_error(sr) + gradient_error(h1)) / 2
    extra = config.pixel * fit["L_pixel"] + config.tie * tie    # not in the paper
    update(nets.opt_G, recons + halluc + extra)
    moved = 127.5 * (h1["image"][-1] - sr["image"][-1]).abs()   # grey levels
    return terms | fit | {"L_z": l_z, "tie": tie, "F": F_h, "image_moves": moved}


def warmup_step(nets, config, perceptual, autocast, hr, lr, real) -> dict:
    """A step of G alone, at z = 0: (10) without L_adv. z means nothing yet."""
    nothing = torch.zeros(len(lr), nets.G.z_dim, *lr.shape[-2:], device=lr.device)
    with autocast:
        sr = nets.G(lr, nothing)
    fit = distances(perceptual, autocast, sr, hr, real)
    tie = gradient_error(sr)
    recons = reconstruction_loss(fit["L_percp"], fit["L_grad"], 0.0, 0.0, config.gamma)
    update(nets.opt_G, recons + config.pixel * fit["L_pixel"] + config.tie * tie)
    return fit | {"tie": tie}


def judge(nets, autocast, pictures: dict, F: torch.Tensor) -> dict:
    """Logits (B, 1, h, w) of D_I, which is told F (section 3.1), and of D_g."""
    with autocast:
        logits = {"image": nets.D_I(pictures["image"], F),
                  "gradient": nets.D_g(pictures["gradient"])}
    return {domain: logits[domain].float() for domain in logits}


def of_both(loss, on_real: dict, on_fake: dict) -> torch.Tensor:
    """D_I's loss and D_g's."""
    return sum(loss(on_real[domain], on_fake[domain]) for domain in on_real)


def r1_of_both(nets, real: dict, F_real: torch.Tensor) -> torch.Tensor:
    """R1 of D_I and D_g, in float32: a slope of a slope needs all digits."""
    leaves = {domain: [picture.detach().requires_grad_() for picture in real[domain]]
              for domain in real}
    logits = judge(nets, contextlib.nullcontext(), leaves, F_real)
    return sum(r1_penalty(logits[domain], leaves[domain]) for domain in logits)


def distances(perceptual, autocast, sr: dict, hr, real: dict) -> dict:
    """How far the reconstruction is from the truth: (6), (7), and L1 on pixels."""
    image = sr["image"][-1]                                     # (B, 3, H, W)
    with autocast:
        l_percp = perceptual(image, hr)
    return {"L_percp": l_percp,                                            # (6)
            "L_grad": gradient_loss(sr["gradient"][-1], real["gradient"][-1]),  # (7)
            "L_pixel": (image - hr).abs().mean()}


def gradient_error(made: dict) -> torch.Tensor:
    """How far G's gradient output is from the gradient of its own image."""
    return gradient_loss(made["gradient"][-1], image_gradient(made["image"][-1]))


def detached(made: dict) -> dict:
    """The same pictures, through which nothing flows back into G."""
    return {domain: [picture.detach() for picture in made[domain]] for domain in made}


def update(optimizer, loss: torch.Tensor):
    """One step of one player down its loss, averaged over all processes."""
    weights = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    # Only this player's weights get gradients, though the loss runs through the other.
    loss.backward(inputs=weights)
    if processes() > 1:
        for weight in weights:
            dist.all_reduce(weight.grad)  # a sum
            weight.grad /= processes()
    optimizer.step()


def fallen(config, step: int) -> float:
    """1, and over the last share `fall` of the steps down to a tenth."""
    left = 1 - step / config.steps
    return 0.1 ** (1 - left / config.fall) if left < config.fall else 1.0


def alpha_at(config, step: int) -> float:
    """The weight of L_z at a step."""
    # Once z acts, L_z has done its work: what it pays for later is noise.
    return config.alpha * fallen(config, step) ** 2 if config.alpha_falls else config.alpha


def processes() -> int:
    """How many there are under torchrun; 1 without, or where torch lacks distributed."""
    together = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if together else 1


class Networks:
    """All that training changes: G, its average, D_I, D_g and the two optimisers."""

    def __init__(self, config, device):
        torch.manual_seed(config.seed)
        self.G = Generator(config.size, config.scale, config.z_dim, config.z_shared,
                           config.width, config.blocks, config.hard_consistency)
        self.ema = copy.deepcopy(self.G).requires_grad_(False)
        self.D_I = Discriminator(config.width, config.scale, config.d_blocks,
                                 condition_channels=3)
        self.D_g = Discriminator(config.width, config.scale, config.d_blocks)
        for network in (self.G, self.ema, self.D_I, self.D_g):
            # The layout in which convolutions are fastest.
            network.to(device, memory_format=torch.channels_last)
        # Section 4.1: beta_1 = 0. With momentum each player would overshoot the other.
        options = dict(betas=(0.0, 0.9), fused=device != "meta")
        self.opt_G = torch.optim.Adam(self.G.parameters(), **options)
        both = [*self.D_I.parameters(), *self.D_g.parameters()]
        self.opt_D = torch.optim.Adam(both, **options)
        self.set_learning_rates(config, 0)

    def set_learning_rates(self, config, step: int):
        """Adam's rates: over the last share `fall` of the steps they fall to a tenth."""
        factor = fallen(config, step)
        self.opt_G.param_groups[0]["lr"] = factor * config.learning_rate_g
        self.opt_D.param_groups[0]["lr"] = factor * config.learning_rate_d

    @torch.no_grad()
    def update_ema(self, decay: float, step: int):
        """The running average follows G: faster at first, to forget the poor first weights."""
        decay = min(decay, (1 + step) / (10 + step))
        for average, current in zip(self.ema.parameters(), self.G.parameters()):
            average.lerp_(current, 1 - decay)

    def state(self) -> dict:
        """What a checkpoint keeps beside the running average."""
        names = ("G", "D_I", "D_g", "opt_G", "opt_D")
        return {name: getattr(self, name).state_dict() for name in names}

    def load(self, content: dict, path):
        """Take up the state of a checkpoint."""
        load_weights(self.ema, content["generator"], path)
        for name in ("G", "D_I", "D_g"):
            load_weights(getattr(self, name), content[name], path)
        self.opt_G.load_state_dict(content["opt_G"])
        self.opt_D.load_state_dict(content["opt_D"])

    def start_from(self, path):
        """G and its average begin as a trained generator; the discriminators begin anew."""
        trained = load_generator(path)
        for name, value in self.G.settings.items():
            require(trained.settings[name] == value,
                    f"{path} has {name} {trained.settings[name]}, and this run {value}")
        self.G.load_state_dict(trained.state_dict())
        self.ema.load_state_dict(trained.state_dict())


# ---- The loop ------------------------------------------------------------------------

def train(config, arguments, perceptual, faces, valid, content: dict | None = None):
    """Train until config.steps or Ctrl-C; `content` is the checkpoint to go on from."""
    nets = Networks(config, arguments.device)
    start = 0
    if content:
        nets.load(content, arguments.resume)
        start = content["step"]
    elif arguments.init:
        nets.start_from(arguments.init)
    # Under torchrun every process takes its share of each batch, and the first one
    # reports.
    world = processes()
    rank = dist.get_rank() if world > 1 else 0
    report = Report(config, arguments, nets, faces, valid, content) if rank == 0 else None
    kind = torch.device(arguments.device).type
    autocast = torch.autocast(kind, torch.bfloat16, enabled=arguments.amp)

    for step in range(start, config.steps):
        nets.set_learning_rates(config, step)
        hr, z1, z2 = batch_at(faces, config, step, arguments.device)
        terms = training_step(nets, config, perceptual, autocast, hr[rank::world],
                              z1[rank::world], z2[rank::world], step)
        nets.update_ema(config.ema, step)
        stop = report.step_done(step + 1, terms) if report else False
        if world > 1:
            stop = tell_all(stop)
        if stop:
            break
    if report:
        report.finish()


def tell_all(stop: bool) -> bool:
    """The first process's answer, in every process."""
    answer = torch.tensor(float(stop))  # on the CPU: nobody waits for a GPU
    dist.broadcast(answer, 0)
    return bool(answer)


def batch_at(faces: torch.Tensor, config, step: int, device) -> tuple:
    """hr (B, 3, H, W) in [-1, 1], z1 and z2 (B, z_dim, h, w), from nothing but seed and step."""
    rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    chosen = torch.randint(len(faces), (config.batch,), generator=rng)
    mirrored = torch.rand(config.batch, generator=rng) < 0.5
    small = config.size // config.scale
    z1, z2 = draw_z((2, config.batch, config.z_dim, small, small), config.z_shared, rng)
    hr = faces[chosen]
    hr[mirrored] = hr[mirrored].flip(-1)
    return from_levels(hr.to(device)), z1.to(device), z2.to(device)


# ---- Faces: drawn, or from a folder; both end as one uint8 tensor (N, 3, size, size) -

def draw_faces(random: torch.Tensor, size: int) -> torch.Tensor:
    """Drawn faces: random (N, 11) in [0, 1] -> (N, 3, size, size) on 8-bit levels.

    The last two columns, above a half for yes, are smile and glasses. Both are hidden
    from LR: shrunk to 8x8 or 4x4, faces that differ in nothing else are equal, up to
    one grey level.
    """
    require(size % 8 == 0, f"drawn faces need a size that is a multiple of 8, got {size}")
    # Lengths are in eighths of the side; x and y are the centres of pixels.
    axis = (torch.arange(size) + 0.5) * 8 / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def colour(*rgb):
        return torch.tensor(rgb).view(3, 1, 1)

    def inside(distance):
        """The share of each pixel inside a shape, from the signed distance to its outline."""
        return (0.5 - distance * size / 8).clamp(0, 1)

    def ellipse(cx, cy, rx, ry):
        return inside((torch.hypot((x - cx) / rx, (y - cy) / ry) - 1) * ry)

    paint = torch.lerp  # paint(image, colour, where)
    r = random[:, :, None, None]
    black = colour(-0.9, -0.9, -0.9)
    tone = 0.9 * r[:, 3:4] + 0.1 * r[:, 4:7]
    skin = tone * colour(0.72, 0.72, 0.68) + colour(-0.3, -0.5, -0.65)
    hair = r[:, 7:8] * colour(1.2, 0.9, 0.4) - 0.85
    width = 2.5 + 0.4 * r[:, 8:9]
    image = (1.6 * r[:, :3] - 0.8).expand(-1, 3, size, size)    # the background
    image = paint(image, hair, ellipse(4, 3.6, width + 0.45, 3.3))
    image = paint(image, skin, ellipse(4, 4.2, width, 3.4) * inside(2.3 - y))
    image = paint(image, black, ellipse(3, 4, 0.2, 0.3) + ellipse(5, 4, 0.2, 0.3))

    # A frown is the smile upside down, inside one row of LR's blocks: their means stay.
    upwards = torch.where(r[:, 9:10] > 0.5, 1, -1)
    bend = 0.52 * (0.5 - ((x - 4) / 1.5).square()) * upwards
    lips = torch.maximum((y - 5.5 - bend).abs() - 0.2, (x - 4).abs() - 1.5)
    image = paint(image, colour(0.1, -0.9, -0.8), inside(lips))

    # Glasses: two frames of 2x2 blocks each and a bridge. Then every block gets its
    # mean back.
    lens = torch.maximum(((x - 4).abs() - 1.05).abs(), (y - 4).abs()) - 0.75
    frame = inside(lens.abs() - 0.14)
    bridge = inside(torch.maximum((y - 4).abs() - 0.1, (x - 4).abs() - 0.3))
    with_glasses = paint(image, black, torch.maximum(frame, bridge))
    with_glasses = project_onto_lr(with_glasses, downscale(image, size // 8))
    return quantize(torch.where(r[:, 10:11] > 0.5, with_glasses, image))


def load_faces(arguments, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation faces, uint8 (N, 3, size, size); no face is in both."""
    if not arguments.data:
        require(not arguments.val, "--val goes with a folder of photos, not with drawn faces")
        require(config.size / config.scale in (2, 4, 8),
                "LR of drawn faces must be 8x8, 4x4 or 2x2")
        counts = arguments.sketches, arguments.val_faces
        random = torch.rand(sum(counts), 11, generator=torch.Generator().manual_seed(0))
        drawn = [to_levels(draw_faces(part, config.size)).byte() for part in random.split(50)]
        return torch.cat(drawn).split(counts)
    photos = list_photos(arguments.data)
    if arguments.val:
        held_out = list_photos(arguments.val)
    else:
        # By a hash of each path: a photo that joins the folder later moves no other.
        number = {path: path_hash(path.relative_to(arguments.data)) for path in photos}
        held_out = [path for path, n in number.items() if n % 20 == 0]
        held_out = held_out or [min(number, key=number.get)]  # of a small folder, one
    known = {path.resolve() for path in held_out}
    photos = [path for path in photos if path.resolve() not in known]
    require(photos, f"all photos of {arguments.data} are among those to validate on")
    faces = read_photos(photos, config.size)
    return faces, read_photos(held_out[:arguments.val_faces], config.size)


def path_hash(path: Path) -> int:
    """The same number on every system, whatever its slashes and accents are made of."""
    spelling = unicodedata.normalize("NFC", path.as_posix())
    return zlib.crc32(spelling.encode(errors="surrogateescape"))


# ---- Reporting: log, validation, pictures, checkpoints -------------------------------

LOG_COLUMNS = ["step", "images_per_s", "D_image_real", "D_image_fake", "D_gradient_real",
               "D_gradient_fake", "R1", "F", "L_percp", "L_grad", "L_pixel", "L_z", "image_moves",
               "tie"]

VALID_COLUMNS = ["step", "faces"]
VALID_COLUMNS += [f"{row}_{score}" for row in ("bicubic", "SR", "hallucination")
                  for score in ("psnr", "ssim", "lr_psnr", "lpips", "realism")]
VALID_COLUMNS += [f"hallucination_{score}"
                  for score in ("pixel_std", "diversity", "spread", "outside")]


class Report:
    """All that happens beside the loop. It asks the device only when a line is due."""

    def __init__(self, config, arguments, nets: Networks, faces, valid, content):
        self.config = config
        self.arguments = arguments
        self.nets = nets
        self.valid = from_levels(valid).to(arguments.device)
        self.judges = find_judges(arguments, faces[evenly(len(faces), len(valid))])
        self.out = run_folder(arguments)
        # (score, faces scored, by realism or not): a new folder begins anew.
        goes_on = content and (self.out / "best.pt").exists()
        self.best = content["best"] if goes_on else None
        self.step = content["step"] if content else 0
        self.terms = {}
        self.count = 0
        self.stop = False
        self.since = time.time()
        for number in stop_signals():
            signal.signal(number, self.interrupt)

    def interrupt(self, *_):
        """The first Ctrl-C lets the step end and saves; the second kills."""
        self.stop = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def print(self, text: str):
        """Print; where nobody reads any more (`| head`), save and stop."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            self.stop = True
            sys.stdout = open(os.devnull, "w")

    def step_done(self, step: int, terms: dict) -> bool:
        """Whatever is due after this many steps. True when the loop is to end."""
        self.step = step
        self.count += 1
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value.detach().mean())
        finished = self.stop or step == self.config.steps  # read once: Ctrl-C may come now
        due = finished or step % self.arguments.val_every == 0
        if due or step == 1 or step % self.arguments.log_every == 0:
            self.log()  # it also keeps NaN out of a checkpoint
        if due:
            self.save("last.pt")  # first: the rest may be interrupted
            self.validate()
            self.save("last.pt")
        return finished

    def log(self):
        """One line and one CSV row.

        Raises FloatingPointError, naming the term, at NaN or Inf.
        """
        # Means over the steps since the last line, where a step has the term.
        means = {name: torch.stack(values).mean().item() for name, values in self.terms.items()}
        weights = [*self.nets.G.parameters(), *self.nets.opt_D.param_groups[0]["params"]]
        total = sum(weight.detach().sum() for weight in weights).item()
        for name, value in (means | {"a weight": total}).items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} became {value} by step {self.step}; "
                                         "no file changed")
        seconds = time.time() - self.since
        images_per_s = self.count * self.config.batch / seconds
        # Steps of the warm-up are faster: they tell nothing of those after it.
        end = self.config.steps
        left = "left"
        if self.step < self.config.warmup:
            end = min(end, self.config.warmup)
            left = "left of the warm-up, z means nothing yet"
        minutes = seconds / self.count * (end - self.step) / 60
        text = "".join(f"  {name} {means[name]:.3g}" for name in LOG_COLUMNS if name in means)
        self.print(f"step {self.step}  {images_per_s:.1f} images/s  {minutes:.1f} min {left}{text}")
        row = {"step": self.step, "images_per_s": images_per_s} | means
        append_row(self.out / "log.csv", row, LOG_COLUMNS)
        self.terms = {}
        self.count = 0
        self.since = time.time()

    def validate(self):
        """Score the running average, draw the grid, keep the best."""
        began = time.time()
        rows = summarize(evaluate(self.nets.ema, self.valid, 4, **self.judges))
        table = {"step": self.step, "faces": len(self.valid)}
        for name, scores in rows.items():
            text = "  ".join(f"{score} {value:.3f}" for score, value in scores.items())
            self.print(f"  {name:13}  {text}")
            table |= {f"{name}_{score}": value for score, value in scores.items()}
        append_row(self.out / "valid.csv", table, VALID_COLUMNS)
        self.draw_grid()
        # Realism alone is bought with samples all alike, spread alone with torn faces.
        # Where they are not measured, the reconstruction has to decide.
        score = table["SR_psnr"]
        if self.judges:
            spread = min(max(table["hallucination_spread"], 1e-6), 1)
            score = -table["hallucination_realism"] / spread
        if self.step > self.config.warmup and self.beats_best(score):
            self.best = (score, len(self.valid), bool(self.judges))
            self.save("best.pt")
        self.since += time.time() - began

    def beats_best(self, score: float) -> bool:
        """Scores of other faces, or of another kind, do not compare: all begins anew."""
        kind = (len(self.valid), bool(self.judges))
        return not self.best or self.best[1:] != kind or score > self.best[0]

    def draw_grid(self):
        """The same six faces and six z at every step."""
        hr = self.valid[:6]
        lr = quantize(downscale(hr, self.config.scale))
        rng = torch.Generator().manual_seed(0)
        z = draw_z((6, self.config.z_dim, *lr.shape[-2:]), self.config.z_shared, rng)
        sheet = contact_sheet(self.nets.ema, lr, z.to(lr.device), hr)
        with warn_of_failure("new grid.png"):
            save_image(sheet, self.out / "grid.png")

    def save(self, name: str):
        """Write a checkpoint from which --resume goes on, with the same data."""
        note = ""
        if self.step <= self.config.warmup:
            note = (f"step {self.step} is within the warm-up of {self.config.warmup}: "
                    "z means nothing yet")
        save_checkpoint(self.out / name, self.nets.ema, **self.nets.state(), step=self.step,
                        best=self.best, config=asdict(self.config), note=note,
                        run={name: getattr(self.arguments, name) for name in RUN})

    def finish(self):
        """The last words: how to go on, or what came of it."""
        checkpoint = shlex.quote(str(self.out / "last.pt"))
        if self.step < self.config.steps:
            self.print(f"stopped and saved; go on with\n  python train.py --resume {checkpoint}")
        else:
            self.print(f"done: look at {self.out / 'grid.png'}, sample with\n"
                       f"  python sample.py PHOTO --checkpoint {checkpoint}")
        if not self.arguments.data:
            found = calibrate(self.nets.ema, self.config, self.arguments.device)
            self.print(calibration_text(found))


def stop_signals() -> list:
    """Ctrl-C, a scheduler's, and a closed window's, unless nohup has it ignored."""
    known = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    return [number for number in known  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN]


def run_folder(arguments) -> Path:
    """The folder of results, this run's alone. ValueError where another run is."""
    home = arguments.resume and Path(arguments.resume).parent
    if home and home.resolve() == Path(arguments.out or home).resolve():
        return home
    kind = Path(arguments.data or "sketches").name + time.strftime("-%m%d-%H%M%S")
    out = Path(arguments.out or Path("runs", kind))
    files = ("last.pt", "best.pt", "log.csv", "valid.csv", "grid.png")
    require(not any((out / name).exists() for name in files),
            f"{out} holds a run already: --resume it, delete it, or name another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.csv").touch(exist_ok=False)  # of two runs at one moment, one fails here
    return out


@contextlib.contextmanager
def warn_of_failure(what: str):
    """A side file that cannot be written is one warning, and no reason to stop."""
    try:
        yield
    except OSError as error:
        print(f"WARNING: no {what}: {error}")


def append_row(path: Path, row: dict, columns: list[str]):
    """One more line of a CSV table."""
    with warn_of_failure(f"row of step {row['step']} in {path.name}"):
        new = not path.exists() or path.stat().st_size == 0
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            if new:
                writer.writeheader()
            writer.writerow(row)


def find_judges(arguments, photographs: torch.Tensor) -> dict:
    """LPIPS and realism for `evaluate`, or nothing, saying why."""
    if not arguments.data:
        return {}  # drawn faces are judged at the end, by what is known of them
    try:
        require(photographs.shape[-1] >= 32, "images are smaller than 32x32")
        photographs = from_levels(photographs).to(arguments.device)
        return {"lpips": LPIPS().to(arguments.device), "realism": Realism(photographs)}
    except (ValueError, OSError) as error:
        print(f"LPIPS and realism are not measured: {error}")
        return {}


# ---- Calibration: of drawn faces it is known what fits an LR -------------------------

def possibilities(count: int, size: int, seed: int = 2) -> torch.Tensor:
    """The four faces behind each LR: (4, count, 3, size, size).

    In this order: smile and glasses, smile alone, glasses alone, neither.
    """
    shared = torch.rand(count, 9, generator=torch.Generator().manual_seed(seed))
    kinds = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]])
    return torch.stack([draw_faces(torch.cat([shared, kind.expand(count, 2)], 1), size)
                        for kind in kinds])


def calibration(samples: torch.Tensor, sr: torch.Tensor, truth: torch.Tensor) -> dict:
    """Do samples (K, N, 3, H, W) show the four possibilities (4, N, 3, H, W) of each LR?

    "found": how many of the four, cleanly, a mean over faces; "smiles", "glasses": % of
    samples. Clean: at most 3 dB worse than sr (N, 3, H, W) is to its own nearest.
    """
    def errors(images):  # (..., N, 3, H, W) -> (4, ..., N), mean squared, in grey levels
        return torch.stack([(to_levels(images) - to_levels(one)).square().mean((-3, -2, -1))
                            for one in truth])
    error = errors(samples)                                     # (4, K, N)
    nearest = error.argmin(0)                                   # (K, N)
    clean = error.amin(0) <= 2 * errors(sr).amin(0)             # (K, N)
    found = sum(((nearest == kind) & clean).any(0).float().mean() for kind in range(4))
    return {"found": found.item(),
            "smiles": 100 * (nearest < 2).float().mean().item(),
            "glasses": 100 * (nearest % 2 == 0).float().mean().item()}


@torch.no_grad()
def calibrate(generator, config, device, faces: int = 100, samples: int = 10) -> dict:
    """`calibration` of hallucinations of held-out drawn faces."""
    truth = possibilities(faces, config.size)                   # (4, faces, 3, H, W)
    lr = quantize(downscale(truth[0], config.scale)).to(device)  # (faces, 3, h, w)
    rng = torch.Generator().manual_seed(0)
    z = draw_z((1 + samples, faces, config.z_dim, *lr.shape[-2:]), config.z_shared, rng)
    z[0] = 0
    made = torch.stack([sample(generator, lr, latent.to(device)).cpu() for latent in z])
    return calibration(made[1:], made[0], truth)


def calibration_text(found: dict) -> str:
    """The result for a reader who has just trained for the first time."""
    return (f"Each small face fits four: smile or not, glasses or not. Ten hallucinations show "
            f"{found['found']:.2f} of the four cleanly\n(a perfect sampler 3.77, one face repeated "
            f"1); {found['smiles']:.0f} % smile and {found['glasses']:.0f} % wear glasses (50 and "
            "50 would be right).")


# ---- Command line --------------------------------------------------------------------

# What a run is made of beside its Config: kept in its checkpoints, and taken up by
# --resume.
RUN = dict(data=None, val=None, sketches=2000, val_faces=128, val_every=500, log_every=50,
           amp=None, photos=None)


def build_parser() -> argparse.ArgumentParser:
    """The run's own flags, and one per setting. What is not said stays None."""
    parser = argparse.ArgumentParser(description="Train hallusr, on photos or drawn faces.")
    run = parser.add_argument_group("the run").add_argument
    run("--data", type=path_argument, help="a folder of photos (default: drawn faces)")
    run("--val", type=path_argument, help="to validate on (default: 5 %% of --data)")
    run("--out", type=path_argument,
        help="folder for results (default: a new one in runs, or where --resume lies)")
    run("--resume", type=path_argument, help="go on from this last.pt, with its settings")
    run("--init", type=path_argument,
        help="start G from this checkpoint's generator, with new discriminators and no warm-up")
    run("--preset", choices=list(PRESETS),
        help="a column of settings (default: photos with --data, else drawn)")
    run("--device", default="auto",
        help="cpu, cuda, cuda:1, mps, ... (default: a GPU if found)")
    run("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (default: if it pays)")
    run("--sketches", type=count, help="faces to draw (default: 2000)")
    run("--val-faces", type=count, help="faces to validate on (default: 128)")
    run("--val-every", type=count, help="steps between scores (default: 500)")
    run("--log-every", type=count, help="steps between log lines (default: 50)")
    method = parser.add_argument_group("settings").add_argument
    for name, paper, photos, drawn, section, meaning in SETTINGS:
        how = {"type": type(paper)}
        if type(paper) is bool:
            how = {"action": argparse.BooleanOptionalAction}
        method("--" + name.replace("_", "-"), **how,
               help=f"{meaning} (paper: {paper}, {section}; photos: {photos}; drawn: {drawn})")
    return parser


def prepare(words=None) -> tuple[argparse.Namespace, Config, dict | None]:
    """Arguments, settings, and the checkpoint to resume; what is said goes first."""
    arguments = build_parser().parse_args(words)
    # For a run that is resumed from elsewhere.
    arguments.data = arguments.data and os.path.abspath(arguments.data)
    arguments.val = arguments.val and os.path.abspath(arguments.val)
    content = None
    if arguments.resume:
        content = load_run(arguments)
        values = content["run"] | content["config"]
    else:
        values = RUN | PRESETS[arguments.preset or ("photos" if arguments.data else "drawn")]
        if arguments.steps:
            # A short run must reach z too.
            values["warmup"] = min(values["warmup"], arguments.steps // 2)
        if arguments.init:
            values["warmup"] = 0  # a trained G knows the reconstruction
    for name, value in values.items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    config = Config(**{name: getattr(arguments, name) for name in PRESETS["paper"]})
    check_config(config)
    require(not content or content["step"] < config.steps,
            f"{arguments.resume} is done: raise --steps")
    arguments.device = find_device(arguments.device)
    if arguments.amp is None:
        arguments.amp = bfloat16_pays(arguments.device)
    return arguments, config, content


def load_run(arguments) -> dict:
    """The checkpoint that --resume names. ValueError for one that cannot go on."""
    require(not arguments.preset, "--resume has the settings of its run: no --preset")
    require(not arguments.init, "--resume goes on with its own G: no --init")
    path = Path(arguments.resume)
    content = load_checkpoint(path)
    require("opt_G" in content, f"{path} holds a generator alone: it cannot be trained on")
    known = {*RUN, *PRESETS["paper"]}
    require(known == {*content["run"], *content["config"]},
            f"{path} is of another version: go on with that one")
    last = Path(arguments.out or path.parent, "last.pt")
    latest = load_checkpoint(last).get("step", 0) if last != path and last.is_file() else 0
    require(content["step"] >= latest, f"{path} is of step {content['step']}, and {last} of "
                                       f"{latest} would be overwritten: name another --out")
    return content


def bfloat16_pays(device: str) -> bool:
    """Does this machine compute in bfloat16 so much faster that lost digits are worth it?"""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or "LOCAL_RANK" in os.environ:
        return False  # not tried; torchrun's processes must agree, and two timings might not
    def seconds(dtype):  # some CPUs have bfloat16 and are slower in it
        square = torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: square @ square, number=1))
    # By turns: whatever runs while the threads still wake up is slow.
    turns = [(seconds(torch.bfloat16), seconds(torch.float32)) for _ in range(4)]
    bfloat16 = min(short for short, _ in turns)
    float32 = min(long for _, long in turns)
    return 1.5 * bfloat16 < float32


def join_processes(arguments, config):
    """Under torchrun: become one of several processes, with a GPU and a share of each batch."""
    # torchrun sets all three; clusters set WORLD_SIZE alone, for other purposes.
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if arguments.device == "cuda" else "gloo")
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world = dist.get_world_size()
    require(config.batch % world == 0, f"batch {config.batch} is no multiple of {world} processes")
    if dist.get_rank() > 0:  # the first one speaks, and all stop when it does
        sys.stdout = open(os.devnull, "w")
        for number in stop_signals():
            signal.signal(number, signal.SIG_IGN)


def main(words=None):
    arguments, config, content = prepare(words)
    if not arguments.data and "OMP_NUM_THREADS" not in os.environ:
        # Small images gain little from a second thread, and lose much beside a busy program.
        torch.set_num_threads(1)
    join_processes(arguments, config)
    if config.warmup >= config.steps:
        print(f"WARNING: all {config.steps} steps are warm-up, and z will mean nothing: raise "
              "--steps or lower --warmup")
    print(f"differs from --preset paper in: {differences(config)}")
    # Before the faces are read, as its weights may be missing.
    pixels = config.perceptual == "pixels"
    perceptual = torch.nn.L1Loss() if pixels else PerceptualLoss(config.perceptual)
    faces, valid = load_faces(arguments, config)
    before = arguments.photos or len(faces)
    arguments.photos = len(faces)
    joined = f" ({before} before)" if before != len(faces) else ""
    print(f"{len(faces)} faces of {config.size}x{config.size} to train on{joined}, {len(valid)} to "
          f"validate on; {config.steps} steps, seed {config.seed}, {arguments.device}, "
          f"{'bfloat16' if arguments.amp else 'float32'}")
    train(config, arguments, perceptual.to(arguments.device), faces, valid, content)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()  # or gloo's threads can abort an ended process


# ---- Clear errors for wrong settings -------------------------------------------------

def check_config(config):
    """Raise ValueError, naming it, for a setting out of its range."""
    check_architecture(config.width, config.scale, min(config.blocks, config.d_blocks))
    require(config.size >= 11 and config.size % config.scale == 0,  # SSIM's window is 11
            f"size must be 11 or more and a multiple of scale {config.scale}, got {config.size}")
    for name, value in asdict(config).items():
        if name == "perceptual":
            continue  # PerceptualLoss knows its layers
        low, high = 0, 2 ** 32 - 1
        if name in ("z_dim", "r1_every", "batch", "steps"):
            low = 1
        if name in ("z_shared", "fall"):
            high = 1
        require(low <= value <= high, f"{name} must be in [{low}, {high}], got {value}")
    levels = config.scale.bit_length() - 1
    require(config.l_z_level <= levels,
            f"l_z_level must be in [0, {levels}] for scale {config.scale}, got "
            f"{config.l_z_level}")
    require(config.tau > 0, f"tau must be positive, got {config.tau}")
    require(config.ema < 1, f"ema must be below 1, got {config.ema}")


if __name__ == "__main__":
    run_as_script(main)
