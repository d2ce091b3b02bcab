"""Train hallusr: one loop, for a CPU or one GPU, or for several under torchrun.

    python train.py                      drawn faces, no data or weights needed: minutes
    python train.py --data FOLDER        any folder tree of images

Writes into --out: last.pt and best.pt (checkpoints), grid.png (look at it), log.csv, valid.csv.
Stop it with Ctrl-C at any time; `python train.py --resume OUT/last.pt` goes on from there.
"""
import signal

if __name__ == "__main__":  # until there is something to save, Ctrl-C just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import math
import os
import shlex
import sys
import time
import timeit
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist

from hallusr import (LPIPS, Discriminator, Generator, PerceptualLoss, Realism, check_architecture,
                     discriminator_loss, diversity_loss, downscale, draw_z, excess, from_levels,
                     generator_loss, gradient_loss, hallucination_loss, image_gradient,
                     load_checkpoint, load_weights, project_onto_lr, pyramid, quantize, r1_penalty,
                     reconstruction_loss, require, sample, save_checkpoint, std_map, to_levels,
                     whole_file)
from sample import (FolderFaces, contact_sheet, count, evaluate, find_device, run_as_script,
                    spread_out, stack, summarize, write_image)

# ---- Settings -----------------------------------------------------------------------------------

def setting(default, source: str, meaning: str, low=0, high=2 ** 32 - 1):
    """A field of Config: its range, and the part of the paper that gives its value, or "open"."""
    return field(default=default, metadata=dict(source=source, help=meaning, range=(low, high)))


@dataclass(frozen=True)
class Config:
    """The numbers of the method, as printed, or our choice where open. ValueError out of range."""
    size: int = setting(64, "open", "side of the large image, in pixels (C1)")
    scale: int = setting(8, "section 4.1", "how many times smaller LR is, a power of two")
    z_dim: int = setting(64, "open", "m, the numbers of the noise z (C4)", 1)
    z_shared: float = setting(1.0, "section 2", "z from one vector (1) to a map (0) (D1)", 0, 1)
    widths: tuple = setting((128, 96, 64, 32), "open", "channels, coarse to fine (C7)")
    blocks: int = setting(8, "Fig. 2", "residual blocks in G")
    d_blocks: int = setting(8, "section 3.2", "residual blocks in each discriminator (D9)")
    hard_consistency: bool = setting(False, "(9), (12)", "make DS(image) = LR inside G (D3)")
    explore: str = setting("branch", "(8)", "what L_z moves: branch, or gradient, image (D10)")
    perceptual: str = setting("relu2_2", "open", "VGG-16 layer of (6), or 'pixels' (C16, D6)")
    gamma: float = setting(10.0, "section 4.1", "weight of (6) and (7) in (10) (D13)")
    beta: float = setting(0.1, "section 4.1", "weight of the adversarial losses in (10) (D13)")
    d_sr: float = setting(1.0, "section 2.3", "weight of SR beside z1's image in D's loss (D12)")
    alpha: float = setting(1.0, "section 4.1", "weight of the diversity loss in (11)")
    tau: float = setting(1.0, "open", "ceiling of the diversity loss (8) (C3)", 1e-6)
    eps: float = setting(0.1, "section 4.1", "free disagreement with LR in (12), grey levels (C19)")
    tie: float = setting(0.0, "(10), (11)", "weight of |g - grad(I)| (D4)")
    pixel: float = setting(0.0, "(10)", "weight of L1 on pixels at z = 0 (D7)")
    warmup: int = setting(0, "section 2.3", "first steps, of G alone: z = 0, no D (D8)")
    r1_gamma: float = setting(10.0, "open", "R1's weight; another gamma than (10)'s (C12)")
    r1_every: int = setting(1, "section 2.3", "steps from one R1 penalty to the next (D2)", 1)
    lr_g: float = setting(1e-4, "section 4.1", "Adam's learning rate for G (D5)")
    lr_d: float = setting(4e-4, "open", "Adam's learning rate for D_I and D_g (C13, D5)")
    fall: float = setting(0.0, "section 4.1", "last share of the steps: rates fall (D11)", 0, 1)
    ema: float = setting(0.999, "open", "decay of the running average of G (C14)", 0, 0.999_999)
    batch: int = setting(8, "section 4.1", "faces per step", 1)
    steps: int = setting(100_000, "open", "training steps (C22)", 1)
    seed: int = setting(0, "open", "seed of weights, batches and noise")

    def __post_init__(self):
        check_architecture(self.widths, self.scale, min(self.blocks, self.d_blocks))
        require(self.size >= 11 and self.size % self.scale == 0,  # SSIM's window is 11
                f"size must be 11 or more and a multiple of scale {self.scale}, got {self.size}")
        require(self.explore in ("branch", "gradient", "image"),
                f"explore must be branch, gradient or image, got {self.explore}")
        for item in fields(self):
            value, (low, high) = getattr(self, item.name), item.metadata["range"]
            require(isinstance(value, str | tuple) or low <= value <= high,
                    f"{item.name} must be in [{low}, {high}], got {value}")


# What to change for a run of hours on two CPU cores: deviations, and choices where it is open.
RECOMMENDED = dict(z_dim=4, z_shared=0.7, r1_every=16, hard_consistency=True, tie=1.0, lr_g=5e-4,
                   lr_d=5e-4, gamma=2.0, beta=0.0, d_sr=0.0, pixel=10.0, warmup=3000, d_blocks=2,
                   perceptual="relu3_3", tau=0.08, r1_gamma=1.0, fall=0.33)
# On top of either, for drawn faces: a small network, to learn in minutes.
SKETCHES = dict(size=32, scale=4, widths=(48, 32, 16), blocks=2, z_shared=1.0, perceptual="pixels",
                gamma=10.0, beta=0.1, d_sr=0.1, pixel=0.0, warmup=600, tau=0.02, alpha=5.0,
                lr_g=1e-3, lr_d=1e-3, fall=0.4, steps=2500)


def deviations(config: Config) -> list[str]:
    """Every setting that the paper gives and that differs here, as in "alpha 4 (paper: 1)"."""
    pairs = [(item.name, getattr(config, item.name), item.default) for item in fields(Config)
             if item.metadata["source"] != "open"]
    special = ((config.perceptual == "pixels", "perceptual", "a layer of VGG-16"),
               (config.lr_d == config.lr_g, "lr_d", "TTUR, another rate than G's"),
               (not config.r1_gamma, "r1_gamma", "R1"))
    pairs += [(name, getattr(config, name), paper) for differs, name, paper in special if differs]
    return [f"{name} {ours} (paper: {paper})".replace(".0 ", " ").replace(".0)", ")")
            for name, ours, paper in pairs if ours != paper]


# ---- Training -----------------------------------------------------------------------------------

def train(config: Config, arguments, perceptual, faces, valid, content: dict | None = None):
    """Train until config.steps or Ctrl-C. Logs, pictures and checkpoints go to arguments.out."""
    nets = Networks(config, arguments.device)
    start = nets.load(content, arguments.resume) if content else 0
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    report = Report(config, arguments, nets, faces, valid, content) if rank == 0 else None
    amp = torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.amp)
    for step in range(start, config.steps):
        nets.set_rates(config, step)
        batch = batch_at(faces, config, step, arguments.device)
        hr, z1, z2 = (part[rank::world] for part in batch)  # every process its share
        terms = training_step(nets, perceptual, amp, config, hr, z1, z2, step)
        nets.update_ema(config.ema, step)
        stop = torch.tensor(float(report.after(step + 1, terms) if report else 0))
        if world > 1:
            dist.broadcast(stop, 0)  # all ask the first; on the CPU, so that no GPU is waited for
        if stop:
            break
    if report:
        report.goodbye()


def training_step(nets, perceptual, amp, config: Config, hr, z1, z2, step: int) -> dict:
    """One step of both players (C20), D first (C18); in the warm-up (D8) of G alone, at z = 0.

    hr (B, 3, H, W), z1 and z2 (B, z_dim, h, w). Returns the terms for the log.
    """
    B, playing = len(hr), step >= config.warmup  # D8
    lr = quantize(downscale(hr, config.scale))  # S4
    real = {"image": pyramid(hr, len(config.widths) - 1)}
    real["gradient"] = [image_gradient(image) for image in real["image"]]  # C11

    # G once, three blocks of B, an order that all below relies on: (1) at z = 0, (2) at z1, z2.
    z = torch.cat([torch.zeros_like(z1), z1, z2]) if playing else torch.zeros_like(z1)
    with amp:  # {"image", "gradient"}: lists over resolutions of (3B, 3, ., .); B in the warm-up
        made = nets.G(lr.repeat(len(z) // B, 1, 1, 1), z)
    image = made["image"][-1]  # C17: (6)-(8) and F see the finest alone     # (3B, 3, H, W)
    edges = image_gradient(image)  # of the image; G's own g is in `made`    # (3B, 3, H, W)
    terms, l_z = {}, 0.0
    adv_sr = adv_h = {"image": 0.0, "gradient": 0.0}
    if playing:
        # D judges z1, never z2; and SR unless beta = d_sr = 0 (S3, C10, D12, D13): J = 2B, else B.
        judged = slice(0 if config.beta or config.d_sr else B, 2 * B)
        fake = {domain: [picture[judged] for picture in made[domain]] for domain in made}
        F = excess(image[judged], lr.repeat(3, 1, 1, 1)[judged], config.eps) # (J, 3, h, w)
        terms = update_discriminators(nets, amp, config, real, fake, F, B, step)
        adv_sr, adv_h = adversarial_losses(nets, amp, fake, F, B)
        explored = {"branch": made.get("gradient"), "image": made["image"],  # D10
                    "gradient": [edges]}[config.explore][-1]
        _, g1, g2 = explored.chunk(3)                                        # (B, 3, H, W) each
        l_z = diversity_loss(g1, g2, z1, z2, config.tau)
        terms |= dict(L_z=l_z, image_moves=(image[B:2 * B] - image[2 * B:]).abs() * 127.5)
    # G step: minimise (10) at z = 0 plus (11): L_adv at z1, L_z at z1 and z2. D stands still.
    with amp:
        l_percp = perceptual(image[:B], hr)
    l_pixel = (image[:B] - hr).abs().mean()                                  # D7
    l_grad = tie = torch.zeros((), device=hr.device)
    if "gradient" in made:
        l_grad = gradient_loss(made["gradient"][-1][:B], real["gradient"][-1])
        tie = gradient_loss(made["gradient"][-1], edges)                     # D4, at any z
    recons = reconstruction_loss(l_percp, l_grad, adv_sr["gradient"], adv_sr["image"],
                                 config.gamma, config.beta)
    halluc = hallucination_loss(adv_h["gradient"], adv_h["image"], l_z, config.alpha)
    descend(nets.opt_G, recons + halluc + config.pixel * l_pixel + config.tie * tie)
    return terms | dict(L_percp=l_percp, L_grad=l_grad, L_pixel=l_pixel, tie=tie)


def update_discriminators(nets, amp, config: Config, real, fake, F, B: int, step: int) -> dict:
    """D step: minimise -log D(real) - log(1 - D(fake)) and R1, for D_I and D_g."""
    none = torch.zeros_like(F[:B])
    given = {"image": torch.cat([none, F.detach()]), "gradient": None}  # 3.1: D_I alone gets F
    loss, terms = 0.0, {"excess": F}
    for domain, D in nets.D.items():
        # Real and fake in one batch, at every resolution; nothing of it flows back to G.
        both = [torch.cat([r, f.detach()]) for r, f in zip(real[domain], fake[domain])]
        with amp:
            logits = D(both, given[domain]).float()                          # (B + J, 1, h, w)
        real_logits, *of_sr, of_h = logits.split(B)  # of_sr: [] where J = B
        # D12: a weighted mean, hallucinations 1, SR d_sr; the README says why not 1 to 1.
        against_sr = sum(config.d_sr * discriminator_loss(real_logits, part) for part in of_sr)
        loss = loss + (discriminator_loss(real_logits, of_h) + against_sr) / (1 + config.d_sr)
        terms |= {f"D_{domain}_real": real_logits, f"D_{domain}_fake": of_h}
        if step % config.r1_every == 0:  # D2: seldom, but then with the weight of all steps
            pictures = [picture.detach().requires_grad_() for picture in real[domain]]
            # C22: in float32, outside amp: two derivatives need the digits.
            r1 = r1_penalty(D(pictures, none if domain == "image" else None), pictures)
            loss = loss + config.r1_every * config.r1_gamma / 2 * r1
            terms[f"R1_{domain}"] = r1
    descend(nets.opt_D, loss)
    return terms


def adversarial_losses(nets, amp, fake, F, B: int) -> tuple[dict, dict]:
    """L_adv of G: {domain: loss}, for SR (0 where D sees none) and for the B hallucinations."""
    sr, h = {"gradient": 0.0}, {"gradient": 0.0}  # so without the branch, and so without D_g
    nets.D.requires_grad_(False)  # G needs the slope through D, nobody needs D's own now
    for domain, D in nets.D.items():
        with amp:
            logits = D(fake[domain], F if domain == "image" else None).float()
        *of_sr, h[domain] = (generator_loss(part) for part in logits.split(B))
        sr[domain] = sum(of_sr)
    nets.D.requires_grad_(True)
    return sr, h


def descend(optimizer, loss: torch.Tensor):
    """One step of one player down its loss, averaged over all processes."""
    optimizer.zero_grad()
    loss.backward()
    if dist.is_initialized():
        for weight in optimizer.param_groups[0]["params"]:
            dist.all_reduce(weight.grad)  # a sum
            weight.grad /= dist.get_world_size()
    optimizer.step()


class Networks:
    """G, its running average, D_I, D_g and the two optimisers: what a step changes."""
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
        # Section 4.1: no momentum, or each player overshoots the other.
        options = dict(betas=(0.0, 0.9), fused=device != "meta")
        self.opt_G = torch.optim.Adam(self.G.parameters(), **options)
        self.opt_D = torch.optim.Adam(self.D.parameters(), **options)
        self.set_rates(config, 0)

    def load(self, content: dict, path) -> int:
        """Take up a checkpoint; return its step."""
        for module, name in ((self.ema, "generator"), (self.G, "G"), (self.D, "D")):
            load_weights(module, content[name], path)
        self.opt_G.load_state_dict(content["opt_G"])
        self.opt_D.load_state_dict(content["opt_D"])
        return content["step"]

    def set_rates(self, config: Config, step: int):
        """Adam's rates; in the last share `fall` of the steps they fall to a tenth (D11)."""
        left = 1 - step / config.steps
        factor = 0.1 ** (1 - left / config.fall) if left < config.fall else 1.0
        self.opt_G.param_groups[0]["lr"] = factor * config.lr_g
        self.opt_D.param_groups[0]["lr"] = factor * config.lr_d

    @torch.no_grad()
    def update_ema(self, decay: float, step: int):
        """C14: follow G; faster in the first steps, to forget the poor first weights."""
        decay = min(decay, (1 + step) / (10 + step))
        for average, current in zip(self.ema.parameters(), self.G.parameters()):
            average.lerp_(current, 1 - decay)


# ---- Faces: drawn, or from a folder; both end as one uint8 tensor (N, 3, size, size) ------------

def draw_faces(random: torch.Tensor, size: int) -> torch.Tensor:
    """Drawn faces from random (N, 11) in [0, 1]: (N, 3, size, size) on 8-bit levels of [-1, 1].

    The last two columns decide, above a half for yes, what LR hides: shrunk to 8x8 or 4x4, faces
    that differ only in smile and glasses are equal, up to one level. A frown is the smile upside
    down inside one row of blocks; glasses shine by just as much as their frame darkens, in a block.
    """
    def colour(*rgb):
        return torch.tensor(rgb).view(3, 1, 1)
    def cover(distance):  # signed distance, negative inside -> share of the pixel that is inside
        return (0.5 - distance * size / 8).clamp(0, 1)
    def ellipse(cx, cy, rx, ry):
        return cover((torch.hypot((x - cx) / rx, (y - cy) / ry) - 1) * ry)
    require(size % 8 == 0, f"drawn faces need a size that is a multiple of 8, got {size}")
    r, axis = random[:, :, None, None], (torch.arange(size) + 0.5) * 8 / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")  # lengths are in eighths of the side
    paint, width = torch.lerp, 2.5 + 0.4 * r[:, 8:9]  # paint(image, colour, where)
    black, tone = colour(-0.9, -0.9, -0.9), 0.9 * r[:, 3:4] + 0.1 * r[:, 4:7]
    skin = tone * colour(0.72, 0.72, 0.68) + colour(-0.3, -0.5, -0.65)
    hair = r[:, 7:8] * colour(1.2, 0.9, 0.4) - 0.85
    image = (1.6 * r[:, :3] - 0.8).expand(-1, 3, size, size)                 # the background
    image = paint(image, hair, ellipse(4, 3.6, width + 0.45, 3.3))
    image = paint(image, skin, ellipse(4, 4.2, width, 3.4) * cover(2.3 - y))
    image = paint(image, black, ellipse(3, 4, 0.2, 0.3) + ellipse(5, 4, 0.2, 0.3))
    bend = 0.52 * (0.5 - ((x - 4) / 1.5).square()) * torch.where(r[:, 9:10] > 0.5, 1, -1)
    lips = torch.maximum((y - 5.5 - bend).abs() - 0.2, (x - 4).abs() - 1.5)
    image = paint(image, colour(0.1, -0.9, -0.8), cover(lips))
    # Glasses: two frames of 2x2 blocks each and a bridge; then every block's mean is put back.
    lens = torch.maximum(((x - 4).abs() - 1.05).abs(), (y - 4).abs()) - 0.75
    bridge = torch.maximum((y - 4).abs() - 0.1, (x - 4).abs() - 0.3)
    framed = paint(image, black, torch.maximum(cover(lens.abs() - 0.14), cover(bridge)))
    framed = project_onto_lr(framed, downscale(image, size // 8))
    return quantize(torch.where(r[:, 10:11] > 0.5, framed, image))


def load_faces(arguments, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation faces, uint8 (N, 3, size, size); no face is in both."""
    if not arguments.data:
        require(not arguments.val, "--val goes with a folder of photos, not with drawn faces")
        require(8 * config.scale % config.size == 0, "LR of drawn faces must be 8x8, 4x4 or 2x2")
        counts = arguments.sketches, arguments.val_faces
        random = torch.rand(sum(counts), 11, generator=torch.Generator().manual_seed(0))
        drawn = [to_levels(draw_faces(part, config.size)).byte() for part in random.split(50)]
        return torch.cat(drawn).split(counts)
    train = FolderFaces(arguments.data, config.size)
    valid = FolderFaces(arguments.val or arguments.data, config.size)
    if not arguments.val:  # a photo's path decides: one that joins the folder later moves no other
        number = {path: zlib.crc32(bytes(path.relative_to(arguments.data))) for path in train.paths}
        valid.paths = [path for path, n in number.items() if n % 20 == 0]
        valid.paths = valid.paths or [min(number, key=number.get)]  # of a small folder, one
    held_out = {path.resolve() for path in valid.paths}
    train.paths = [path for path in train.paths if path.resolve() not in held_out]
    require(train.paths, f"all photos of {arguments.data} are among those to validate on")
    return stack(train), stack(valid, arguments.val_faces)


def batch_at(faces: torch.Tensor, config: Config, step: int, device) -> tuple:
    """hr (B, 3, H, W) in [-1, 1], z1 and z2 (B, z_dim, h, w), from nothing but seed and step."""
    rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    chosen = torch.randint(len(faces), (config.batch,), generator=rng)
    mirrored = torch.rand(config.batch, generator=rng) < 0.5  # C15
    small = config.size // config.scale
    z1, z2 = draw_z((2, config.batch, config.z_dim, small, small), config.z_shared, rng)
    hr = faces[chosen]
    hr[mirrored] = hr[mirrored].flip(-1)
    return from_levels(hr.to(device)), z1.to(device), z2.to(device)


# ---- Reporting: log, validation, pictures, checkpoints ------------------------------------------

class Report:
    """All that happens beside the loop. It reads the device only when a line is due."""
    def __init__(self, config: Config, arguments, nets: Networks, faces, valid, content):
        self.config, self.arguments, self.nets = config, arguments, nets
        self.out = self.claim(arguments)
        self.log_rows, self.valid_rows = content["rows"] if content else ([], [])
        self.valid = from_levels(valid).to(arguments.device)
        self.judges = find_judges(arguments, faces[spread_out(len(faces), len(valid))])
        self.terms, self.count, self.stop, self.since = {}, 0, False, time.time()
        for name in (signal.SIGINT, signal.SIGTERM):  # schedulers send the second
            signal.signal(name, self.interrupt)

    def claim(self, arguments) -> Path:
        """The folder of results, this run's alone. Raises ValueError where another run is."""
        home, named = arguments.resume and Path(arguments.resume).parent, arguments.out
        if home and home.resolve() == Path(named or home).resolve():
            return home
        kind = Path(arguments.data or "sketches").name + time.strftime("-%m%d-%H%M%S")
        out = Path(named or Path("runs", kind))
        files = ("last.pt", "best.pt", "log.csv", "valid.csv", "grid.png")
        require(not any((out / name).exists() for name in files),
                f"{out} holds a run already: --resume it, delete it, or name another --out")
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.csv").touch(exist_ok=False)  # of two runs at one moment, one fails here
        return out

    def interrupt(self, *_):
        """The first Ctrl-C lets the step end and saves; the second kills."""
        self.stop = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def say(self, text: str):
        """Print; where nobody reads any more (`| head`), save and stop in place of a traceback."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            self.stop, sys.stdout = True, open(os.devnull, "w")

    def after(self, step: int, terms: dict) -> bool:
        """Whatever is due after this many steps. True when the loop is to end."""
        self.count += 1
        for name, value in terms.items():  # tensors, logged as means over the steps that have them
            self.terms.setdefault(name, []).append(value.detach().mean())
        finished = self.stop or step == self.config.steps  # read once: Ctrl-C may come now
        due = finished or step % self.arguments.val_every == 0
        if due or step == 1 or step % self.arguments.log_every == 0:
            self.log(step)  # also what keeps NaN out of a checkpoint
        if due:
            self.save("last.pt", step)  # first: the rest may be interrupted
            self.validate(step)
            self.save("last.pt", step)
        return finished

    def log(self, step: int):
        """One line and one CSV row. Raises FloatingPointError, naming the term, at NaN or Inf."""
        means = {name: torch.stack(terms).mean().item() for name, terms in self.terms.items()}
        weights = [*self.nets.G.parameters(), *self.nets.D.parameters()]
        total = sum(weight.detach().sum() for weight in weights).item()
        for name, value in (means | {"a weight": total}).items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} became {value} by step {step}; no file changed")
        steps, warmup, seconds = self.config.steps, self.config.warmup, time.time() - self.since
        pace, end = self.count * self.config.batch / seconds, steps if step >= warmup else warmup
        minutes = seconds / self.count * (min(end, steps) - step) / 60
        text = "left of the warm-up, z means nothing yet" if step < warmup else "left"
        text += "".join(f"  {name} {value:.3g}" for name, value in means.items())
        self.say(f"step {step}  {pace:.1f} images/s  {minutes:.1f} min {text}")
        self.log_rows.append({"step": step, "images_per_s": pace} | means)
        self.export("log.csv", self.log_rows)
        self.terms, self.count, self.since = {}, 0, time.time()

    def export(self, name: str, rows: list[dict]):
        """All rows as a CSV table, whole or not at all. Nothing reads it back."""
        names = list(dict.fromkeys(key for row in rows for key in row))
        lines = [names] + [[str(row.get(key, "")) for key in names] for row in rows]
        with whole_file(self.out / name) as temporary:
            temporary.write_text("".join(",".join(line) + "\n" for line in lines))

    def validate(self, step: int):
        """Score the running average on the validation faces, draw the grid, keep the best."""
        began, ema, config = time.time(), self.nets.ema, self.config
        rows, row = summarize(evaluate(ema, self.valid, 4, **self.judges)), {"step": step}
        for name, scores in rows.items():
            self.say(f"  {name:13}  " + "  ".join(f"{key} {scores[key]:.3f}" for key in scores))
            row |= {f"{name}_{key}": value for key, value in scores.items()}
        self.valid_rows.append(row | {"faces": len(self.valid)})
        self.export("valid.csv", self.valid_rows)
        hr = self.valid[:6]
        lr, rng = quantize(downscale(hr, config.scale)), torch.Generator().manual_seed(0)
        z = draw_z((6, config.z_dim, *lr.shape[-2:]), config.z_shared, rng).to(lr.device)
        write_image(contact_sheet(ema, lr, z, hr), self.out / "grid.png")
        name, sign = ("hallucination_realism", -1) if self.judges else ("SR_psnr", 1)
        marks = [sign * row[name] for row in self.valid_rows if row["step"] > config.warmup
                 and name in row and row.get("faces") == len(self.valid)]
        if marks and marks[-1] == max(marks):
            self.save("best.pt", step)
        self.since += time.time() - began

    def goodbye(self):
        """The last words: how to go on, or what came of it."""
        checkpoint = shlex.quote(str(self.out / "last.pt"))
        self.say(f"stopped and saved; go on with\n  python train.py --resume {checkpoint}"
                 if self.log_rows[-1]["step"] < self.config.steps else
                 f"done: look at {self.out / 'grid.png'}, sample with\n"
                 f"  python sample.py PHOTO --checkpoint {checkpoint}")
        if not self.arguments.data:
            self.say(calibration_table(self.nets.ema, self.config, self.arguments.device))

    def save(self, name: str, step: int):
        """Write a checkpoint from which --resume goes on, with the same data."""
        states = {key: getattr(self.nets, key).state_dict() for key in ("G", "D", "opt_G", "opt_D")}
        note = f"step {step} is within the warm-up of {self.config.warmup}: z means nothing yet"
        save_checkpoint(self.out / name, self.nets.ema, **states, step=step,
                        run={key: getattr(self.arguments, key) for key in RUN},
                        config=asdict(self.config), rows=(self.log_rows, self.valid_rows),
                        note=note if step <= self.config.warmup else "")


def find_judges(arguments, photographs: torch.Tensor) -> dict:
    """LPIPS and realism for `evaluate`, or nothing, saying why."""
    try:
        require(arguments.data, "drawn faces are judged by their calibration, at the end")
        require(photographs.shape[-1] >= 32, "images are smaller than 32x32")
        photographs = from_levels(photographs).to(arguments.device)
        return {"lpips": LPIPS().to(arguments.device), "realism": Realism(photographs)}
    except (ValueError, OSError) as error:
        print(f"LPIPS and realism are not measured: {error}")
        return {}


# ---- Calibration: on drawn faces it is known what a perfect sampler would show ------------------

def possibilities(count: int, size: int, seed: int = 2) -> torch.Tensor:
    """The faces behind each LR, (4, count, 3, size, size): both smile and glasses, ..., neither."""
    shared = torch.rand(count, 9, generator=torch.Generator().manual_seed(seed))
    return torch.stack([draw_faces(torch.cat([shared, kind.expand(count, 2)], 1), size)
                        for kind in torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]])])


def calibration(samples: torch.Tensor, sr: torch.Tensor, truth: torch.Tensor) -> dict:
    """Do samples (K, N, 3, H, W) show the four possibilities (4, N, 3, H, W), cleanly and evenly?

    A sample is clean when its error to its nearest possibility is at most twice (3 dB) that of sr
    (N, 3, H, W). Noise, blur, one answer for all: none wins PSNR, clean samples or spread's place.
    """
    def error(images):  # (..., N, 3, H, W) -> (4, ..., N), mean squared, in grey levels
        return torch.stack([(to_levels(images) - to_levels(one)).square().mean((-3, -2, -1))
                            for one in truth])
    apart = error(samples)                                                          # (4, K, N)
    nearest, clean = apart.argmin(0), apart.amin(0) <= 2 * error(sr).amin(0)        # (K, N)
    found = [((nearest == kind) & clean).any(0).float().mean() for kind in range(4)]
    smile, glasses = nearest < 2, nearest % 2 == 0                                  # (K, N)
    answers = torch.stack([smile, ~smile, glasses, ~glasses]) & clean               # (4, K, N)
    mouth, eyes = answers.float().mean(1).unflatten(0, (2, 2)).amin(1)              # (N,) each
    spread, due = std_map(samples), std_map(truth)                                  # (N, 3, H, W)
    overlap = torch.minimum(spread, due).sum() / torch.maximum(spread, due).sum()
    return {"PSNR of the four to a sample, dB": 10 * (255 ** 2 / apart.amin(1).mean()).log10(),
            "of the four, found cleanly": sum(found),
            "smiles, %": 100 * smile.float().mean(), "glasses, %": 100 * glasses.float().mean(),
            "rarer mouth, clean, %": 100 * mouth.mean(), "rarer eyes, clean, %": 100 * eyes.mean(),
            "spread / true spread": spread.mean() / due.mean(),
            "spread in its place, %": 100 * overlap}


@torch.no_grad()
def calibration_table(generator, config: Config, device, faces: int = 100, samples: int = 10):
    """`calibration` of hallucinations of held-out drawn faces, beside what else could be shown."""
    truth, rng = possibilities(faces, config.size), torch.Generator().manual_seed(0)
    lr = quantize(downscale(truth[0], config.scale))                       # (faces, 3, h, w)
    z = draw_z((1 + samples, faces, config.z_dim, *lr.shape[-2:]), config.z_shared, rng)
    z[0] = 0
    sr, *ours = [sample(generator, lr.to(device), latent.to(device)).cpu() for latent in z]
    perfect = truth[torch.randint(4, (samples, faces), generator=rng), torch.arange(faces)]
    shown = {"perfect": perfect, "ours": torch.stack(ours), "SR only": sr.expand_as(perfect)}
    columns = [calibration(images, sr, truth) for images in shown.values()]
    lines = [(f"{samples} samples of {faces} drawn faces", shown)]
    lines += [(row, [f"{column[row]:.2f}" for column in columns]) for row in columns[0]]
    return "\n".join(f"{row:34}" + "".join(f"{x:>9}" for x in values) for row, values in lines)


# ---- Command line -------------------------------------------------------------------------------

# What a run is made of beside its Config: kept in its checkpoints, and taken up by --resume.
RUN = dict(data=None, val=None, sketches=2000, val_faces=128, val_every=500, log_every=50,
           amp=None, photos=None)


def flags() -> argparse.ArgumentParser:
    """The run's own flags, and one per field of Config."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    run = parser.add_argument_group("the run").add_argument
    run("--data", type=os.path.abspath, help="a folder of photos (default: faces drawn now)")
    run("--val", type=os.path.abspath, help="a folder to validate on (default: 5 %% of --data)")
    run("--out", help="folder for results (default: a new one in runs, or where --resume lies)")
    run("--resume", help="go on from this last.pt, with its data and its settings")
    run("--preset", choices=("recommended", "paper"), help="for hours (default), or as printed")
    run("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (default: if it pays)")
    for name, what in (("sketches", "faces to draw"), ("val-faces", "faces to validate on"),
                       ("val-every", "steps between scores"), ("log-every", "between log lines")):
        run("--" + name, type=count, help=f"{what} (default: {RUN[name.replace('-', '_')]})")
    method = parser.add_argument_group("the method", f"drawn faces, over any preset: {SKETCHES}")
    for item in fields(Config):
        best, kind = RECOMMENDED.get(item.name, item.default), type(item.default)
        text = (f"{item.metadata['help']}; paper: {item.metadata['source']}; default {best}"
                + f", --preset paper {item.default}" * (best != item.default))
        how = (dict(action=argparse.BooleanOptionalAction) if kind is bool else
               dict(type=int, nargs="+") if kind is tuple else dict(type=kind))
        method.add_argument("--" + item.name.replace("_", "-"), help=text, **how)
    return parser


def prepare(words=None) -> tuple[argparse.Namespace, Config, dict | None]:
    """Arguments, settings, and the checkpoint to resume; a flag goes before what these bring."""
    parser = flags()
    said, content = parser.parse_args(words), None
    base = RUN | asdict(Config()) | (RECOMMENDED if said.preset != "paper" else {})
    base |= {} if said.data else SKETCHES
    if said.resume:
        require(not said.preset, "--resume has the settings of its run: no --preset")
        content, path = load_checkpoint(said.resume), Path(said.resume)
        require("opt_G" in content, f"{path} holds a generator alone: it cannot be trained on")
        known, base = RUN.keys() | asdict(Config()).keys(), content["run"] | content["config"]
        require(known == base.keys(), f"{path} is of another version: go on with that one")
        last = Path(said.out or path.parent, "last.pt")
        latest = load_checkpoint(last).get("step", 0) if last != path and last.is_file() else 0
        require(content["step"] >= latest, f"{path} is of step {content['step']}, and {last} of "
                                           f"{latest} would be overwritten: name another --out")
    parser.set_defaults(**base)
    arguments = parser.parse_args(words)
    arguments.widths = tuple(arguments.widths)
    config = Config(**{name: getattr(arguments, name) for name in asdict(Config())})
    require(not content or content["step"] < config.steps, f"{said.resume} is done: raise --steps")
    arguments.device = find_device(arguments.device)
    if arguments.amp is None and arguments.device == "cuda":
        arguments.amp = torch.cuda.is_bf16_supported(including_emulation=False)
    if arguments.amp is None:  # C22: a GPU is asked, a CPU timed: some have it but are slower
        squares = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
        half, full = (min(timeit.repeat(lambda: a @ a, number=1)) for a in squares)
        arguments.amp = 1.5 * half < full and "RANK" not in os.environ  # torchrun's must agree
    return arguments, config, content


def join_processes(arguments, config: Config):
    """Under torchrun: become one of several processes, with a GPU and a share of each batch."""
    if "WORLD_SIZE" not in os.environ:
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if arguments.device == "cuda" else "gloo")
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world = dist.get_world_size()
    require(config.batch % world == 0, f"batch {config.batch} is no multiple of {world} processes")
    if dist.get_rank() > 0:  # the first one speaks, and all stop when it does
        sys.stdout = open(os.devnull, "w")
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)


def main(words=None):
    arguments, config, content = prepare(words)
    join_processes(arguments, config)
    print(f"differs from the print in: {', '.join(deviations(config)) or 'nothing'}")
    print(", ".join(f"{name} {value}" for name, value in asdict(config).items()))
    pixels = config.perceptual == "pixels"  # D6; before the faces, as weights may be missing
    perceptual = torch.nn.L1Loss() if pixels else PerceptualLoss(config.perceptual)
    faces, valid = load_faces(arguments, config)
    before, arguments.photos = arguments.photos or len(faces), len(faces)
    print(f"{len(faces)} faces of {config.size}x{config.size} to train on"
          + f" ({before} before)" * (before != len(faces)) + f", {len(valid)} to validate on; "
          f"{arguments.device}, {'bfloat16' if arguments.amp else 'float32'}")
    train(config, arguments, perceptual.to(arguments.device), faces, valid, content)
    if dist.is_initialized():
        dist.destroy_process_group()  # or gloo's threads can abort a process that has ended


if __name__ == "__main__":
    run_as_script(main)
