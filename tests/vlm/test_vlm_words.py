"""Scenes in words, fresh questions, fewer shapes, soft targets of numbers."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

from vlm import components
from vlm.config import Run, Scenes, Stage
from vlm.near import Near
from vlm.scenes import make_example, sample_scene
from vlm.scenes.questions import MAX_DRAWS
from vlm.scenes.source import ASKED, READING, SceneSource
from vlm.scenes.words import CORNER, EDGES, NOTHING, VOCABULARY, Told, connector


def test_every_place_has_the_words_of_its_object():
    """Against the objects, cell by cell: at 3 x 3 places each has at most one, and eight of nine have one."""
    source = SceneSource("vqa", 20)
    for key in map(str, range(20)):
        scene = source.scene(key)
        rows = Told(3).get(source, [key])[0]
        cells = {
            3 * int(3 * (item.box[1] + item.box[3]) / 2 / scene.size)
            + int(3 * (item.box[0] + item.box[2]) / 2 / scene.size): item
            for item in scene.objects
        }
        assert len(cells) == 8
        for place, row in enumerate(rows):
            found = {VOCABULARY[i]: float(row[i]) for i in (row > 1e-3 * row.max()).nonzero().flatten()}
            if place not in cells:
                assert list(found) == [NOTHING]
                continue
            item = cells[place]
            plain = {word for word in found if ":" not in word}
            assert plain == {item.colour, item.name} | (
                {item.size, item.texture} if item.kind == "shape" else {item.kind}
            )
            for edge, corner in zip(EDGES, item.box, strict=True):
                bell = {float(w.partition(":")[2]): v for w, v in found.items() if w.startswith(edge)}
                assert sum(bell.values()) / found[item.colour] == pytest.approx(CORNER, rel=0.02)
                assert max(bell, key=bell.get) == pytest.approx(corner / scene.size, abs=0.0051)


def test_a_place_begins_as_the_sum_of_its_words_vectors():
    """Of a run's own language model; the corners, which are no tokens, aside."""
    stage = Stage({"vqa": Scenes("vqa", 10)}, steps=5, batch_size=4, lr=1e-3)
    run = Run("a", "mamba-tiny", (stage,), {}, encoder="words", image_size=96)
    made, text = components.model(run, len(VOCABULARY)), components.text("scenes")
    source = SceneSource("vqa", 3)
    for key in "012":
        features = Told(3).get(source, [key])
        plain = features * torch.tensor([float(":" not in word) for word in VOCABULARY])
        found = made.vision_embed_tokens(plain)[0]
        for item in source.scene(key).objects:
            x, y = ((a + b) / 2 / 128 for a, b in (item.box[::2], item.box[1::2]))
            more = (item.size, item.texture) if item.kind == "shape" else (item.kind,)
            said = [
                item.name if item.kind == "digit" else f" {item.name}",
                *(f" {w}" for w in (item.colour, *more)),
            ]
            wanted = sum(made.lm.embedding.weight[text.encode(word)[0]] for word in said)
            assert torch.allclose(found[3 * int(3 * y) + int(3 * x)], wanted, atol=1e-5)
    with pytest.raises(ValueError, match="needs a tokenizer with a token for 'red'"):
        connector(made.lm.embedding.weight, lambda word: [1, 2])


def test_words_are_of_scenes_alone():
    with pytest.raises(ValueError, match="encoder='words' reads scenes, and 'x' has none"):
        Told(3).fill(type("Source", (), {"name": "x"})())
    eyes = components.eyes("words", 96, None)
    assert (eyes.side, eyes.width) == (3, len(VOCABULARY) == len(set(VOCABULARY)) and len(VOCABULARY))
    with pytest.raises(ValueError, match="encoder='words' reads scenes in words, no pictures"):
        eyes([SceneSource("vqa", 1).picture("0")])


def test_draws_ask_anew_about_the_same_scenes():
    source = SceneSource("vqa", 5, turns=14, draws=3)
    assert len(source) == 15 and source.keys() == ["0", "1", "2", "3", "4"]
    texts = ["".join(c.text for c in source[i].chunks) for i in range(15)]
    assert len(set(texts)) == 15
    assert [source[i].image for i in range(15)] == [*"01234"] * 3 and len(
        {source[i].id for i in range(15)}
    ) == 15
    for i in range(15):
        asked = [c.text for c in source[i].chunks if not c.supervised]
        assert len(asked) == len(set(asked)) <= 15
    again = SceneSource("attribute", 5, turns=2, draws=8)
    for scene in range(5):  # with the same two questions in every draw there would be two
        asked = [c.text for k in range(8) for c in again[scene + 5 * k].chunks if "Question" in c.text]
        assert len(set(asked)) > 8
    first = SceneSource("vqa", 5, turns=14)
    assert [first[i].chunks for i in range(5)] == [source[i].chunks for i in range(5)]
    with pytest.raises(ValueError, match=r"turns=20 x draws=1000 must be at most 16384"):
        SceneSource("vqa", 5, turns=20, draws=1000)
    with pytest.raises(ValueError, match="draw 16384 must be in"):
        make_example(sample_scene(0, "train", 0), "count", MAX_DRAWS)


def test_kinds_of_questions_take_turns():
    """Of 14 turns two are read once each, and every other kind comes at least twice."""
    rounds = [SceneSource("vqa", 40, turns=14)[i].chunks for i in range(40)]
    starts = {
        "existence": "Is there", "count": "How many", "attribute": "What", "comparison": "Are there more",
        "reading-digit": "Which digit", "reading-word": "Which word",
    }  # fmt: skip
    assert set(starts) | {"spatial"} == {*ASKED, *READING}
    for chunks in rounds:
        questions = [c.text.partition("Question: ")[2] for c in chunks if "Question" in c.text]
        for kind, start in starts.items():
            asked = sum(q.startswith(start) for q in questions)
            assert asked == 1 if kind in READING else 1 <= asked <= 3, (kind, asked)


def test_answers_stay_balanced_in_every_draw():
    for draw in (0, 1, 7):
        said = [make_example(sample_scene(2, "train", i), "count", draw).answer for i in range(40)]
        assert {answer: said.count(answer) for answer in "0123"} == dict.fromkeys("0123", 10)


@pytest.mark.parametrize("shapes", [1, 2, 4])
def test_scenes_of_fewer_shapes_are_parts_of_the_whole_scene(shapes):
    for index in range(20):
        whole, part = sample_scene(0, "train", index), sample_scene(0, "train", index, shapes=shapes)
        assert len(part.shapes) == shapes and set(part.objects) <= set(whole.objects)
        assert [o for o in part.objects if o.kind != "shape"] == [
            o for o in whole.objects if o.kind != "shape"
        ]
        assert part.ground == whole.ground
    kept = {tuple(whole.shapes.index(o) for o in part.shapes) for part, whole in (
        (sample_scene(0, "train", i, shapes=shapes), sample_scene(0, "train", i)) for i in range(60)
    )}  # fmt: skip
    assert len(kept) > 3
    a, b = SceneSource("count", 3, shapes=shapes), SceneSource("count", 3)
    assert a.fingerprint != b.fingerprint
    with pytest.raises(ValueError, match=r"must be in 1 .. 6, and 6 for 'combination'"):
        sample_scene(0, "combination", 0, shapes=shapes)


def test_a_soft_target_is_a_bell_over_near_numbers():
    """Against the sum written out, and hard cross-entropy for every other token."""
    text = components.text("scenes")
    near, vocabulary = Near.of(text.encode, len(text), 2.0), len(text)
    torch.manual_seed(0)
    logits = torch.randn(3, vocabulary)
    (number,), (word,), (edge,) = text.encode("0.40"), text.encode(" red"), text.encode("1.00")
    found = near.cross_entropy(logits, torch.tensor([number, word, edge]))
    logp = logits.log_softmax(-1)
    assert found[1] == pytest.approx(-float(logp[1, word]))
    for row, centre in ((0, 40), (2, 100)):
        weights = [math.exp(-((i - centre) ** 2) / 8) for i in range(101)]
        ids = [text.encode(f"{i / 100:.2f}")[0] for i in range(101)]
        wanted = -sum(w * float(logp[row, i]) for w, i in zip(weights, ids, strict=True)) / sum(weights)
        assert float(found[row]) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="box_spread needs a tokenizer with one token for each"):
        Near.of(lambda said: [1, 2], 10, 1.0)


def test_what_changes_a_stage_changes_its_name():
    def ids(**more):
        given = dict(steps=5, batch_size=4, lr=1e-3) | more
        data = given.pop("data", {"vqa": Scenes("vqa", 10)})
        return Run("a", "mamba-tiny", (Stage(data, **given),), {}, image_size=96).stage_ids()

    names = [
        ids(), ids(until={"vqa": 1.0}), ids(box_spread=1.5), ids(data={"vqa": Scenes("vqa", 10, shapes=4)}),
        ids(data={"vqa": Scenes("vqa", 10, draws=2)}),
    ]  # fmt: skip
    assert len({name[0] for name in names}) == len(names)
