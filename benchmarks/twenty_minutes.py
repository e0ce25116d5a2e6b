"""What twenty minutes of training on `shapes` reach on this machine: prompt accuracy for seen and held-out combinations.

    python benchmarks/twenty_minutes.py [--minutes M] [--threads N] [--seed N] [--out FILE]

Trains a model from nothing in a temporary folder, as `sd-scratch train --data shapes --minutes M` does, and measures it with 1,000 prompts.
"""
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import typer
from sd_scratch.course import whole_file
from sd_scratch.pipeline import Trainer, plan_for


def main(minutes: float = 20, threads: int = os.cpu_count(), seed: int = 0, out: Path = Path(__file__).with_suffix(".json")):
    torch.set_num_threads(threads)
    start, said = time.perf_counter(), []

    def say(line): said.append(line), print(f"{(time.perf_counter() - start) / 60:5.1f} min  {line}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        plan = plan_for(minutes, ["shapes"], seed, "cpu")
        say(f"plan: autoencoder {plan.vae_steps} steps, CLIP {plan.clip_steps}, UNet {plan.unet_steps}")
        Trainer(plan, folder, "cpu", say=say).run()
        report = json.loads((Path(folder) / "training/prompts.json").read_text())
    spent = (time.perf_counter() - start) / 60
    print(f"\n{'prompts':24} {'one object':>12} {'two objects':>12}")
    for kind in "seen", "held_out": print(f"{kind:24} {report[kind]['one']['accuracy']:12.1%} {report[kind]['two']['accuracy']:12.1%}")
    result = dict(minutes_asked=minutes, minutes_spent=round(spent, 1), threads=threads, machine=platform.processor() or platform.machine(), torch=torch.__version__, said=[line for line in said if not line.startswith("look at")], report=report, plan=asdict(plan))
    with whole_file(out) as path: path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__": typer.run(main)
