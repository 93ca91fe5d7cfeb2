"""Evaluation of a finished run, its report, and several runs side by side."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from selfsight import cli
from selfsight.contracts import Batch
from selfsight.datamodules import digits
from selfsight.evaluation import cache
from selfsight.evaluation.features import Features
from selfsight.reporting import comparison, curves, embedding, embedding_map, page, pictures, report, run_comparison
from selfsight.reporting.galleries import galleries
from selfsight.reporting.thumbnails import denormalised
from selfsight.runs.folder import RunFolder

from ..small import SmallNet


@pytest.fixture(scope="module")
def runs(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(finished_run, folder / "a")
    for name, *words in (("b", "seed=1"), ("c", "method=swav")):
        cli.main(["pretrain", "debug=smoke", "report=false", f"runs={folder}", f"name={name}", *words])
    return folder


def record(run: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "eval" / f"{name}.json").read_text())
    return content


def test_every_stage_from_one_pass(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.main(["retrieval", f"run={runs / 'a'}", "stage=all"])
    found = record(runs / "a", "retrieval-all")
    assert list(found["result"]) == ["act1", "layer1", "layer2", "layer3", "layer4", "final", "projection"]
    assert found["result"]["layer4"] == found["result"]["final"] != found["result"]["projection"]
    assert "cosine" in found["protocol"]
    assert found["data"].startswith("digits (1,437")

    def twice(*_: object, **__: object) -> None:
        raise AssertionError("features that lie in the run folder were extracted again")

    monkeypatch.setattr(cache, "extract", twice)
    cli.main(["knn", f"run={runs / 'a'}", "stage=layer2"])
    cli.main(["cluster", f"run={runs / 'a'}"])
    assert {"nmi", "ari", "cluster_accuracy"} == set(record(runs / "a", "clustering")["result"])
    with (runs / "a" / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["clustering/nmi"]) == pytest.approx(record(runs / "a", "clustering")["result"]["nmi"], rel=1e-5)


def test_published_protocols_by_name(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["linear", f"run={runs / 'a'}", "linear.protocol=supcon", "linear.epochs=1"])
    protocol = record(runs / "a", "linear-supcon-epochs_1")["protocol"]
    assert "augmented images, SGD" in protocol
    assert "epochs 1 for 100" in protocol
    for name, told in (("spark-finetune", "selfsight finetune"), ("supconn", "Did you mean 'supcon'")):
        with pytest.raises(SystemExit):
            cli.main(["linear", f"run={runs / 'a'}", f"linear.protocol={name}"])
        assert told in capsys.readouterr().err


def test_report_needs_no_network(runs: Path) -> None:
    cli.main(["diagnostics", f"run={runs / 'c'}"])
    cli.main(["report", f"run={runs / 'c'}", "projection=pca"])
    page = (runs / "c" / "report.html").read_text()
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", outside)
    for part in ("Prototypes", "Nearest neighbours", "Views", "Embedding map", "diagnostics", "seed: 0"):
        assert part in outside, part
    assert outside.count("class='source'") == pictures.VIEWED
    assert f"selfsight report run={runs / 'c'}" in outside
    assert "commit" in outside
    assert "guessing" in page


def test_report_of_what_detectors_and_older_versions_left(runs: Path, tmp_path: Path) -> None:
    """A record without a stage, and figures of every depth, each in its row."""
    folder = RunFolder(tmp_path)
    (tmp_path / "eval").mkdir()
    result = {"box_ap": 0.25, "few_shot": {"5": {"mean": 0.5, "std": 0.1}}, "all": {"final": {"map": 0.75}}}
    content = {"protocol": "Mask <R-CNN>", "data": "drawn (4 images)", "result": result}
    (tmp_path / "eval" / "detect.json").write_text(json.dumps(content))
    told = report.evaluations(folder)
    assert "drawn (4 images): Mask &lt;R-CNN&gt;" in told
    for name, value in (("box_ap", "0.2500"), ("few_shot 5", "0.5000 ± 0.1000"), ("all final map", "0.7500")):
        assert f"<tr><td>{name}</td><td>{value}</td></tr>" in told


def test_a_map_of_a_hundred_thousand_points() -> None:
    """Each point is drawn once a colouring, pictures stay few, and the whole fits into a page."""
    n = 100_000
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % 10
    data = Data(digits(image_size=8, mean=(0.3,) * 3, std=(0.3,) * 3, test_fraction=0.2, seed=0, name="digits"))
    test = Features(x, labels, torch.arange(n) % len(data.data.test))
    train = Features(x[:500], labels[:500], torch.arange(500))
    known = embedding.build_map(train, test, data.data.test, "pca")
    made = embedding_map.figure(data, known)
    shown = [trace for trace in made.data if trace.visible]
    assert {trace.type for trace in made.data} == {"scattergl"}
    assert sum(len(trace.x) for trace in shown) == n
    assert sum(len(trace.x) for trace in made.data) == 5 * n  # class, prediction, right or wrong, cluster, loss
    assert len(made.layout.images) <= embedding_map.FRAMED
    size = len(page.figure_html(made, name="map")) + len(embedding_map.hover_card(data, known, "map"))
    assert size < 30_000_000


class Data:
    """As much of a datamodule as the map asks for."""

    def __init__(self, data: Any) -> None:
        self.data = data


def test_neighbours_vote() -> None:
    """By hand: two classes on two axes, one test image on the other class's axis."""
    train = Features(torch.eye(2).repeat(10, 1), torch.tensor([0, 1]).repeat(10), torch.arange(20))
    test = Features(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]), torch.arange(3))
    answers, loss = embedding.votes(train, test)
    assert answers.tolist() == [0, 1, 0]
    assert loss[:2].max() < 1e-4 < 6 < loss[2]


def test_nobody_votes_for_itself() -> None:
    """Of 200 pairs of copies with opposite labels every image is taken for its twin's class, whoever is found first."""
    base = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    twins = Features(base.repeat(2, 1), torch.arange(400) // 200, torch.arange(400))
    known = embedding.build_map(twins, twins, None, "pca")
    assert known.labels is not None
    assert known.wrong.all()


def test_images_without_labels_neither_vote_nor_are_wrong() -> None:
    x = torch.eye(2).repeat(10, 1)
    labels = torch.tensor([0, 1]).repeat(10)
    labels[4:] = -1
    some = Features(x, labels, torch.arange(20))
    known = embedding.build_map(some, some, None, "pca")
    assert known.predictions is not None
    assert known.labels is not None
    assert known.loss is not None
    assert np.array_equal(known.predictions, known.rows % 2), "an image is taken for what the labelled ones like it are"
    assert not known.wrong.any()
    assert (known.loss[known.labels < 0] == 0).all()
    data = Data(digits(image_size=8, mean=(0.3,) * 3, std=(0.3,) * 3, test_fraction=0.2, seed=0, name="digits"))
    by_class, _, mistakes, _ = embedding_map.colourings(data, known)
    for colouring in (by_class, mistakes):
        assert colouring.names[-1] == "no label"
        assert (colouring.values == len(colouring.names) - 1).sum() == 16
        assert len(colouring.names) == len(colouring.colours)


def test_points_beyond_the_fitted_ones_stand_beside_their_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "FITTED", 60)
    x = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    flat = embedding.project_2d(np.concatenate([x, x[:5]]), "tsne")
    nearest = np.linalg.norm(flat[60:, None] - flat[None, :60], axis=2).argmin(1)
    assert nearest.tolist() == [0, 1, 2, 3, 4]


def test_images_come_back_out_of_normalised_tensors() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    x = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert np.array_equal(denormalised(x, mean, std), pixels.permute(0, 2, 3, 1).numpy())


def test_views_have_the_colours_of_their_image() -> None:
    """Views cut from one flat colour show it, whether they are normalised or not."""
    from selfsight.datamodules import ArrayImages, ImageData, ImageDataModule
    from selfsight.datamodules.views.view import View

    colour = torch.tensor([200, 120, 40], dtype=torch.uint8)
    flat = ArrayImages(colour[None, :, None, None].expand(4, 3, 24, 24).contiguous())
    for mean, std in ((None, None), ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))):
        data = ImageData("flat", flat, None, (), image_size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
        view = View(16, count=2, crop="resized", mean=mean, std=std)
        module = ImageDataModule(data, [view], batch_size=2, num_workers=0, engine="cpu", seed=0)
        page = pictures.views(*pictures.viewed_batch(module), module)
        found = re.findall(r"alt='view'[^>]* src='data:image/png;base64,([^']+)'", page)
        assert len(found) == 2 * pictures.VIEWED
        for picture in found:
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"))
            assert np.abs(pixels.astype(int) - colour.numpy()).max() <= 1


def test_rotation_shows_what_it_sees() -> None:
    from selfsight.methods.rotation import Rotation

    method = Rotation(SmallNet(), hidden_dims=(), map_side=None, decay="all").eval()
    x = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        (gallery,) = galleries(method, Batch([x], torch.arange(8)), ())
        seen = method.logits(gallery.images.flatten(0, 1)).argmax(1).view(-1, 4)
    assert gallery.right is not None
    assert torch.equal(gallery.images[:, 0], x[:6])
    assert torch.equal(gallery.right, seen == torch.arange(4))
    assert [[int(c.split("°")[0]) // 90 for c in row] for row in gallery.captions] == seen.tolist()


def test_pixpro_shows_what_it_pairs() -> None:
    """Of two equal views of one place, every pixel lies where it lies, and its unchanged twin is found there."""
    from selfsight.methods.pixpro import PixPro

    method = PixPro(
        SmallNet(), hidden_dim=16, dim=8, loss="pixcontrast", exponent=2, clamp=0, transform_layers=0,
        normalise_value=True, pos_ratio=0.7, skip_empty=False, temperature=0.3, instance_weight=0, decay="all",
    ).eval()  # fmt: skip
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([4.0, 2, 20, 20, 40, 50, 0, 0]).expand(3, 8)
    whole = torch.tensor([0.0, 0, 40, 50, 40, 50, 0, 0]).expand(3, 8)
    with torch.no_grad():
        (gallery,) = galleries(method, Batch([x, x, x], torch.arange(3), boxes=[whole, box, box]), ())
    assert gallery.points is not None
    assert gallery.points.shape == (3, 3, 5, 2)
    assert torch.equal(gallery.points[:, 0], gallery.points[:, 1])
    assert torch.equal(gallery.points[:, 0], gallery.points[:, 2])
    assert set(gallery.points.flatten().tolist()) <= {0.125, 0.375, 0.625, 0.875}  # centres of a map of 4 x 4


def test_simmatchv2_shows_what_propagation_changes() -> None:
    from selfsight.losses import simmatchv2
    from selfsight.methods.semi.simmatchv2 import SimMatchV2

    torch.manual_seed(0)
    method = SimMatchV2(
        SmallNet(), labels=torch.tensor([0, 1, 2]), num_classes=3, dim=8, K=16, t=0.1, alpha=0.5, topn=3, tau=0.95,
        lambda_nn=1, lambda_ee=1, lambda_ne=1, da_m=None, norm_feat=False, eman=True, decay="all",
    ).eval()  # fmt: skip
    x = torch.randn(10, 3, 16, 16)
    with torch.no_grad():
        labels, propagated = galleries(method, Batch([x], torch.arange(10), torch.full((10,), -1)), ("a", "b", "c"))
        logits, z = method.teacher(x)
        p = logits.softmax(1)
        r = simmatchv2.refine(z, p, method.l_bank, method.l_labels, n=3, t=0.1, alpha=0.5)
    first = int((r - p).abs().sum(1).argmax())
    assert torch.equal(propagated.images[0, 0], x[first])
    before, after = (f"{'abc'[int(row.argmax())]} {row.max():.0%}" for row in (p[first], r[first]))
    assert propagated.captions[0][0] == f"{before} → {after}"
    assert propagated.labelled is not None
    assert sorted(propagated.labelled[0].tolist()) == [0, 1, 2]
    assert [c.split()[0] for c in propagated.captions[0][1:]] == ["abc"[int(i)] for i in propagated.labelled[0]]
    assert labels.right is not None
    assert bool(labels.right.all()), "what is unknown is no mistake"


def test_guessing_is_drawn_or_told() -> None:
    """The line of guessing stands in a chart that it would not flatten, and is told at the edge of others."""
    near = curves.curve({"": [(1, 0.2), (2, 0.6)]}, "knn_top1", 0.1)
    assert [shape.y0 for shape in near.layout.shapes] == [0.1]
    far = curves.curve({"": [(1, 0.92), (2, 0.97)]}, "knn_top1", 0.1)
    assert not far.layout.shapes
    assert [note.text for note in far.layout.annotations] == ["↓ guessing: 10%"]


@pytest.mark.parametrize(
    ("column", "values", "least"),
    [
        ("knn_top1", (0.91, 0.93), 0.1),
        ("knn_top1", (0.999, 1.0), 0.1),
        ("rank", (50.0, 51.0), 10.2),
        ("loss", (2.0,), 0.4),
    ],
)
def test_noise_does_not_fill_a_chart(column: str, values: tuple[float, ...], least: float) -> None:
    drawn = curves.curve({"": [*enumerate(values, 1)]}, column)
    low, high = drawn.layout.yaxis.autorangeoptions.include
    assert high - low == pytest.approx(least)
    assert low <= min(values)
    assert max(values) <= high
    assert not column.endswith("_top1") or (low >= 0 and high <= 1)


def test_a_curve_with_a_span_is_left_alone() -> None:
    assert curves.wider([0.2, 0.6], share=True) is None
    assert curves.wider([9.0, 3.0], share=False) is None


def test_what_matters_most_comes_first_and_larger() -> None:
    rows = [
        {"epoch": str(i), "lr": "0.1", "rank": "5", "loss": "2", "knn_top1": "0.5", "feature_std": "1"} for i in (1, 2)
    ]
    drawn = curves.curves(rows, 10)
    large, small = drawn.split("<div class='grid'>")
    for column in ("loss", "knn_top1", "rank"):
        assert curves.TITLES[column] in large
        assert curves.TITLES[column] not in small
    assert curves.TITLES["lr"] in small
    assert curves.main_columns(["student_top1", "lr"]) == ["student_top1"]


def test_compare_runs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a", "b", "c"]
    cli.main(["compare-runs", *(str(runs / name) for name in names), f"out={tmp_path / 'page.html'}", "features=true"])
    told = capsys.readouterr().out
    assert "mean of 2 seeds (a, …)" in told  # a and b; c is another method
    folders = [RunFolder.open(runs / name) for name in names]
    changed = {row[0]: row[1:] for row in run_comparison.differences(folders)}
    assert changed["seed"] == ["0", "1", "0"]
    assert changed["method._target_"][2] == "selfsight.methods.swav.SwAV"
    assert "dataset.name" not in changed
    rows = [[f"views.global.{i}", "0", "1"] for i in range(20)]
    assert run_comparison.main_differences(rows) == rows
    main, others = ["method._target_", "choices.recipe", "seed"], ["method.then._target_", "views.mean"]
    rows += [[key, "0", "1"] for key in (*main, *others)]
    assert [row[0] for row in run_comparison.main_differences(rows)] == main
    twin = RunFolder.open(shutil.copytree(runs / "a", tmp_path / "twin"))
    assert run_comparison.alike([folders[0], twin], "cpu") == [["a and twin", "1.000", "100.0%"]]
    assert "What differs in the configuration" in (tmp_path / "page.html").read_text()
    for words in ([str(runs / "a")], [str(runs / "a"), f"{runs}/b/../a"]):
        with pytest.raises(SystemExit):
            cli.main(["compare-runs", *words])
        assert "two different run folders" in capsys.readouterr().err


def summarised(path: Path, config: str, **summary: Any) -> RunFolder:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"method: {{}}\n{config}")
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "metrics.csv").write_text("epoch,loss,rank\n1,2.5,3\n2,2.0,4\n")
    return RunFolder.open(path)


def test_the_table_of_runs(tmp_path: Path) -> None:
    """Everything measured has a column, and the mean of the seeds a number in each."""

    def run(seed: int, knn: float, shot: float) -> RunFolder:
        measured = {"knn_top1": knn, "rank": 10.0 * seed, "few_shot": {"1": {"mean": shot, "std": 0.1}}}
        learned = {"student": {"top1": knn / 2}, "teacher": {"top1": knn / 4}}
        config = f"seed: {seed}\nlabels: {{seed: {seed}}}\ndatamodule: {{labels: {{seed: {seed}}}}}\nlr: 1\n"
        return summarised(tmp_path / f"s{seed}", config, pretrained=measured, classifiers=learned, train_seconds=60)

    folders = [run(1, 0.5, 0.4), run(3, 0.7, 0.6)]
    titles, rows = run_comparison.table(folders)
    averaged = "test accuracy of the average"
    assert titles == ["run", "epochs", "kNN", "rank", "test accuracy", averaged, "1/class", "time"]
    assert rows[0] == ["s1", "2", "50.0%", "10.0", "25.0%", "12.5%", "40.0% ± 10.0", "1:00"]
    mean = ["60.0% ± 14.1", "20.0 ± 14.1", "30.0% ± 7.1", "15.0% ± 3.5", "50.0% ± 14.1"]
    assert rows[2] == ["mean of 2 seeds (s1, …)", "", *mean, ""]
    changed = run_comparison.differences(folders)
    assert [row[0] for row in changed] == ["seed", "labels.seed", "datamodule.labels.seed"]


def test_the_table_of_runs_on_labels_in_any_number_and_on_numbers(tmp_path: Path) -> None:
    """mAP and R² of frozen features and of fine-tuned networks, each with its spread in its own unit."""

    def run(seed: int, r2: float) -> RunFolder:
        measured = {"knn_map": 0.5, "knn_r2": r2}
        learned = {"student": {"map": 0.25, "f1": 0.1}, "teacher": {"r2": r2 / 2}}
        return summarised(tmp_path / f"s{seed}", f"seed: {seed}\n", pretrained=measured, classifiers=learned)

    titles, rows = run_comparison.table([run(1, 0.5), run(2, 0.7)])
    assert titles[2:-1] == ["kNN, mAP", "kNN, R²", "test mAP", "test R² of the average"]
    assert rows[0][2:-1] == ["50.0%", "0.500", "25.0%", "0.250"]
    assert rows[2][2:-1] == ["50.0% ± 0.0", "0.600 ± 0.141", "25.0% ± 0.0", "0.300 ± 0.071"]


def test_what_repetitions_are(tmp_path: Path) -> None:
    """Runs of other seeds, and those that go on from them; neither copies nor runs of another recipe."""
    sources = [summarised(tmp_path / f"pre{seed}", f"seed: {seed}\nlr: 1\n") for seed in (0, 1)]
    other = summarised(tmp_path / "other", "seed: 0\nlr: 2\n")
    tuned = [
        summarised(tmp_path / f"tuned{i}", f"seed: {i}\nrun: {source.path}\nlabels: {{split: {source.path}/l.json}}\n")
        for i, source in enumerate([*sources, other])
    ]
    copy = RunFolder.open(shutil.copytree(sources[0].path, tmp_path / "copy"))
    assert run_comparison.repetitions([*sources, copy, other, *tuned]) == [[0, 1], [4, 5]]
    assert run_comparison.repetitions([sources[0], copy]) == []


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [summarised(tmp_path / place / "x", f"seed: {i}\n") for i, place in enumerate("ab")]
    assert run_comparison.titles_of(folders) == ["a/x", "b/x"]
    assert run_comparison.titles_of([*folders, summarised(tmp_path / "y", "seed: 0\n")])[2] == "y"
    drawn = run_comparison.curves_of(folders)
    for column in ("loss", "rank"):
        assert curves.TITLES[column] in drawn
    assert drawn.count('"name":"a\\u002fx"') == drawn.count('"name":"b\\u002fx"') == 2


def test_ten_lines_of_a_picture_are_told_apart() -> None:
    names = [f"approach {i}" for i in range(10)]
    cfg = OmegaConf.create({"approaches": names, "labels_per_class": [1, 4], "seeds": 2, "dataset": {"name": "digits"}})
    rows = [(name, labels, seed, 0.5 + 0.1 * seed) for name in names for labels in (1, 4) for seed in (0, 1)]
    drawn = re.findall(r'"line":\{"color":"#\w+","dash":"\w+"\}', comparison.told(rows, cfg))
    assert len(drawn) == len(set(drawn)) == 10
