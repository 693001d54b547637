"""Pictures of users: right pixels for every depth, one line for what cannot be read; and where answers go."""

from __future__ import annotations

import io
import struct
import sys
import zlib

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pillow is not installed; .ci/run installs it")
pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

import vlm_runs
from PIL import Image

from ssm_retrieval.errors import UserError
from vlm import pictures, predict
from vlm.scenes import __main__ as scenes

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(path, array, **more):
    Image.fromarray(array).save(path, **more)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_scaled_to_8(tmp_path, name):
    """White stays white, and every level of 8 bits, as 257 times itself, comes back."""
    path = saved(tmp_path / name, RAMP.astype(np.uint16) * 257)
    found = pictures.read(path)
    assert found.dtype == np.uint8 and (found == RAMP[..., None]).all() and found.shape == (16, 16, 3)
    between = saved(tmp_path / f"b-{name}", np.array([[0, 127, 129, 32767, 65535]], np.uint16))
    assert pictures.read(between)[0, :, 0].tolist() == [0, 0, 1, 127, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_usual_modes_are_those_of_pillow(tmp_path, mode):
    image = Image.fromarray(np.stack([RAMP, RAMP.T, RAMP[::-1]], 2)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert (pictures.read(path) == np.asarray(Image.open(path).convert("RGB"))).all()


def test_a_picture_on_its_side_is_turned_for_users_only(tmp_path):
    array = np.stack([RAMP[:4]] * 3, 2)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path, exif=exif)
    assert (pictures.read(path) == array).all()
    assert (predict.read_picture(path) == np.rot90(array, -1)).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("name", ["a.jpg", "A.JPG", "a", "a.tar.gz"])
def test_the_content_decides_the_format_and_not_the_name(tmp_path, kind, name):
    first, later = Image.fromarray(RAMP), Image.fromarray(RAMP.T)
    more = dict(save_all=True, append_images=[later]) if kind == "GIF" else {}
    first.save(tmp_path / name, kind, **more | ({"lossless": True} if kind == "WEBP" else {}))
    assert (pictures.read(tmp_path / name) == RAMP[..., None]).all()  # of a film the first picture
    assert pictures.size(tmp_path / name) == (16, 16)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (3, 40)])
def test_a_picture_of_any_shape_becomes_a_square_of_its_colour(tmp_path, shape):
    from vlm import encoder as timm_encoder
    from vlm.scenes import encoder as scenes_encoder

    array = np.full((*shape, 3), (200, 10, 30), np.uint8)
    found = pictures.read(saved(tmp_path / "a.png", array))
    assert found.shape == array.shape
    square = scenes_encoder.resized([found], 32)
    assert square.shape == (1, 3, 32, 32) and (square == square[..., :1, :1]).all()
    assert square[0, :, 0, 0].tolist() == [200, 10, 30]
    pixels = timm_encoder.pixels([Image.fromarray(found)], 28)
    assert pixels.shape == (1, 3, 28, 28) and (pixels == pixels[..., :1, :1]).all()


def bomb_bmp() -> bytes:
    """54 bytes that promise 60000 x 60000 pixels."""
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 1, 1, 0, 0)


def bomb_png() -> bytes:
    """Few bytes that become 40000 x 40000 pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 40000, 40000, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def encoded(kind: str, array=None, **more) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.stack([RAMP] * 3, 2) if array is None else array).save(content, kind, **more)
    return content.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
BAD = {
    "empty": b"",
    "text": b"hello",
    "zeros": bytes(1000),
    "bmp bomb": bomb_bmp(),
    "png bomb": bomb_png(),
    "cut png": encoded("PNG", NOISE)[:2000],
    "cut jpeg": encoded("JPEG", NOISE)[:700],
    "cut gif": encoded("GIF")[:60],
    "cut tiff": encoded("TIFF", NOISE)[:500],
    "cut webp": encoded("WEBP", NOISE)[:300],
    "png header alone": encoded("PNG")[:20],
    "png of wrong checksums": encoded("PNG", NOISE).replace(b"IDAT", b"IDAX"),
    "float tiff": encoded("TIFF", RAMP.astype(np.float32)),
    "32 bit tiff": encoded("TIFF", RAMP.astype(np.int32)),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "pickle": b"\x80\x04]\x94.",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_one_line_with_its_name(tmp_path, name, recwarn):
    path = tmp_path / f"{name} [red].png"
    path.write_bytes(BAD[name])
    with pytest.raises(UserError, match="cannot be read as a picture") as raised:
        predict.read_picture(path)
    said = str(raised.value)
    assert said.startswith(f"IMAGE {path} ") and said.endswith("give a PNG or JPEG file") and "\n" not in said


def test_what_is_not_there_or_a_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"absent.png does not exist; give a PNG"):
        predict.read_picture(tmp_path / "absent.png")
    with pytest.raises(UserError, match=r"cannot be read as a picture .Is a directory.; give a PNG"):
        predict.read_picture(tmp_path)
    with pytest.raises(UserError, match=r"b: .*|cannot be read as a picture"):
        predict.read_picture(tmp_path / ("b" * 3000))


def test_pictures_of_data_sets_say_what_to_do(tmp_path):
    from vlm.data.files import MissingFile, require

    with pytest.raises(MissingFile, match="download the official files"):
        require(tmp_path, "a.json", "the official files")
    assert issubclass(MissingFile, UserError) and issubclass(MissingFile, FileNotFoundError)


def test_without_pillow_the_command_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"pip install -e"):
        pictures.read(tmp_path / "a.png")


# --- questions and answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [predict.MOST_ASKED + 1, 240_000])
@pytest.mark.parametrize("task", ["auto", "vqa", "grounding"])
def test_a_question_that_would_take_all_memory_is_refused(length, task):
    with pytest.raises(UserError, match=f"has {length} characters; ask in at most {predict.MOST_ASKED}"):
        predict.wording("x" * length, task, 10, 10)
    assert predict.wording("x" * predict.MOST_ASKED, task, 10, 10)


@pytest.mark.parametrize("box", [(-1e12, -5, 1e12, 5), (3, 3, 1, 1), (1e300, 0, 1e301, 1), (2, 2, 5, 5)])
def test_any_box_that_a_model_says_can_be_drawn(box):
    white = np.full((8, 8, 3), 255, np.uint8)
    drawn = np.asarray(predict.draw(white, [(box, predict.SAID, "A")], zoom=4))
    assert drawn.shape == (32, 32, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("vlm")
    vlm_runs.save_encoder(out)
    return vlm_runs.save(vlm_runs.run("mamba-tiny"), out)


@pytest.mark.parametrize(
    "argv", [["{image}", "x" * 5000], ["{bad}"], ["{image}", "--task", "vqa"], ["{absent}"]]
)
def test_bad_input_of_predict_is_one_line(folder, tmp_path, capsys, argv):
    paths = dict(image=saved(tmp_path / "a.png", NOISE), bad=tmp_path / "bad.png", absent=tmp_path / "no.png")
    paths["bad"].write_bytes(BAD["cut png"])
    assert predict.main([str(folder), *(part.format(**paths) for part in argv)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ")


def refused(status: int, capsys) -> None:
    said = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(said) == 1 and "is not a regular file" in said[0]


def test_an_answer_does_not_replace_a_device_or_a_folder(folder, tmp_path, capsys, monkeypatch):
    import os

    image, pipe = saved(tmp_path / "a.png", NOISE), tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(predict, "ask", lambda *_: "[0.25,0.50,0.75,1.00].")
    for out in (pipe, tmp_path, "/dev/full"):
        refused(predict.main([str(folder), str(image), "Where is it?", "--out", str(out)]), capsys)
        refused(scenes.main(["--out", str(out)]), capsys)
    assert pipe.is_fifo()


@pytest.mark.parametrize("argv", [["--seed", "-1"], ["--seed", str(10**30)]])
def test_bad_input_of_the_contact_sheet_is_one_line(tmp_path, capsys, argv):
    assert scenes.main(["--out", str(tmp_path / "a.png"), *argv]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


# --- the demo's uploads -------------------------------------------------------------------------------------


@pytest.fixture
def upload():
    pytest.importorskip("gradio", reason="gradio is not installed; .ci/run installs it")
    from gradio.data_classes import ImageData

    from vlm.demo import app

    return lambda path: app.read_upload(ImageData(path=str(path), orig_name="mine.png"))


def test_an_upload_is_read_as_predict_reads_it(upload, tmp_path):
    path = saved(tmp_path / "a.png", RAMP.astype(np.uint16) * 257)
    assert (upload(path) == predict.read_picture(path)).all()


@pytest.mark.parametrize("name", BAD)
def test_an_unreadable_upload_is_said_on_the_page(upload, tmp_path, name):
    import gradio

    path = tmp_path / "a.png"
    path.write_bytes(BAD[name])
    with pytest.raises(gradio.Error, match=r"mine.png cannot be read as a picture .*; give a PNG") as raised:
        upload(path)
    assert str(tmp_path) not in raised.value.message


def test_a_huge_upload_is_refused_by_its_header(upload, tmp_path):
    import gradio

    path = tmp_path / "a.png"
    Image.new("1", (10_000, 5_001)).save(path)
    with pytest.raises(gradio.Error, match="10000 x 5001 pixels; give one of at most 50 million"):
        upload(path)
