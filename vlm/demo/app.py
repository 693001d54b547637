"""The page of the demo."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr
import matplotlib.colors

from ssm_retrieval.errors import UserError
from ssm_retrieval.style import NAMES, family_colors
from vlm import pictures
from vlm.answering import Answerer
from vlm.demo import drawing
from vlm.demo.asking import Question, Reply, ask, questions, typed
from vlm.metrics.catalogue import overlap
from vlm.pictures import Picture
from vlm.predict import MOST_ASKED
from vlm.scenes import SPLITS, render, sample_scene

MOST_BYTES, MOST_PIXELS = "20mb", 50_000_000  # of an upload
TITLE = "Where do two models look?"
INTRODUCTION = f"""
# {TITLE}

Both models get the same picture and the same question. **Green** frames are around what the question is
about, **blue** ones are answers. The heat maps show patch by patch what an answer was read from and, for
models with a state, what each patch wrote into it.
"""
# quantity of `vlm.information_flow` -> heading of its map, in layers with attention and in SSM layers
HEADINGS = {
    "attention": ("Looked at (attention)", "Read from (hidden attention)"),
    "write": ("", "Wrote (size of the state update)"),
    "share": ("", "Still in the state at the answer"),
}
MEANINGS = {
    "attention": "Strongest patch: {most:.1%} of all that was read; the whole image: {total:.0%}.",
    "write": "Strongest patch: {peak:.1f} times the mean patch.",
    "share": "Strongest patch: {most:.1%} of the state's norm.",
}
CSS = """
.verdict {display: inline-block; padding: 0 .6em; border-radius: .8em; color: white; font-weight: 600}
.verdict.right {background: #00823c} .verdict.wrong {background: #c81e1e} .verdict.open {background: #5a6270}
.said {font-size: 1.25em; font-weight: 600; margin-left: .4em; overflow-wrap: anywhere}
.contestant {border-left: .4em solid; padding-left: .6em; margin-top: .6em} .contestant h2 {margin: 0}
.small {font-size: .9em; line-height: 1.35; opacity: .8}
.html-container {padding: 0 !important}
.scale {height: .8em; flex: 1; max-width: 16em; border-radius: .2em; border: 1px solid #999}
#picture img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}
"""


def read_upload(payload: Any) -> Picture | None:
    """Read a picture that the user uploads (`vlm.pictures.read`).

    Raises:
        Error: Gradio's, shown on the page, if the picture cannot be read or is too large.
    """
    if payload is None:
        return None
    name = payload.orig_name or "The picture"
    try:
        width, height = pictures.size(payload.path, name)
        if width * height > MOST_PIXELS:
            raise gr.Error(
                f"{name} has {width} x {height} pixels; give one of at most {MOST_PIXELS // 10**6} million"
            )
        return pictures.read(payload.path, name, upright=True)
    except UserError as error:
        raise gr.Error(str(error)) from None


class Card:
    """One model's half of the page: its components, and what they show of a reply.

    Args:
        number: 0 = left, 1 = right.
        contestant: The model.
    """

    def __init__(self, number: int, contestant: Answerer):
        self.contestant = contestant
        run = contestant.run
        colour = matplotlib.colors.to_hex(family_colors()[run.family])
        count = sum(p.numel() for p in contestant.model.parameters()) / 1e6
        about = f"run {run.name}, {run.layout}, {run.image_size} px, {count:.2f} M parameters"
        gr.HTML(
            f'<div class="contestant" style="border-color: {colour}"><h2>{NAMES[run.family]}</h2>'
            f'<div class="small">{html.escape(about)}</div></div>',
        )
        self.answer = gr.HTML(elem_id=f"answer-{number}", min_height=100)
        last = contestant.model.lm.config.n_layer - 1
        self.layer = gr.Slider(
            0, max(last, 1), value=last // 2, step=1, visible=last > 0, elem_id=f"layer-{number}",
            label=f"Layer of the heat maps (0 = first, {last} = last)", buttons=[],
        )  # fmt: skip
        self.places: list[Any] = []
        self.maps: list[Any] = []
        self.notes: list[Any] = []
        with gr.Row():
            with gr.Column(min_width=200):
                self.picture = _image("Answer", f"picture-{number}")
                gr.HTML("<b>Answer</b>")
            self._map("attention", number)
        with gr.Row():
            self._map("write", number)
            self._map("share", number)

    def _map(self, name: str, number: int) -> None:
        with gr.Column(min_width=200) as place:
            self.maps.append(_image(HEADINGS[name][1], f"{name}-{number}"))
            self.notes.append(gr.HTML())
        self.places.append(place)

    @property
    def outputs(self) -> list[Any]:
        return [self.answer, self.picture, *self.heat_outputs]

    @property
    def heat_outputs(self) -> list[Any]:
        return [*self.places, *self.maps, *self.notes]

    def show(self, picture: Picture, reply: Reply, layer: int) -> list[Any]:
        """Return the values of `outputs`.

        Args:
            picture: (height, width, 3) uint8, RGB.
            reply: The model's reply.
            layer: Layer of the heat maps.

        Returns:
            One value per component.
        """
        return [verdict(reply), drawing.answered(picture, reply), *self.heat(picture, reply, layer)]

    def heat(self, picture: Picture, reply: Reply, layer: int) -> list[Any]:
        """Return the values of `heat_outputs`.

        Args:
            picture: (height, width, 3) uint8, RGB.
            reply: The model's reply.
            layer: Layer of the heat maps.

        Returns:
            One value per component.
        """
        found = reply.maps[int(layer)]
        boxes = [box for box, _ in drawing.subjects(reply.question)]
        there = [name in found for name in HEADINGS]
        return [
            *(gr.update(visible=shown) for shown in there),
            *(drawing.heat(picture, found[name], boxes) if name in found else None for name in HEADINGS),
            *(note(reply, int(layer), name) if name in found else "" for name in HEADINGS),
        ]


def _image(label: str, elem_id: str) -> gr.Image:
    """A picture for display only; its label is for screen readers."""
    return gr.Image(
        label=label, show_label=False, format="png", interactive=False, elem_id=elem_id, buttons=[]
    )


def verdict(reply: Reply) -> str:
    """Return HTML with the answer, whether it is right, and the right answer."""
    right, target = reply.right, reply.question.sample.target
    name = {True: "right", False: "wrong", None: "open"}[right]
    word = "answer" if right is None else name
    lines = [f'<span class="verdict {name}">{word}</span><span class="said">{_text(reply.said)}</span>']
    if "box" in target:
        lines.append(f"right: {_text(target['answer'])}, IoU {overlap(target, reply.said):.2f}")
    elif "answer" in target:
        lines.append(f"right: {_text(target['answer'])}")
    elif "captions" in target:
        lines.append(f"for example: {_text(target['captions'][0])}")
    if reply.unknown:
        lines.append(f"this model has no word for: {_text(', '.join(reply.unknown))}")
    first, *rest = lines
    small = "".join(f'<div class="small">{line}</div>' for line in rest)
    return f'<div>{first}</div><div class="small">asked: {_text(reply.question.text)}</div>{small}'


def note(reply: Reply, layer: int, name: str) -> str:
    """Return HTML that says what a heat map shows and what its strongest colour stands for.

    Args:
        reply: The model's reply.
        layer: Layer of the heat map.
        name: Name of its quantity.

    Returns:
        HTML.
    """
    values = reply.maps[layer][name]
    text = MEANINGS[name].format(
        most=values.max(), total=values.sum(), peak=values.max() / max(values.mean(), 1e-30)
    )
    if reply.ratios:
        text += f" Patches of the right object: {reply.ratios[layer][name]:.2f} times those of other shapes."
    return f'<b>{HEADINGS[name]["write" in reply.maps[layer]]}</b><div class="small">{text}</div>'


def _text(said: str) -> str:
    return html.escape(said.strip()) or "(nothing)"


def build(contestants: Sequence[Answerer]) -> gr.Blocks:
    """Build the page of two models."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        scene: Any = gr.State(None)  # (seed, split, index); None for an uploaded picture
        seen: Any = gr.State(None)  # (picture, replies)
        with gr.Row():
            with gr.Column(min_width=280):
                picture = gr.Image(
                    label="Picture", show_label=False, type="numpy", format="png",
                    sources=["upload", "clipboard"], elem_id="picture", height=360, buttons=[],
                )  # fmt: skip
                # no subclass, because gradio writes a file beside the module of each
                picture.preprocess = read_upload
            with gr.Column(min_width=280):
                with gr.Row():
                    index = gr.Number(0, label="Scene", precision=0, minimum=0, min_width=80, elem_id="index")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80, elem_id="seed")
                    split = gr.Dropdown(
                        list(SPLITS), value="heldout", label="Split", min_width=120, elem_id="split"
                    )
                rendered = gr.Button("Render a scene", elem_id="render")
                example = gr.Dropdown([], label="Questions about this scene", elem_id="example")
                words = gr.Textbox(
                    label="Question", elem_id="question", lines=1, max_length=MOST_ASKED,
                    info='"Where is the red star?" asks for a box; nothing asks for a caption.',
                )  # fmt: skip
                asked = gr.Button("Ask both", variant="primary", elem_id="ask")
        gr.HTML(
            '<div class="small" style="display: flex; gap: .6em; align-items: center">Heat maps: nothing'
            f'<div class="scale" style="background: {drawing.colour_scale()}"></div>'
            "most in this layer</div>",
        )
        with gr.Row():
            cards = []
            for number, contestant in enumerate(contestants):
                with gr.Column(min_width=320):
                    cards.append(Card(number, contestant))

        def render_scene(*which: Any) -> tuple[Any, ...]:
            made, known = _scene(which)
            choices = [(f"{q.sample.task}: {q.text}", q.text) for q in known]
            return render(made), which, gr.update(choices=choices, value=known[0].text), known[0].text

        def ask_both(shown: Picture | None, which: Any, said: str, *layers: int) -> list[Any]:
            if shown is None:
                raise gr.Error("There is no picture yet: upload one, or render a scene.")
            try:
                asking = _question(shown, which, said or "")
                replies = [ask(contestant, shown, asking) for contestant in contestants]
            except UserError as error:
                raise gr.Error(str(error)) from None
            both = zip(cards, replies, layers, strict=True)
            return [(shown, replies), *(x for card, r, layer in both for x in card.show(shown, r, layer))]

        shared: dict[str, Any] = dict(api_visibility="private")
        rendering = shared | dict(
            fn=render_scene, inputs=[seed, split, index], outputs=[picture, scene, example, words]
        )
        asking = shared | dict(
            fn=ask_both,
            inputs=[picture, scene, words, *(card.layer for card in cards)],
            outputs=[seen, *(x for card in cards for x in card.outputs)],
            concurrency_id="models",  # only one request at a time can record activations
            show_progress="minimal",
        )
        gr.on([page.load, rendered.click], **rendering).success(**asking)
        gr.on([asked.click, words.submit], **asking)
        example.input(lambda text: text, example, words, **shared).then(**asking)
        gr.on([picture.upload, picture.clear], _no_scene, None, [scene, example], **shared)
        for number, card in enumerate(cards):

            def draw_again(state: Any, layer: int, card: Card = card, number: int = number) -> list[Any]:
                if state is None:
                    return [gr.skip() for _ in card.heat_outputs]
                return card.heat(state[0], state[1][number], layer)

            card.layer.change(
                draw_again, [seen, card.layer], card.heat_outputs, show_progress="hidden", **shared
            )
    return page


def _scene(which: Sequence[Any]) -> tuple[Any, list[Question]]:
    """The scene of (seed, split, index) and its questions; errors are shown on the page."""
    seed, split, index = which
    if seed is None or index is None:
        raise gr.Error("Seed and scene must be whole numbers from 0 on.")
    try:
        made = sample_scene(seed, split, index)
    except ValueError as error:
        raise gr.Error(str(error)) from None
    return made, questions(made)


def _no_scene() -> tuple[None, Any]:
    """What is known of an uploaded picture: no scene, no questions."""
    return None, gr.update(choices=[], value=None)


def _question(picture: Picture, which: Any, said: str) -> Question:
    """One of the scene's own questions, or the user's."""
    known = _scene(which)[1] if which is not None else []
    return next((q for q in known if q.text.lower() == said.strip().lower()), None) or typed(said, picture)


def serve(page: gr.Blocks, port: int) -> None:
    """Show the page on this machine until Ctrl-C; nothing is fetched or sent elsewhere.

    Args:
        page: Page of `build`.
        port: Port of the page.

    Raises:
        OSError: If the port is taken.
    """
    page.queue().launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        theme=gr.themes.Base(primary_hue="blue").set(block_info_text_color="*neutral_600"),
        css=CSS,
        footer_links=[],
    )
    print(f"http://127.0.0.1:{port} (Ctrl-C stops it)", flush=True)
    page.block_thread()
