"""How good diffusion on Fashion-MNIST gets in some minutes on this machine, in pixels and in latents.

    python benchmarks/fashion_mnist.py [--minutes M] [--kinds pixels,latents] [--device D] [--threads N] [--seed N] [--evaluations 20,50,100] [--draws N]
        [--folder FOLDER] [--out FILE] [--note TEXT]

Trains a UNet on the 60,000 training pictures with their ten captions, once on pixels (the four of a square of 2×2 as four channels) and once on the latents of an autoencoder,
whose training counts. Then it paints 2,048 pictures three times with 20, 50 and 100 evaluations of the network, of captions drawn from the training set, and measures FID in the
features of the course's classifier of clothes against the 10,000 test pictures. The floor is what 2,048 training pictures score.

A run that was killed goes on where it was when the same command comes again; what was painted is not painted again. FILE keeps the rows of other machines and budgets.
"""
import json
import math
import os
import platform
import time
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from torch import nn

from sd_scratch.course import data_folder, pick_device, whole_file
from sd_scratch.data import fashion_mnist
from sd_scratch.denoising import start_as_nothing
from sd_scratch.evaluation import fid, kid, load_clothes_classifier
from sd_scratch.noise import NoiseSchedule
from sd_scratch.samplers import SAMPLERS, sampling_steps
from sd_scratch.training import Fit, replayed, seeded
from sd_scratch.unet import UNet2DConditionModel
from sd_scratch.vae import AutoencoderKL

COUNT, DRAWS, MOMENTS = 2048, 3, (1 / 8, 1 / 4, 1 / 2, 1)
TIMING = 0.03                                                               # of the minutes, to find out how many steps they are
SCHEDULE = dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")   # its last level is noise alone, as what samplers start from
SAMPLER = {20: "ddim", 50: "ddpm", 100: "ddpm"}                             # by evaluations, one in each step; at 50, `ddpm` did better in trials than `ddim` at 20
AT_A_MOMENT = "ddim", 20                                                    # of the training


def unet(channels, side, widths, attention, layers=1):
    "Describe a UNet; `attention` says for each level whether it looks around and at the caption."
    return dict(in_channels=channels, out_channels=channels, sample_size=side, block_out_channels=widths, layers_per_block=layers, norm_num_groups=16, attention_head_dim=4, cross_attention_dim=10,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention], up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]])


def autoencoder(widths, channels=4, layers=1):
    "Describe an autoencoder of grey pictures, whose squares of 2×2 pixels are four channels."
    return dict(in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=layers, latent_channels=channels, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * len(widths), up_block_types=["UpDecoderBlock2D"] * len(widths))


RECIPES = dict(                                                             # `share`: of the minutes, for the autoencoder
    cpu=dict(
        pixels=dict(unet=unet(4, 16, [32, 64, 96], [0, 0, 1]), batch=64, lr=4e-3, decay=0.999),
        latents=dict(unet=unet(4, 8, [64, 96], [0, 1]), batch=128, lr=4e-3, decay=0.999, vae=autoencoder([32, 64]), kl=3e-6, share=0.25, vae_batch=8, vae_lr=4e-3)),
    cuda=dict(
        pixels=dict(unet=unet(4, 16, [128, 192, 192], [0, 0, 1]), batch=128, lr=4e-3, decay=0.999),
        latents=dict(unet=unet(8, 8, [128, 176], [1, 1]), batch=128, lr=4e-3, decay=0.999, vae=autoencoder([64, 128], channels=8), kl=1e-6, share=0.3, vae_batch=64, vae_lr=4e-3)))


class Notes(dict):
    "What a run knows so far, in a file"
    def __init__(self, file):
        self.file = file
        super().__init__(json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})

    def keep(self, **facts):
        "Add facts, and write all."
        self.update(facts)
        with whole_file(self.file) as path: path.write_text(json.dumps(self, indent=1) + "\n", encoding="utf-8")


def seconds(device):
    "Read the clock that the minutes are of: with one thread on the CPU the processor's, so that waiting for other work on the machine doesn't count; else that on the wall."
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


class Clock:
    "Add up what the steps of a training took over all its lives, as a callback; steps that were lost with a life don't count, those that it forgot to note count as long as the others"
    def __init__(self, notes, name, done, device):
        self.notes, self.name, self.device = notes, name, device
        steps, *spent = notes.get(name, [0, 0, 0])
        self.spent, self.written = [s * done / max(1, steps) for s in spent], time.perf_counter()                # the weights may be some seconds older or younger than the notes
        self.start()

    def start(self):
        "Don't count what was since the last step."
        self.last = seconds(self.device), time.perf_counter()

    def __call__(self, fit):
        now = seconds(self.device), time.perf_counter()
        self.spent, self.last = [s + b - a for s, a, b in zip(self.spent, self.last, now)], now
        if now[1] - self.written > 10 or len(fit.losses) == fit.steps:
            self.notes.keep(**{self.name: [len(fit.losses), *self.spent]})
            self.written = now[1]


class Copier(nn.Module):
    "The autoencoder as one call, of tensors only"
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, pictures, noise):
        latent = self.vae.encode(pictures)
        return self.vae.decode(latent.mean + latent.std * noise), latent.kl()


def describe(device):
    "Name what computes."
    if device.type == "cuda": return torch.cuda.get_device_name(device)
    try: return next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration): return platform.processor() or platform.machine()


class Bench:
    "The pictures, and the measurements that need no model"
    def __init__(self, device):
        self.device, train, test = device, fashion_mnist("train"), fashion_mnist("test")
        self.pictures = F.pixel_unshuffle(train.pictures, 2).to(device)                                      # (N, 1, 32, 32) -> (N, 4, 16, 16)
        names = {caption: i for i, caption in enumerate(sorted(set(train.captions)))}
        self.captions = F.one_hot(torch.tensor([names[caption] for caption in train.captions]), 10).float()[:, None].to(device)     # (N, 1, 10): the text is the caption's number
        self.classifier = load_clothes_classifier().to(device)
        self.there = self.features(test.pictures)

    def features(self, pictures): return self.classifier.features(scaled(pictures.to(self.device)))

    def scores(self, sets):
        "Measure sets of pictures: mean FID, its spread and mean KID."
        found = [self.features(pictures) for pictures in sets]
        fids = [fid(self.there, one) for one in found]
        return dict(fid=mean(fids), spread=stdev(fids) if len(fids) > 1 else None, kid=mean(kid(self.there, one) for one in found), draws=len(fids))

    def some(self, draw):
        "Draw real pictures, in squares."
        return self.pictures[torch.randperm(len(self.pictures), generator=torch.Generator().manual_seed(draw))[:COUNT].to(self.device)]


def scaled(pictures): return pictures.float() / 127.5 - 1


def drawn(squares):
    "Turn what a model makes into pictures, in the 256 steps of grey that pictures have."
    return F.pixel_shuffle(((squares.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), 2).cpu()


class Run:
    "One kind of diffusion for some minutes on one machine; its folder keeps what was trained and measured"
    def __init__(self, kind, minutes, bench, seed, folder, say):
        self.kind, self.minutes, self.bench, self.device, self.seed = kind, minutes, bench, bench.device, seed
        self.recipe = RECIPES["cpu" if bench.device.type == "cpu" else "cuda"][kind]
        self.about = json.loads(json.dumps(self.recipe | dict(optimizer="Muon", schedule=SCHEDULE, moments=AT_A_MOMENT)))
        self.threads = torch.get_num_threads()
        self.folder = folder / f"{kind}-{minutes:g}-{self.device.type}-{self.threads}-{seed}"
        self.notes, self.say = Notes(self.folder / "notes.json"), lambda line: say(f"{kind}: {line}")
        if not self.notes: self.notes.keep(recipe=self.about)
        if self.notes.get("recipe", self.about) != self.about: raise typer.BadParameter(f"{self.folder} holds a run with another recipe (its notes.json names it): delete that folder, or give another --folder")
        self.schedule = NoiseSchedule(**SCHEDULE)
        a = self.schedule.alphas_cumprod.to(self.device)[:, None, None, None]
        self.signal, self.sigma = a.sqrt(), (1 - a).sqrt()                                                          # (T, 1, 1, 1)
        with seeded(seed):
            self.unet = start_as_nothing(UNet2DConditionModel(**self.recipe["unet"])).to(self.device)
            self.vae = AutoencoderKL(**self.recipe["vae"]).to(self.device) if "vae" in self.recipe else None
        c = self.unet.config
        self.shape = c["in_channels"], c["sample_size"], c["sample_size"]

    def random(self, generator):
        "Make a source of random numbers on the device from a step's: (shape) -> normal, (shape, below) -> integers."
        g = generator if self.device.type == "cpu" else torch.Generator(self.device).manual_seed(generator.initial_seed())
        return lambda shape, below=None: torch.randn(shape, generator=g, device=self.device) if below is None else torch.randint(below, shape, generator=g, device=self.device)

    def vae_fit(self, steps, vae, checkpoint=None):
        "Make the training of the autoencoder, with the loss of notebook 07."
        r, copier = self.recipe, Copier(vae)
        batch, pictures = r["vae_batch"], self.bench.pictures
        fit = Fit(vae, steps, r["vae_lr"], decay=r["decay"], seed=self.seed, checkpoint=checkpoint, muon=True)
        network = replayed(copier, torch.zeros(batch, *pictures.shape[1:], device=self.device), torch.zeros(batch, *self.shape, device=self.device))
        def loss(generator):
            random = self.random(generator)
            x = scaled(pictures[random((batch,), len(pictures))])
            again, kl = network(x, random((batch, *self.shape)))
            return (again - x).abs().mean() + (again - x).square().mean() + r["kl"] * kl.mean()
        return fit, loss

    def unet_fit(self, steps, unet, codes, checkpoint=None):
        "Make the training of the denoiser, with the loss of notebook 13."
        r, (middles, spreads), captions = self.recipe, codes, self.bench.captions
        batch = r["batch"]
        fit = Fit(unet, steps, r["lr"], decay=r["decay"], seed=self.seed, checkpoint=checkpoint, muon=True)
        network = replayed(unet, torch.zeros(batch, *self.shape, device=self.device), torch.zeros(batch, dtype=torch.long, device=self.device), captions[:batch].clone())
        def loss(generator):
            random = self.random(generator)
            chosen, t, noise = random((batch,), len(middles)), random((batch,), len(self.signal)), random((batch, *self.shape))
            x = scaled(middles[chosen]) if spreads is None else middles[chosen] + spreads[chosen] * random(noise.shape)
            signal, sigma = self.signal[t], self.sigma[t]
            return F.mse_loss(network(signal * x + sigma * noise, t, captions[chosen]), signal * noise - sigma * x)  # the velocity
        return fit, loss

    def plan(self):
        "Time some steps, and turn the minutes into steps; once for a run."
        if "plan" in self.notes: return self.notes["plan"]
        share, plan = self.recipe.get("share", 0), {}
        noise = torch.zeros(len(self.bench.pictures), *self.shape, dtype=None if self.vae else torch.uint8, device=self.device)
        for name, part in dict(vae=share, unet=1 - share).items():
            if not part: continue
            with seeded(self.seed): network = (AutoencoderKL if name == "vae" else UNet2DConditionModel)(**self.recipe[name]).to(self.device)
            fit, loss = self.vae_fit(10 ** 6, network) if name == "vae" else self.unet_fit(10 ** 6, network, (noise, noise if self.vae else None))
            for _ in range(3): fit.step(loss)
            start, budget, count = seconds(self.device), 60 * self.minutes * part, 0
            while count < 3 or seconds(self.device) - start < TIMING * budget: fit.step(loss); count += 1
            plan[name] = max(10, int((1 - TIMING) * budget * count / (seconds(self.device) - start)))
        self.notes.keep(plan=plan)
        return plan

    def train(self, name, fit, loss, *callbacks):
        "Train one network, or go on with it; return the minutes that its steps took, and those on the wall."
        clock = Clock(self.notes, name, len(fit.losses), self.device)
        if len(fit.losses) < fit.steps: self.say(f"{name}, step {len(fit.losses)} of {fit.steps}")
        fit.go(loss, every=min(30, 60 * self.minutes / 8), progress=False, callbacks=[clock, *(lambda fit, f=f: f(fit) and clock.start() for f in callbacks)])
        return [s / 60 for s in self.notes[name][1:]]

    @torch.no_grad()
    def encode(self):
        "Turn all pictures into what the denoiser is trained on, once; return also the minutes."
        if not self.vae: return (self.bench.pictures, None), 0
        file, start = self.folder / "latents.safetensors", seconds(self.device)
        if "encoding" not in self.notes:
            found = [self.vae.encode(scaled(part)) for part in self.bench.pictures.split(500)]
            with whole_file(file) as path: save_file(dict(middles=torch.cat([d.mean for d in found]), spreads=torch.cat([d.std for d in found])), path)
            self.notes.keep(encoding=(seconds(self.device) - start) / 60)
        middles, spreads = map(load_file(file, str(self.device)).get, ("middles", "spreads"))
        self.scale = 1 / middles.std()
        return (self.scale * middles, self.scale * spreads), self.notes["encoding"]

    @torch.inference_mode()
    def decode(self, x): return self.vae.decode(x / self.scale) if self.vae else x

    @torch.inference_mode()
    def paint(self, name, sampler, evaluations, draw):
        "Paint pictures of captions drawn from the training set, if the folder hasn't them; return them."
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            generator, steps, found = torch.Generator().manual_seed(1000 * self.seed + draw), sampling_steps(self.schedule, evaluations), []
            captions = self.bench.captions[torch.randint(len(self.bench.captions), (COUNT,), generator=generator).to(self.device)]
            noise = torch.randn(COUNT, *self.shape, generator=generator).to(self.device)
            for x, text in zip(*(whole.split(128 if self.device.type == "cpu" else COUNT) for whole in (noise, captions))):
                found.append(drawn(self.decode(SAMPLERS[sampler](lambda x, t: self.unet(x, t, text), x, steps, generator, schedule=self.schedule))))
            with whole_file(file) as path: save_file(dict(pictures=torch.cat(found)), path)
            self.say(f"painted {name}")
        return load_file(file)["pictures"]

    def moment(self, fit):
        "Paint with the averaged weights at some moments of the training, as a callback; say whether this was one."
        share = {round(share * fit.steps): share for share in MOMENTS}.get(len(fit.losses))
        if share is None: return False
        with fit.averaged(): self.paint(f"moment-{share:g}", *AT_A_MOMENT, 0)
        return True

    def measure(self, evaluations, draws):
        "Train, paint and measure what isn't done yet; return the row of the table."
        plan, r, bench = self.plan(), self.recipe, self.bench
        minutes = self.train("vae", *self.vae_fit(plan["vae"], self.vae, self.folder / "vae.safetensors")) if self.vae else [0, 0]
        codes, encoding = self.encode()
        before = minutes[0] + encoding
        spent = self.train("unet", *self.unet_fit(plan["unet"], self.unet, codes, self.folder / "unet.safetensors"), self.moment)
        sets = {number: [] for number in evaluations}
        for draw in range(draws):
            for number in evaluations: sets[number].append(self.paint(f"{SAMPLER[number]}-{number}-{draw}", SAMPLER[number], number, draw))
        some = [bench.some(draw) for draw in range(DRAWS)]
        with torch.inference_mode(): copies = [torch.cat([drawn(self.vae.decode(self.vae.encode(scaled(part)).mean)) for part in one.split(500)]) for one in some] if self.vae else None
        curve = [[before + share * spent[0], bench.scores([self.paint(f"moment-{share:g}", *AT_A_MOMENT, 0)])["fid"]] for share in MOMENTS]
        return dict(kind=self.kind, minutes_asked=self.minutes, machine=describe(self.device), threads=self.threads, seed=self.seed, minutes=before + spent[0], minutes_of_the_autoencoder=before,
            minutes_on_the_wall=minutes[1] + encoding + spent[1], steps=plan["unet"], batch=r["batch"], pictures=plan["unet"] * r["batch"], parameters=count(self.unet), steps_of_the_autoencoder=plan.get("vae", 0),
            parameters_of_the_autoencoder=count(self.vae), torch=torch.__version__, recipe=self.about, floor=bench.scores([F.pixel_shuffle(one, 2) for one in some]),
            copies=bench.scores(copies) if copies else None, scores={number: dict(sampler=SAMPLER[number]) | bench.scores(each) for number, each in sets.items()}, curve=curve)


def count(network): return sum(w.numel() for w in network.parameters()) if network else 0


def minutes_to(curve, score):
    "Read off when a training reached an FID, between its moments on logarithmic scales; None if it didn't."
    for (a, high), (b, low) in zip(curve, curve[1:]):
        if high >= score >= low: return math.exp(math.log(a) + math.log(b / a) * (math.log(high / score) / math.log(high / low) if high > low else 0))
    return curve[0][0] if curve[0][1] <= score else None


def same(row): return tuple(row[key] for key in ("minutes_asked", "machine", "threads", "seed"))


def ratios(rows):
    "Say for each pair of rows with one optimizer and schedule when the one, on its way, had the FID that the other ends with, and how many times sooner that was."
    found = []
    for pixels in (row for row in rows if row["kind"] == "pixels"):
        for latents in (row for row in rows if row["kind"] == "latents" and same(row) == same(pixels) and all(row["recipe"].get(key) == pixels["recipe"].get(key) for key in ("optimizer", "schedule"))):
            slow, fast = sorted((pixels, latents), key=lambda row: row["curve"][-1][1], reverse=True)
            reached = minutes_to(fast["curve"], slow["curve"][-1][1])
            found.append(dict(zip(("minutes_asked", "machine", "threads", "seed"), same(pixels))) | dict(fid=slow["curve"][-1][1], slower=slow["kind"], minutes=slow["curve"][-1][0], faster=fast["kind"],
                its_minutes=reached, ratio=slow["curve"][-1][0] / reached, at_least=reached == fast["curve"][0][0]))
    return found


def spread(score): return f"{score['fid']:.3g}" + (f" ± {score['spread']:.2g}" if score["draws"] > 1 else "")


def table(rows):
    "Write the results as lines of text."
    yield f"FID and KID of {COUNT:,} pictures, painted of captions drawn from the training set, against the 10,000 test pictures, in the features of the course's classifier of clothes; ± standard deviation of the draws, all of one training"
    yield "minutes of all steps and of encoding the training set: with one thread of a CPU the processor's, otherwise on the wall"
    yield f"{'kind':8} {'parameters':>10} {'minutes':>7} {'threads':>7} {'steps':>7} {'pictures':>10} {'evaluations':>11} {'sampler':15} {'FID':>16} {'floor':>16} {'FID/floor':>9} {'KID':>9}  machine"
    for r in rows:
        for evaluations, s in r["scores"].items():
            yield (f"{r['kind']:8} {(r['parameters'] + r['parameters_of_the_autoencoder']) / 1e6:8.2f} M {r['minutes']:7.1f} {r['threads']:7} {r['steps']:7} {r['pictures']:10,} {evaluations:>11} {s['sampler']:15} "
                   f"{spread(s):>16} {spread(r['floor']):>16} {s['fid'] / r['floor']['fid']:9.2f} {s['kid']:9.2e}  {r['machine']}")
        if r["note"]: yield f"{'':8} {r['note']}"
        if r["copies"]: yield f"{'':8} its autoencoder's copies of real pictures: FID {spread(r['copies'])}, {r['copies']['fid'] / r['floor']['fid']:.2f} times the floor"
    for r in ratios(rows):
        yield f"{r['minutes_asked']:g} minutes, {r['machine']}: {r['slower']} end with FID {r['fid']:.3g} (one draw, {AT_A_MOMENT[1]} evaluations) after {r['minutes']:.1f} minutes; {r['faster']}, on their way, have it after {'at most ' * r['at_least']}{r['its_minutes']:.1f}, {'at least ' * r['at_least']}{r['ratio']:.1f} times sooner"


def main(minutes: float = 10, kinds: str = "pixels,latents", device: str = None, threads: int = os.cpu_count(), seed: int = 0, evaluations: str = ",".join(map(str, SAMPLER)), draws: int = DRAWS, folder: Path = None, out: Path = Path(__file__).with_suffix(".json"), note: str = None):
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    start = time.perf_counter()
    def say(line): print(f"{(time.perf_counter() - start) / 60:5.1f} min  {line}", flush=True)
    if unknown := set(kinds.split(",")) - set(RECIPES["cpu"]): raise typer.BadParameter(f"there is no kind {', '.join(sorted(unknown))}; there are {', '.join(RECIPES['cpu'])}")
    if unknown := set(evaluations.split(",")) - set(map(str, SAMPLER)): raise typer.BadParameter(f"there is no sampler for {', '.join(sorted(unknown))} evaluations; there are those for {', '.join(map(str, SAMPLER))}")
    if draws < 1: raise typer.BadParameter(f"{draws} draws; it must be 1 or more")
    bench, rows = Bench(pick_device(device)), []
    for kind in kinds.split(","):
        row = Run(kind, minutes, bench, seed, folder or data_folder() / "benchmark", say).measure(sorted(map(int, evaluations.split(","))), draws)
        others, before = [], {}
        for r in json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []:
            if (r["kind"], *same(r)) == (kind, *same(row)): before = r
            else: others.append(r)
        row["note"] = before.get("note", "") if note is None else note
        rows = sorted([*others, json.loads(json.dumps(row))], key=lambda r: (r["machine"], r["threads"], r["minutes_asked"], r["kind"], r["seed"]))
        with whole_file(out) as path: path.write_text(json.dumps(dict(rows=rows, ratios=ratios(rows)), indent=1) + "\n", encoding="utf-8")
    print("\n" + "\n".join(table(rows)) + f"\nwritten to {out}")


if __name__ == "__main__": typer.run(main)
