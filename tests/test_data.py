"Captioned pictures: notebook 03."
import hashlib
import json
import math
import random
import re
from collections import Counter
from urllib.error import URLError

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sd_scratch import data
from sd_scratch.course import emoji_font
from sd_scratch.data import (BACKGROUNDS, CLOTHES, COLORS, DATASETS, HELD_OUT, RELATIONS, SHAPES, SIZES, CaptionedPictures, Scene, Thing, draw_scene,
                             emoji, emoji_captions, fashion_mnist, load_data, parse_caption, picture_folder, plain_picture, random_scene, shapes)

seeds = st.integers(0, 2**32)
scenes = st.builds(lambda seed, things, held_out: random_scene(random.Random(seed), things, held_out), seeds, st.sampled_from([None, 1, 2]), st.booleans())


@pytest.fixture(scope="session")
def clothes():
    try: return {split: fashion_mnist(split) for split in ("train", "test")}
    except FileNotFoundError: pytest.skip("missing: Fashion-MNIST, and no network to download it (SD_SCRATCH_DATA names the folder that holds it)")


@pytest.fixture(scope="session")
def icons():
    try: return {split: emoji(split) for split in ("train", "test")}
    except FileNotFoundError: pytest.skip("missing: a colour emoji font (on Debian the package fonts-noto-color-emoji)")


@pytest.fixture(scope="session")
def drawn(): return {split: shapes(split, count=3000) for split in ("train", "test", "held_out")}


def held_out_things(scene): return [thing for thing in scene.things if (thing.color, thing.shape) in HELD_OUT]


# the interface

@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 3]))
def test_a_batch_is_the_bytes_as_floats(seed, channels):
    pictures = torch.randint(0, 256, (5, channels, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    ds = CaptionedPictures(pictures, list("abcde"), "letters", "train")
    x, captions = ds.batch(torch.tensor([4, 0, 4]))
    assert x.shape == (3, 3, 4, 4) and x.dtype == torch.float32 and -1 <= x.min() and x.max() <= 1 and captions == ["e", "a", "e"]
    assert torch.equal(((x + 1)*127.5).round().to(torch.uint8), pictures[[4, 0, 4]].expand(-1, 3, -1, -1))
    one, caption = ds[-1]
    assert torch.equal(one, x[0]) and caption == "e"
    x.zero_()                                      # a batch is a copy and its own memory
    assert torch.equal(ds.pictures, pictures) and torch.equal(ds[4][0], one)


def test_a_data_set_is_torchs():
    ds = CaptionedPictures(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), ["a", "b", "c"])
    x, captions = next(iter(torch.utils.data.DataLoader(ds, batch_size=2)))
    assert x.shape == (2, 3, 2, 2) and list(captions) == ["a", "b"] and [caption for _, caption in ds] == ["a", "b", "c"]
    with pytest.raises(IndexError): ds[3]


@pytest.mark.parametrize("pictures", [torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 3, 3, dtype=torch.uint8)])
def test_wrong_pictures_are_refused(pictures):
    with pytest.raises(ValueError, match="uint8 tensor"): CaptionedPictures(pictures, ["a", "b"])


# the grammar of shapes

@settings(deadline=None)
@given(scenes)
def test_a_caption_is_read_back(scene):
    assert parse_caption(scene.caption) == scene == parse_caption(scene.caption.upper())


@settings(deadline=None)
@given(scenes)
def test_true_captions_mean_the_same(scene):
    assert len(scene.captions) == len({*scene.captions}) and scene.caption in scene.captions
    assert {parse_caption(caption).canonical() for caption in scene.captions} == {scene.canonical()}
    assert scene.canonical().relation in (None, "above", "left of") and scene.canonical().canonical() == scene.canonical()
    assert scene.turned().turned() == scene
    assert scene.exchanged().exchanged() == scene
    assert (scene.exchanged().canonical() == scene.canonical()) == (len(set(scene.things)) == 1)      # another picture, unless there is nothing to exchange
    assert len(scene.captions) == len(scene.things)


def test_opposite_relations():
    assert [Scene((Thing("small", "red", "star"),)*2, relation, "gray").turned().relation for relation in RELATIONS] == ["below", "above", "right of", "left of"]


@pytest.mark.parametrize("caption, words", [
    ("", "doesn't end in"), ("red heart", "doesn't end in"), ("on a white background", "neither one thing nor two"),
    ("a large red circle on a white", "doesn't end in"), ("a large red circle on the white background", "doesn't end in"),
    ("an large red circle on a white background", "not 'an'"), ("a red circle on a white background", "neither one thing nor two"),
    ("a big red circle on a white background", "'big' is no size; use one of: small, large"),
    ("a large teal circle on a white background", "'teal' is no color"), ("a large red hexagon on a white background", "'hexagon' is no shape"),
    ("a large red circle on a green background", "'green' is no background"),
    ("a large red circle near a small red circle on a white background", "'near' is no relation"),
    ("a large red circle left of small red circle on a white background", "not 'of'"),
    ("a large red circle above a small red circle above a small red star on a white background", "neither")])
def test_a_caption_that_is_not_understood_says_why(caption, words):
    with pytest.raises(ValueError) as error: parse_caption(caption)
    assert words in str(error.value) and repr(caption) in str(error.value) and "looks like" in str(error.value)


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read_or_refused(text):
    with pytest.raises(ValueError): parse_caption(text)


def test_impossible_scenes_are_refused():
    thing = Thing("small", "red", "star")
    for things, relation in [((), None), ((thing,), "above"), ((thing, thing), None), ((thing,)*3, "above"), ((thing, thing), "inside")]:
        with pytest.raises(ValueError): Scene(things, relation, "white")
    with pytest.raises(ValueError, match="can't be seen"): draw_scene(Scene((Thing("small", "black", "star"),), None, "black"), random.Random(0))


@settings(deadline=None)
@given(scenes, seeds)
def test_a_mirror_swaps_left_and_right_only(scene, seed):
    other = {"left of": "right of", "right of": "left of", "above": "above", "below": "below", None: None}
    image = np.asarray(draw_scene(scene, random.Random(seed)))[:, ::-1].astype(int)
    mirrored = Scene(scene.things, other[scene.relation], scene.background)
    middles = [np.argwhere((image == COLORS[thing.color]).all(-1)).mean(0) for thing in scene.things]
    if len(middles) == 2 and scene.things[0].color != scene.things[1].color:
        (y0, x0), (y1, x1) = middles
        seen = ("above" if y0 < y1 else "below") if abs(y1 - y0) > abs(x1 - x0) else ("left of" if x0 < x1 else "right of")
        assert seen == mirrored.relation


# random scenes

def test_training_never_holds_a_held_out_combination():
    rng = random.Random(7)
    for _ in range(20_000): assert not held_out_things(random_scene(rng))


def test_held_out_scenes_always_hold_one():
    rng = random.Random(8)
    many = [random_scene(rng, held_out=True) for _ in range(5000)]
    assert all(map(held_out_things, many))
    assert {(o.color, o.shape) for scene in many for o in held_out_things(scene)} == set(HELD_OUT)
    firsts = sum(bool(held_out_things(Scene(scene.things[:1], None, scene.background))) for scene in many if len(scene.things) == 2)
    assert .4 < firsts/sum(len(scene.things) == 2 for scene in many) < .7       # it isn't always the same one of the two


def test_held_out_takes_each_colour_and_shape_once():
    assert len({color for color, _ in HELD_OUT}) == 4 and {shape for _, shape in HELD_OUT} == set(SHAPES)


@settings(deadline=None)
@given(scenes)
def test_nothing_is_invisible(scene):
    assert all(COLORS[thing.color] != BACKGROUNDS[scene.background] for thing in scene.things)


def test_every_word_of_a_held_out_combination_is_well_known():
    rng = random.Random(10)
    seen = Counter((thing.color, thing.shape) for _ in range(4000) for thing in random_scene(rng).things)
    for color, shape in HELD_OUT:
        assert sum(seen[color, other] > 50 for other in SHAPES) == 3 and sum(seen[other, shape] > 50 for other in COLORS) == 7


def test_things_of_one_scene_are_drawn_independently():
    rng = random.Random(11)
    many = [random_scene(rng, 2) for _ in range(6000)]
    for key, words in dict(size=SIZES, shape=SHAPES).items():
        pairs = Counter(tuple(getattr(thing, key) for thing in scene.things) for scene in many)
        assert len(pairs) == len(words)**2 and max(pairs.values()) < 1.4*min(pairs.values())


def test_attributes_are_uniform():
    rng = random.Random(9)
    many = [random_scene(rng) for _ in range(12_000)]
    things = [thing for scene in many for thing in scene.things]
    for values, names in [((o.background for o in many), BACKGROUNDS), ((len(o.things) for o in many), (1, 2)), ((o.size for o in things), SIZES),
                          ((o.shape for o in things), SHAPES), ((o.relation for o in many if o.relation), RELATIONS)]:
        counts = Counter(values)
        assert set(counts) == set(names) and max(counts.values()) < 1.15*min(counts.values())
    on_gray = Counter((o.color, o.shape) for scene in many if scene.background == "gray" for o in scene.things)
    assert len(on_gray) == len(COLORS)*len(SHAPES) - len(HELD_OUT) and max(on_gray.values()) < 2*min(on_gray.values())


# drawn scenes

@settings(deadline=None)
@given(scenes, seeds)
def test_things_lie_apart_inside_and_as_the_caption_says(scene, seed):
    places = data._places(scene, random.Random(seed))
    for thing, (x, y, r) in zip(scene.things, places):
        assert 0 <= x - r and x + r <= 1 and 0 <= y - r and y + r <= 1
        assert (r > .17) == (thing.size == "large")
    if len(places) == 2:
        (x0, y0, r0), (x1, y1, r1) = places
        toward, aside = (y1 - y0, x1 - x0) if scene.relation in ("above", "below") else (x1 - x0, y1 - y0)
        if scene.relation in ("below", "right of"): toward = -toward
        assert toward >= r0 + r1 + .04 and abs(aside) < .4*toward


@settings(deadline=None)
@given(scenes, seeds)
def test_the_picture_shows_what_the_caption_says(scene, seed):
    image = draw_scene(scene, random.Random(seed))
    assert image.size == (32, 32) and image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    is_drawn = np.abs(pixels - BACKGROUNDS[scene.background]).sum(-1) > 0
    expected = np.zeros_like(is_drawn)
    for thing, (x, y, r) in zip(scene.things, data._places(scene, random.Random(seed))):
        assert tuple(pixels[int(32*y), int(32*x)]) == COLORS[thing.color]
        expected[max(0, math.floor(32*(y - r)) - 1):math.ceil(32*(y + r)) + 1, max(0, math.floor(32*(x - r)) - 1):math.ceil(32*(x + r)) + 1] = True
    assert not (is_drawn & ~expected).any()
    if len(scene.things) == 1:
        extent = max(np.ptp(o) for o in np.nonzero(is_drawn)) + 1
        assert (extent > 11.5) == (scene.things[0].size == "large")


def test_colours_can_be_told_apart():
    named = list(COLORS.values()) + [BACKGROUNDS["gray"], BACKGROUNDS["pink"]]
    assert min(math.dist(a, b) for i, a in enumerate(named) for b in named[:i]) > 90


def test_shapes_can_be_told_apart():
    for size in SIZES:
        masks = []
        for shape in SHAPES:
            image = draw_scene(Scene((Thing(size, "black", shape),), None, "white"), random.Random(3))
            masks.append(1 - np.asarray(image.convert("L"))/255)
        for i, a in enumerate(masks):
            for b in masks[:i]: assert np.abs(a - b).sum() > .12*max(a.sum(), b.sum())


def test_edges_are_smooth():
    scene = Scene((Thing("large", "black", "circle"),), None, "white")
    assert len(np.unique(np.asarray(draw_scene(scene, random.Random(0)).convert("L")))) > 10


# the data set of shapes

def test_same_seed_same_pictures_for_ever():
    ds = shapes(count=200)
    assert hashlib.sha256("\n".join(ds.captions).encode()).hexdigest()[:16] == "1a8d9f301a433fa0"
    means = ds.pictures[:6].float().mean((1, 2, 3))
    assert torch.allclose(means, torch.tensor([141.8, 7.4, 138.4, 144.8, 147.9, 246.2]), atol=.5), means     # the last bit may depend on Pillow's version
    again = shapes(count=200)
    assert torch.equal(ds.pictures, again.pictures) and ds.captions == again.captions


def test_a_longer_data_set_begins_like_a_shorter_one(drawn):
    assert torch.equal(shapes(count=50).pictures, drawn["train"].pictures[:50]) and shapes(count=50).captions == drawn["train"].captions[:50]


def test_splits_and_seeds_share_no_pictures(drawn):
    sets = [{x.numpy().tobytes() for x in ds.pictures} for ds in (*drawn.values(), shapes(count=500, seed=1))]
    for i, a in enumerate(sets):
        for b in sets[:i]: assert not a & b


def test_shapes_hold_what_their_split_says(drawn):
    for split, ds in drawn.items():
        parsed = [parse_caption(caption) for caption in ds.captions]
        assert ds.pictures.shape == (3000, 3, 32, 32) and (ds.name, ds.split) == ("shapes", split)
        assert sum(len(scene.things) == 2 for scene in parsed) == 1500
        assert all(bool(held_out_things(scene)) == (split == "held_out") for scene in parsed)


def test_no_shapes_at_all(): assert len(shapes(count=0)) == 0


def test_both_descriptions_of_a_picture_occur(drawn):
    said = Counter(parse_caption(caption).relation for caption in drawn["train"].captions)
    assert set(said) == {None, *RELATIONS} and min(said[o] for o in RELATIONS) > 300


# splits

def test_a_hash_splits_for_good():
    names = [f"{i}.png" for i in range(2000)]
    test = [name for name in names if data._in_split(name, "test")]
    assert all(data._in_split(name, "train") != data._in_split(name, "test") for name in names) and 150 < len(test) < 250
    assert test[:5] == ["12.png", "38.png", "39.png", "50.png", "51.png"]              # for ever: a test picture must never become a training picture
    assert data._in_split("ü.png", "train") != data._in_split("ü.png", "test")


# Fashion-MNIST

def test_clothes(clothes):
    for split, count in dict(train=60_000, test=10_000).items():
        ds = clothes[split]
        assert ds.pictures.shape == (count, 1, 32, 32) and ds.pictures.dtype == torch.uint8 and (ds.name, ds.split) == ("fashion_mnist", split)
        assert Counter(ds.captions) == {f"a photo of {name}": count//10 for name in CLOTHES}
        border = torch.ones(32, 32, dtype=torch.bool)
        border[2:-2, 2:-2] = False
        assert ds.pictures[:, 0, border].max() == 0 and ds.pictures[:, 0, 2:-2, 2:-2].float().mean() > 50
    assert clothes["train"].captions[0] == "a photo of an ankle boot"
    x, _ = clothes["train"][0]
    assert x.shape == (3, 32, 32) and torch.equal(x[0], x[2])


def test_no_network_and_no_files(monkeypatch, tmp_path):
    def unplugged(*args, **kwargs): raise URLError("no network")
    monkeypatch.setenv("SD_SCRATCH_DATA", str(tmp_path/"data"))
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", unplugged)
    with pytest.raises(FileNotFoundError) as error: fashion_mnist()
    for words in str(tmp_path/"data"), "Connect to the network", "SD_SCRATCH_DATA": assert words in str(error.value)


def test_truncated_files(monkeypatch, tmp_path):
    raw = tmp_path/"FashionMNIST"/"raw"
    raw.mkdir(parents=True)
    for name in "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte":
        (raw/name).write_bytes(bytes([0, 0, 8, 3 if "images" in name else 1]) + bytes(30))
    monkeypatch.setenv("SD_SCRATCH_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="remove files there that are incomplete"): fashion_mnist()


# emoji

def test_the_table_of_captions():
    text = (data.files("sd_scratch")/"tables"/"emoji.json").read_text(encoding="utf-8")
    pairs = json.loads(text, object_pairs_hook=list)
    codes = [int(code[2:], 16) for code, _ in pairs]
    assert all(re.fullmatch(r"U\+[0-9A-F]{4,5}", code) for code, _ in pairs) and codes == sorted(set(codes))
    assert 1300 < len(pairs) < 1400 and len({caption for _, caption in pairs}) == len(pairs)
    for _, caption in pairs:
        assert re.fullmatch(r"[a-z][a-z'-]*( [a-z][a-z'-]*)*", caption) and len(caption.split()) <= 8
        assert not {"heavy", "negative", "squared", "ideograph", "modifier", "regional", "indicator", "component"} & set(caption.split()), caption
    table = dict(zip(codes, (caption for _, caption in pairs)))
    assert table == emoji_captions()
    for code, caption in {0x2764: "red heart", 0x2B50: "yellow star", 0x1F499: "blue heart", 0x1F600: "grinning face", 0x26AB: "black circle"}.items():
        assert table[code] == caption
    for low, high in (0, 0x80), (0xFE00, 0xFE0F), (0x1F1E6, 0x1F1FF), (0x1F3FB, 0x1F3FF), (0xE0000, 0x10FFFF):     # letters, selectors, regions, skins, tags
        assert not [code for code in codes if low <= code <= high]


def test_emoji(icons):
    train, test = icons["train"], icons["test"]
    assert {"red heart", "yellow star", "grinning face", "blue heart"} <= set(train.captions) and not set(train.captions) & set(test.captions)
    assert .07 < len(test)/(len(train) + len(test)) < .13
    assert set(train.captions) | set(test.captions) <= set(emoji_captions().values())
    for split, ds in icons.items():
        assert (ds.name, ds.split) == ("emoji", split) and ds.pictures.shape[1:] == (3, 32, 32)
        assert all(x.float().std() > 2 for x in ds.pictures)                         # none is blank
    everything = [x.numpy().tobytes() for ds in icons.values() for x in ds.pictures]
    assert len(set(everything)) == len(everything)


def test_the_colours_in_the_captions_are_the_pictures(icons):
    if emoji_font().name != "NotoColorEmoji.ttf": pytest.skip("missing: the font Noto Color Emoji")
    of = dict(red=(0, 12), orange=(15, 35), yellow=(35, 52), green=(60, 160), blue=(185, 235), purple=(255, 310), pink=(310, 350))     # hue, degrees
    for ds in icons.values():
        for x, caption in zip(ds.pictures, ds.captions):
            hue, saturation, value = (np.asarray(o).astype(float) for o in Image.fromarray(x.permute(1, 2, 0).numpy()).convert("HSV").split())
            for word in set(caption.split()) & set(of):
                low, high = of[word]
                near = (np.abs((hue*360/255 - (low + high)/2 + 180) % 360 - 180) <= (high - low)/2 + 12) & (saturation > 60) & (value > 60)
                assert near.mean() > .015, (caption, near.mean())


def test_characters_that_the_font_lacks_are_left_out(monkeypatch):
    monkeypatch.setattr(data, "emoji_font", lambda: f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    ds = emoji()
    assert 50 < len(ds) < 500 and "red heart" in ds.captions and "chess pawn" not in ds.captions and "melting face" not in ds.captions


def test_a_font_that_cannot_be_drawn_with(monkeypatch, tmp_path):
    (tmp_path/"broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(data, "emoji_font", lambda: tmp_path/"broken.ttf")
    with pytest.raises(OSError, match="install Noto Color Emoji"): emoji()


# a folder

@pytest.fixture
def folder(tmp_path):
    def make(*lines, pictures=("a.png",)):
        for name in pictures:
            (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 60), "red").save(tmp_path/name)
        text = "\n".join(line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines)
        (tmp_path/"metadata.jsonl").write_text(text, encoding="utf-8")
        return tmp_path
    return make


def entry(name, text="a picture"): return dict(file_name=name, text=text)


def test_a_folder(folder):
    names = [f"sub/{i}.png" for i in range(40)]
    path = folder(*(dict(entry(name, f"picture {name} ü"), more=1) for name in names), "", pictures=names)
    train, test = picture_folder(path), load_data(str(path), "test")
    assert len(train) > len(test) > 0 and sorted(train.captions + test.captions) == sorted(f"picture {name} ü" for name in names)
    assert train.pictures.shape[1:] == (3, 32, 32) and train.name == path.name
    assert picture_folder(path).captions == train.captions
    fewer = folder(*(entry(name, f"picture {name} ü") for name in names[::2]), pictures=())
    assert set(picture_folder(fewer, "test").captions) <= set(test.captions)


def test_pictures_are_cut_to_squares_and_laid_on_white(folder):
    path = folder(*(entry(f"{name}.png", name) for name in ("wide", "clear", "gray", "turned", "twice")), entry("twice.png", "again"), pictures=())
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    wide.save(path/"wide.png")
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(path/"clear.png")
    Image.new("L", (10, 10), 128).save(path/"gray.png")
    turned = Image.new("RGB", (64, 64), "red")
    turned.paste("blue", (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 3                                       # upside down
    turned.save(path/"turned.png", exif=exif)
    turned.save(path/"twice.png")
    sets = [picture_folder(path, split) for split in ("train", "test")]
    x = {caption: picture for ds in sets for picture, caption in ds}
    assert torch.allclose(x["wide"][:, 16, 16], torch.tensor([-1., -1., 1.])) and (x["wide"][2] > .8).all()
    assert (x["clear"] == 1).all() and torch.allclose(x["gray"], torch.tensor(128/127.5 - 1).expand(3, 32, 32), atol=1e-6)
    assert x["turned"][2, 28, 16] == 1 and x["twice"][2, 28, 16] == -1 and torch.equal(x["twice"], x["again"])


def test_plain_pictures():
    "Upright, on paper, RGB: from a palette, from black and white, from a file that says how the camera was held."
    stripes = Image.fromarray(np.uint8([[255, 0] * 8] * 4))
    for picture in (stripes, stripes.convert("1"), stripes.convert("P"), stripes.convert("CMYK"), stripes.convert("RGB").quantize(2)):
        assert plain_picture(picture).mode == "RGB" and plain_picture(picture).tobytes() == stripes.convert("RGB").tobytes()
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert [plain_picture(half, paper).getpixel((0, 0)) for paper in ("white", "black")] == [(255, 127, 127), (128, 0, 0)]
    turned = Image.new("L", (2, 6))
    turned.getexif()[0x0112] = 6
    assert plain_picture(turned).size == (6, 2) and plain_picture(plain_picture(turned)).size == (6, 2)
    for mode in ("I;16", "I;16B", "I", "F"):
        with pytest.raises(ValueError, match="more than 8 bits; save it with 8 bits"): plain_picture(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("line, words", [
    ("{'file_name': 'a.png'}", "isn't JSON"), ("{", "isn't JSON"), ("[1, 2]", "no text under the key 'file_name'"), ("3", "no text under the key 'file_name'"),
    (dict(text="x"), "no text under the key 'file_name'"), (dict(file_name="a.png"), "no text under the key 'text'"),
    (dict(file_name="a.png", text=3), "no text under the key 'text'"), (dict(file_name=["a.png"], text="x"), "no text under the key 'file_name'"),
    (entry("b.png"), "there is no picture 'b.png'"), (entry("broken.png"), "the picture 'broken.png' can't be read"), (entry("text.png"), "can't be read"), (entry("deep.png"), "save it with 8 bits a channel"),
    (entry(""), "there is no picture ''"), (entry("../a.png"), "outside the folder"), (entry("sub/../../a.png"), "outside the folder"), (entry("/etc/hosts"), "outside the folder")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_wrong_line_is_named(folder, line, words, split):
    path = folder(entry("a.png"), "", line, entry("a.png"))
    (path/"broken.png").write_bytes((path/"a.png").read_bytes()[:60])
    (path/"text.png").write_text("not a picture")
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(path/"deep.png")     # Pillow would cut 16 bits off at 255
    with pytest.raises(ValueError) as error: picture_folder(path, split)
    assert f"{path/'metadata.jsonl'}, line 3: " in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_no_text(folder):
    path = folder(entry("a.png"))
    (path/"metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "x"}\n\xff\xfe\x00\n')
    with pytest.raises(ValueError, match="line 2: .* isn't JSON"): picture_folder(path)


def test_line_ends_and_byte_order_marks_of_windows(folder):
    path = folder(entry("a.png"))
    (path/"metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "a.png", "text": "x"}\r\n{"file_name": "a.png", "text": "y"}\r\n')
    assert picture_folder(path).captions == ["x", "y"]


def test_a_folder_without_metadata(tmp_path, folder):
    with pytest.raises(ValueError, match="has no metadata.jsonl; write one"): picture_folder(tmp_path)
    with pytest.raises(ValueError, match="names 0 pictures"): picture_folder(folder(""))


def test_a_small_folder_may_have_no_test_pictures(folder):
    test = picture_folder(folder(entry("a.png")), "test")
    assert len(test) == 0 and test.pictures.shape == (0, 3, 32, 32)


# by name

def test_unknown_data_lists_what_there_is(tmp_path):
    for name in "cifar", "", tmp_path/"absent", "tiny.json":
        with pytest.raises(ValueError) as error: load_data(name)
        assert all(o in str(error.value) for o in DATASETS) and "metadata.jsonl" in str(error.value)


@pytest.mark.parametrize("name, splits", [("fashion_mnist", "train, test"), ("emoji", "train, test"), ("shapes", "train, test, held_out")])
def test_an_unknown_split_lists_the_splits(name, splits):
    with pytest.raises(ValueError, match=f"{name} has no split 'valid'; its splits are {splits}$"): load_data(name, "valid")


def test_by_name(monkeypatch):
    for name in DATASETS: monkeypatch.setattr(data, name, lambda split, seed=None, name=name: (name, split, seed))
    assert [load_data(name, "test", seed=3) for name in DATASETS] == [("fashion_mnist", "test", None), ("shapes", "test", 3), ("emoji", "test", None)]
