"The tokenizer gives the ids that transformers' CLIPTokenizer gives with the same files, learns what a recount learns, and says what is wrong with bad input."
import json, pickle, random, time, unicodedata
from collections import Counter
from itertools import combinations, pairwise

import pytest
import torch
from transformers import CLIPTokenizer as Reference

from sd_scratch.course import weights_folder
from sd_scratch.data import emoji_captions, random_scene
from sd_scratch.exercises import tokenizer as exercises
from sd_scratch.tokenizer import BEGIN, BYTES, END, CLIPTokenizer, clean, learn_merges, merge_pair, spell, split_words

SPECIALS = [BEGIN, END, BEGIN.upper(), "<|EndOfText|>", "<|", "|>", "</w>", "startoftext"]
PIECES = [*"éüñçøßŁİıſΣςÅﬁǅ", "e\u0301", "A\u030a", "o\u0302\u0323", "\u0301", "ΟΔΟΣ", "STRASSE", "Привет", "שלום", "مرحبا", "नमस्ते", "ไทย", "한국어", "\u1112\u1161\u11ab",
          "红心", "東京タワー", "ﾊﾟ", "が", "か\u3099", "，", "。",
          "❤", "❤️", "😀", "👩‍👩‍👧", "🇳🇿", "👍🏽", "1️⃣", "🏴\U000e0067\U000e0062\U000e007f", *"½²³¾٣৪Ⅷ①〇", "2024", "3.14", "x²",
          "don't", "WE'LL", "i'm", "you've", "they're", "she'd", "it's'", "'s", "''s", "’s", "'T", "rock'n'roll", "!", "!!", "?!", "...", "#version:", "a-b_c", "\\", '"', "$&+", "٪", "€",
          *"\x00\x01\x07\x08\x1b\x1c\x1d\x1e\x1f\x7f\x80\x85\xa0\xad\u200b\u200d\u200e\u2060\ufeff\ufffd\ufffe\uffff", "\U0010ffff", "\ue000"]
SPACES = [" ", " ", " ", "", "", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u2029", "\u202f", "\u3000", " \n "]
STABLE = [chr(c) for c in range(0x110000) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs", "Co")]  # the same in every Unicode table since 2002


def awkward(count, seed):
    "Yield strings made to be awkward for a tokenizer."
    rng = random.Random(seed)
    words = " ".join(emoji_captions().values()).split()

    def piece():
        kind = rng.random()
        if kind < .35: return rng.choice([str.lower, str.upper, str.title])(rng.choice(words))
        if kind < .65: return rng.choice(PIECES)
        if kind < .75: return rng.choice(SPECIALS)
        if kind < .85: return "".join(rng.choices(STABLE, k=rng.randint(1, 5)))
        if kind < .95: return "".join(rng.choices("etaoinshrdluEA", k=rng.randint(5, 40)))
        return str(rng.randint(0, 99_999))

    for i in range(count):
        if i % 1_000 == 0: yield "".join(rng.choices("etaoinshrdlubcd", k=rng.choice([300, 700, 2_000])))      # a very long word
        else: yield "".join(piece() + rng.choice(SPACES) for _ in range(rng.randint(0, 12)))


@pytest.fixture(scope="module")
def captions():
    rng = random.Random(0)
    return [*emoji_captions().values(), *(random_scene(rng).caption for _ in range(5_000))]


@pytest.fixture(scope="module")
def trained(captions): return CLIPTokenizer.train(captions, 1_800)


@pytest.fixture(scope="module")
def strings(): return list(awkward(10_000, seed=0))


@pytest.fixture
def folder(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    return tmp_path


def differences(ours, theirs, texts):
    "List the first texts that the two encode or decode differently."
    wrong = []
    for text in texts:
        ids, want = ours.encode(text), theirs(text).input_ids
        if ids != want or ours.decode(ids) != theirs.decode(want, skip_special_tokens=True): wrong.append(text)
    return wrong[:5]


def replace(path, **changes):
    "Change entries of a JSON file; a key whose value is None leaves."
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


# --- the same numbers as transformers


def test_the_strings_are_awkward(strings):
    text = "".join(strings)
    assert len(strings) == 10_000 and len(set(strings)) > 8_000
    for wanted in [*PIECES, *SPECIALS]: assert wanted in text, wanted
    assert max(len(word) for string in strings for word in string.split()) >= 2_000


@pytest.mark.parametrize("pad_token, count", [(END, 10_000), ("!", 3_000)])
def test_transformers_reads_our_folder_and_agrees(trained, strings, tmp_path, pad_token, count):
    ours = CLIPTokenizer(trained.vocab, trained.merges, pad_token=pad_token)
    ours.save_pretrained(tmp_path)
    theirs = Reference.from_pretrained(tmp_path)
    assert (len(theirs), theirs.model_max_length, theirs.pad_token_id) == (1_800, 77, ours.pad_token_id)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)
    assert not differences(ours, theirs, strings[:count])
    want = theirs(strings[:500], padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ours(strings[:500]), want)
    assert torch.equal(ours(strings[:500], max_length=12), theirs(strings[:500], padding="max_length", truncation=True, max_length=12, return_tensors="pt").input_ids)


@pytest.mark.parametrize("pad_token", [END, "!"])
def test_we_read_the_folder_that_transformers_writes(trained, strings, tmp_path, pad_token):
    CLIPTokenizer(trained.vocab, trained.merges, 50, pad_token).save_pretrained(tmp_path / "ours")
    theirs = Reference.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "tokenizer.json").exists() and not (tmp_path / "theirs" / "vocab.json").exists()
    ours = CLIPTokenizer.from_pretrained(tmp_path / "theirs")
    assert (ours.vocab, ours.merges) == (trained.vocab, trained.merges)
    assert (ours.model_max_length, ours.pad_token) == (50, pad_token)
    assert not differences(ours, Reference.from_pretrained(tmp_path / "theirs"), strings[:2_000])


def test_cleaning_equals_the_normalizer(trained, strings):
    normalizer = reference(trained).backend_tokenizer.normalizer
    assert not [text for text in strings[:3_000] if clean(text) != normalizer.normalize_str(text)]


def test_a_folder_like_the_published_one(folder, strings):
    "SD 1.5 and 2.1 were published with the special tokens as objects; that of 2.1 with '!' for padding."
    token = lambda content: dict(content=content, lstrip=False, normalized=True, rstrip=False, single_word=False)
    marked = lambda content: token(content) | {"__type": "AddedToken"}
    (folder / "special_tokens_map.json").write_text(json.dumps(dict(bos_token=token(BEGIN), eos_token=token(END), unk_token=token(END), pad_token="!")))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        add_prefix_space=False, bos_token=marked(BEGIN), eos_token=marked(END), unk_token=marked(END), pad_token=END, do_lower_case=True, errors="replace",
        model_max_length=77, tokenizer_class="CLIPTokenizer", name_or_path="openai/clip-vit-large-patch14")))
    ours, theirs = CLIPTokenizer.from_pretrained(folder), Reference.from_pretrained(folder)
    assert ours.pad_token == theirs.pad_token == "!"        # the map goes before the configuration
    texts = [text for text in strings if BEGIN.upper() not in text and "<|EndOfText|>" not in text]
    assert len(texts) > 5_000 and not differences(ours, theirs, texts[:2_000])


def test_every_word_of_a_two_letter_language():
    "Few letters and much repetition: merges overlap as they never do in English."
    for seed in range(20):
        rng = random.Random(seed)
        words = ["".join(rng.choices("ab", k=rng.randint(1, 12))) for _ in range(20)]
        ours = CLIPTokenizer.train(words, 514 + rng.randint(1, 60))
        words = Counter(word for caption in words for word in split_words(clean(caption)))
        assert ours.merges == recounted(words, len(ours.merges)), seed
        theirs = reference(ours)
        assert not [text for text in ("".join(rng.choices("ab", k=rng.randint(1, 40))) for _ in range(100)) if ours.encode(text) != theirs.encode(text)]


def reference(ours):
    "Build the reference on the vocabulary and merges of `ours`."
    return Reference(vocab=ours.vocab, merges=ours.merges)


@pytest.mark.parametrize("pad_token", [END, "!"])
def test_any_ids_become_the_same_text(trained, pad_token):
    "Ids that no text gives: halves of characters, letters without an end, special tokens in the middle."
    ours, rng = CLIPTokenizer(trained.vocab, trained.merges, pad_token=pad_token), random.Random(0)
    theirs = Reference(vocab=ours.vocab, merges=ours.merges, pad_token=pad_token)
    for _ in range(500):
        ids = rng.choices(range(rng.choice([256, 512, 1_800])), k=rng.randint(0, 20)) + rng.choices(range(1_790, 1_800), k=2)
        assert ours.decode(ids) == ours.decode(torch.tensor(ids)) == theirs.decode(ids, skip_special_tokens=True), ids


def test_the_files_are_those_of_a_published_tokenizer(folder, trained):
    "Older versions of transformers skip the first line of merges.txt whatever it says."
    assert sorted(path.name for path in folder.iterdir()) == ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert lines[0] == "#version: 0.2" and lines[1:] == [*map(" ".join, trained.merges), ""]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["tokenizer_class"], config["do_lower_case"], config["model_max_length"], config["unk_token"]) == ("CLIPTokenizer", True, 77, END)


# --- learning


def recounted(words, count):
    "Learn merges by counting everything anew each time."
    spelled, merges = {word: spell(word) for word in words}, []
    while len(merges) < count:
        counts = Counter()
        for word, n in words.items():
            for pair in pairwise(spelled[word]): counts[pair] += n
        if not counts: break
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        spelled = {word: merge_pair(symbols, merges[-1]) for word, symbols in spelled.items()}
    return merges


@pytest.mark.parametrize("seed", range(5))
def test_learning_equals_a_recount(seed):
    rng = random.Random(seed)
    words = {"".join(rng.choices("aabcé", k=rng.randint(1, 9))): rng.randint(1, 5) for _ in range(60)}
    merges = learn_merges(words, 10_000)
    assert merges == recounted(words, 10_000)
    assert learn_merges(words, 25) == merges[:25]


def test_learning_does_not_depend_on_the_order(captions, trained):
    shuffled = random.Random(1).sample(captions, len(captions))
    assert CLIPTokenizer.train(shuffled, 1_800).merges == trained.merges
    assert list(trained.vocab)[:2] + list(trained.vocab)[256:258] + list(trained.vocab)[-2:] == ["!", '"', "!</w>", '"</w>', BEGIN, END]
    assert list(trained.vocab.values()) == list(range(1_800))


def test_learning_stops_when_no_pair_is_left():
    tokenizer = CLIPTokenizer.train(["red", "red red"], 5_000)
    assert len(tokenizer) == 516 and tokenizer.tokenize("Red reds") == ["red</w>", "r", "e", "d", "s</w>"]
    assert len(CLIPTokenizer.train([], 5_000)) == 514


def test_learning_and_encoding_are_fast(captions):
    start = time.process_time()
    tokenizer = CLIPTokenizer.train(captions, 1_800)
    learned = time.process_time()
    tokenizer(captions[:1_400])
    encoded = time.process_time()
    tokenizer("e" * 500 + "".join(random.Random(0).choices("etaoinshr", k=5_000)))
    assert learned - start < 8 and encoded - learned < 1 and time.process_time() - encoded < 5


# --- rows


def test_captions_come_back(trained, captions):
    for caption in captions[:3_000]:
        if caption.replace(" ", "").isalpha(): assert trained.decode(trained.encode(caption)) == caption.lower()


def test_rows_are_padded_and_cut(trained):
    begin, end = trained.bos_token_id, trained.eos_token_id
    short, long = trained(["red", "red " * 100])
    assert short.tolist() == [begin, *trained.encode("red")[1:-1], *[end] * 75]
    assert long.tolist() == [begin, *trained.encode("red " * 75)[1:-1], end] and long.dtype == torch.int64
    assert trained("red " * 75)[0, -1] == trained("red " * 76)[0, -1] == end
    assert trained(("red", "blue"), max_length=2).tolist() == [[begin, end]] * 2
    assert CLIPTokenizer(trained.vocab, trained.merges, pad_token="!")("", max_length=4).tolist() == [[begin, end, 0, 0]]
    assert CLIPTokenizer(trained.vocab, trained.merges, 16)(["red"]).shape == (1, 16)


@pytest.mark.parametrize("text, cut", [("", ""), ("red " * 75, ""), ("red " * 75 + "Star", "star"), ("red " * 74 + "Star", ""), ("red " * 74 + "12 hearts", "2 hearts"),
                                       ("red " * 74 + "q" * 9 + " star", "q" * 9 + " star"), ("q" * 300, "q" * 300), ("red " * 74 + END + "star!", "star !")])
def test_the_words_that_are_cut_are_named(trained, text, cut):
    assert trained.truncated(text) == cut
    assert bool(cut) == (len(trained.encode(text)) > 77)


def test_a_copy_for_another_process_agrees(trained):
    assert pickle.loads(pickle.dumps(trained)).encode("a RED heart!") == trained.encode("a RED heart!")


def test_a_letter_that_the_vocabulary_lacks_is_the_unknown_token(tmp_path):
    "A vocabulary cut down for a test, as some published ones are."
    tokens = [*"abc", "a</w>", "b</w>", "ab</w>", BEGIN, END]
    ours = CLIPTokenizer({token: id for id, token in enumerate(tokens)}, [("a", "b</w>")])
    ours.save_pretrained(tmp_path)
    assert ours.encode("ab xb") == Reference.from_pretrained(tmp_path)("ab xb").input_ids == [6, 5, 7, 4, 7]


# --- words that were added later

ADDED = {"<cat-toy>": 1_800, "<Moon>": 1_801, "<moon>s": 1_802, "wug": 1_803}
LATER = ["a <cat-toy>", "<CAT-TOY><moon>", "a <MOON>, red", "two <moon>s on", "wugs", "a wug.", "<cat -toy>", END + "<moon>" + BEGIN, "<moon", "", "é<moon>é"]


def test_added_words_are_read_as_by_transformers(trained, tmp_path):
    ours = CLIPTokenizer(trained.vocab, trained.merges, added=ADDED)
    ours.save_pretrained(tmp_path / "ours")
    theirs = Reference.from_pretrained(tmp_path / "ours")
    assert [ours.encode(text) for text in LATER] == [theirs(text).input_ids for text in LATER]
    assert len(ours) == len(theirs) == 1_804 and ours.encode("a <cat-toy>")[2] == 1_800
    assert ours.decode(ours.encode("red <cat-toy> on")) == "red <cat-toy> on"
    assert ours.truncated("red " * 74 + "<moon>s x") == "x"
    assert all(ours.encode(text) == trained.encode(text) for text in awkward(500, seed=3) if "wug" not in text and "<moon>" not in text.lower())
    theirs.save_pretrained(tmp_path / "theirs")                                # tokenizer.json
    for folder in "ours", "theirs":
        again = CLIPTokenizer.from_pretrained(tmp_path / folder)
        assert again.added == ADDED and [again.encode(text) for text in LATER] == [ours.encode(text) for text in LATER]


def test_a_folder_forgets_added_words(trained, tmp_path):
    CLIPTokenizer(trained.vocab, trained.merges, added=ADDED).save_pretrained(tmp_path)
    trained.save_pretrained(tmp_path)
    assert CLIPTokenizer.from_pretrained(tmp_path).vocab == trained.vocab


def test_added_words_that_cannot_be_told(trained):
    with pytest.raises(ValueError, match="'red</w>' is in the vocabulary already"): CLIPTokenizer(trained.vocab, trained.merges, added={"red</w>": 1_800})
    with pytest.raises(ValueError, match="' ' is empty"): CLIPTokenizer(trained.vocab, trained.merges, added={" ": 1_800})
    with pytest.raises(ValueError, match="same id"): CLIPTokenizer(trained.vocab, trained.merges, added={"<moon>": 7})


# --- bad input


@pytest.mark.parametrize("text", [None, 3, b"red", ["red"], ["red", None]])
def test_a_text_that_is_not_a_string(trained, text):
    with pytest.raises(TypeError, match=f"must be a str, not {type(text[-1] if text == ['red', None] else text).__name__}"):
        trained(text) if text == ["red", None] else trained.encode(text)


def test_captions_that_are_not_a_list_of_strings():
    with pytest.raises(TypeError, match="a list of texts"): CLIPTokenizer.train("red heart", 600)
    with pytest.raises(TypeError, match="caption 1 .* not int"): CLIPTokenizer.train(["red", 7], 600)


@pytest.mark.parametrize("size", [-1, 0, 513])
def test_a_vocabulary_too_small_for_the_letters(size):
    with pytest.raises(ValueError, match=f"vocab_size is {size}; it must be at least 514"): CLIPTokenizer.train(["red"], size)


def test_an_empty_batch_and_rows_too_short(trained):
    with pytest.raises(ValueError, match="no texts"): trained([])
    for length in (1, 0, -3):
        with pytest.raises(ValueError, match=f"max_length is {length}"): trained("red", max_length=length)


@pytest.mark.parametrize("id", [1_800, -1, 10**9])
def test_an_unknown_id(trained, id):
    with pytest.raises(ValueError, match=f"no token {id}: .* from 0 to 1799"): trained.decode([0, id])


def test_vocabulary_and_merges_of_different_tokenizers(trained):
    with pytest.raises(ValueError, match="do not belong together: merge 3, .*'qz'"): CLIPTokenizer(trained.vocab, [*trained.merges[:2], ("q", "z")])
    with pytest.raises(ValueError, match="merge 1, .* two tokens"): CLIPTokenizer(trained.vocab, [("q", "z", "y")])
    with pytest.raises(ValueError, match="lacks the special token '<pad>'"): CLIPTokenizer(trained.vocab, trained.merges, pad_token="<pad>")
    with pytest.raises(ValueError, match="no byte, such as '心'"): CLIPTokenizer(trained.vocab | {"心": 1_800}, trained.merges)
    with pytest.raises(ValueError, match="same id"): CLIPTokenizer(trained.vocab | {"!": 1}, trained.merges)


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*neither vocab.json and merges.txt nor tokenizer.json"): CLIPTokenizer.from_pretrained(tmp_path / "nowhere")
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt is missing"): CLIPTokenizer.from_pretrained(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"): (folder / name).unlink()
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert CLIPTokenizer.from_pretrained(folder).model_max_length == 77


@pytest.mark.parametrize("name, content, message", [
    ("vocab.json", '{\n"a": 0,\n"b" 1}', r"vocab.json is not JSON: .*line 3"),
    ("vocab.json", "[1, 2]", "vocab.json must hold a JSON object, not a list"),
    ("vocab.json", '{"a": "0"}', "vocab.json: the vocabulary must give each token a whole number"),
    ("vocab.json", '{"a": true}', "whole number"),
    ("vocab.json", '{"a": -1}', "whole number, 0 or more"),
    ("vocab.json", '{"a": 0}', "lacks the special token"),
    ("vocab.json", b"\xff\xfe{", "vocab.json is not JSON"),
    ("merges.txt", "#version: 0.2\na b\na\n", r"merges.txt, line 3: 'a' is not a pair"),
    ("merges.txt", "#version: 0.2\na b c\n", r"merges.txt, line 2: 'a b c'"),
    ("merges.txt", "#version: 0.2\na \n", r"merges.txt, line 2: 'a ' is not a pair"),
    ("merges.txt", "#version: 0.2\nq zz\n", "do not belong together"),
    ("merges.txt", b"#version: 0.2\n\xff \xfe\n", "do not belong together"),
    ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
    ("tokenizer_config.json", '{"model_max_length": "many"}', "model_max_length must be a whole number of at least 2, not 'many'"),
    ("tokenizer_config.json", '{"model_max_length": -1}', "at least 2, not -1"),
    ("special_tokens_map.json", '{"pad_token": "<pad>"}', "lacks the special token '<pad>'"),
    ("special_tokens_map.json", '{"pad_token": ["!"]}', "lacks the special token"),
    ("added_tokens.json", '{"<cat-toy>": 1799}', "same id"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"1799": {"content": "<cat-toy>"}}}', "same id"),
])
def test_malformed_files(folder, name, content, message):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message): CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("changes, message", [
    (dict(model=None), "not CLIP's kind"), (dict(model=[]), "not CLIP's kind"), (dict(model=dict(type="WordPiece", vocab={})), "not CLIP's kind"),
    (dict(model=dict(type="BPE", end_of_word_suffix=None, vocab={}, merges=[])), "not CLIP's kind"),
    (dict(model=dict(type="BPE", end_of_word_suffix="</w>", vocab=[], merges=[])), "whole number"),
    (dict(model=dict(type="BPE", end_of_word_suffix="</w>", vocab={"a": 0}), added_tokens=[]), "lacks the special token"),
    (dict(added_tokens=[dict(content="<cat-toy>", id=1_799)]), "same id"),
])
def test_a_tokenizer_json_of_another_kind(trained, tmp_path, changes, message):
    reference(trained).save_pretrained(tmp_path)
    assert CLIPTokenizer.from_pretrained(tmp_path).merges == trained.merges
    assert CLIPTokenizer.from_pretrained(tmp_path).model_max_length == 77      # transformers writes 10**30 where nothing was said
    replace(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(ValueError, match=message): CLIPTokenizer.from_pretrained(tmp_path)


def test_merges_as_text_lines_in_tokenizer_json(trained, tmp_path):
    "Older versions of tokenizers wrote 'a b' where newer ones write ['a', 'b']."
    reference(trained).save_pretrained(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    replace(tmp_path / "tokenizer.json", model=model | dict(merges=[" ".join(pair) for pair in trained.merges]))
    assert CLIPTokenizer.from_pretrained(tmp_path).merges == trained.merges


def test_windows_line_ends(folder, trained):
    path = folder / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert CLIPTokenizer.from_pretrained(folder).merges == trained.merges


def test_all_bytes_have_a_letter():
    assert sorted(BYTES.values()) == list(range(256)) and not any(letter.isspace() for letter in BYTES)


# --- what later parts rely on


def test_encoding_again_what_was_decoded(trained, captions):
    "Decoding puts spaces between words, never inside one: the ids stay."
    for caption in captions[:3_000] + ["woman's hat", "jack-o-lantern", "½ Café ❤", "don't!?", "12:30", "(^_^)"]:
        ids = trained.encode(caption)
        assert trained.encode(trained.decode(ids)) == ids, caption


def test_one_row_of_the_table_reaches_the_captions_with_its_token_only(trained, captions):
    rows, heart = trained(captions[:1_376]), trained.vocab["heart</w>"]
    with_heart = [n for n, caption in enumerate(captions[:1_376]) if "heart" in split_words(clean(caption))]
    assert (rows == heart).any(1).nonzero().flatten().tolist() == with_heart and len(with_heart) > 10


def test_what_is_returned_can_be_changed(trained):
    "The cache of encoded words stays as it is."
    want = trained.encode("a red saxophone")
    trained.tokenize("saxophone").clear(); trained.encode("saxophone").clear(); trained("saxophone").zero_()
    assert trained.encode("a red saxophone") == want


def test_tokenizers_share_nothing(trained):
    small = CLIPTokenizer(trained.vocab, trained.merges[:10])
    assert trained.tokenize("heart") == ["heart</w>"] and len(small.tokenize("heart")) > 1 and trained.tokenize("heart") == ["heart</w>"]
    other = CLIPTokenizer(trained.vocab, trained.merges, pad_token="!")
    assert other.encode("red!")[-2] == 0 != trained.encode("red!")[-2]


def test_the_shipped_tokenizer_agrees_with_transformers(strings):
    folder = weights_folder() / "tiny" / "tokenizer"
    assert not differences(CLIPTokenizer.from_pretrained(folder), Reference.from_pretrained(folder), strings[:1_000])


# --- the exercises' checks


def shortest(word, vocabulary):
    "Find a shortest cut by trying all of them."
    letters = spell(word)
    cuts = ([letters[i:j] for i, j in pairwise([0, *places, len(letters)])] for count in range(len(letters)) for places in combinations(range(1, len(letters)), count))
    return next(["".join(piece) for piece in cut] for cut in cuts if all(len(piece) == 1 or "".join(piece) in vocabulary for piece in cut))


@pytest.mark.parametrize("name, right, wrong, message", [
    ("letters", 10, 9, "9 is not right"),
    ("pair_counts", lambda words: Counter(pair for word, n in words.items() for _ in range(n) for pair in pairwise(word)), lambda words: {}, "the last one too"),
    ("fit", lambda tokenizer, text, length: max((" ".join(text.split()[:n]) for n in range(9) if len(tokenizer.encode(" ".join(text.split()[:n]))) <= length), key=len), lambda *given: "", "fits as well"),
    ("table_gradient", lambda ids, grad, size: torch.stack([grad[ids == row].sum(0) for row in range(size)]), lambda ids, grad, size: torch.zeros(size, 3), "one place"),
    ("best_cut", shortest, lambda word, vocabulary: spell(word), "pieces are enough"),
])
def test_checks_know_right_from_wrong(name, right, wrong, message, capsys):
    check = getattr(exercises, f"check_{name}")
    check(right)
    check(None)
    assert capsys.readouterr().out == "correct\nnot solved yet\n"
    with pytest.raises(AssertionError, match=message): check(wrong)
