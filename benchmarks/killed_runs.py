"""Kill a small training run at random moments, again and again, and see whether it ends with the weights of a run that nobody disturbed.

    python benchmarks/killed_runs.py [--kills 100] [--steps 60] [--seed 0] [--out FILE]

The network has what is easily forgotten: a batch norm with its running mean, dropout, and weights that never get a gradient. A checkpoint is written after each step, so that many kills come while one is being written.
"""
import argparse, json, multiprocessing, random, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._dynamo  # which the first step of an optimizer would import anew in each life
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sd_scratch.course import whole_file
from sd_scratch.training import Fit, _read

torch.set_num_threads(1)


def train(steps, seed, checkpoint, out):
    "Train to the end, from the checkpoint if there is one, and write the final weights and losses."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Dropout(0.2), nn.Conv2d(8, 3, 3, padding=1))
    model.unused = nn.Parameter(torch.ones(3))
    x = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    def loss(generator):
        noise = torch.randn(8, 3, 16, 16, generator=generator)
        return (model(x + 0.5 * noise) - noise).square().mean()
    run = Fit(model, steps, lr=0.01, seed=seed, checkpoint=checkpoint)
    run.go(loss, every=-1, progress=False)
    with whole_file(out) as path: save_file({**model.state_dict(), "losses": torch.tensor(run.losses, dtype=torch.float64)}, path)


def contents(path):
    "Read all tensors of a file."
    with safe_open(path, "pt") as file: return {key: file.get_tensor(key) for key in file.keys()}


def same(a, b):
    "Say whether two files hold the same tensors, bit for bit."
    a, b = contents(a), contents(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def kill_runs(kills, steps, seed, folder):
    "Run, kill, go on; a run that has ended is compared, and the next begins. Return one row for each run."
    start = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn").Process        # a fork needn't import torch again
    dice, rows, left = random.Random(seed), [], kills
    while left:
        number = len(rows)
        whole, checkpoint, out = (folder / f"{number}-{name}.safetensors" for name in ("whole", "run", "end"))
        began = time.perf_counter()
        first = start(target=train, args=(steps, number, None, whole))
        first.start(), first.join()
        if first.exitcode: raise SystemExit("the undisturbed run failed")
        longest = (time.perf_counter() - began) / 2
        row = dict(run=number, kills=0, at_steps=[], while_writing=0, damaged=0)
        while not out.exists():
            life = start(target=train, args=(steps, number, checkpoint, out))
            life.start()
            life.join(dice.uniform(0, longest) if left else None)
            if life.exitcode is None and left:
                life.kill(), life.join()                                                               # SIGKILL
                row["kills"], left = row["kills"] + 1, left - 1
                row["while_writing"] += bool(list(folder.glob(f".{number}-run*part*")))
                if checkpoint.exists():
                    try: row["at_steps"].append(len(_read(checkpoint)[1]["losses"]))
                    except ValueError: row["damaged"] += 1
                else: row["at_steps"].append(0)
            elif life.exitcode: raise SystemExit(f"run {number} failed when it went on")
        rows.append(row | dict(same=same(whole, out)))
    return rows


def main(args=None):
    "Run the program; return its exit status."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="of one run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="the results as JSON (default: %(default)s)")
    args = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder: rows = kill_runs(args.kills, args.steps, args.seed, Path(folder))
    print("run  kills  while writing  damaged  same weights  killed after these steps")
    for r in rows: print(f"{r['run']:3}  {r['kills']:5}  {r['while_writing']:13}  {r['damaged']:7}  {'yes' if r['same'] else 'NO':>12}  {' '.join(map(str, r['at_steps']))}")
    total = dict(kills=sum(r["kills"] for r in rows), runs=len(rows), while_writing=sum(r["while_writing"] for r in rows), damaged=sum(r["damaged"] for r in rows), same=sum(r["same"] for r in rows))
    print(f"{total['kills']} kills, {total['while_writing']} of them while a checkpoint was written; {total['same']} of {total['runs']} runs end with the weights of the undisturbed run, bit for bit")
    with whole_file(args.out) as path: path.write_text(json.dumps(dict(steps=args.steps, torch=torch.__version__, total=total, runs=rows), indent=1) + "\n", encoding="utf-8")
    return int(total["same"] < total["runs"])


if __name__ == "__main__": sys.exit(main())
