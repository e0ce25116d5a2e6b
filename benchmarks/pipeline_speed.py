"""How long each stage of drawing takes, and how much memory: our `StableDiffusion` against diffusers' `StableDiffusionPipeline`, on the same weights.

    python benchmarks/pipeline_speed.py [--models tiny,wide] [--batches 1,16] [--repeats N] [--threads N] [--channels-last] [--out FILE]

Both open the folder that our `save_pretrained` wrote and draw the same prompts from the same latents with DDIM and guidance, in turn (ours, theirs, ours, theirs, ...). `wide` is `tiny` with four times the
channels and random weights, on latents of 16×16: there the arithmetic counts, and what Python adds doesn't. A ratio below 1 says that we are quicker; ratios are taken within a turn, so that what else
the machine does in that moment hits both. FILE keeps the rows of other machines, models, batches and numbers of threads.

Each draws as it comes. Ours then has all channels of a place side by side in memory, diffusers' one channel after the other; with --channels-last diffusers' is laid out like ours (one line, see `opened`), and
such rows stand under "channels_last" in FILE, the others under "rows".

With one thread the seconds are the processor's, so that other work on the machine doesn't count; with more they are the clock's. Memory of a stage: the most bytes that its tensors hold at one moment, beside the weights.
Memory of the process: the most that a fresh process occupies which imports, opens and draws.
"""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import diffusers
import torch
import transformers
import typer
from torch.profiler import ProfilerActivity, profile, record_function

from sd_scratch.course import whole_file
from sd_scratch.pipeline import PROMPTS, StableDiffusion
from sd_scratch.training import seeded
from sd_scratch.unet import UNet2DConditionModel
from sd_scratch.vae import AutoencoderKL

SIDES, STAGES = ("ours", "diffusers"), ("text encoder", "UNet", "decoder")
STEPS = dict(tiny=25, wide=4)                                # of the sampler: each is as long as the one before
GUIDANCE = 5.0
KINDS = dict(                                                # of operators, by what is in their names ($: the end); what is in none of them is "other operators"
    convolutions=("conv",), attention=("scaled_dot_product",), **{"matrix products": ("mm", "linear", "matmul", "::t$")}, norms=("norm",),
    copies=("copy_", "cat", "clone", "contiguous", "upsample", "::to$"), elementwise=("silu", "gelu", "sigmoid", "add", "sub", "mul", "div", "sqrt", "clamp"))


def widened(pipe, factor=4, size=16):
    "Make a model with so many times the channels of a model's UNet and autoencoder, with random weights, on latents of that size."
    unet, vae = (dict(net.config, block_out_channels=[factor * width for width in net.config["block_out_channels"]]) for net in (pipe.unet, pipe.vae))
    pixels = size * 2 ** (len(vae["block_out_channels"]) - 1)
    with seeded(0): return StableDiffusion(AutoencoderKL(**dict(vae, sample_size=pixels)).eval(), pipe.text_encoder, pipe.tokenizer, UNet2DConditionModel(**dict(unet, sample_size=size)).eval(), pipe.schedule)


def opened(side, folder, channels_last=False):
    "Open a folder, here or in diffusers; lay out diffusers' weights like ours, if asked to."
    pipe = StableDiffusion.from_pretrained(folder) if side == "ours" else diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if side == "diffusers": pipe.set_progress_bar_config(disable=True)
    for network in (pipe.unet, pipe.vae) if channels_last else (): network.to(memory_format=torch.channels_last)
    return pipe


def arguments(model, batch, size):
    "Say what both are called with."
    prompts = [prompt for several in PROMPTS.values() for prompt in several]
    return dict(prompt=[prompts[i % len(prompts)] for i in range(batch)], num_inference_steps=STEPS[model], guidance_scale=GUIDANCE, output_type="np",
        latents=torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(0)))


def clock(): return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def watched(pipe):
    "Let a pipeline note what its stages take; return the notes, a dictionary that is filled anew by each drawing."
    notes = {}
    for stage, owner, method in zip(STAGES, (pipe.text_encoder, pipe.unet, pipe.vae), ("forward", "forward", "decode")):
        def timed(*args, stage=stage, run=getattr(owner, method), **options):
            with record_function(stage):
                start = clock()
                result = run(*args, **options)
                notes[stage] = notes.get(stage, 0) + clock() - start
            return result
        setattr(owner, method, timed)
    return notes


def turn(pipe, notes, options):
    "Draw once; return the seconds of each stage and of the whole, and the pictures."
    notes.clear()
    wall, start = time.perf_counter(), clock()
    pictures = pipe(**options).images
    whole = clock() - start
    return dict(notes, rest=whole - sum(notes.values()), whole=whole, wall=time.perf_counter() - wall), pictures


def kind_of(operator): return next((kind for kind, words in KINDS.items() if any(word in operator + "$" for word in words)), "other operators")


def profiled(pipe, options):
    "Draw once under the profiler; return the share of each kind of operator, and the most bytes that the tensors of each stage hold."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        start = time.perf_counter()
        with record_function("whole"): pipe(**options)
        spent = time.perf_counter() - start
    share = dict.fromkeys((*KINDS, "other operators"), 0.0)
    for event in found.key_averages():
        if "::" in event.key: share[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / spent
    events = found.profiler.kineto_results.events()
    held, now = [], 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()): held.append((event.start_ns(), now := now + event.nbytes()))
    most = {stage: max((bytes for when, bytes in held for a, b in spans if a <= when <= b), default=0) / 2 ** 20
            for stage in (*STAGES, "whole") for spans in [[(e.start_ns(), e.end_ns()) for e in events if e.name() == stage]]}
    return share | dict(Python=1 - sum(share.values())), most


def process_memory(side, folder, model, batch):
    "Draw in a fresh process that imports only what this side needs; return the most memory that it occupied, MB, or None where the system doesn't say."
    program = f"""import re, sys, torch
from pathlib import Path
torch.set_num_threads({torch.get_num_threads()})
if {side!r} == "ours":
    from sd_scratch.pipeline import StableDiffusion
    pipe = StableDiffusion.from_pretrained({str(folder)!r})
else:
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained({str(folder)!r}, safety_checker=None)
pipe(["red heart"] * {batch}, num_inference_steps=2, guidance_scale={GUIDANCE}, output_type="np")
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2 ** 10)"""
    if not Path("/proc/self/status").exists(): return None
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1])))
    return float(done.stdout.split()[-1])


def spread(values):
    "Give the median and the quartiles."
    return dict(median=median(values), low=quantiles(values, n=4)[0], high=quantiles(values, n=4)[2]) if len(values) > 1 else dict.fromkeys(("median", "low", "high"), values[0])


def measure(model, batch, repeats, fresh, channels_last):
    "Measure one model with one size of batch; return the row of the table."
    with tempfile.TemporaryDirectory() as folder:
        tiny = StableDiffusion.from_pretrained("tiny")
        (tiny if model == "tiny" else widened(tiny)).save_pretrained(folder)
        pipes = {side: opened(side, folder, channels_last) for side in SIDES}
        memory = {side: process_memory(side, folder, model, batch) if fresh else None for side in SIDES}
    nets = {name: getattr(pipes["ours"], name) for name in ("text_encoder", "unet", "vae")}
    size = pipes["ours"].unet.config["sample_size"]
    options = arguments(model, batch, size)
    notes = {side: watched(pipe) for side, pipe in pipes.items()}
    pictures = {side: turn(pipes[side], notes[side], options)[1] for side in SIDES}            # nobody is timed when they are drawn for the first time
    turns = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES: turns[side].append(turn(pipes[side], notes[side], options)[0])
    seconds = {side: {stage: median(one[stage] for one in turns[side]) for stage in turns[side][0]} for side in SIDES}
    ratio = {stage: spread([a[stage] / b[stage] for a, b in zip(*turns.values())]) for stage in (*STAGES, "whole", "wall")}
    where, tensors = zip(*(profiled(pipes[side], options) for side in SIDES))
    return dict(model=model, batch=batch, threads=torch.get_num_threads(), machine=platform.processor() or platform.machine(), processors=os.cpu_count(), python=platform.python_version(), torch=torch.__version__,
        diffusers=diffusers.__version__, transformers=transformers.__version__, clock="processor" if torch.get_num_threads() == 1 else "wall", steps=STEPS[model], guidance=GUIDANCE, repeats=repeats, latents=size,
        pixels=pictures["ours"].shape[1], parameters={name: sum(w.numel() for w in net.parameters()) for name, net in nets.items()}, difference=float(abs(pictures["ours"] - pictures["diffusers"]).max()),
        seconds=seconds, ratio=ratio, tensors_mb=dict(zip(SIDES, tensors)), process_mb=memory, share=dict(zip(SIDES, where)))


def table(rows):
    "Write the results as lines of text."
    yield "seconds of a drawing, ours / diffusers; ratio: median of the turns [quartiles]; MB: what the stage's tensors hold at most, ours / diffusers"
    yield f"{'model':6} {'batch':>5} {'threads':>7} {'steps':>5}  {'stage':13} {'ours':>9} {'diffusers':>9} {'ratio':>6}  {'quartiles':15} {'MB':>15}"
    for r in rows:
        head = f"{r['model']:6} {r['batch']:5} {r['threads']:7} {r['steps']:5}"
        for stage in (*STAGES, "rest", "whole"):
            ours, theirs = (r["seconds"][side][stage] for side in SIDES)
            ratio = r["ratio"].get(stage)
            text = f"{ratio['median']:6.2f}  {ratio['low']:6.2f} – {ratio['high']:<6.2f}" if ratio else " " * 23
            mb = " / ".join(f"{r['tensors_mb'][side][stage]:.2f}" for side in SIDES) if stage in r["tensors_mb"]["ours"] else ""
            yield f"{head}  {stage:13} {ours:9.4f} {theirs:9.4f} {text} {mb:>15}"
            head = " " * len(head)
        for side in SIDES: yield f"{head}  {side + ':':11} " + ", ".join(f"{kind} {share:.0%}" for kind, share in r["share"][side].items())
        if r["process_mb"]["ours"]: yield f"{head}  a fresh process: {r['process_mb']['ours']:.0f} MB ours, {r['process_mb']['diffusers']:.0f} MB diffusers"
        yield f"{head}  largest difference of the pictures: {r['difference']:.1e}"


def key(row): return tuple(row[name] for name in ("machine", "threads", "model", "batch"))


def main(models: str = "tiny,wide", batches: str = "1,16", repeats: int = 9, threads: int = 1, fresh: bool = True, channels_last: bool = False, out: Path = Path(__file__).with_suffix(".json")):
    if unknown := set(models.split(",")) - set(STEPS): raise typer.BadParameter(f"there is no model {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if repeats < 1: raise typer.BadParameter(f"repeats is {repeats}; it must be 1 or more")
    torch.set_num_threads(threads)
    place = "channels_last" if channels_last else "rows"
    for model in models.split(","):
        for batch in map(int, batches.split(",")):
            row = measure(model, batch, repeats, fresh, channels_last)
            print("\n".join(table([row])), flush=True)
            if row["difference"] > 1e-4: raise SystemExit(f"the pictures differ by {row['difference']:.1e}: nothing is written")
            found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
            found[place] = sorted([*(r for r in found.get(place, []) if key(r) != key(row)), json.loads(json.dumps(row))], key=key)
            with whole_file(out) as path: path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__": typer.run(main)
