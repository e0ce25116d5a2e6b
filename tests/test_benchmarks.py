"The benchmarks, with little to do. Fashion-MNIST: killed and called again, it ends with the row of a run that nobody disturbed, and keeps the rows of others. Speed: both draw the same, and the parts add up."
import importlib.util, json
from pathlib import Path

import pytest
import torch

from sd_scratch.data import CLOTHES, CaptionedPictures


def benchmark(name):
    "Import a benchmark."
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", Path(__file__).parent.parent / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(monkeypatch):
    "Give the benchmark, with few and small pictures' worth of work."
    module = benchmark("fashion_mnist")
    pictures = torch.randint(0, 256, (300, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    captions = [f"a photo of {CLOTHES[i % 10]}" for i in range(300)]
    monkeypatch.setattr(module, "fashion_mnist", lambda split: CaptionedPictures(pictures if split == "train" else pictures.flip(0)[:200], captions[:300 if split == "train" else 200]))
    monkeypatch.setattr(module, "COUNT", 20)
    monkeypatch.setattr(module, "SAMPLER", {2: "ddim", 3: "ddpm"})
    monkeypatch.setattr(module, "AT_A_MOMENT", ("ddim", 2))
    small = dict(batch=4, lr=1e-3, decay=0.9)
    monkeypatch.setattr(module, "RECIPES", dict(cpu=dict(
        pixels=small | dict(unet=module.unet(4, 16, [16, 16], [0, 0])),
        latents=small | dict(unet=module.unet(4, 8, [16, 16], [0, 0]), vae=module.autoencoder([8, 8]), kl=1e-6, share=0.3, vae_batch=4, vae_lr=1e-3))))
    return module


def rows(module, folder, out, **options):
    "Run the benchmark and read what it wrote."
    module.main(minutes=0.001, device="cpu", threads=1, evaluations="2,3", folder=folder, out=out, **options)
    return json.loads(out.read_text(encoding="utf-8"))["rows"]


def timeless(row): return {key: value for key, value in row.items() if "minutes" not in key and key != "curve"} | dict(curve=[score for _, score in row["curve"]])


def test_a_killed_benchmark_goes_on(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.Run, "plan", lambda self: self.notes.setdefault("plan", dict(vae=12, unet=16)))    # a timing would give each run another
    whole = rows(bench, tmp_path / "whole", tmp_path / "whole.json")
    assert [row["kind"] for row in whole] == ["latents", "pixels"] and all(len(row["curve"]) == 4 and list(row["scores"]) == ["2", "3"] and row["scores"]["3"]["draws"] == 3 for row in whole)
    assert "FID/floor" in capsys.readouterr().out
    left = [0]

    def mortal(denoise):
        def killed(*args, **options):
            left[0] -= 1
            if not left[0]: raise KeyboardInterrupt
            return denoise(*args, **options)
        return killed

    for name in ("ddim", "ddpm"): monkeypatch.setitem(bench.SAMPLERS, name, mortal(bench.SAMPLERS[name]))
    lives, found = 0, None
    while found is None:
        left[0], lives = 4, lives + 1                                                                             # dies at the fourth set of pictures, among them those of moments
        try: found = rows(bench, tmp_path / "killed", tmp_path / "killed.json")
        except KeyboardInterrupt: pass
    assert lives == 7 and [timeless(row) for row in found] == [timeless(row) for row in whole]


def test_a_new_run_keeps_the_rows_of_others(bench, tmp_path):
    out = tmp_path / "out.json"
    first = rows(bench, tmp_path, out, kinds="pixels")
    other = first[0] | dict(machine="another")
    out.write_text(json.dumps(dict(rows=[*first, other])), encoding="utf-8")
    again = rows(bench, tmp_path, out, kinds="pixels", seed=1)
    assert {(row["machine"], row["seed"]) for row in again} == {(first[0]["machine"], 0), (first[0]["machine"], 1), ("another", 0)}
    assert len(rows(bench, tmp_path, out, kinds="pixels", seed=1)) == 3                                            # replaced, not added


def test_the_ratio_is_read_off_the_curves(bench):
    row = dict(minutes_asked=8, machine="m", threads=1, seed=0, recipe=dict(schedule="cosine"))
    slow, fast = row | dict(kind="pixels", curve=[[1, 16], [2, 8], [4, 4], [8, 2]]), row | dict(kind="latents", curve=[[1, 4], [2, 3], [4, 1], [8, 0.5]])
    (found,) = bench.ratios([slow, fast])
    assert found["faster"] == "latents" and 2 < found["its_minutes"] < 4 and found["ratio"] == pytest.approx(8 / found["its_minutes"])
    assert not bench.ratios([slow, fast | dict(recipe=dict(schedule="linear"))])                                    # a row of an older recipe tells nothing of pixels and latents
    assert bench.minutes_to(slow["curve"], 8) == 2 and bench.minutes_to(slow["curve"], 1) is None


@pytest.mark.parametrize("options, message", [(dict(kinds="sound"), "pixels, latents"), (dict(evaluations="2,10"), "no sampler for 10 evaluations; there are those for 2, 3"), (dict(draws=0), "1 or more")])
def test_what_there_is_not_is_refused_before_the_training(bench, tmp_path, options, message):
    with pytest.raises(bench.typer.BadParameter, match=message): bench.main(minutes=1, device="cpu", threads=1, folder=tmp_path, out=tmp_path / "out.json", **dict(evaluations="2,3") | options)
    assert not any(tmp_path.iterdir())


def test_a_folder_of_another_recipe_is_refused(bench, tmp_path, monkeypatch):
    rows(bench, tmp_path / "runs", tmp_path / "out.json", kinds="pixels", note="first")
    assert rows(bench, tmp_path / "runs", tmp_path / "out.json", kinds="pixels")[0]["note"] == "first"                # a note stays until another is given
    monkeypatch.setitem(bench.SCHEDULE, "beta_schedule", "scaled_linear")
    with pytest.raises(bench.typer.BadParameter, match="another recipe"): rows(bench, tmp_path / "runs", tmp_path / "out.json", kinds="pixels")


@pytest.mark.parametrize("noted, done, minutes", [([100, 60, 120], 80, [48, 96]), ([100, 60, 120], 120, [72, 144]), (None, 0, [0, 0])])
def test_the_clock_counts_the_steps_that_are_left(bench, tmp_path, noted, done, minutes):
    notes = bench.Notes(tmp_path / "notes.json")
    if noted: notes.keep(unet=noted)
    assert bench.Clock(notes, "unet", done, torch.device("cpu")).spent == pytest.approx(minutes)


@pytest.fixture
def speed(monkeypatch):
    "Give the benchmark of the pipeline, with two steps to draw in."
    module = benchmark("pipeline_speed")
    monkeypatch.setattr(module, "STEPS", dict(tiny=2, wide=1))
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_speed_of_the_pipeline(speed, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    out.write_text(json.dumps(dict(rows=[dict(machine="another", threads=1, model="tiny", batch=2)])), encoding="utf-8")
    speed.main(models="tiny", batches="2", repeats=3, fresh=False, out=out)
    said, rows = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert "UNet" in said and "Python" in said and len(rows) == 2                       # another machine's row stays
    (row,) = [r for r in rows if r["machine"] != "another"]
    assert row["difference"] <= 1e-4 and row["pixels"] == 32 and row["clock"] == "processor"
    for side in speed.SIDES:
        seconds, held = row["seconds"][side], row["tensors_mb"][side]
        assert min(seconds.values()) > 0 and seconds["UNet"] > seconds["text encoder"]
        assert sum(seconds[part] for part in (*speed.STAGES, "rest")) == pytest.approx(seconds["whole"], rel=0.2)    # medians, each of its own
        assert sum(row["share"][side].values()) == pytest.approx(1) and 0 < row["share"][side]["convolutions"] < 1
        assert 2 * 3 * 32 * 32 * 4 / 2 ** 20 < held["decoder"] <= held["whole"] < 20         # two pictures, and a little more
    assert row["ratio"]["whole"]["low"] <= row["ratio"]["whole"]["median"] <= row["ratio"]["whole"]["high"]
    turn = speed.turn
    monkeypatch.setattr(speed, "turn", lambda pipe, *rest: (dict.fromkeys((took := turn(pipe, *rest))[0], 1.0 if isinstance(pipe, speed.StableDiffusion) else 4.0), took[1]))
    for layout in (False, True): speed.main(models="tiny", batches="2", repeats=1, fresh=False, channels_last=layout, out=out)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["channels_last"][0]["ratio"]["UNet"] == dict.fromkeys(("median", "low", "high"), 0.25)                # ours / theirs
    assert len(found["rows"]) == 2 and len(found["channels_last"]) == 1                 # replaced, not added


def test_speed_is_only_of_the_same_pictures(speed, tmp_path, monkeypatch):
    opened = speed.opened

    def spoilt(side, folder, layout):
        pipe = opened(side, folder, layout)
        if side == "ours": pipe.unet.conv_out.bias.data += 0.1
        return pipe

    monkeypatch.setattr(speed, "opened", spoilt)
    with pytest.raises(SystemExit, match="differ"): speed.main(models="tiny", batches="1", repeats=1, fresh=False, out=tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(speed.typer.BadParameter, match="tiny, wide"): speed.main(models="huge", out=tmp_path / "out.json")


def test_operators_are_told_apart(speed):
    for name, kind in dict(mkldnn_convolution="convolutions", addmm="matrix products", t="matrix products", to="copies", native_layer_norm="norms", mul="elementwise", transpose="other operators",
        _scaled_dot_product_flash_attention_for_cpu="attention").items(): assert speed.kind_of(f"aten::{name}") == kind
