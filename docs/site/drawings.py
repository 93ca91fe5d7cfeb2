"""The drawing of each method: what goes through which network, and what is compared with what.

    python docs/site/drawings.py        writes docs/images/drawings/*.svg anew

Blue is learned, violet is an average that follows without gradient, dashed arrows carry no gradient, ochre is the loss.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import svg

FOLDER = Path(__file__).parents[1] / "images" / "drawings"
COLUMN, ROW, WIDE, HIGH, EDGE = 118, 58, 98, 40, 8

#: column, row, text and kind of a box; columns and rows may be fractions
Box = tuple[float, float, str, str]


@dataclass(frozen=True)
class Drawing:
    """Boxes by name, and arrows between them.

    Attributes:
        title: what the drawing shows, in a sentence.
        boxes: see `Box`.
        arrows: words ``from>to``; ``from~to`` without gradient, ``from=to`` with a head at both ends.
        note: a line below.
    """

    title: str
    boxes: dict[str, Box]
    arrows: str
    note: str = ""

    @property
    def joined(self) -> dict[str, Box]:
        """The boxes that an arrow leads to or from."""
        ends = {name for word in self.arrows.split() for name in re.split("[>~=]", word)}
        return {name: placed for name, placed in self.boxes.items() if name in ends}

    def draw(self) -> str:
        width = EDGE * 2 + max(x for x, *_ in self.joined.values()) * COLUMN + WIDE
        height = EDGE * 2 + max(y for _, y, *_ in self.joined.values()) * ROW + HIGH
        heads = (
            '<defs><marker id="to" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="var(--soft)"/></marker></defs>\n'
        )
        body = [heads, *map(self.arrow, self.arrows.split()), *map(box, self.joined.values())]
        if self.note:
            body.append(svg.text(EDGE, height + 8, self.note, "soft", "start", 12))
        return svg.document(width, height + 22 * bool(self.note), self.title, "\n".join(body))

    def arrow(self, word: str) -> str:
        sign = next(sign for sign in ">~=" if sign in word)
        (ax, ay, *_), (bx, by, *_) = (self.boxes[name] for name in word.split(sign))
        if ax == bx:  # one above the other
            down = by > ay
            x = EDGE + ax * COLUMN + WIDE / 2
            path = f"M{x:g} {top(ay) + HIGH * down:g}V{top(by) + HIGH * (not down):g}"
        else:
            back = bx < ax
            start, end = EDGE + ax * COLUMN + WIDE * (not back), EDGE + bx * COLUMN + WIDE * back
            middle = end - 10 if not back else end + 10
            path = f"M{start:g} {top(ay) + HIGH / 2:g}H{middle:g}V{top(by) + HIGH / 2:g}H{end:g}"
        dashes = ' stroke-dasharray="5 4"' if sign == "~" else ""
        both = ' marker-start="url(#to)"' if sign == "=" else ""
        look = f'fill="none" stroke="var(--soft)" stroke-width="1.5" marker-end="url(#to)"{both}{dashes}'
        return f'<path d="{path}" {look}/>'


def top(row: float) -> float:
    return EDGE + row * ROW


def box(placed: Box) -> str:
    """A rectangle with its text; data have no frame of their own colour."""
    x, y, words, kind = placed
    left, edge = EDGE + x * COLUMN, f"{kind}-edge" if f"{kind}-edge" in svg.COLOURS else "line"
    frame = (
        f'<rect x="{left:g}" y="{top(y):g}" width="{WIDE}" height="{HIGH}" rx="6" '
        f'fill="var(--{kind})" stroke="var(--{edge})" stroke-width="1.4"/>'
    )
    return frame + svg.text(left + WIDE / 2, top(y) + HIGH / 2, words, size=12.5 if "\n" not in words else 11.5)


def two_views(*after: tuple[str, str], loss: str, middle: float = 0.5) -> dict[str, Box]:
    """Two views of an image through the same parts, and the loss at the end."""
    boxes: dict[str, Box] = {"image": (0, middle, "image", "plain")}
    for row, suffix in enumerate("12"):
        boxes[f"v{suffix}"] = (1, row, f"view {suffix}", "plain")
        for column, (name, kind) in enumerate(after, 2):
            boxes[f"p{column}{suffix}"] = (column, row, name, kind)
    boxes["loss"] = (len(after) + 2, middle, loss, "loss")
    return boxes


def through(length: int, rows: str = "12") -> str:
    """The arrows of `two_views`."""
    names = ["v", *(f"p{column}" for column in range(2, 2 + length))]
    words = [f"{a}{row}>{b}{row}" for row in rows for a, b in pairwise(names)]
    return " ".join([*(f"image>v{row}" for row in rows), *words, *(f"{names[-1]}{row}>loss" for row in rows)])


BACKBONE, HEAD = ("backbone", "net"), ("head", "net")
#: the side that follows in place of being learned
AVERAGED: dict[str, Box] = {"p22": (2, 1, "average", "slow"), "p32": (3, 1, "average", "slow")}

DRAWINGS = {
    "simclr": Drawing(
        "SimCLR: both views of an image pass backbone and head; each has to find the other among those of the batch",
        two_views(BACKBONE, HEAD, loss="find the other\nof 2N views")
        | {"others": (4, 1.55, "all other\nimages", "plain")},
        through(2) + " others>loss",
        "afterwards: backbone and first layer of the head, fine-tuned on few labels, then distilled into a student",
    ),
    "supcon": Drawing(
        "SupCon: every view is drawn to all views of its class and pushed from the rest of the batch",
        two_views(BACKBONE, HEAD, loss="draw to\nthe own class")
        | {"labels": (4, 1.55, "labels of\nthe batch", "plain")},
        through(2) + " labels>loss",
    ),
    "simsiam": Drawing(
        "SimSiam: the prediction from one view has to point where the projection of the other does, without gradient",
        two_views(BACKBONE, ("projector", "net"), ("predictor", "net"), loss="same\ndirection")
        | {"p42": (4, 1, "stop\ngradient", "plain")},
        "image>v1 image>v2 v1>p21 v2>p22 p21>p31 p22>p32 p31>p41 p32~p42 p41>loss p42~loss",
        "and the same with the views exchanged",
    ),
    "byol": Drawing(
        "BYOL: the prediction from one view has to be what a slow copy says of the other",
        two_views(BACKBONE, ("projector", "net"), ("predictor", "net"), loss="same\ndirection")
        | AVERAGED,
        "image>v1 image>v2 v1>p21 v2~p22 p21>p31 p22~p32 p31>p41 p32~loss p41>loss p21~p22 p31~p32",
        "and the same with the views exchanged; the average follows after every step",
    ),
    "mocov3": Drawing(
        "MoCo v3: the query from one view has to find the key of the other among the keys of the batch",
        two_views(BACKBONE, ("projector", "net"), ("predictor", "net"), loss="find the key\namong N")
        | AVERAGED | {"keys": (5, 1.55, "keys of all\nother images", "slow")},
        "image>v1 image>v2 v1>p21 v2~p22 p21>p31 p22~p32 p31>p41 p32~loss p41>loss p21~p22 p31~p32 keys~loss",
        "and the same with the views exchanged",
    ),
    "vicreg": Drawing(
        "VICReg: rows of one image agree, every column varies, no two columns go together",
        {
            "image": (0, 1, "image", "plain"),
            "v1": (1, 0.5, "view 1", "plain"), "v2": (1, 1.5, "view 2", "plain"),
            "f1": (2, 0.5, "backbone", "net"), "f2": (2, 1.5, "backbone", "net"),
            "g1": (3, 0.5, "expander", "net"), "g2": (3, 1.5, "expander", "net"),
            "e": (4, 1, "embeddings\nN × D", "plain"),
            "var": (5, 0, "each column\nvaries", "loss"), "inv": (5, 1, "rows agree", "loss"),
            "cov": (5, 2, "no two\ncolumns alike", "loss"),
        },
        "image>v1 image>v2 v1>f1 v2>f2 f1>g1 f2>g2 g1>e g2>e e>var e>inv e>cov",
    ),
    "barlow": Drawing(
        "Barlow Twins: the correlations of two views' embeddings become the identity",
        two_views(BACKBONE, ("projector", "net"), ("normalise\ncolumns", "plain"), loss="correlations\n= identity"),
        through(3),
    ),
    "lejepa": Drawing(
        "LeJEPA: views agree with the mean of the large ones, and all embeddings together look like a Gaussian",
        {
            "image": (0, 1, "image", "plain"),
            "v1": (1, 0, "large view 1", "plain"), "v2": (1, 1, "large view 2", "plain"),
            "v3": (1, 2, "small views", "plain"),
            "f": (2, 1, "backbone", "net"), "g": (3, 1, "projector", "net"),
            "loss": (4, 0.4, "agree with\nthe mean", "loss"), "normal": (4, 1.6, "normal along\nany direction", "loss"),
        },
        "image>v1 image>v2 image>v3 v1>f v2>f v3>f f>g g>loss g>normal",
    ),
    "swav": Drawing(
        "SwAV: every crop predicts the code of each large one; codes share a batch evenly among the prototypes",
        {
            "image": (0, 1, "image", "plain"),
            "v1": (1, 0, "large crop 1", "plain"), "v2": (1, 1, "large crop 2", "plain"),
            "v3": (1, 2, "small crops", "plain"),
            "f": (2, 1, "backbone\nand head", "net"), "c": (3, 1, "scores for K\nprototypes", "net"),
            "q": (4, 0, "Sinkhorn:\ncodes", "slow"), "p": (4, 2, "softmax:\npredictions", "net"),
            "loss": (5, 1, "predict the\nother's code", "loss"),
        },
        "image>v1 image>v2 image>v3 v1>f v2>f v3>f f>c c~q c>p q~loss p>loss",
        "codes are of the large crops alone; predictions are of all",
    ),
    "dino": Drawing(
        "DINO: from every crop the student has to say what the teacher says of each other large one",
        {
            "image": (0, 0.5, "image", "plain"),
            "v1": (1, 0, "all crops", "plain"), "v2": (1, 1, "large crops", "plain"),
            "f1": (2, 0, "student\nbackbone", "net"), "f2": (2, 1, "teacher\nbackbone", "slow"),
            "g1": (3, 0, "head", "net"), "g2": (3, 1, "head", "slow"),
            "s1": (4, 0, "softmax\nτ 0.1", "plain"), "s2": (4, 1, "− centre,\nsoftmax τ 0.04", "plain"),
            "loss": (5, 0.5, "same\ndistribution", "loss"),
        },
        "image>v1 image>v2 v1>f1 v2~f2 f1>g1 f2~g2 g1>s1 g2~s2 s1>loss s2~loss f1~f2 g1~g2",
    ),
    "pixpro": Drawing(
        "PixPro: pixels that show the same spot, embedded by the network and by its slow copy, have to agree",
        {
            "image": (0, 0.5, "image", "plain"),
            "v1": (1, 0, "view 1", "plain"), "v2": (1, 1, "view 2", "plain"),
            "f1": (2, 0, "backbone,\nmap", "net"), "f2": (2, 1, "average,\nmap", "slow"),
            "g1": (3, 0, "projector", "net"), "g2": (3, 1, "average", "slow"),
            "p": (4, 0, "propagation", "net"),
            "loss": (5, 0.5, "same place,\nsame direction", "loss"),
            "where": (4, 1.55, "places of\nthe crops", "plain"),
        },
        "image>v1 image>v2 v1>f1 v2~f2 f1>g1 f2~g2 g1>p p>loss g2~loss where>loss f1~f2 g1~g2",
        "and the same with the views exchanged",
    ),
    "rotation": Drawing(
        "Rotation: a picture is turned by four angles, and the network says by which",
        {
            "image": (0, 1.5, "image, crop,\nflip", "plain"),
            **{f"v{i}": (1, i, f"turned {90 * i}°", "plain") for i in range(4)},
            "f": (2, 1.5, "backbone", "net"), "g": (3, 1.5, "head", "net"),
            "loss": (4, 1.5, "which of\nthe four?", "loss"),
        },
        " ".join(f"image>v{i} v{i}>f" for i in range(4)) + " f>g g>loss",
    ),
    "spark": Drawing(
        "SparK: a sparse encoder sees the cells that are left; a decoder paints the hidden ones from all its maps",
        {
            "image": (0, 1, "image", "plain"), "hide": (1, 1, "hide 60 %\nof the cells", "plain"),
            "f": (2, 1, "sparse\nencoder", "net"),
            "m1": (3, 0, "smallest map\n+ tokens", "net"), "m2": (3, 1, "next map\n+ tokens", "net"),
            "m3": (3, 2, "largest map\n+ tokens", "net"),
            "d": (4, 1, "U-Net\ndecoder", "net"), "loss": (5, 1, "hidden cells:\nsquared error", "loss"),
            "true": (5, 2, "cells,\nnormalised", "plain"),
        },
        "image>hide hide>f f>m1 f>m2 f>m3 m1>d m2>d m3>d d>loss true>loss",
    ),
    "mae": Drawing(
        "MAE: a transformer sees a quarter of the patches; a narrow decoder paints the others",
        {
            "image": (0, 0.5, "image,\npatches", "plain"), "hide": (1, 0.5, "hide 75 %", "plain"),
            "f": (2, 0, "encoder, on\nthe visible", "net"), "m": (2, 1, "mask tokens", "net"),
            "d": (3, 0.5, "in order:\ndecoder", "net"), "loss": (4, 0.5, "hidden patches:\nsquared error", "loss"),
            "true": (4, 1.5, "patches,\nnormalised", "plain"),
        },
        "image>hide hide>f hide>m f>d m>d d>loss true>loss",
    ),
    "distillation": Drawing(
        "Distillation: a student of any kind learns the answers of a frozen network, without labels",
        {
            "image": (0, 0.5, "view of an\nimage", "plain"),
            "f1": (1, 0, "student", "net"), "f2": (1, 1, "teacher,\nfrozen", "slow"),
            "g1": (2, 0, "head", "net"), "q": (2, 1, "queue of\nanswers", "slow"),
            "loss": (3, 0.5, "as similar\nto the queue", "loss"),
        },
        "image>f1 image~f2 f1>g1 f2~q g1>loss q~loss",
    ),
    "semi": Drawing(
        "FixMatch and relatives: a trusted guess on a weak view is the label of the strong view",
        {
            "x": (0, 0, "labelled\nimage", "plain"), "u": (0, 1.5, "unlabelled\nimage", "plain"),
            "wx": (1, 0, "weak view", "plain"), "w": (1, 1, "weak view", "plain"), "s": (1, 2, "strong view", "plain"),
            "fx": (2, 0, "network", "net"), "fw": (2, 1, "network", "net"), "fs": (2, 2, "network", "net"),
            "t": (3, 1, "trusted?\naligned?", "slow"),
            "sup": (4, 0, "its label:\nloss_sup", "loss"), "uns": (4, 1.5, "the guess:\nloss_unsup", "loss"),
        },
        "x>wx u>w u>s wx>fx w~fw s>fs fx>sup fw~t t~uns fs>uns",
        "one network, three times",
    ),
    "simmatchv2": Drawing(
        "SimMatchV2: the teacher's class and similarities of a weak view are learned by the student on a strong one",
        {
            "u": (0, 1.5, "unlabelled\nimage", "plain"),
            "w": (1, 0.5, "weak view", "plain"), "s": (1, 2.5, "strong view", "plain"),
            "ft": (2, 0.5, "teacher,\naverage", "slow"), "fs": (2, 2.5, "student", "net"),
            "k": (3, 0, "edges: to\nbanks of images", "slow"), "p": (3, 1, "node: class,\naligned", "slow"),
            "ps": (3, 2, "node", "net"), "ks": (3, 3, "edges", "net"),
            "r": (4, 0.5, "propagated\nlabel", "slow"),
            "loss": (5, 1.25, "nodes:\nL_nn, L_ne", "loss"), "ee": (5, 2.5, "edges:\nL_ee", "loss"),
        },
        "u>w u>s w~ft s>fs ft~k ft~p fs>ks fs>ps k~r p~r r~loss ps>loss ks>ee k~ee fs~ft",
        "labelled images: cross-entropy of the student, beside these",
    ),
}  # fmt: skip


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, drawing in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(drawing.draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
