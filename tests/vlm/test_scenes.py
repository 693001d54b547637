"""vlm.scenes against pixels, and against solvers that only know the list of objects."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sklearn")
from scipy import ndimage

from vlm.data.samples import Sample
from vlm.guesses import most_frequent_answer
from vlm.prompts import Chunk
from vlm.scenes import CHANCE, SPLITS, TASKS, make_example, render, sample_scene
from vlm.scenes.scene import HELDOUT_PAIRS, digit_sources
from vlm.scenes.stamps import COLOURS, WORDS, shade, stamp

scenes = st.builds(
    sample_scene,
    st.integers(0, 2**32),
    st.sampled_from(SPLITS),
    st.integers(0, 2**40),
    st.sampled_from([96, 128, 336]),
)
quick = settings(max_examples=60, deadline=None)


def matching(scene, words):
    """The shapes that every word of a phrase fits ("shape" fits all)."""
    return [
        o for o in scene.objects
        if o.kind == "shape"
        and all(w in ("shape", o.name, o.colour, o.size, o.texture) for w in words.split())
    ]  # fmt: skip


def the_one(scene, words):
    (item,) = matching(scene, words)
    return item


def solve(example):
    """The answer from the question's words and the list of objects."""
    scene, question = example.scene, example.question
    if m := re.fullmatch(r"Is there an? (\w+ \w+)\?", question):
        return "yes" if matching(scene, m[1]) else "no"
    if m := re.fullmatch(r"How many (\w+) shapes are there\?", question):
        return str(len(matching(scene, m[1])))
    if m := re.fullmatch(r"What (\w+) is the (.+)\?", question):
        return getattr(the_one(scene, m[2]), "name" if m[1] == "shape" else m[1])
    if m := re.fullmatch(r"Are there more (\w+) shapes than (\w+) shapes\?", question):
        return "yes" if len(matching(scene, m[1])) > len(matching(scene, m[2])) else "no"
    if m := re.fullmatch(r"Is the (.+) (left of|right of|above|below) the (.+)\?", question):
        (ax, ay), (bx, by) = (
            ((o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2)
            for o in (the_one(scene, m[1]), the_one(scene, m[3]))
        )
        truth = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[m[2]]
        return "yes" if truth else "no"
    if m := re.fullmatch(r"Where is the (.+)\?", question):
        assert example.boxes == (the_one(scene, m[1]).box,)
        return "[{:.2f},{:.2f},{:.2f},{:.2f}]".format(*(np.array(example.boxes[0]) / scene.size))
    if m := re.fullmatch(r"Which box shows the (.+)\?", question):
        assert len(set(example.boxes)) == 4
        return "ABCD"[example.boxes.index(the_one(scene, m[1]).box)]
    if m := re.fullmatch(r"Which (\w+) is written\?", question):
        (item,) = [o for o in scene.objects if o.kind == m[1]]
        return item.name
    raise AssertionError(question)


@quick
@given(scenes)
def test_every_answer_is_what_the_objects_say(scene):
    for task in TASKS:
        example = make_example(scene, task)
        if task == "caption":
            named = re.findall(r"a (\w+ \w+ \w+ \w+)", example.answer.lower())
            assert [the_one(scene, words) for words in named] == list(scene.shapes)
        else:
            assert example.answer == solve(example), example.question


@quick
@given(scenes)
def test_boxes_are_the_changed_pixels_and_lie_apart_inside(scene):
    empty = render(replace(scene, objects=()))
    used = np.zeros(empty.shape[:2], int)
    for item in scene.objects:
        changed = (render(replace(scene, objects=(item,))) != empty).any(-1)
        rows, columns = np.nonzero(changed)
        assert item.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        x1, y1, x2, y2 = item.box
        assert 0 <= x1 < x2 <= scene.size and 0 <= y1 < y2 <= scene.size
        used[y1:y2, x1:x2] += 1
    assert used.max() == 1


@quick
@given(scenes)
def test_counts_can_be_read_off_the_pixels(scene):
    shapes_only = replace(scene, objects=scene.shapes)
    image = render(shapes_only)
    example = make_example(scene, "count")
    colour = example.question.split()[2]
    coloured = (image == COLOURS[colour]).all(-1) | (image == shade(colour)).all(-1)
    _, number = ndimage.label(coloured, structure=np.ones((3, 3)))
    assert number == int(example.answer)


def test_splits_share_neither_digit_images_nor_combinations():
    seen, unseen = (
        set(np.concatenate([digit_sources(s, d) for d in range(10)])) for s in ("train", "heldout")
    )
    assert not seen & unseen and len(seen | unseen) == 1797
    for split in SPLITS:
        drawn = [sample_scene(1, split, k) for k in range(300)]
        pairs = {(o.colour, o.name) for scene in drawn for o in scene.shapes}
        digits = {o.source for scene in drawn for o in scene.objects if o.kind == "digit"}
        assert digits <= (seen if split == "train" else unseen)
        assert (pairs >= HELDOUT_PAIRS) if split == "combination" else not pairs & HELDOUT_PAIRS
    assert len({colour for colour, _ in HELDOUT_PAIRS}) == len({shape for _, shape in HELDOUT_PAIRS}) == 6


def test_answers_are_balanced_exactly():
    for task, answers in {"existence": 2, "comparison": 2, "spatial": 2, "count": 4, "pointing": 4}.items():
        for split in SPLITS:
            counts = Counter(make_example(sample_scene(3, split, k), task).answer for k in range(200))
            assert set(counts.values()) == {200 // answers}, (task, split, counts)


def test_answers_to_one_image_do_not_tell_each_other():
    asked = ("existence", "comparison", "spatial")
    answers = np.array(
        [
            [make_example(sample_scene(2, "train", k), task).answer == "yes" for task in asked]
            for k in range(600)
        ]
    )
    correlation = np.corrcoef(answers.T)[np.triu_indices(3, 1)]
    assert abs(correlation).max() < 0.17  # four standard errors


def blind_share(train, test) -> float:
    """Share of examples that the question alone answers."""
    known, asked = (
        [Sample("0", e.task, "0", e.task, (Chunk(e.question),), {"answer": e.answer}) for e in examples]
        for examples in (train, test)
    )
    guesses = most_frequent_answer(known, asked)
    return float(np.mean([said == e.answer for said, e in zip(guesses, test, strict=True)]))


def test_the_question_alone_is_near_chance():
    for task, chance in CHANCE.items():
        train = [make_example(sample_scene(0, "train", k), task) for k in range(3000)]
        test = [make_example(sample_scene(0, "heldout", k), task) for k in range(1000)]
        # four standard errors of 1000 answers
        share = blind_share(train, test)
        assert abs(share - chance) < 4 * (chance * (1 - chance) / 1000) ** 0.5, (task, share)


def test_the_guess_finds_a_leak():
    examples = [make_example(sample_scene(0, "train", k), "existence") for k in range(40)]
    leaky = [replace(e, question=e.question + e.answer) for e in examples]
    assert blind_share(leaky, leaky) == 1.0 > blind_share(examples, examples)


def test_scenes_are_functions_of_their_arguments():
    first, again = (sample_scene(5, "train", 7) for _ in range(2))
    assert first == again and first != sample_scene(5, "train", 8) != sample_scene(6, "train", 8)
    assert make_example(first, "count") == make_example(again, "count")


def test_every_word_and_digit_fits_a_cell_at_the_smallest_sizes():
    scene = sample_scene(0, "train", 0)
    word, digit = (next(o for o in scene.objects if o.kind == kind) for kind in ("word", "digit"))
    items = [replace(word, name=name) for name in WORDS] + [replace(digit, source=k) for k in range(1797)]
    for size in range(96, 161):
        for item in items[: len(WORDS) + 50]:
            assert max(stamp(item, size)[0].shape) <= size // 3 - 4, (item, size)
    for item in items:
        assert max(stamp(item, 96)[0].shape) <= 96 // 3 - 4


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sample_scene(0, "test", 0), "unknown split 'test'; valid: train"),
        (lambda: sample_scene(0, "train", -1), "index -1 must be in"),
        (lambda: sample_scene(-1, "train", 0), "seed -1 must be in"),
        (lambda: sample_scene(0, "train", 0, size=50), "size 50 is too small"),
        (lambda: make_example(sample_scene(0, "train", 0), "sing"), "unknown task 'sing'; valid: caption"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_contact_sheet_needs_no_timm(tmp_path):
    """It imports torchvision, which must match torch."""
    code = (
        "import sys; sys.modules['timm'] = sys.modules['torchvision'] = None; "
        "from vlm.scenes.__main__ import main; "
        f"sys.exit(main(['--out', {str(tmp_path / 'a.png')!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
