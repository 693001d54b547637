"""The numbers of a page that `analysis.report` has written, read back; and pages to read."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pandas as pd
from tiny_runs import by_family

from analysis.report import __main__ as cli


def write(path, *folders):
    """The text of the report of some runs, written to `path`."""
    assert cli.main([*map(str, folders), "--out", str(path)]) == 0
    return path.read_text(encoding="utf-8")


def decoded(value):
    """plotly's arrays as numpy's, in whatever is nested in lists and dictionaries."""
    if isinstance(value, dict) and "bdata" in value:
        numbers = np.frombuffer(base64.b64decode(value["bdata"]), dtype="<" + value["dtype"])
        return numbers.reshape([int(n) for n in value["shape"].split(",")] if "shape" in value else -1)
    if isinstance(value, dict):
        return {name: decoded(part) for name, part in value.items()}
    return [decoded(part) for part in value] if isinstance(value, list) else value


def views(text):
    """Name of a figure -> its views, as the page holds them."""
    pattern = r'<figure data-figure="(\w+)">.*?<script type="application/json">(.*?)</script>'
    return {name: decoded(placed(**json.loads(data))) for name, data in re.findall(pattern, text, re.DOTALL)}


def placed(views, arrays):
    """The page holds every array once: put them back where they are meant."""
    if isinstance(views, dict) and isinstance(views.get("array"), int):
        return arrays[views["array"]]
    if isinstance(views, dict):
        return {name: placed(part, arrays) for name, part in views.items()}
    return [placed(part, arrays) for part in views] if isinstance(views, list) else views


def panels(view):
    return [panel for block in view["blocks"] for panel in block["panels"]]


def lines(panel):
    """Name -> trace of the lines of a panel, without the bands behind them."""
    return {t["name"]: t for t in panel["figure"]["data"] if t["type"] == "scatter" and "name" in t}


def table(folder, probe, family):
    return pd.read_parquet(by_family(folder)[family] / "probes" / f"{probe}.{family}.parquet")


def same(found, wanted):
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(wanted, float), rtol=1e-5, atol=1e-7)


def wide(rows, index, column, value="value"):
    return rows.pivot(index=index, columns=column, values=value).to_numpy(float)
