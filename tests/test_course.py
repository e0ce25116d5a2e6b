"Folders, devices, pictures and files that are whole: notebook 00."
import hashlib
import os

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from sd_scratch import course
from sd_scratch.course import (data_folder, emoji_font, image_grid, pick_device, show_images, show_map, to_image, to_tensor, weights_folder,
                               whole_file, whole_folder)


def test_data_folder_is_the_named_one_or_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SD_SCRATCH_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv("SD_SCRATCH_DATA", "~/pictures")
    assert str(data_folder()) == os.path.expanduser("~/pictures")
    for unset in None, "":
        monkeypatch.delenv("SD_SCRATCH_DATA") if unset is None else monkeypatch.setenv("SD_SCRATCH_DATA", unset)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert data_folder() == tmp_path/"sd_scratch"


def test_weights_lie_in_the_package():
    assert weights_folder().parent.samefile(os.path.dirname(course.__file__))


def test_noto_comes_before_other_fonts_wherever_it_lies(tmp_path):
    for name in "a/seguiemj.ttf", "a/Apple Color Emoji.ttc", "b/deep/NotoColorEmoji.ttf":
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    assert emoji_font([tmp_path/"a", tmp_path/"b"]).name == "NotoColorEmoji.ttf"
    assert emoji_font([tmp_path/"a"]).name == "Apple Color Emoji.ttc"


def test_a_missing_font_is_explained_per_system(tmp_path):
    with pytest.raises(FileNotFoundError) as error: emoji_font([tmp_path, tmp_path/"absent"])
    for words in "fonts-noto-color-emoji", "Fedora", "Arch", "macOS", "Windows": assert words in str(error.value)


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu") == pick_device("cpu") == pick_device(torch.device("cpu"))
    for name in "cuda", "mps", "meta", "gpu", "":
        with pytest.raises(ValueError, match="this machine has cpu$"): pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda") and pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="cuda, cuda:0, cuda:1, mps, cpu"): pick_device("cuda:2")


@given(arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(3))))
def test_a_picture_survives_the_way_into_numbers_and_back(pixels):
    x = to_tensor(Image.fromarray(pixels))
    assert x.shape == (3, *pixels.shape[:2]) and x.dtype == torch.float32 and x.abs().max() <= 1
    np.testing.assert_array_equal(np.asarray(to_image(x)), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "RGBA"])
def test_every_mode_of_picture_becomes_three_channels(mode):
    assert torch.equal(to_tensor(Image.new("RGB", (3, 2), "white").convert(mode)), torch.ones(3, 2, 3))


def test_transparent_is_white():
    glass = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert torch.allclose(to_tensor(glass).flatten(), torch.tensor([1, -.004, -.004]), atol=.01)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 0])
    palette.info["transparency"] = 0
    assert torch.equal(to_tensor(palette), torch.ones(3, 1, 1))


def test_to_image_cuts_off_and_takes_what_training_gives():
    x = torch.tensor([[[-5., 5.]]], dtype=torch.float64, requires_grad=True)
    assert to_image(x).tobytes() == bytes([0]*3 + [255]*3)
    assert to_image(torch.zeros(1, 1, 1, dtype=torch.bfloat16)).getpixel((0, 0)) == (128,)*3
    for shape in (4, 2, 2), (2, 2), (1, 3, 2, 2):
        with pytest.raises(ValueError, match="has the shape"): to_image(torch.zeros(shape))


def test_a_grid_lays_pictures_out_in_rows():
    colors = ["red", "lime", "blue"]
    grid = image_grid([Image.new("RGB", (2, 2), o) for o in colors], columns=2, pad=1, scale=3, background="black")
    assert grid.size == (2*(6 + 1) + 1, 2*(6 + 1) + 1)
    assert [grid.getpixel(p) for p in ((1, 1), (8, 1), (1, 8), (8, 8), (0, 0))] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (0, 0, 0)]
    assert image_grid(torch.zeros(20, 3, 4, 4), pad=0).size == (8*4, 3*4)


def test_titles_make_room_for_themselves():
    plain, titled = image_grid(torch.zeros(2, 3, 96, 96)), image_grid(torch.zeros(2, 3, 96, 96), titles=["short", "a text that needs more than one line to be shown"])
    assert titled.width == plain.width and titled.height >= plain.height + 3*13
    with pytest.raises(ValueError, match="1 titles for 2 pictures"): image_grid(torch.zeros(2, 3, 4, 4), titles=["one"])
    with pytest.raises(ValueError, match="no pictures"): image_grid([])


def test_pictures_are_shown_as_jpeg(monkeypatch):
    shown = []
    display = pytest.importorskip("IPython.display", reason="missing: IPython")
    monkeypatch.setattr(display, "display", shown.append)
    show_images(torch.zeros(4, 3, 32, 32), titles=list("abcd"))
    assert shown[0].data[:3] == b"\xff\xd8\xff" and len(shown[0].data) < 20_000


def pixels_of(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def test_the_map_lights_each_part():
    for mode, plan in course._MODES.items():
        dark = pixels_of(show_map(mode=mode))
        lit = {part: hashlib.sha256(pixels_of(show_map(part, mode))).hexdigest() for part in plan["boxes"]}
        assert len({hashlib.sha256(dark).hexdigest(), *lit.values()}) == len(lit) + 1
        assert (dark[0, 0] == 255).all()


def test_the_map_lights_two_parts():
    yellow = [sum(patch.get_linewidth() == 2 for patch in show_map(part, "training").axes[0].patches) for part in (None, "vae", "vae unet")]
    assert yellow == [0, 1, 2]
    assert (pixels_of(show_map("data unet")) == pixels_of(show_map("data unet", "training"))).all()
    with pytest.raises(ValueError, match="no part 'engine'"): show_map("unet engine")


def test_the_map_takes_the_mode_that_has_the_part():
    assert (pixels_of(show_map("data")) == pixels_of(show_map("data", "training"))).all()
    assert (pixels_of(show_map("unet")) == pixels_of(show_map("unet", "drawing"))).all()
    with pytest.raises(ValueError, match="no part 'sampler'"): show_map("sampler", "training")
    with pytest.raises(ValueError, match="no part 'engine'; its parts are .*unet"): show_map("engine")
    with pytest.raises(ValueError, match="the modes are drawing, training"): show_map(mode="sleeping")


def test_the_map_leaves_no_figure_open():
    before = matplotlib.pyplot.get_fignums()
    show_map()
    assert matplotlib.pyplot.get_fignums() == before


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_file_is_whole_or_not_at_all(tmp_path, error):
    path = tmp_path/"new"/"file.txt"
    with pytest.raises(error), whole_file(path) as part:
        part.write_text("half")
        raise error
    assert list(path.parent.iterdir()) == []
    with whole_file(path) as part:
        assert part.parent == path.parent and part.suffix == path.suffix
        part.write_text("one")
    with pytest.raises(error), whole_file(path) as part:
        part.write_text("tw")
        raise error
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_is_whole_or_not_at_all(tmp_path, error):
    path = tmp_path/"model"
    with pytest.raises(error), whole_folder(path) as part:
        (part/"half").touch()
        raise error
    assert list(tmp_path.iterdir()) == []
    with whole_folder(path) as part: (part/"old").touch()
    with pytest.raises(error), whole_folder(path) as part:
        (part/"half").touch()
        raise error
    assert [o.name for o in path.iterdir()] == ["old"]
    with whole_folder(path) as part: (part/"new").touch()
    assert [o.name for o in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path/"model"
    with whole_folder(path) as part: (part/"old").touch()
    rename = os.replace
    def failing(source, target):
        if str(source).endswith(".part") and str(target) == str(path): raise OSError("disk gone")
        rename(source, target)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk gone"), whole_folder(path) as part: (part/"new").touch()
    assert [o.name for o in path.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [path]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path/"model").touch()
    with pytest.raises(FileExistsError, match="is a file"), whole_folder(tmp_path/"model"): pass
    assert [o.name for o in tmp_path.iterdir()] == ["model"]
