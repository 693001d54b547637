"""Conversations: LLaVA's pretraining captions and its instructions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ssm_retrieval.errors import UserError
from vlm.data.files import load_json, require, structure
from vlm.data.records import Conversation, Turn

ROLES = {"human": "human", "gpt": "assistant"}


def _conversations(source: str, path: Path, split: str) -> Iterator[Conversation]:
    with structure(path):
        for row in load_json(path):
            said = row["conversations"]
            if not row.get("image"):  # larger mixes have conversations without an image, of any form
                continue
            roles = [turn["from"] for turn in said]
            if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
                raise UserError(f"the turns of {row['id']} do not alternate from human to gpt")
            turns = tuple(Turn(ROLES[turn["from"]], turn["value"]) for turn in said)
            yield Conversation(id=str(row["id"]), source=source, split=split, image=row["image"], turns=turns)


def llava_pretrain(folder: Path, split: str) -> Iterator[Conversation]:
    """Return one record per image: a request for a caption, and the caption."""
    path = require(folder, "blip_laion_cc_sbu_558k.json", "LLaVA's pretraining set of 558 K captions")
    return _conversations("llava-pretrain", path, split)


def llava_instruct(folder: Path, split: str) -> Iterator[Conversation]:
    """Return one record per conversation about an image; entries without an image are left out."""
    path = require(folder, "llava_instruct_150k.json", "LLaVA-Instruct 150 K")
    return _conversations("llava-instruct", path, split)
