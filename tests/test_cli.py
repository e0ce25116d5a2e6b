"The program as its user calls it: a process of its own, its output, its exit status, what it leaves behind."
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from PIL import Image

from sd_scratch.cli import picture_path
from sd_scratch.pipeline import Plan, StableDiffusion, shipped_models
from test_pipeline import MINI

HEART = ("generate", "red heart")


def call(*words, cwd, **env):
    "Run sd-scratch; give exit status, output and errors."
    done = subprocess.run([sys.executable, "-c", "from sd_scratch.cli import main; main()", *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL,
        env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), COLUMNS="200") | env)
    return done.returncode, done.stdout, done.stderr


def refused(*words, cwd, **env):
    "Run sd-scratch with something wrong: status 2, one line, no traceback, nothing left behind. Give the line."
    before = sorted(cwd.rglob("*"))
    status, out, error = call(*words, cwd=cwd, **env)
    assert status == 2 and "Traceback" not in error, error
    assert sorted(cwd.rglob("*")) == before
    return error


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    "A model that the program trained, in a few steps, on shapes; with what it printed."
    folder = tmp_path_factory.mktemp("cli")
    MINI.save(folder / "plan.json")
    status, out, error = call("train", "--plan", "plan.json", "--out", "model", "--device", "cpu", cwd=folder)
    assert status == 0, error
    return folder, out, error


def test_train(mini):
    folder, out, error = mini
    assert "6 steps for the autoencoder, 6 for CLIP, 6 for the UNet" in out
    assert "dB" in out and "prompt accuracy" in out and "--model model" in out
    assert "loss" in error and "6/6" in error                                               # the progress bars
    assert {p.name for p in (folder / "model" / "training").iterdir()} >= {"plan.json", "reconstructions.png", "samples.png", "prompts.json"}
    assert Plan.load(folder / "model" / "training" / "plan.json") == MINI
    StableDiffusion.from_pretrained(folder / "model")


def test_resume_of_a_finished_training_keeps_it(mini):
    folder = mini[0]
    weights = folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    assert call("train", "--out", "model", "--resume", "--device", "cpu", cwd=folder)[0] == 0
    assert weights.read_bytes() == before


def test_generate(mini, tmp_path):
    model = mini[0] / "model"
    for name in ("a.png", "b.png"): status, out, error = call(*HEART, "--model", model, "--steps", 2, "--count", 3, "--seed", 7, "--out", name, cwd=tmp_path)
    assert status == 0 and str(tmp_path / "b.png") in out and error == ""
    assert Image.open(tmp_path / "a.png").size == (3 * 130 + 2, 132)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()                # same seed, same pictures
    call(*HEART, "--model", model, "--steps", 2, "--count", 3, "--seed", 8, "--negative", "blue", "--out", "c.png", cwd=tmp_path)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    for _ in range(2): call(*HEART, "--model", model, "--steps", 1, "--count", 1, cwd=tmp_path)
    assert (tmp_path / "red-heart.png").exists() and (tmp_path / "red-heart-2.png").exists()      # nothing is overwritten by default


def test_long_prompt(mini, tmp_path):
    status, out, error = call("generate", "heart " * 40 + "zebra", "--model", mini[0] / "model", "--steps", 1, "--out", "x.png", cwd=tmp_path)
    assert status == 0 and "zebra" in error and "warning" in error and (tmp_path / "x.png").exists()


@pytest.mark.parametrize("words, says", [
    ((*HEART, "--steps", 0), "--steps is 0"), ((*HEART, "--count", -1), "--count is -1"), ((*HEART, "--guidance", "nan"), "--guidance is nan"),
    ((*HEART, "--guidance", "much"), "valid number"), ((*HEART, "--seed", -1), "--seed is -1"), ((*HEART, "--model", "huge"), "no model 'huge'"),
    ((*HEART, "--device", "abacus"), "no device 'abacus'"), ((*HEART, "--out", "none/x.png"), "does not exist"), ((*HEART, "--out", "x.txt"), ".png"), ((*HEART, "--out", "."), "x"),
    (("generate",), "prompt"), (("paint", "x"), "paint"), (("train", "--data", "shapes"), "--out"),
    (("train", "--out", "m"), "--data is missing"), (("train", "--out", "m", "--data", "cats", "--minutes", "0.1"), "no data set or folder 'cats'"),
    (("train", "--out", "m", "--data", "shapes", "--minutes", "0"), "minutes is 0"), (("train", "--out", "m", "--resume"), "nothing to go on with"),
    (("train", "--out", "m", "--plan", "none.json"), "none.json is missing"), (("train", "--out", "m", "--data", "shapes", "--device", "abacus"), "no device"),
], ids=lambda value: " ".join(map(str, value))[-40:] if isinstance(value, tuple) else "")
def test_refuses(words, says, tmp_path):
    if says == "x": says = "ending of a picture"
    assert says in refused(*words, cwd=tmp_path)


def test_refuses_folders(tmp_path, mini):
    data = tmp_path / "pictures"
    data.mkdir()
    train = ("train", "--data", "pictures", "--out", "m", "--plan", "plan.json")
    from dataclasses import replace
    replace(MINI, data=["pictures"]).save(tmp_path / "plan.json")
    assert "metadata.jsonl" in refused(*train, cwd=tmp_path)
    (data / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\nnot json\n')
    Image.new("RGB", (40, 40), "red").save(data / "a.png")
    assert "line 2" in refused(*train, cwd=tmp_path)
    (data / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "two"}\n')
    assert "line 2" in refused(*train, cwd=tmp_path)
    assert "not empty" in refused("train", "--data", "shapes", "--out", "pictures", cwd=tmp_path)
    (data / "b.png").write_bytes((data / "a.png").read_bytes()[:50])
    assert "line 2" in refused(*train, cwd=tmp_path)
    assert "is a file" in refused("train", "--data", "shapes", "--out", "plan.json", cwd=tmp_path)
    assert "model_index.json is missing" in refused(*HEART, "--model", data, cwd=tmp_path)


def test_own_folder(tmp_path):
    "Train on one's own pictures, and draw."
    from dataclasses import replace
    folder = tmp_path / "pictures"
    folder.mkdir()
    colors = ["red", "blue", "green", "yellow"]
    for color in colors: Image.new("RGB", (50, 40), color).save(folder / f"{color}.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(dict(file_name=f"{color}.png", text=f"all {color}")) + "\n" for color in colors))
    replace(MINI, data=["pictures"], vocab_size=530).save(tmp_path / "plan.json")
    status, out, error = call("train", "--plan", "plan.json", "--out", "m", "--device", "cpu", cwd=tmp_path)
    assert status == 0, error
    assert call("generate", "all red", "--model", "m", "--steps", 1, "--out", "x.png", cwd=tmp_path)[0] == 0


def test_unwritable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)                                # a folder without the right to write, even for the superuser
    with pytest.raises(PermissionError, match="can't be written"): picture_path(tmp_path / "x.png", "")


def test_doctor_and_help(tmp_path):
    status, out, error = call("doctor", cwd=tmp_path, SD_SCRATCH_DATA=str(tmp_path / "none"))
    assert status == 0, error
    for word in ("Python", "PyTorch", "device", "threads", "emoji font", "not there yet", "MISSING: downloaded", "minutes", *shipped_models()): assert word in out
    assert "--guidance" in call("generate", "--help", cwd=tmp_path)[1] and "--resume" in call("train", "--help", cwd=tmp_path)[1]


def test_help_needs_no_torch(tmp_path):
    program = "import sys, sd_scratch.cli; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'diffusers', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1]).returncode == 0


def test_program_is_installed():
    found = [e for e in entry_points(group="console_scripts") if e.name == "sd-scratch"]
    if not found: pytest.skip("missing: the package is not installed (pip install -e .)")
    assert found[0].value == "sd_scratch.cli:main"
