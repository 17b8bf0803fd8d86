"""One query's curve as a picture file."""

from __future__ import annotations

import io

from PIL import Image

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.mining.describe import query_row
from qure_core.report.figures import draw_score_curve

_SIGNATURE = {"Software": "qure-core"}  # by which a picture of ours is known


def check_picture(picture: str) -> None:
    """Raise `InputError` if a file that is no curve drawn here would be written over."""
    if not storage.exists(picture):
        return
    try:
        with Image.open(io.BytesIO(storage.read_bytes(picture))) as found:
            ours = found.info.get("Software") == _SIGNATURE["Software"]
    except OSError:
        ours = False
    if not ours:
        raise InputError(f"--picture: {picture} exists already; choose another name")


def draw_query(uri: str, query_id: str, picture: str) -> None:
    """Write one query's sorted curve with both drops as a PNG file."""
    check_picture(picture)
    buffer = io.BytesIO()
    figure = draw_score_curve(query_row(uri, query_id))
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=130, metadata=_SIGNATURE)
    storage.write_bytes(picture, buffer.getvalue())
