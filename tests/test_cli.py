"The program as its user calls it: its output, its exit status, what it leaves behind."
import json
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sd_scratch import pipeline
from sd_scratch.cli import main, open_picture, picture_path, what_to_change
from sd_scratch.evaluation import prompt_report, prompts_for
from sd_scratch.pipeline import Plan, StableDiffusion, fit_picture, seconds_per_step, shipped_models
from test_pipeline import MINI

HEART = ("generate", "red heart")


def call(*words, cwd, **env):
    "Call the program's outermost function, as a process of its own would; give exit status, output and errors."
    out, error = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(error):
        warnings.simplefilter("default")
        for kind in DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning: warnings.simplefilter("ignore", kind)      # Python's own beginning
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["sd-scratch", *map(str, words)])
        for name, value in env.items(): patch.setenv(name, value)
        with pytest.raises(SystemExit) as end: main()
    return end.value.code, out.getvalue(), error.getvalue()


def process(program, cwd, *words):
    "Run Python in a process of its own; give exit status, output and errors."
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL,
        env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1])))
    return done.returncode, done.stdout, done.stderr


def refused(*words, cwd, **env):
    "Run sd-scratch with something wrong: status 2, one line, no traceback, nothing left behind. Give the line."
    before = sorted(cwd.rglob("*"))
    status, out, error = call(*words, cwd=cwd, **env)
    assert status == 2 and "Traceback" not in error, error
    assert sorted(cwd.rglob("*")) == before
    return error


@pytest.fixture(scope="module", autouse=True)
def short_measurements():
    "The program's own measurements, on few prompts and on small networks."
    few = [prompt for held_out in (False, True) for things in (1, 2) for prompt in prompts_for(2, held_out, things)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "prompt_report", partial(prompt_report, prompts=few))
        patch.setattr(pipeline, "seconds_per_step", lambda plan, *more, **options: seconds_per_step(replace(plan, widths=MINI.widths), *more, **options))
        yield


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
    status, out, error = call("train", "--out", "model", "--resume", "--plan", "other.json", "--seed", 1, "--device", "cpu", cwd=folder)
    assert status == 0 and "--seed, --plan left aside" in error
    assert weights.read_bytes() == before


def test_generate(mini, tmp_path):
    model = mini[0] / "model"
    for name in ("a.png", "b.png"): status, out, error = call(*HEART, "--model", model, "--steps", 2, "--count", 3, "--seed", 7, "--out", name, cwd=tmp_path)
    assert status == 0 and str(tmp_path / "b.png") in out and error == ""
    assert Image.open(tmp_path / "a.png").size == (3 * 130 + 2, 132)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()                # same seed, same pictures
    usual = {"--model": model, "--steps": 2, "--count": 3, "--seed": 7, "--out": "c.png"}
    for option, value in {"--seed": 8, "--negative": "blue", "--guidance": 1, "--steps": 3, "--model": "tiny"}.items():
        assert call(*HEART, *(word for pair in (usual | {option: value}).items() for word in pair), cwd=tmp_path)[0] == 0
        assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes(), f"{option} changes nothing"
    for _ in range(2): call(*HEART, "--model", model, "--steps", 1, "--count", 1, cwd=tmp_path)
    assert (tmp_path / "red-heart.png").exists() and (tmp_path / "red-heart-2.png").exists()      # nothing is overwritten by default


def test_long_prompt(mini, tmp_path):
    status, out, error = call("generate", "heart " * 40 + "zebra", "--model", mini[0] / "model", "--steps", 1, "--out", "x.png", cwd=tmp_path)
    assert status == 0 and "zebra" in error and "warning" in error and (tmp_path / "x.png").exists()


@pytest.mark.parametrize("words, says", [
    ((*HEART, "--steps", 0), "--steps is 0"), ((*HEART, "--count", -1), "--count is -1"), ((*HEART, "--guidance", "nan"), "--guidance is nan"),
    ((*HEART, "--guidance", "much"), "valid number"), ((*HEART, "--seed", -1), "--seed is -1"), ((*HEART, "--model", "huge"), "no model 'huge'"),
    ((*HEART, "--device", "abacus"), "no device 'abacus'"), ((*HEART, "--out", "none/x.png"), "does not exist"), ((*HEART, "--out", "x.txt"), ".png"), ((*HEART, "--out", "."), "x"),
    ((*HEART, "--width", 0), "--width is 0"), ((*HEART, "--height", 9999), "--height is 9999"), ((*HEART, "--width", 30), "multiples of"),
    ((*HEART, "--strength", 0.5), "--strength says what to do with a picture: name the picture with --image"), ((*HEART, "--mask", "m.png"), "--mask says what to do with a picture"),
    ((*HEART, "--image", "none.png"), "--image: there is no file none.png"), ((*HEART, "--image", "."), "is a folder"),
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
    train = ("train", "--out", "m", "--plan", "plan.json")
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
    folder = tmp_path / "pictures"
    folder.mkdir()
    colors = ["red", "blue", "green", "yellow"]
    for color in colors: Image.new("RGB", (50, 40), color).save(folder / f"{color}.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(dict(file_name=f"{color}.png", text=f"all {color}")) + "\n" for color in colors))
    replace(MINI, data=["pictures"], vocab_size=530).save(tmp_path / "plan.json")
    status, out, error = call("train", "--plan", "plan.json", "--out", "m", "--device", "cpu", "--data", "shapes", "--minutes", 1, cwd=tmp_path)
    assert status == 0, error
    assert "warning: plan.json says what to train on, how long and from which seed: --data, --minutes left aside" in error and "--seed" not in error
    assert Plan.load(tmp_path / "m" / "training" / "plan.json").data == ["pictures"]
    assert call("generate", "all red", "--model", "m", "--steps", 1, "--out", "x.png", cwd=tmp_path)[0] == 0


@pytest.fixture
def photo(tmp_path):
    "A folder with a picture of 60 x 40 pixels, a red disc on white."
    picture = Image.new("RGB", (60, 40), "white")
    ImageDraw.Draw(picture).ellipse((16, 6, 44, 34), "red")
    picture.save(tmp_path / "photo.png")
    return tmp_path


def seen(path):
    "What a picture file holds, as numbers from 0 to 255."
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def painted(folder, name, *boxes, size=(60, 40), mode="L"):
    "Save a mask: white boxes on black."
    mask = Image.new(mode, size)
    for box in boxes: mask.paste("white", box)
    mask.save(folder / name)


EDIT = ("generate", "a large blue circle on a white background", "--steps", 10, "--count", 1, "--image", "photo.png")


def test_change_a_picture(photo):
    "A weak change keeps the picture, a strong one doesn't; the picture is cut and resized, which is said in one line."
    known, far = np.asarray(fit_picture(Image.open(photo / "photo.png"), 32, 32)).astype(int), []
    for strength in (0.1, 0.9):
        status, out, error = call(*EDIT, "--strength", strength, "--out", "x.png", cwd=photo)
        assert status == 0 and error.count("\n") == 1 and "warning: the picture is 60 x 40 pixels" in error and "32 x 32" in error
        far.append(abs(seen(photo / "x.png")[2::4, 2::4] - known).mean())                          # each pixel is drawn as 4 x 4
    assert far[0] < 20 and far[1] > 40                                                            # measured: 12 and 70
    Image.open(photo / "photo.png").crop((10, 0, 42, 32)).save(photo / "small.png")
    status, out, error = call(*EDIT, "--image", "small.png", "--count", 2, "--out", "two.png", cwd=photo)
    assert status == 0 and error == "" and Image.open(photo / "two.png").size == (2 * 130 + 2, 132)  # the size of the model: nothing to say


def test_a_mask_keeps_what_is_black(photo):
    painted(photo, "mask.png", (30, 0, 60, 40))
    assert call(*EDIT, "--mask", "mask.png", "--out", "x.png", cwd=photo)[0] == 0
    far = abs(seen(photo / "x.png")[2::4, 2::4] - np.asarray(fit_picture(Image.open(photo / "photo.png"), 32, 32))).mean((0, 2))   # of each column
    assert far[:14].mean() < 20 and far[16:].mean() > 40                                          # measured: 13 and 70


def test_size(photo):
    assert call(*HEART, "--steps", 2, "--count", 1, "--width", 64, "--height", 16, "--out", "wide.png", cwd=photo)[0] == 0
    assert Image.open(photo / "wide.png").size == (128, 32)


def test_refuses_pictures(photo):
    "Each is said in one line, before the model is opened."
    early = (*EDIT, "--model", "huge")                                                             # there is no such model: whoever looks for it first says so
    (photo / "text.png").write_text("no picture")
    error = refused(*early, "--mask", "text.png", cwd=photo)
    assert error.startswith("sd-scratch: --mask: text.png can't be read as a picture") and error.count("\n") == 1
    assert "--strength is 1.5" in refused(*early, "--strength", 1.5, cwd=photo)
    before = (photo / "photo.png").read_bytes()
    assert "name another file" in refused(*early, "--out", "photo.png", cwd=photo)
    assert (photo / "photo.png").read_bytes() == before
    (photo / "half.png").write_bytes(before[:60])
    Image.fromarray(np.full((40, 60), 40_000, np.uint16)).save(photo / "deep.png")
    for image, mask, says in ("half", None, "--image: .*half.png can't be read"), ("photo", "half", "--mask: .*half.png can't be read"), ("photo", "none", "--mask: there is no file"), ("deep", None, "--image: .*deep.png can't be .* more than 8 bits"):
        with pytest.raises((ValueError, OSError), match=says): what_to_change(photo / f"{image}.png", None, mask and photo / f"{mask}.png", 10)


def test_refuses_what_the_class_refuses(photo):
    "The program speaks of its options, and before PyTorch is there; it may not be milder or stricter than `StableDiffusion`, which looks again."
    painted(photo, "half.png", (0, 0, 9, 9))
    painted(photo, "small.png", (0, 0, 9, 9), size=(40, 60))
    painted(photo, "black.png")
    painted(photo, "dark.png", (0, 0, 60, 40))
    Image.open(photo / "dark.png").point(lambda x: x // 2).save(photo / "dark.png")                # 127 of 255 is black
    Image.new("RGBA", (60, 40), (255, 255, 255, 0)).save(photo / "clear.png")                      # white, but nothing of it is there
    pipe = StableDiffusion.from_pretrained("tiny")
    def both(image, strength, mask):
        yield lambda: what_to_change(image and photo / f"{image}.png", strength, mask and photo / f"{mask}.png", 10)
        yield lambda: pipe("", num_inference_steps=10, output_type="latent", image=image and Image.open(photo / f"{image}.png"), strength=strength, mask_image=mask and Image.open(photo / f"{mask}.png"))
    for image, strength, mask, says in [("photo", 0, None, "strength is 0"), ("photo", -0.5, None, "above 0"), ("photo", 1.01, None, "at most 1"), ("photo", float("nan"), None, "strength is nan"), ("photo", 1e-320, None, "less than one step"),
            ("photo", 0.0999, None, "less than one step"), ("photo", 0.05, "half", "less than one step"), (None, 0.5, None, "strength says what to do with a picture"), (None, None, "half", "mask(_image)? says what to do with a picture"),
            ("photo", None, "small", "mask(_image)? is 40 x 60 pixels, .* 60 x 40"), ("photo", None, "black", "no white"), ("photo", None, "dark", "no white"), ("photo", None, "clear", "no white")]:
        for ask in both(image, strength, mask):
            with pytest.raises(ValueError, match=says): ask()
    for image, strength, mask in ("photo", 0.1, None), ("photo", 1, None), ("photo", 0.1, "half"), (None, None, None):
        with warnings.catch_warnings(action="ignore"):
            for ask in both(image, strength, mask): ask()
    with pytest.raises(ValueError, match="take 0.1 or more"): what_to_change(photo / "photo.png", 0.05, None, 10)


def test_a_turned_photograph_and_its_mask(photo):
    "A camera writes how it was held; what counts is the picture as it is seen."
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(photo / "photo.png").save(photo / "turned.jpg", exif=turned)
    assert open_picture(photo / "turned.jpg", "--image", "white").size == (40, 60)
    painted(photo, "mask.png", (0, 0, 9, 9), size=(40, 60))
    assert what_to_change(photo / "turned.jpg", None, photo / "mask.png", 25)["strength"] == 1.0
    assert what_to_change(photo / "turned.jpg", None, None, 25)["strength"] == 0.8


def test_unwritable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)                                # a folder without the right to write, even for the superuser
    with pytest.raises(PermissionError, match="can't be written"): picture_path(tmp_path / "x.png", "")


def test_doctor_and_help(tmp_path):
    status, out, error = call("doctor", cwd=tmp_path, SD_SCRATCH_DATA=str(tmp_path / "none"))
    assert status == 0, error
    for word in ("Python", "PyTorch", "device", "threads", "emoji font", "not there yet", "MISSING: downloaded", "minutes", *shipped_models()): assert word in out
    help = call("generate", "--help", cwd=tmp_path)[1]
    for option in ("--guidance", "--image", "--strength", "--mask", "--width", "--height"): assert option in help
    assert "--resume" in call("train", "--help", cwd=tmp_path)[1]


PROGRAM = "from sd_scratch.cli import main; main()"
SLOW = "import atexit, sys; atexit.register(lambda: print(*(m for m in ('torch', 'matplotlib', 'diffusers', 'transformers') if m in sys.modules))); "


def test_a_process_of_its_own(tmp_path):
    "What the shell sees: nothing on the channel for errors when all went well; one line and status 2 otherwise, and then PyTorch was never needed."
    status, out, error = process(PROGRAM, tmp_path, *HEART, "--steps", 1, "--count", 1)
    assert (status, out, error) == (0, f"1 picture of 'red heart' saved in {tmp_path / 'red-heart.png'}\n", "")
    assert process(SLOW + PROGRAM, tmp_path, *HEART, "--image", "none.png") == (2, "\n", "sd-scratch: --image: there is no file none.png\n")


def test_help_needs_no_torch(tmp_path):
    status, out, error = process(SLOW + PROGRAM, tmp_path, "generate", "--help")
    assert status == 0 and "--guidance" in out and out.endswith("\n\n") and error == ""           # the last line, of slow modules, is empty


def test_program_is_installed():
    found = [e for e in entry_points(group="console_scripts") if e.name == "sd-scratch"]
    if not found: pytest.skip("missing: the package is not installed (pip install -e .)")
    assert found[0].value == "sd_scratch.cli:main"
