"""What `selfsight explore` shows in the browser, and what it answers."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from selfsight.checkpoints import export
from selfsight.datamodules import DataModule
from selfsight.datamodules.images.decode import Unreadable
from selfsight.datamodules.images.formats import read_file
from selfsight.engine import measure
from selfsight.engine.about_data import NO_LABEL, class_name, readable
from selfsight.errors import UserError
from selfsight.evaluation import Features
from selfsight.files import with_folder
from selfsight.reporting import embedding_map
from selfsight.reporting.embedding import EmbeddingMap
from selfsight.reporting.embedding_map import PALE, WRONG
from selfsight.reporting.thumbnails import about_pictures, thumbnail
from selfsight.runs.folder import RunFolder

if TYPE_CHECKING:
    from bokeh.models import LayoutDOM
    from bokeh.models.widgets import Button, Div, FileInput, Select

WHOLE = "calc(100vh - 60px)"  # height of the window, but for the title
LISTED = 48  # pictures beside the map, at most
NAMED = 40  # classes up to which a legend names their colours
EVERYTHING, ERRORS = "everything", "only errors"
DOTS, PICTURES = "dots", "pictures"
PICTURED, SIDE = 400, 34  # pictures on the map, at most, and their side in pixels


class Explorer:
    """What one open page shows, and what it answers.

    Attributes:
        source: the points; `EmbeddingMap` row ``i`` is point ``i``.
        shown: which points the filters leave. drawn: the pictures in place of dots.
        selected: points chosen by lasso, tap or search, in order.
        root: folder of the data set; None of one that has none.
    """

    def __init__(
        self, folder: RunFolder, data: DataModule, backbone: nn.Module, shown: Features, known: EmbeddingMap, split: str
    ) -> None:
        from bokeh.models import BooleanFilter, CDSView, ColumnDataSource
        from bokeh.models.widgets import Button, Div, FileInput, Select, TextInput

        self.folder, self.data, self.backbone, self.known, self.split = folder, data, backbone, known, split
        self.images, self.indices = known.images, known.indices
        place = folder.config().dataset.get("root")
        self.root = None if place is None else Path(place).expanduser().resolve()
        self.x = F.normalize(shown.x[known.rows], dim=1)
        self.colourings = {one.title: one for one in embedding_map.colourings(data, known)}
        first = next(iter(self.colourings))
        self.source = ColumnDataSource(
            {
                "x": known.flat[:, 0].astype(np.float32),
                "y": known.flat[:, 1].astype(np.float32),
                "colour": self.colours(first),
                "about": [self.about(i) for i in range(len(known.rows))],
            }
        )
        self.drawn = ColumnDataSource({"x": [], "y": [], "url": []}, name="drawn")
        self.shown = np.ones(len(known.rows), dtype=bool)
        self.view = CDSView(filter=BooleanFilter(booleans=[True] * len(known.rows)))
        wide: Mapping[str, Any] = {"sizing_mode": "stretch_width"}
        colour = Select(title="colour", value=first, options=self.colour_options(), name="colour", **wide)
        classes: list[str | tuple[str, str]] = [EVERYTHING, *self.class_filters()]
        self.label = Select(title="class", value=EVERYTHING, options=classes, name="class", **wide)
        errors: list[str | tuple[str, str]] = [EVERYTHING, ERRORS] if known.labels is not None else [EVERYTHING]
        self.errors = Select(title="show", value=EVERYTHING, options=errors, name="show", **wide)
        marks: list[str | tuple[str, str]] = [DOTS, PICTURES]
        self.marks = Select(title="draw", value=DOTS, options=marks, name="draw", **wide)
        self.path = TextInput(
            title="search by image: path in the data set", placeholder="photo.jpg", name="path", **wide
        )
        upload = FileInput(title="or a file", accept="image/*", name="upload")
        self.list_name = TextInput(title="name of the list", value="selection", name="list", **wide)
        export = Button(label="export the selection", button_type="primary", name="export", **wide)
        self.status = Div(text="", name="status", **wide)
        self.pictures = Div(text=self.help_text(), name="pictures", **wide)
        self.legend = Div(text=self.legend_of(first), name="legend", **wide)
        colour.on_change("value", lambda attr, old, new: self.recolour(new))
        for filtering in (self.label, self.errors):
            filtering.on_change("value", lambda attr, old, new: self.refilter())
        self.marks.on_change("value", lambda attr, old, new: self.draw())
        self.path.on_change("value", lambda attr, old, new: self.search_path(new))
        upload.on_change("value", lambda attr, old, new: self.search_bytes(new))
        export.on_click(lambda: self.export())
        self.source.selected.on_change("indices", lambda attr, old, new: self.show_selected(new))
        self.layout = self._laid_out(colour, upload, export)

    def _laid_out(self, colour: Select, upload: FileInput, export: Button) -> LayoutDOM:
        from bokeh.layouts import column, row
        from bokeh.plotting import figure

        plot = figure(
            tools="pan,wheel_zoom,lasso_select,box_select,tap,reset,hover", active_drag="lasso_select",
            active_scroll="wheel_zoom", tooltips="@about", output_backend="webgl",
            sizing_mode="stretch_width", styles={"height": WHOLE}, min_height=420, name="map", min_width=480,
        )  # fmt: skip
        plot.axis.visible = False
        plot.grid.visible = False
        plot.outline_line_color = None
        n = len(self.known.rows)
        size = 9 if n < 2000 else 6 if n < 10_000 else 3
        plot.scatter(
            "x", "y", source=self.source, view=self.view, color="colour", size=size,
            line_color=None, fill_alpha=0.85, nonselection_fill_alpha=0.12,
        )  # fmt: skip
        plot.image_url(
            "url", "x", "y", w=SIDE, h=SIDE, w_units="screen", h_units="screen", anchor="center", source=self.drawn
        )
        filters = [row(self.label, self.errors, sizing_mode="stretch_width")] if self.known.labels is not None else []
        side = column(
            row(colour, self.marks, sizing_mode="stretch_width"), self.legend, *filters, self.path, upload,
            row(self.list_name, sizing_mode="stretch_width"), export, self.status, self.pictures,
            width=380,
        )  # fmt: skip
        # in a narrow window the panel goes below the map
        both = row(plot, side, sizing_mode="stretch_width", styles={"flex-wrap": "wrap"})
        return column(self._title(), both, sizing_mode="stretch_width")

    def _title(self) -> Div:
        from bokeh.models.widgets import Div

        about = f"<b style='font-size:18px'>{html.escape(self.folder.name)}</b> &nbsp; {len(self.known.rows):,} "
        return Div(text=f"{about}{self.split} images of {html.escape(self.data.data.name)}")

    # --- what is known -------------------------------------------------------------------------------------------

    def class_filters(self) -> dict[str, int]:
        """Labels by the names that the filter has for them."""
        if self.known.labels is None:
            return {}
        names = {class_name(self.data.data, i): i for i in range(self.data.data.num_classes)}
        return names | ({NO_LABEL: -1} if (self.known.labels < 0).any() else {})

    def colour_options(self) -> list[str | tuple[str, str]]:
        return [*self.colourings, *(["loss"] if self.known.loss is not None else [])]

    def colours(self, title: str) -> list[str]:
        """The colour of every point."""
        if title == "loss":
            from bokeh.palettes import Viridis256

            assert self.known.loss is not None
            scaled = self.known.loss / max(float(self.known.loss.max()), 1e-9)
            return [Viridis256[int(255 * value)] for value in scaled]
        chosen = self.colourings[title]
        return [chosen.colours[int(value)] for value in chosen.values]

    def legend_of(self, title: str) -> str:
        if title not in self.colourings or len(self.colourings[title].names) > NAMED:
            return "dark: small, yellow: large" if title == "loss" else ""
        pairs = zip(self.colourings[title].colours, self.colourings[title].names, strict=True)
        return " ".join(
            f"<span style='white-space:nowrap; margin-right:10px'><span style='color:{shade}'>&#9679;</span> "
            f"{html.escape(name)}</span>"
            for shade, name in pairs
        )

    def about(self, i: int) -> str:
        name = readable(self.images.name(int(self.indices[i])))
        parts = [f"image {name}" if name.isdigit() else name]
        if self.known.labels is not None and self.known.predictions is not None:
            label, said = int(self.known.labels[i]), int(self.known.predictions[i])
            known = 0 <= label < self.data.data.num_classes
            parts.append(f"class {class_name(self.data.data, label)}" if known else class_name(self.data.data, label))
            if label != said:
                parts.append(f"taken for {class_name(self.data.data, said)}")
        return " · ".join(parts)

    def help_text(self) -> str:
        return (
            "Draw a loop around points to see their images, or tap one to see its neighbours. "
            "With the shift key a selection grows. " + about_pictures(self.data.data.bands)
        )

    # --- what happens --------------------------------------------------------------------------------------------

    def recolour(self, title: str) -> None:
        self.source.data["colour"] = self.colours(title)
        self.legend.text = self.legend_of(title)

    def refilter(self) -> None:
        """Show the points that the two filters leave."""
        keep = np.ones(len(self.known.rows), dtype=bool)
        if self.label.value != EVERYTHING:
            keep &= self.known.labels == self.class_filters()[self.label.value]
        if self.errors.value == ERRORS:
            keep &= self.known.wrong
        from bokeh.models import BooleanFilter

        self.shown = keep
        self.view.filter = BooleanFilter(booleans=keep.tolist())
        self.status.text = f"{int(keep.sum()):,} of {len(keep):,} images shown"
        self.draw()

    def draw(self) -> None:
        """Pictures in place of dots, where they are asked for: of some of the points that are shown, spread evenly."""
        points = np.flatnonzero(self.shown) if self.marks.value == PICTURES else np.empty(0, int)
        points = points[np.unique(np.linspace(0, len(points) - 1, min(PICTURED, len(points))).astype(int))]
        urls = [thumbnail(self.images.read(int(self.indices[i])), SIDE) for i in points]
        self.drawn.data = {"x": self.known.flat[points, 0], "y": self.known.flat[points, 1], "url": urls}

    @property
    def selected(self) -> list[int]:
        return list(self.source.selected.indices)

    def show_selected(self, chosen: list[int]) -> None:
        """Pictures of the selection; of a single point, its neighbours as well."""
        if not chosen:
            self.pictures.text = self.help_text()
        elif len(chosen) == 1:
            closest = self.nearest(self.x[chosen[0]], LISTED // 2 + 1)
            self.pictures.text = self.row("chosen", chosen) + self.row(
                "closest images", [i for i in closest if i != chosen[0]][: LISTED // 2]
            )
        else:
            self.pictures.text = self.row(f"{len(chosen):,} chosen", chosen[:LISTED])

    def row(self, title: str, points: list[int]) -> str:
        cells = []
        for i in points:
            picture = thumbnail(self.images.read(int(self.indices[i])), 64)
            edge = WRONG if self.known.wrong[i] else PALE
            cells.append(
                f"<img src='{picture}' title='{html.escape(self.about(i), quote=True)}' style='width:54px;height:54px;"
                f"object-fit:contain;image-rendering:pixelated;border:2px solid {edge};border-radius:4px;margin:1px'>"
            )
        return f"<div style='margin:6px 0 2px'><b>{html.escape(title)}</b></div><div>{''.join(cells)}</div>"

    def nearest(self, x: torch.Tensor, k: int) -> list[int]:
        """The points whose features are closest to ``x [D]`` by cosine."""
        found: list[int] = (self.x @ F.normalize(x, dim=0)).topk(min(k, len(self.x))).indices.tolist()
        return found

    def search_path(self, path: str) -> None:
        """Search by an image of the data set's folder. Of other paths nothing is said, not even whether they exist."""
        if not path.strip():
            return
        file = None if self.root is None else (self.root / path.strip()).resolve()
        if file is None or self.root is None or not file.is_relative_to(self.root):
            self.status.text = "Only images in the folder of the data set are found by their path; open others below."
            return
        try:
            self.search(read_file(file))
        except Unreadable as reason:
            self.status.text = f"{html.escape(path)} cannot be read ({html.escape(str(reason))})."

    def search_bytes(self, encoded: str) -> None:
        import base64

        self.search(base64.b64decode(encoded))

    def search(self, content: bytes) -> None:
        """Select the images closest to the one in a file's bytes."""
        try:
            image = self.data.data.decode(content)
        except Unreadable as reason:
            self.status.text = f"That is no image ({reason})."
            return
        feature = measure.feature_of_image(self.backbone, self.data, image)
        closest = self.nearest(feature, LISTED // 2)
        self.source.selected.indices = closest
        self.pictures.text = self.row("closest to your image", closest)
        self.status.text = f"your image: <img src='{thumbnail(image, 96)}' style='height:54px;vertical-align:middle'>"

    def export(self) -> None:
        """Write the names of the selected images, one a line, into the run folder."""
        if not self.selected:
            self.status.text = "Nothing is selected."
            return
        name = "".join(c for c in self.list_name.value if c.isalnum() or c in "-_") or "selection"
        path = self.folder.path / "selections" / f"{name}.txt"
        chosen = sorted(self.selected)
        names = [self.images.name(int(self.indices[i])) for i in chosen]
        lines = b"".join(os.fsencode(name) + b"\n" for name in names)  # of files, whose names may be any bytes
        try:
            export.replace(with_folder(path), lambda beside: beside.write_bytes(lines))
        except UserError as error:
            self.status.text = html.escape(str(error))
            return
        labelled = self.known.labels is not None and bool((self.known.labels[chosen] >= 0).all())
        use = f" Use it with labels.list={path}" if self.split == "train" and labelled else ""
        self.status.text = html.escape(f"{len(names)} names in {path}.{use}")
