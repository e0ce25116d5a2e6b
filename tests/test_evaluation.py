"The measures: prompt accuracy and its classifier, on painters of whom the answer is known; FID, KID and nearest neighbours, against plain formulas and distributions of which they are known."
import json, random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sd_scratch.course import to_tensor, weights_folder
from sd_scratch.data import BACKGROUNDS, CLOTHES, COLORS, HELD_OUT, RELATIONS, SHAPES, SIZES, Scene, Thing, draw_scene, fashion_mnist, parse_caption, random_scene, shapes
from sd_scratch.evaluation import (ClothesClassifier, ShapesClassifier, fid, kid, load_clothes_classifier, load_shapes_classifier, nearest, prompt_accuracy, prompt_report, prompts_for,
                                   save_clothes_classifier, save_shapes_classifier, train_clothes_classifier, train_shapes_classifier, worn)

KINDS = dict(shapes=(ShapesClassifier, load_shapes_classifier, save_shapes_classifier), clothes=(ClothesClassifier, load_clothes_classifier, save_clothes_classifier))
each_kind = pytest.mark.parametrize("kind, load, save", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def classifier(): return load_shapes_classifier()


def draw_all(scenes, seed=0):
    "Draw scenes: (N, 3, 32, 32) in [-1, 1]."
    rng = random.Random(f"test_evaluation {seed}")
    return torch.stack([to_tensor(draw_scene(scene, rng)) for scene in scenes])


def random_scenes(count, things=None, held_out=False, seed=0):
    rng = random.Random(f"test_evaluation {things} {held_out} {seed}")
    return [random_scene(rng, things, held_out) for _ in range(count)]


def share_right(classifier, pictures, scenes):
    "How many are read correctly, computed without the module's own counting."
    return sum(read is not None and read.caption in scene.captions for read, scene in zip(classifier.read(pictures), scenes, strict=True)) / len(scenes)


# the classifier

@pytest.mark.parametrize("held_out", [False, True], ids=["seen", "held_out"])
@pytest.mark.parametrize("things", [1, 2])
def test_classifier_reads_real_pictures(classifier, things, held_out):
    scenes = random_scenes(1000, things, held_out)
    pictures = draw_all(scenes)
    assert share_right(classifier, pictures, scenes) >= 0.99
    assert share_right(classifier, worn(pictures, torch.Generator().manual_seed(0)), scenes) >= 0.98


@pytest.mark.parametrize("split", ["train", "test", "held_out"])
def test_classifier_reads_every_split_of_the_data_set(classifier, split):
    data = shapes(split, 400, seed=7)
    pictures, captions = data.batch(range(400))
    assert share_right(classifier, pictures, list(map(parse_caption, captions))) >= 0.99


def test_classifier_knows_every_combination(classifier):
    scenes = [Scene((Thing(size, color, shape),), None, background) for size in SIZES for color in COLORS for shape in SHAPES for background in BACKGROUNDS
              if COLORS[color] != BACKGROUNDS[background]]
    missed = {(t.color, t.shape): 0 for s in scenes for t in s.things}
    for seed in range(4):
        for scene, read in zip(scenes, classifier.read(draw_all(scenes, seed))): missed[scene.things[0].color, scene.things[0].shape] += read != scene
    assert set(HELD_OUT) <= set(missed) and max(missed.values()) <= 2, {k: n for k, n in missed.items() if n}  # of 24 to 32 pictures


def test_classifier_does_not_forgive_one_wrong_attribute(classifier):
    def neighbours(scene):
        for i, thing in enumerate(scene.things):
            for name, words in dict(size=SIZES, color=COLORS, shape=SHAPES).items():
                for word in words: yield replace(scene, things=scene.things[:i] + (replace(thing, **{name: word}),) + scene.things[i + 1:])
        for background in BACKGROUNDS: yield replace(scene, background=background)
        if scene.relation:
            for relation in RELATIONS: yield replace(scene, relation=relation)
    wrong = [(new, scene) for held_out in (False, True) for scene in random_scenes(40, None, held_out, seed=1) for new in neighbours(scene)
             if new.canonical() != scene.canonical() and all(COLORS[t.color] != BACKGROUNDS[new.background] for t in new.things)]
    painted, meant = zip(*wrong)
    assert len(wrong) > 1000 and share_right(classifier, draw_all(painted), meant) <= 0.005


def test_pictures_that_are_no_scene_are_not_read_as_one(classifier):
    rng = random.Random(3)
    empty = torch.tensor(list(BACKGROUNDS.values()))[:, :, None, None].expand(-1, 3, 32, 32) / 127.5 - 1
    three = []
    while len(three) < 100:  # a third thing laid into a picture of two, where it touches neither
        two, one = random_scene(rng, 2), random_scene(rng, 1)
        a, b = draw_all([two, replace(one, background=two.background)] if COLORS[one.things[0].color] != BACKGROUNDS[two.background] else [two, two], rng.random())
        back = torch.tensor(BACKGROUNDS[two.background])[:, None, None] / 127.5 - 1
        there = [((x - back).abs() > 1e-3).any(0) for x in (a, b)]
        if not (there[0] & there[1]).any(): three.append(torch.where(there[1], b, a))
    assert classifier.read(empty) == [None] * len(BACKGROUNDS)
    assert classifier.read(torch.stack(three)).count(None) >= 95


def test_scenes_are_read_in_canonical_order(classifier):
    red, blue = Thing("large", "red", "circle"), Thing("small", "blue", "square")
    for relation in RELATIONS:
        scene = Scene((red, blue), relation, "white")
        (read,) = classifier.read(draw_all([scene]))
        assert read == (scene if relation in ("above", "left of") else scene.turned())


def test_reading_depends_on_no_other_picture(classifier):
    scenes = random_scenes(1003, seed=2)
    pictures = draw_all(scenes)
    together = classifier.read(pictures)
    assert len(together) == 1003 and together[-3:] == classifier.read(pictures[-3:]) and together[499:502] == classifier.read(pictures[499:502])


def test_values_beyond_the_range_are_cut_off_as_in_a_saved_picture(classifier):
    scenes = random_scenes(100, seed=3)
    pictures = draw_all(scenes)
    assert share_right(classifier, pictures * 3, scenes) == share_right(classifier, (pictures * 3).clamp(-1, 1), scenes)


def test_reading_takes_the_best_word_of_every_head():
    classifier = ShapesClassifier()
    with torch.no_grad():
        classifier.heads.weight.zero_()
        scores = dict(zip("layout background size1 color1 shape1 size2 color2 shape2".split(), classifier.heads.bias.zero_().split([4, 4, 2, 8, 4, 2, 8, 4])))
        for head, k in dict(layout=2, background=3, size1=1, color1=4, shape1=3, size2=0, color2=7, shape2=2).items(): scores[head][k] = 1
        picture = torch.zeros(1, 3, 32, 32)
        assert classifier.read(picture) == [parse_caption("a large purple star left of a small white triangle on a pink background")]
        scores["layout"][0] = 2
        assert classifier.read(picture) == [parse_caption("a large purple star on a pink background")]
        scores["layout"][3] = 3
        assert classifier.read(picture) == [None]


@pytest.mark.parametrize("pictures, says", [
    (torch.zeros(3, 32, 32), "(3, 32, 32)"), (torch.zeros(2, 1, 32, 32), "(2, 1, 32, 32)"), (torch.zeros(2, 3, 64, 64), "(2, 3, 64, 64)"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "uint8"), ([1, 2], "list"), (torch.full((2, 3, 32, 32), torch.inf), "diverged")])
def test_pictures_of_the_wrong_kind(classifier, pictures, says):
    for use in classifier.read, lambda x: prompt_accuracy(lambda prompts: x, prompts_for(2), classifier):
        with pytest.raises(ValueError) as error: use(pictures)
        assert says in str(error.value)


# its training and its file

def test_wear_never_turns_one_colour_into_another():
    colors = torch.tensor(list(COLORS.values())) / 127.5 - 1
    flat = colors.repeat(50, 1)
    x = worn(flat[:, :, None, None].expand(-1, 3, 32, 32), torch.Generator().manual_seed(0))
    assert x.min() >= -1 and x.max() <= 1 and 0.01 < (x.mean((2, 3)) - flat).abs().mean() < 0.1
    assert torch.equal(torch.cdist(x.mean((2, 3)), colors).argmin(1), torch.arange(len(flat)) % len(colors))


def test_training_is_repeatable_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    train = lambda seed, lr=3e-3: train_shapes_classifier(steps=2, seed=seed, batch=8, count=200, lr=lr, progress=False).state_dict()
    first, again, start, other = train(0), train(0), train(0, lr=0.), train(1, lr=0.)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(w, again[name]) for name, w in first.items()) and not torch.equal(start["heads.weight"], other["heads.weight"])


def test_training_learns():
    classifier = train_shapes_classifier(steps=60, batch=32, count=2000, progress=False)
    scenes = random_scenes(200, 1)
    read = classifier.read(draw_all(scenes))
    assert not classifier.training and sum(r is not None and r.background == s.background for r, s in zip(read, scenes)) > 120  # a quarter by chance


@each_kind
def test_shipped_file_is_small_and_in_half_precision(kind, load, save):
    path = weights_folder() / kind.shipped
    assert path.stat().st_size <= 0.5e6
    with safe_open(path, "pt") as file: assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    classifier = load()
    assert type(classifier) is kind and {w.dtype for w in classifier.parameters()} == {torch.float32} and not classifier.training


@each_kind
def test_saved_classifier_comes_back(tmp_path, kind, load, save):
    save(load(), tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == (weights_folder() / kind.shipped).read_bytes()
    torch.manual_seed(1)
    fresh = kind()
    save(fresh, tmp_path / "fresh.safetensors")
    assert all(torch.equal(w, fresh.state_dict()[name].half().float()) for name, w in load(tmp_path / "fresh.safetensors").state_dict().items())


@each_kind
def test_file_of_something_else(tmp_path, kind, load, save):
    other = next(other for other, *_ in KINDS.values() if other is not kind)
    with pytest.raises(ValueError, match=f"{other.shipped} doesn't hold the weights of a {kind.__name__}"): load(weights_folder() / other.shipped)
    (tmp_path / "cut.safetensors").write_bytes((weights_folder() / kind.shipped).read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"): load(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="none.safetensors"): load(tmp_path / "none.safetensors")


# the network that looks at clothes

@pytest.fixture(scope="module")
def clothes():
    try: return {split: fashion_mnist(split) for split in ("train", "test")}
    except FileNotFoundError as error: pytest.skip(str(error))


def grey(data, indices): return data.batch(indices)[0][:, :1]


def accuracy(classifier, data, indices):
    with torch.no_grad(): best = classifier(grey(data, indices)).argmax(1).tolist()
    return sum(data.captions[i] == f"a photo of {CLOTHES[k]}" for i, k in zip(indices, best, strict=True)) / len(indices)


def test_clothes_classifier_is_right_about_pictures_that_it_was_not_trained_on(clothes):
    parts = [accuracy(load_clothes_classifier(), clothes["test"], range(i, i + 1000)) for i in range(0, 10_000, 1000)]
    assert sum(parts) / 10 >= 0.92


def test_features_are_what_the_head_sees_of_each_picture_by_itself():
    classifier = load_clothes_classifier()
    x = torch.rand(1003, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = classifier.features(x)
    assert features.shape == (1003, 80) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(classifier.head(features), classifier(x))
    torch.testing.assert_close(classifier.features(x[499:502]), features[499:502], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(classifier.features((3 * x)[:9]), classifier.features((3 * x)[:9].clamp(-1, 1)), rtol=0, atol=0)


def test_of_a_picture_in_colour_the_clothes_classifier_sees_the_mean_of_the_channels():
    classifier = load_clothes_classifier()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(classifier.features(x), classifier.features(x.mean(1, keepdim=True)))
    torch.testing.assert_close(classifier(x), classifier(x.mean(1, keepdim=True)))


@pytest.mark.parametrize("pictures, says", [
    (torch.zeros(3, 32, 32), "(3, 32, 32)"), (torch.zeros(2, 2, 32, 32), "(2, 2, 32, 32)"), (torch.zeros(2, 1, 28, 28), "(2, 1, 28, 28)"),
    (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "uint8"), (None, "NoneType"), (torch.full((2, 1, 32, 32), torch.nan), "diverged")])
def test_features_of_pictures_of_the_wrong_kind(pictures, says):
    with pytest.raises(ValueError) as error: ClothesClassifier().features(pictures)
    assert says in str(error.value)


def test_training_the_clothes_classifier(clothes):
    torch.manual_seed(5)
    train = lambda seed, lr=3e-3, steps=2: train_clothes_classifier(steps, seed, batch=16, lr=lr, progress=False)
    first, again, start, other = (train(*how).state_dict() for how in ((0,), (0,), (0, 0.), (1, 0.)))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(w, again[name]) for name, w in first.items()) and not torch.equal(start["head.weight"], other["head.weight"])
    learned = train(0, steps=100)
    assert not learned.training and accuracy(learned, clothes["test"], range(1000)) > 0.5           # a tenth by chance


# FID, KID and nearest neighbours

def cloud(n, d, seed=0, scale=1., shift=0.):
    "Draw features that lie in no particular directions."
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix * scale + shift


@pytest.mark.parametrize("n, m, d", [(500, 300, 20), (200, 1000, 80), (60, 40, 80), (2, 3, 5), (50, 70, 1)])
def test_fid_is_the_formula_with_scipys_matrix_root(n, m, d):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = cloud(n, d, 0).numpy(), cloud(m, d, 1, 1.5, 0.3).numpy()
    c, c_w = (np.atleast_2d(np.cov(z, rowvar=False)) for z in (x, y))
    if min(n, m) > d: root = linalg.sqrtm(c @ c_w).real.trace()
    else: root = linalg.sqrtm((a := linalg.sqrtm(c).real) @ c_w @ a + 1e-14 * np.eye(d)).real.trace()   # sqrtm can't take the root of every singular product
    want = ((x.mean(0) - y.mean(0))**2).sum() + c.trace() + c_w.trace() - 2 * root
    assert fid(torch.tensor(x), torch.tensor(y)) == pytest.approx(want, rel=1e-5)


def test_fid_of_gaussians_of_which_it_is_known():
    flat = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = flat - flat.mean(0)
    white = flat @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(flat.T))).T                         # mean 0, covariance 1, to the last digits
    a, b = torch.tensor([1., 2, 3, 4, 5, 6]).double(), torch.tensor([6., 1, 1, 2, 0, 3]).double()
    shift = torch.tensor([0., 1, 0, 0, 2, 0]).double()
    assert fid(white * a, white * b + shift) == pytest.approx(5 + ((a - b)**2).sum().item())            # widths along common axes: their differences, squared
    assert fid(white, 3 * white) == pytest.approx(6 * 4)


@pytest.mark.parametrize("n", [3, 50, 400])
def test_fid_has_the_properties_of_a_squared_distance(n):
    x, y = cloud(n, 40), cloud(n + 7, 40, 1, 2.)
    assert 0 <= fid(x, x) < 1e-6 and 0 <= fid(x, x.flip(0)) < 1e-6
    assert fid(x, y) == pytest.approx(fid(y, x)) and fid(x, y) > 1
    shift = torch.linspace(-1, 1, 40).double()
    assert fid(x, x + shift) == pytest.approx(shift.square().sum().item(), abs=1e-4)                    # same shape elsewhere
    assert fid(x + shift, y + shift) == pytest.approx(fid(x, y), rel=1e-6) and fid(3 * x, 3 * y) == pytest.approx(9 * fid(x, y), rel=1e-6)
    turn = torch.linalg.qr(cloud(40, 40, 2))[0]
    assert fid(x @ turn, y @ turn) == pytest.approx(fid(x, y), rel=1e-6)
    assert isinstance(fid(x, y), float) and fid(x.float().numpy(), y.float()) == pytest.approx(fid(x, y), rel=1e-4)


def test_fid_is_too_large_for_few_samples_and_kid_is_not():
    draws = [torch.randn(2, 30, 10, generator=torch.Generator().manual_seed(seed)) for seed in range(400)]
    fids, kids = (torch.tensor([measure(x, y) for x, y in draws]) for measure in (fid, kid))
    assert fids.min() > 0.5                                                                             # 0 would be true
    assert (kids < 0).any() and kids.mean().abs() < 3 * kids.std() / 400**0.5


@pytest.mark.parametrize("n, m, d, chunk", [(13, 8, 5, 1000), (2, 30, 3, 7), (25, 25, 40, 10)])
def test_kid_is_the_double_loop(n, m, d, chunk):
    x, y = cloud(n, d, 0).tolist(), cloud(m, d, 1, 1.5, 0.3).tolist()
    kernel = lambda a, b: (sum(p * q for p, q in zip(a, b)) / d + 1)**3
    apart = lambda z: sum(kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
    want = apart(x) + apart(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)
    x, y = (torch.tensor(z, dtype=torch.float64) for z in (x, y))
    assert kid(x, y, chunk) == pytest.approx(want, rel=1e-9)
    assert kid(y, x) == pytest.approx(want, rel=1e-9)


def test_kid_finds_a_difference():
    x, y = cloud(1000, 20, 0), cloud(1000, 20, 0, 1.3)
    assert abs(kid(x[:500], x[500:])) < 0.1 * kid(x[:500], y[500:]) and abs(kid(x[:500], x[500:])) < 0.1 * kid(x[:500], x[500:] + 0.5)


@pytest.mark.parametrize("real, generated, says", [
    (torch.zeros(1, 4), torch.zeros(9, 4), "the real features have the shape (1, 4)"), (torch.zeros(9, 4), torch.zeros(0, 4), "the generated features have the shape (0, 4)"),
    (torch.zeros(9), torch.zeros(9, 4), "(9,)"), (torch.zeros(9, 1, 32, 32), torch.zeros(9, 4), "(9, 1, 32, 32)"), (torch.zeros(9, 4), torch.zeros(9, 5), "real features have 4 numbers, generated ones 5"),
    (torch.zeros(9, 4), torch.full((9, 4), torch.inf), "the generated features hold values that are infinite"), (torch.full((9, 4), torch.nan), torch.zeros(9, 4), "the real features hold")])
def test_features_that_nothing_can_be_said_of(real, generated, says):
    for measure in fid, kid:
        with pytest.raises(ValueError) as error: measure(real, generated)
        assert says in str(error.value)


@pytest.mark.parametrize("chunk", [256, 7])
def test_nearest_is_what_all_distances_say(chunk):
    generator = torch.Generator().manual_seed(0)
    pictures, others = torch.randn(50, 1, 8, 8, generator=generator), torch.randn(300, 1, 8, 8, generator=generator)
    distances = torch.stack([(others - p).flatten(1).norm(dim=1) for p in pictures])
    index, distance = nearest(pictures, others, chunk)
    assert torch.equal(index, distances.argmin(1))
    torch.testing.assert_close(distance, distances.min(1).values)


def test_nearest_finds_a_copy_at_distance_zero():
    candidates = 5 + torch.randn(300, 1024, generator=torch.Generator().manual_seed(0))
    index, distance = nearest(candidates[[7, 299, 0]], candidates)
    assert index.tolist() == [7, 299, 0] and distance.tolist() == [0, 0, 0]


@pytest.mark.parametrize("queries, candidates, says", [
    (torch.zeros(2, 4), torch.zeros(0, 4), "no candidates"), (torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4), "a query has 16 numbers, a candidate 48"),
    (torch.full((2, 4), torch.nan), torch.zeros(2, 4), "not numbers"), (torch.zeros(2, 4), torch.full((2, 4), torch.inf), "infinite")])
def test_nearest_of_what_can_not_be_compared(queries, candidates, says):
    with pytest.raises(ValueError) as error: nearest(queries, candidates)
    assert says in str(error.value)


# prompts

@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("things", [1, 2, None])
def test_prompts(held_out, things):
    prompts = prompts_for(200, held_out, things, seed=3)
    scenes = list(map(parse_caption, prompts))
    assert prompts == prompts_for(200, held_out, things, seed=3) != prompts_for(200, held_out, things, seed=4)
    assert {len(s.things) for s in scenes} == ({things} if things else {1, 2})
    assert {any((t.color, t.shape) in HELD_OUT for t in s.things) for s in scenes} == {held_out}
    if things != 1: assert {s.relation for s in scenes} - {None} == set(RELATIONS)


# painters of whom the answer is known

class Told:
    "A classifier that doesn't look: it says what it was told, picture by picture."
    def __init__(self, scenes): self.scenes = iter(scenes)
    def read(self, pictures): return [next(self.scenes) for _ in pictures]


@pytest.fixture(scope="module")
def readable(classifier):
    "Prompts with one drawn picture each that is certainly read correctly."
    scenes = random_scenes(60, None, False, seed=4) + random_scenes(60, None, True, seed=4)
    pictures = draw_all(scenes)
    fine = [(s.caption, x) for s, x, read in zip(scenes, pictures, classifier.read(pictures)) if read == s.canonical()][:100]
    assert len(fine) == 100
    return dict(fine)


def swap_colors(picture, caption):
    "Paint another thing's colour: the first thing gets a colour that it doesn't have."
    scene = parse_caption(caption)
    color = next(c for c in COLORS if COLORS[c] != BACKGROUNDS[scene.background] and c not in [t.color for t in scene.things])
    return draw_all([replace(scene, things=(replace(scene.things[0], color=color), *scene.things[1:]))])[0]


@pytest.mark.parametrize("batch", [64, 7, 1000])
def test_a_painter_who_swaps_a_color_in_every_fourth_picture(readable, batch):
    prompts = list(readable)
    fourth = set(prompts[::4])
    painter = lambda some: torch.stack([swap_colors(readable[p], p) if p in fourth else readable[p] for p in some])
    assert prompt_accuracy(painter, prompts, batch=batch) == 0.75
    assert prompt_accuracy(lambda some: torch.stack([readable[p] for p in some]), prompts, batch=batch) == 1
    assert prompt_accuracy(lambda some: torch.stack([swap_colors(readable[p], p) for p in some]), prompts, batch=batch) == 0


def test_pictures_of_other_prompts_are_wrong(readable):
    prompts = list(readable)
    other = dict(zip(prompts, prompts[1:] + prompts[:1]))
    assert prompt_accuracy(lambda some: torch.stack([readable[other[p]] for p in some]), prompts) == 0


def test_both_captions_of_a_picture_count(readable):
    two = [p for p in readable if parse_caption(p).relation]
    turned = [parse_caption(p).turned().caption for p in two]
    assert len(two) > 20 and not set(two) & set(turned)
    pictures = torch.stack([readable[p] for p in two])
    for prompts in two, turned: assert prompt_accuracy(lambda some: pictures, prompts, batch=1000) == 1
    mirrored = [replace(scene, things=scene.things[::-1]).caption for scene in map(parse_caption, two) if scene.things[0] != scene.things[1]]
    assert prompt_accuracy(lambda some: pictures, mirrored, batch=1000) == 0


def test_prompts_are_drawn_in_order_and_in_batches():
    asked, prompts = [], prompts_for(10)
    def painter(some):
        asked.append(list(some))
        return torch.zeros(len(some), 3, 32, 32)
    assert prompt_accuracy(painter, prompts, Told(parse_caption(p).canonical() for p in prompts), batch=4) == 1
    assert sum(asked, []) == prompts and list(map(len, asked)) == [4, 4, 2]


BLANK = lambda prompts: torch.zeros(len(prompts), 3, 32, 32)


def test_report_counts_each_kind_and_each_attribute():
    cases = {  # prompt: what is read
        "a large red circle on a white background": "a large red circle on a white background",                                          # seen, one: right
        "a small red circle on a white background": "a large red circle on a pink background",                                           # size, background
        "a small purple star on a white background": None,                                                                               # held out, one: no scene
        "a large red circle below a small blue square on a gray background": "a small blue square above a large red circle on a gray background",      # right
        "a large blue circle above a small red star on a gray background": "a large blue circle left of a small red star on a gray background",        # layout
        "a large red circle above a small red star on a gray background": "a large red circle on a gray background",                                   # layout; no second thing
        "a large green triangle left of a small red star on a black background": "a large green triangle left of a small orange circle on a black background"}
    report = prompt_report(BLANK, list(cases), Told(parse_caption(read) if read else None for read in cases.values()), batch=3)
    assert report == dict(
        seen=dict(one=dict(prompts=2, accuracy=1/2), two=dict(prompts=3, accuracy=1/3), all=dict(prompts=5, accuracy=2/5)),
        held_out=dict(one=dict(prompts=1, accuracy=0), two=dict(prompts=1, accuracy=0), all=dict(prompts=2, accuracy=0)),
        attributes=dict(layout=4/7, background=5/7, size=8/11, color=8/11, shape=8/11), neither=1/7)
    assert json.loads(json.dumps(report)) == report


def test_report_by_default_asks_a_thousand_prompts():
    asked = []
    report = prompt_report(lambda prompts: asked.extend(prompts) or BLANK(prompts), classifier=Told([None] * 1000))
    assert asked == sum((prompts_for(250, held_out, things) for held_out in (False, True) for things in (1, 2)), [])
    assert all(report[kind] == {name: dict(prompts=n, accuracy=0) for name, n in dict(one=250, two=250, all=500).items()} for kind in ("seen", "held_out"))
    assert report["neither"] == 1 and set(report["attributes"].values()) == {0}


def test_report_of_one_kind_says_nothing_of_the_others():
    prompts = prompts_for(3, True, 2)
    report = prompt_report(BLANK, prompts, Told(parse_caption(p).canonical() for p in prompts))
    assert report["seen"]["all"] == dict(prompts=0, accuracy=None) and report["held_out"]["two"] == dict(prompts=3, accuracy=1)


@pytest.mark.parametrize("prompt, says", [
    ("a red heart", "can't read the caption 'a red heart'"), ("a large red heart on a white background", "'heart' is no shape"),
    ("a large white star left of a small white star on a white background", "can't be seen on a white background")])
def test_prompt_that_no_picture_can_fit_is_refused_before_anything_is_drawn(prompt, says):
    def painter(prompts): raise AssertionError("nothing should be drawn")
    for measure in prompt_accuracy, prompt_report:
        with pytest.raises(ValueError) as error: measure(painter, prompts_for(100) + [prompt])
        assert says in str(error.value)


@pytest.mark.parametrize("prompts", [[], "a large red circle on a white background"])
def test_prompts_must_be_a_list_with_something_in_it(prompts):
    with pytest.raises(ValueError, match="prompts is a list of captions"): prompt_accuracy(BLANK, prompts)


@pytest.mark.parametrize("count", [0, 9, 11])
def test_one_picture_a_prompt(count):
    with pytest.raises(ValueError, match=f"draw made {count} pictures of 10 prompts"): prompt_accuracy(lambda prompts: torch.zeros(count, 3, 32, 32), prompts_for(10))
