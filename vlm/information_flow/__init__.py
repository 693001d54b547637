"""The flow of information from an image's patches to a model's answer.

`layer_flows` measures it layer by layer for any sequences and positions. `target_table` compares the patches
of the object that a question asks for with those of the scene's other shapes, and `target_ratios` summarises
that table with intervals. `python -m vlm.information_flow RUN... --out flow.parquet` writes the table.
"""

from vlm.information_flow.flow import Flow, answer_places, layer_flows, patch_places, scan_flow
from vlm.information_flow.targets import COLUMNS, group_weights, patches_of, target_ratios, target_table

__all__ = [
    "COLUMNS", "Flow", "answer_places", "group_weights", "layer_flows", "patch_places", "patches_of",
    "scan_flow", "target_ratios", "target_table",
]  # fmt: skip
