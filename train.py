"""Train hallusr: one plain loop, for one CUDA GPU or a CPU.

    python train.py                         faces that it draws itself, no data needed: minutes
    python train.py --data FOLDER           photos: hours on a GPU, days on a CPU
    python train.py --resume OUT/last.pt    go on with a run that was stopped

Into --out go last.pt and, of photos, best.pt (checkpoints), grid.png (look at it), and
two tables, a line of JSON for each row: log.jsonl and valid.jsonl.
"""
import argparse
import copy
import json
import math
import shlex
import signal
import time
import unicodedata
import zlib
from collections import Counter
from dataclasses import asdict, make_dataclass
from functools import partial
from pathlib import Path

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.utils import save_image

from hallusr import (VGG_LAYERS, Discriminator, Generator, PerceptualLoss, beside_features,
                     check_architecture, discriminator_loss, diversity_loss, downscale, draw_z,
                     energy_score, excess, from_levels, generator_loss, gradient_loss,
                     hallucination_loss, image_gradient, load_checkpoint, load_generator,
                     load_weights, pyramid, quantize, r1_penalty, reconstruction_loss, require,
                     save_checkpoint, to_levels)
from sample import (contact_sheet, count, directions_found, evaluate, evenly, find_device,
                    list_photos, metrics_against, path_argument, print_scores, read_photos,
                    run_as_script, summarize)

# ---- Settings: a line each -----------------------------------------------------------

# --preset chooses a column: the paper's; photos, with --data; drawn, without. The
# section is where the paper fixes the value, if only by omission; "open" where it does
# not, and that under "paper" is ours too. Reasons: assets/PAPER.md.
SETTINGS = [
    # name               paper  photos drawn  section   meaning
    ("size",             64,    64,    32,    "open",   "side of the large image, pixels"),
    ("scale",            8,     8,     8,     "4.1",    "times that LR is smaller: a power of 2"),
    ("width",            32,    40,    8,     "open",   "channels at full size, more at coarser"),
    ("blocks",           8,     8,     1,     "Fig. 2", "residual blocks in G, at LR's size"),
    ("fine_blocks",      0,     1,     0,     "open",   "residual blocks in each UpBlock"),
    ("d_blocks",         8,     2,     1,     "3.2",    "residual blocks in each D"),
    ("z_dim",            64,    4,     4,     "open",   "numbers in z"),
    ("z_shared",         1.0,   0.7,   1.0,   "2",      "1: z is one vector, 0: a map"),
    ("hard_consistency", False, True,  True,  "(9)",    "make DS(image) = LR inside G"),
    ("d_features",       False, True,  False, "3.2",    "D_I sees VGG-16's features too"),
    ("eps",              12.75, 12.75, 12.75, "4.2",    "F ignores so many grey levels"),
    ("perceptual",       "relu2_2", "relu3_3", "pixels", "open", "VGG-16 layer of (6), or pixels"),
    ("gamma",            10.0,  2.0,   5.0,   "4.1",    "weight of (6) and (7) in (10)"),
    ("beta",             0.1,   0.0,   0.0,   "4.1",    "weight of z = 0 in both players' L_adv"),
    ("alpha",            1.0,   0.0,   0.0,   "4.1",    "weight of L_z (8) in (11)"),
    ("tau",              1.0,   1.0,   1.0,   "open",   "ceiling of L_z (8)"),
    ("energy",           0.0,   10.0,  10.0,  "2.3",    "weight of the energy score"),
    ("pixel",            0.0,   10.0,  0.0,   "2.3",    "weight of L1 on pixels at z = 0"),
    ("warmup",           0,     3000,  500,   "2.3",    "first steps: G alone, at z = 0"),
    ("r1_gamma",         10.0,  0.1,   10.0,  "open",   "R1's own gamma, not (10)'s"),
    ("r1_every",         1,     16,    16,    "2.3",    "steps from one R1 to the next"),
    ("learning_rate_g",  1e-4,  5e-4,  2e-3,  "4.1",    "Adam's learning rate for G"),
    ("learning_rate_d",  4e-4,  5e-4,  2e-3,  "open",   "Adam's learning rate for D_I and D_g"),
    ("decay",            0.0,   0.33,  0.4,   "4.1",    "last share of steps: rates decay"),
    ("ema",              0.999, 0.999, 0.999, "open",   "decay of the running average of G"),
    ("batch",            8,     8,     8,     "4.1",    "faces per step"),
    ("steps",            100_000, 100_000, 2000, "open", "training steps"),
    ("seed",             0,     0,     0,     "open",   "seed of weights, batches and noise"),
]
PRESETS = {preset: {row[0]: row[column] for row in SETTINGS}
           for column, preset in enumerate(("paper", "photos", "drawn"), 1)}
Config = make_dataclass("Config", PRESETS["paper"], frozen=True)


# ---- One step ------------------------------------------------------------------------

def training_step(nets, config, hr, z1, z2, kind: str) -> dict:
    """One step of both discriminators, then one of G; in the warm-up, of G alone.

    hr (B, 3, H, W) in [-1, 1], z1 and z2 (B, z_dim, h, w); nets: Networks; kind: what
    `kind_of` says of the step. Returns means for the log.
    """
    # LR is rounded, as a file is.
    lr = quantize(downscale(hr, config.scale))                  # (B, 3, h, w)
    if kind == "warm-up":
        return warmup_step(nets, config, hr, lr, torch.zeros_like(z1))

    images = pyramid(hr, len(nets.G.up_blocks))
    real = {"image": images, "gradient": [image_gradient(image) for image in images]}
    # Each is {"image", "gradient"}: lists, coarse to fine, to (B, 3, H, W).
    with nets.autocast:
        sr = nets.G(lr, torch.zeros_like(z1))                   # (1)
        h1 = nets.G(lr, z1)                                     # (2)
        h2 = nets.G(lr, z2)                                     # (2), to set beside h1
    F_h = excess(h1["image"][-1], lr, config.eps)               # (12)  (B, 3, h, w)
    F_real = torch.zeros_like(F_h)  # a photograph shrinks to its own LR exactly

    # D step: photographs against z1's images. No detach: `update` moves D alone.
    seen_real = with_features(nets, real)
    seen_h = with_features(nets, h1)
    on_real = judge(nets, seen_real, F_real)
    on_h = judge(nets, seen_h, F_h)
    terms = terms_of_D(on_real, on_h)
    loss_D = loss_of_both(on_real, on_h)
    if config.beta:
        # A weighted mean: beta for the reconstruction, as in (10), 1 for the hallucination.
        F_sr = excess(sr["image"][-1], lr, config.eps)          # (12)  (B, 3, h, w)
        seen_sr = with_features(nets, sr)
        against_sr = loss_of_both(on_real, judge(nets, seen_sr, F_sr))
        loss_D = (loss_D + config.beta * against_sr) / (1 + config.beta)
    if kind == "with R1":
        # Every r1_every steps, with as many times the weight: lazy R1, as in StyleGAN2.
        terms["R1"] = r1_of_both(nets, real, F_real)
        loss_D = loss_D + config.r1_every * config.r1_gamma / 2 * terms["R1"]
    update(nets.opt_D, loss_D)

    # G step: ask the D just improved again.
    on_h = judge(nets, seen_h, F_h)
    l_z = diversity_loss(h1["gradient"][-1], h2["gradient"][-1], z1, z2, config.tau)  # (8)
    halluc = hallucination_loss(generator_loss(on_h["gradient"]),
                                generator_loss(on_h["image"]), l_z, config.alpha)  # (11)
    adv_g = adv_i = 0.0
    if config.beta:
        on_sr = judge(nets, seen_sr, F_sr)
        adv_g = generator_loss(on_sr["gradient"])
        adv_i = generator_loss(on_sr["image"])
    fit = distances(nets, sr, hr)
    recons = reconstruction_loss(fit["L_percp"], fit["L_grad"], adv_g, adv_i,
                                 config.gamma, config.beta)     # (10)
    extra = config.pixel * fit["L_pixel"]  # this and the energy score: not in the paper
    if config.energy:
        terms["energy"] = mean_energy(seen_real, seen_h, with_features(nets, h2))
        extra = extra + config.energy * terms["energy"]
    update(nets.opt_G, recons + halluc + extra)
    moved = 127.5 * (h1["image"][-1] - sr["image"][-1]).abs()   # grey levels
    return means(terms | fit | {"L_z": l_z, "F": F_h, "image_moves": moved})


def warmup_step(nets, config, hr, lr, zero) -> dict:
    """A step of G alone, at z = 0: (10) without L_adv, plus L1 on pixels."""
    with nets.autocast:
        sr = nets.G(lr, zero)                                   # (1)
    fit = distances(nets, sr, hr)
    recons = reconstruction_loss(fit["L_percp"], fit["L_grad"], 0.0, 0.0, config.gamma)
    update(nets.opt_G, recons + config.pixel * fit["L_pixel"])
    return means(fit)


def means(terms: dict) -> dict:
    """One number for each term, for the log."""
    return {name: term.detach().mean() for name, term in terms.items()}


def kind_of(config, step: int) -> str:
    """Which of three programs a step is, counted from 0: a CUDA graph records each once."""
    if step < config.warmup:
        return "warm-up"
    return "with R1" if step % config.r1_every == 0 else "plain"


def with_features(nets, made: dict) -> dict:
    """Images beside their VGG-16 features, where D_I sees them; gradients as they are."""
    if nets.phi is None:
        return made
    with nets.autocast:
        images = beside_features(made["image"], nets.phi)
    return {"image": images, "gradient": made["gradient"]}


def judge(nets, pictures: dict, F: torch.Tensor) -> dict:
    """Logits (B, 1, h, w) of D_I, which is told F (section 3.1), and of D_g."""
    with nets.autocast:
        return {"image": nets.D_I(pictures["image"], F).float(),
                "gradient": nets.D_g(pictures["gradient"]).float()}


def terms_of_D(on_real: dict, on_fake: dict) -> dict:
    """Logits and AUC of both discriminators, for the log."""
    terms = {}
    for domain, real in on_real.items():
        fake = on_fake[domain]
        terms[f"D_{domain}_real"] = real
        terms[f"D_{domain}_fake"] = fake
        # In which pairs has the photograph the higher logit? 0.5 is a blind D.
        ahead = real.mean((1, 2, 3))[:, None] - fake.mean((1, 2, 3))  # (B, B)
        terms[f"D_{domain}_auc"] = (ahead.sign() + 1) / 2  # a tie is half a win
    return terms


def loss_of_both(on_real: dict, on_fake: dict) -> torch.Tensor:
    """D_I's loss and D_g's."""
    return sum(discriminator_loss(on_real[domain], on_fake[domain]) for domain in on_real)


def r1_of_both(nets, real: dict, F_real: torch.Tensor) -> torch.Tensor:
    """R1 of D_I and D_g, without autocast: a slope of a slope needs all digits."""
    images = [image.detach().requires_grad_() for image in real["image"]]
    gradients = [edges.detach().requires_grad_() for edges in real["gradient"]]
    # Down to the pixels: a D gentle at VGG-16's features may be steep there.
    seen = images if nets.phi is None else beside_features(images, nets.phi)
    loss = r1_penalty(nets.D_I(seen, F_real), images)
    return loss + r1_penalty(nets.D_g(gradients), gradients)


def mean_energy(real: dict, one: dict, two: dict) -> torch.Tensor:
    """The energy score, a mean over all that the discriminators see."""
    scores = []
    for domain in real:
        for truth, a, b in zip(real[domain], one[domain], two[domain]):
            # In the truth's deviations, as features are larger than edges.
            scores.append(energy_score(a, b, truth) / truth.std().clamp(min=0.01))  # no 0 / 0
    return torch.stack(scores).mean()


def distances(nets, sr: dict, hr) -> dict:
    """How far the reconstruction is from the truth: (6), (7), and L1 on pixels."""
    image = sr["image"][-1]                                     # (B, 3, H, W)
    with nets.autocast:
        l_percp = nets.perceptual(image, hr)
    return {"L_percp": l_percp,                                            # (6)
            "L_grad": gradient_loss(sr["gradient"][-1], image_gradient(hr)),    # (7)
            "L_pixel": (image - hr).abs().mean()}


def update(optimizer, loss: torch.Tensor):
    """One step of one player down its loss."""
    weights = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    # The other player's weights get no slope, and D's backward pass stops short of G,
    # whose own can then follow without a second forward pass.
    loss.backward(inputs=weights)
    optimizer.step()


class GraphedStep:
    """A step on a CUDA GPU, recorded once and then replayed: one launch for thousands.

    step(hr, z1, z2, kind) may read nothing back from the GPU, and what changes from step
    to step must stand in tensors that live on.
    """

    def __init__(self, step):
        self.step = step
        self.stream = torch.cuda.Stream()
        # One pool for all graphs: they run one at a time, and none reads what another left.
        self.memory = torch.cuda.graph_pool_handle()
        self.batch = None
        self.plain_steps = Counter()
        self.graphs = {}  # one for each kind of step: a graph knows no if
        self.terms = {}

    def __call__(self, hr, z1, z2, kind):
        if self.batch is None:
            self.batch = [hr.clone(), z1.clone(), z2.clone()]
        # A graph reads where it read when it was recorded.
        for place, given in zip(self.batch, (hr, z1, z2)):
            place.copy_(given)
        if kind in self.graphs:
            self.graphs[kind].replay()
            return self.terms[kind]
        # A kind's first three steps run as usual, on the stream that will record: Adam
        # allocates its state, cuDNN chooses its algorithms.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            terms = self.step(*self.batch, kind)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.plain_steps[kind] += 1
        if self.plain_steps[kind] == 3:
            self.record(kind)
        return terms

    def record(self, kind):
        """Record a step without computing it: its first replay is the next step."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.memory, stream=self.stream):
                self.terms[kind] = self.step(*self.batch, kind)
        except RuntimeError as error:
            # torch raises a second error over the reason.
            reason = str(error.__context__ or error).partition("\n")[0]
            raise ValueError(f"no CUDA graph of a step {kind!r}, go on with --no-graph: {reason}")
        self.graphs[kind] = graph


class Networks:
    """All that a step works with: G, its average, D_I, D_g, VGG-16 and two optimisers.

    amp: forward passes in bfloat16; None: if device is a CUDA GPU that has it.
    """

    def __init__(self, config, device, amp: bool | None = None):
        torch.manual_seed(config.seed)
        self.G = Generator(config.size, config.scale, config.z_dim, config.z_shared,
                           config.width, config.blocks, config.fine_blocks,
                           config.hard_consistency)
        self.ema = copy.deepcopy(self.G).requires_grad_(False)
        self.D_I = Discriminator(config.width, config.scale, config.d_blocks,
                                 condition_channels=3, with_vgg=config.d_features)
        self.D_g = Discriminator(config.width, config.scale, config.d_blocks)
        # VGG-16, frozen, up to the layer as small as G's coarsest image.
        self.phi = None
        if config.d_features:
            self.phi = PerceptualLoss(list(VGG_LAYERS)[len(self.G.up_blocks) - 1]).to(device)
        for network in (self.G, self.ema, self.D_I, self.D_g):
            network.to(device, memory_format=torch.channels_last)  # fastest convolutions
        pixels = config.perceptual == "pixels"
        perceptual = torch.nn.L1Loss() if pixels else PerceptualLoss(config.perceptual)
        self.perceptual = perceptual.to(device)                 # (6)
        device_type = torch.device(device).type
        on_gpu = device_type == "cuda"
        if amp is None:
            amp = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        self.amp = amp
        # A graph must not read weights that were cast before it: no cache there.
        self.autocast = torch.autocast(device_type, torch.bfloat16, enabled=amp,
                                       cache_enabled=not on_gpu)
        # Section 4.1: beta_1 = 0. With momentum each player would overshoot the other.
        options = dict(betas=(0.0, 0.9), fused=True, capturable=on_gpu)
        self.opt_G = torch.optim.Adam(self.G.parameters(), **options)
        both = [*self.D_I.parameters(), *self.D_g.parameters()]
        self.opt_D = torch.optim.Adam(both, **options)
        if on_gpu:
            # A CUDA graph would repeat a number: what changes stands in tensors.
            for optimizer in (self.opt_G, self.opt_D):
                optimizer.param_groups[0]["lr"] = torch.zeros((), device=device)
        self.follow_schedule(config, 0)

    def follow_schedule(self, config, step: int):
        """The learning rates of this step: over the last share `decay`, down to a tenth."""
        left = 1 - step / config.steps
        factor = 0.1 ** (1 - left / config.decay) if left < config.decay else 1.0
        rates = ((self.opt_G, config.learning_rate_g), (self.opt_D, config.learning_rate_d))
        for optimizer, rate in rates:
            group = optimizer.param_groups[0]
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(factor * rate)
            else:
                group["lr"] = factor * rate

    def update_ema(self, ema: float, step: int):
        """The running average follows G: faster at first, to forget the poor first weights."""
        ema = min(ema, (1 + step) / (10 + step))
        follow = get_ema_multi_avg_fn(ema)  # all weights at once
        follow(list(self.ema.parameters()), list(self.G.parameters()), None)

    def load(self, content: dict, path):
        """Take up the state of a checkpoint."""
        load_weights(self.ema, content["generator"], path)
        for name in ("G", "D_I", "D_g"):
            load_weights(getattr(self, name), content[name], path)
        for name in ("opt_G", "opt_D"):
            optimizer = getattr(self, name)
            # Adam's averages alone: its options are this device's, not the checkpoint's.
            own = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": content[name]["state"], "param_groups": own})

    def start_from(self, path):
        """G and its average begin as a trained generator; the discriminators begin anew."""
        trained = load_generator(path)
        require(trained.settings == self.G.settings,
                f"{path} has the settings {trained.settings}, and this run {self.G.settings}")
        self.G.load_state_dict(trained.state_dict())
        self.ema.load_state_dict(trained.state_dict())


# ---- The loop ------------------------------------------------------------------------

def train(config, arguments, nets, report, faces, start: int):
    """Train from step `start` until config.steps or Ctrl-C."""
    step_once = partial(training_step, nets, config)
    device = next(nets.G.parameters()).device  # cuda:0 where "cuda" was said
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if arguments.graph:
            step_once = GraphedStep(step_once)

    for step in range(start, config.steps):
        nets.follow_schedule(config, step)
        hr, z1, z2 = batch_at(faces, config, step, device)
        terms = step_once(hr, z1, z2, kind_of(config, step))
        nets.update_ema(config.ema, step)
        if report.step_done(step + 1, terms):
            break
    report.finish()


def batch_at(faces: torch.Tensor, config, step: int, device) -> tuple:
    """hr (B, 3, H, W) in [-1, 1], z1 and z2 (B, z_dim, h, w), from nothing but seed and step."""
    # On the CPU, so that every device draws the same.
    rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    chosen = torch.randint(len(faces), (config.batch,), generator=rng)
    mirrored = torch.rand(config.batch, 1, 1, 1, generator=rng) < 0.5
    small = config.size // config.scale
    z = draw_z((2, config.batch, config.z_dim, small, small), config.z_shared, rng)
    hr = faces[chosen]
    hr = torch.where(mirrored, hr.flip(-1), hr)
    z1, z2 = z.to(device, non_blocking=True)
    return from_levels(hr.to(device, non_blocking=True)), z1, z2


# ---- Faces: drawn, or from a folder; both end as one uint8 tensor (N, 3, size, size) -

def draw_faces(random: torch.Tensor, size: int) -> torch.Tensor:
    """Drawn faces: random (N, 7) in [0, 1] -> (N, 3, size, size), rounded to 8 bits.

    The last column says where the eyes look, in parts of a full turn: 0 is right, 0.25
    down. An LR of 4x4 hides it: it is the same for all gazes, up to one level.
    """
    # Lengths are in eighths of the side; x and y are the centres of pixels.
    axis = (torch.arange(size) + 0.5) * 8 / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def paint(image, rgb, where):
        return torch.lerp(image, torch.as_tensor(rgb).view(-1, 3, 1, 1), where)

    def ellipse(cx, cy, rx, ry):
        """The share of each pixel inside, from the signed distance to the outline."""
        distance = (torch.hypot((x - cx) / rx, (y - cy) / ry) - 1) * ry
        return (0.5 - distance * size / 8).clamp(0, 1)

    background, (skin, hair, width, gaze) = random[:, :3], random[:, 3:, None].unbind(1)
    skin = skin * torch.tensor([0.72, 0.72, 0.68]) + torch.tensor([-0.3, -0.5, -0.65])
    hair = hair * torch.tensor([1.2, 0.9, 0.4]) - 0.85
    width = 2.5 + 0.4 * width[:, :, None, None]
    image = (1.6 * background - 0.8)[:, :, None, None].expand(-1, 3, size, size)
    image = paint(image, hair, ellipse(4, 3.6, width + 0.45, 3.3))
    image = paint(image, skin, ellipse(4, 4.2, width, 3.4) * (y > 1.8))
    image = paint(image, [0.1, -0.9, -0.8], ellipse(4, 5.9, 0.9, 0.3))  # the mouth

    # Each eye lies within one pixel of LR, whose mean does not tell where the pupil is.
    gaze = 2 * torch.pi * gaze[:, :, None, None]
    for eye in (3, 5):
        pupil = ellipse(eye + 0.5 * gaze.cos(), 3 + 0.5 * gaze.sin(), 0.4, 0.4)
        image = paint(image, [0.9, 0.9, 0.9], ellipse(eye, 3, 0.95, 0.95))
        image = paint(image, [-0.9, -0.9, -0.9], pupil)
    return quantize(image)


def possibilities(count: int, size: int) -> torch.Tensor:
    """Faces that share one LR, their eyes in 16 directions: (16, count, 3, size, size).

    The first four look right, within an eighth of a turn; then down, left and up.
    """
    shared = torch.rand(count, 6, generator=torch.Generator().manual_seed(2))
    gazes = (torch.arange(16) - 1.5) / 16
    return torch.stack([draw_faces(torch.cat([shared, gaze.expand(count, 1)], 1), size)
                        for gaze in gazes])


def load_faces(arguments, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation faces, uint8 (N, 3, size, size); no file is in both."""
    if not arguments.data:
        require(not arguments.val, "--val goes with a folder of photos, not with drawn faces")
        require(config.size / config.scale in (2, 4),
                "LR of drawn faces must be 4x4 or 2x2; photos need --data")
        counts = arguments.drawn, arguments.val_faces
        random = torch.rand(sum(counts), 7, generator=torch.Generator().manual_seed(0))
        faces = [to_levels(draw_faces(part, config.size)).byte() for part in random.split(50)]
        return torch.cat(faces).split(counts)
    paths = list_photos(arguments.data)
    if arguments.val:
        held_out = list_photos(arguments.val)
    else:
        # By a hash of each path: a photo that joins the folder later moves no other.
        number = {path: path_hash(path.relative_to(arguments.data)) for path in paths}
        held_out = [path for path, n in number.items() if n % 20 == 0]
        held_out = held_out or [min(number, key=number.get)]  # of a small folder, one
    hidden = {path.resolve() for path in held_out}
    paths = [path for path in paths if path.resolve() not in hidden]
    require(paths, f"all photos of {arguments.data} are among those to validate on")
    held_out = [held_out[i] for i in evenly(len(held_out), arguments.val_faces)]
    return read_photos(paths, config.size), read_photos(held_out, config.size)


def path_hash(path: Path) -> int:
    """The same number on every system, whatever its slashes and accents are made of."""
    spelling = unicodedata.normalize("NFC", path.as_posix())
    return zlib.crc32(spelling.encode(errors="surrogateescape"))


# ---- Reporting: log, validation, pictures, checkpoints -------------------------------

class Report:
    """All that happens beside the loop. It reads from the device only when a line is due."""

    def __init__(self, config, arguments, nets: Networks, faces, valid):
        self.out = run_folder(arguments)
        self.config = config
        self.arguments = arguments
        self.nets = nets
        self.valid = from_levels(valid).to(arguments.device)
        self.metrics = {}
        # LPIPS needs sides of 31, realism and AUC two faces on both sides.
        if arguments.data and config.size >= 31 and min(len(faces), len(valid)) >= 2:
            photographs = from_levels(faces[evenly(len(faces), len(valid))])
            self.metrics = metrics_against(photographs.to(arguments.device))
        best = self.out / "best.pt"  # of a run that is resumed
        self.best = load_checkpoint(best).get("score") if best.exists() else None
        self.terms = {}
        self.count = 0
        self.stop = False
        self.since = time.perf_counter()
        hang_up = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM, hang_up):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as in a background job
                self.handlers[number] = signal.signal(number, self.interrupt)

    def interrupt(self, *_):
        """The first Ctrl-C lets the step end and saves; the second kills."""
        self.stop = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def step_done(self, step: int, terms: dict) -> bool:
        """Whatever is due after this many steps. True when the loop is to end."""
        self.step = step
        self.count += 1
        # A copy, as a CUDA graph writes the next step's to the same place.
        for name, value in zip(terms, torch.stack(list(terms.values())).unbind()):
            self.terms.setdefault(name, []).append(value)
        due = self.stop or step == self.config.steps or step % self.arguments.val_every == 0
        if due or step == 1 or step % self.arguments.log_every == 0:
            terms = self.means()  # it also keeps NaN out of a checkpoint
            if due:
                self.save()  # first: the rest may be interrupted
            try:
                self.log(terms)
            except OSError:  # the terminal is gone, or the reader of a pipe
                self.save()
                raise
            if due:
                self.validate()
            self.terms = {}
            self.count = 0
            self.since = time.perf_counter()  # training's alone: validation is over
        return due and (self.stop or step == self.config.steps)

    def means(self) -> dict:
        """Over the steps since the last line. Raises FloatingPointError at NaN or Inf."""
        # Not every step has every term.
        terms = {name: torch.stack(values).mean().item() for name, values in self.terms.items()}
        for name, value in terms.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} became {value} by step {self.step}; "
                                         "no file changed")
        return terms

    def log(self, terms: dict):
        """One line and one row."""
        seconds = max(time.perf_counter() - self.since, 1e-6)  # a coarse clock may stand still
        images_per_s = self.count * self.config.batch / seconds
        # A step takes about four times as long once the discriminators play.
        warmup = max(0, min(self.config.warmup, self.config.steps) - self.step)
        later = self.config.steps - self.step - warmup
        minutes = seconds / self.count * (warmup + (4 * later if warmup else later)) / 60
        text = "".join(f"  {name} {value:.3g}" for name, value in terms.items())
        when = f"about {minutes:.1f} min left" + (", warm-up" if warmup else "")
        print(f"step {self.step}  {images_per_s:.1f} images/s  {when}{text}")
        self.append("log.jsonl", {"step": self.step, "images_per_s": images_per_s} | terms)

    def validate(self):
        """Score the running average, draw the grid, keep the best."""
        rows = summarize(evaluate(self.nets.ema, self.valid, 4, **self.metrics))
        print_scores(rows)
        table = {"step": self.step, "faces": len(self.valid)}
        for name, scores in rows.items():
            table |= {f"{name}_{score}": value for score, value in scores.items()}
        self.append("valid.jsonl", table)
        save_image(self.grid(), self.out / "grid.png")
        # Realism alone would choose samples that are all alike. So models whose spread is
        # at least 0.8 of their error come first, and of them the least realism x AUC.
        if self.metrics and self.step > self.config.warmup:
            score = (table["hallucination_spread"] >= 0.8,
                     -table["hallucination_realism"] * table["hallucination_auc"])
            if not self.best or score > self.best:  # compared from the left
                self.best = score
                save_checkpoint(self.out / "best.pt", self.nets.ema, step=self.step, score=score)

    def append(self, name: str, row: dict):
        """One more line of a table: each row names its own columns."""
        with open(self.out / name, "a") as file:
            file.write(json.dumps(row) + "\n")

    def grid(self):
        """What G makes of the same six faces and six z at every step."""
        hr = self.valid[:6]
        lr = quantize(downscale(hr, self.config.scale))
        rng = torch.Generator().manual_seed(0)
        z = draw_z((6, self.config.z_dim, *lr.shape[-2:]), self.config.z_shared, rng)
        return contact_sheet(self.nets.ema, lr, z.to(lr.device), hr)

    def save(self):
        """Write last.pt, from which --resume goes on, with the same data."""
        state = {part: getattr(self.nets, part).state_dict()
                 for part in ("G", "D_I", "D_g", "opt_G", "opt_D")}
        save_checkpoint(self.out / "last.pt", self.nets.ema, **state, step=self.step,
                        config=asdict(self.config),
                        run={flag: getattr(self.arguments, flag) for flag in RUN})

    def finish(self):
        """The last words: how to go on, or what came of it."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        checkpoint = shlex.quote(str(self.out / "last.pt"))
        if self.step < self.config.steps:
            print(f"stopped and saved; go on with\n  python train.py --resume {checkpoint}")
        else:
            print(f"done: look at {self.out / 'grid.png'}, sample with\n"
                  f"  python sample.py PHOTO --checkpoint {checkpoint}")
        if not self.arguments.data:
            faces = possibilities(100, self.config.size).to(self.arguments.device)
            found = directions_found(self.nets.ema, faces)
            print("Each small face hides where the eyes look. Ten hallucinations look in "
                  f"{found:.2f} of four\ndirections: a perfect sampler in 3.77, one face "
                  "repeated in 1.")


def run_folder(arguments) -> Path:
    """The folder of results, this run's alone. ValueError where another run is."""
    if arguments.resume:
        return Path(arguments.resume).parent
    name = Path(arguments.data or "drawn").name + time.strftime("-%m%d-%H%M%S")
    out = Path(arguments.out or Path("runs", name))
    files = ("last.pt", "best.pt", "log.jsonl", "valid.jsonl", "grid.png")
    require(not any((out / file).exists() for file in files),
            f"{out} holds a run already: --resume it, delete it, or name another --out")
    # A name of our own must be new: another run may have begun in this second.
    out.mkdir(parents=True, exist_ok=bool(arguments.out))
    return out


# ---- Command line --------------------------------------------------------------------

# Of a run beside its Config: kept in its checkpoints, taken up by --resume.
RUN = ("data", "val", "drawn", "val_faces", "val_every", "log_every", "amp")


def build_parser() -> argparse.ArgumentParser:
    """The run's own flags, and one per setting. A setting that is not said stays None."""
    parser = argparse.ArgumentParser(description="Train hallusr, on photos or drawn faces.")
    run = parser.add_argument_group("the run").add_argument
    run("--data", type=path_argument, help="a folder of photos (default: drawn faces)")
    run("--val", type=path_argument, help="to validate on (default: 5 %% of --data)")
    run("--out", type=path_argument, help="folder for results (default: a new one in runs)")
    run("--resume", type=path_argument, help="go on from this last.pt, with its settings")
    run("--init", type=path_argument,
        help="start from this checkpoint's G, with new discriminators and no warm-up")
    run("--preset", choices=list(PRESETS),
        help="a column of settings (default: photos with --data, else drawn)")
    run("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if found)")
    run("--amp", action=argparse.BooleanOptionalAction,
        help="bfloat16 (default: on a CUDA GPU that has it)")
    run("--graph", action=argparse.BooleanOptionalAction, default=True,
        help="on a CUDA GPU, replay the step as a CUDA graph (default: yes)")
    run("--drawn", type=count, default=2000, help="faces to draw (default: %(default)s)")
    run("--val-faces", type=count, default=128, help="faces to validate on (default: %(default)s)")
    run("--val-every", type=count, default=500, help="steps between scores (default: %(default)s)")
    run("--log-every", type=count, default=50, help="steps between lines (default: %(default)s)")
    method = parser.add_argument_group("settings").add_argument
    for name, paper, photos, drawn, section, meaning in SETTINGS:
        how = {"type": type(paper)}
        if type(paper) is bool:
            how = {"action": argparse.BooleanOptionalAction}
        method("--" + name.replace("_", "-"), **how,
               help=f"{meaning} (paper: {paper}, {section}; photos: {photos}; drawn: {drawn})")
    return parser


def prepare(words=None) -> tuple[argparse.Namespace, Config, dict | None]:
    """Arguments, settings, and the checkpoint to resume. A flag beats preset and checkpoint."""
    parser = build_parser()
    arguments = parser.parse_args(words)
    content = load_run(arguments) if arguments.resume else None
    if content:
        values = content["run"] | content["config"]
    else:
        values = dict(PRESETS[arguments.preset or ("photos" if arguments.data else "drawn")])
        if arguments.steps:
            # A short run must reach z too.
            values["warmup"] = min(values["warmup"], arguments.steps // 2)
        if arguments.init:
            values["warmup"] = 0  # a trained G knows the reconstruction
    # Once more, over these values: argparse changes only those that a flag names.
    arguments = parser.parse_args(words, argparse.Namespace(**values))
    config = Config(**{name: getattr(arguments, name) for name in PRESETS["paper"]})
    check_config(config)
    if content:
        require(content["step"] < config.steps, f"{arguments.resume} is done: raise --steps")
        require(arguments.val_faces == content["run"]["val_faces"],
                "--resume keeps --val-faces: realism depends on their number, and best.pt on it")
    arguments.device = find_device(arguments.device)
    return arguments, config, content


def load_run(arguments) -> dict:
    """The checkpoint that --resume names. ValueError for one that cannot go on."""
    require(not (arguments.preset or arguments.init or arguments.out),
            "--resume goes on as the run began: no --preset, --init or --out")
    path = Path(arguments.resume)
    # From an older one, the newest would be overwritten.
    require(path.name == "last.pt", f"--resume takes a run's last.pt, got {path}")
    content = load_checkpoint(path)
    known = {*RUN, *PRESETS["paper"]}
    require(known == {*content.get("run", ()), *content.get("config", ())},
            f"{path} is of another version, or a generator alone: --init starts from that")
    return content


def main(words=None):
    arguments, config, content = prepare(words)
    if not arguments.data:
        # Small images gain little from a second thread, and lose much beside a busy program.
        torch.set_num_threads(1)
    changed = [f"{name} {value} ({PRESETS['paper'][name]})"
               for name, value in asdict(config).items() if value != PRESETS["paper"][name]]
    print(f"differs from --preset paper in: {', '.join(changed) or 'nothing'}")
    # Before the faces are read, which may take minutes: VGG-16 may be missing.
    nets = Networks(config, arguments.device, arguments.amp)
    if content:
        nets.load(content, arguments.resume)
    elif arguments.init:
        nets.start_from(arguments.init)
    faces, valid = load_faces(arguments, config)
    print(f"{len(faces)} faces of {config.size}x{config.size} to train on, {len(valid)} to "
          f"validate on; {config.steps} steps (--steps for a shorter run), seed {config.seed}, "
          f"{arguments.device}, {'bfloat16' if nets.amp else 'float32'}")
    report = Report(config, arguments, nets, faces, valid)
    train(config, arguments, nets, report, faces, content["step"] if content else 0)


# ---- Clear errors for wrong settings -------------------------------------------------

def check_config(config):
    """Raise ValueError, naming it, for a setting out of its range."""
    check_architecture(config.width, config.scale, min(config.blocks, config.d_blocks))
    require(config.size >= 11 and config.size % config.scale == 0,  # SSIM's window is 11
            f"size must be 11 or more and a multiple of scale {config.scale}, got {config.size}")
    for name, value in asdict(config).items():
        low = 1 if name in ("z_dim", "r1_every", "batch", "steps") else 0
        high = 1 if name in ("z_shared", "decay", "ema") else math.inf
        require(type(value) is str or low <= value <= high,
                f"{name} must be in [{low}, {high}], got {value}")


if __name__ == "__main__":
    run_as_script(main)
