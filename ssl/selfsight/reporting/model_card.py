"""The model card of an exported backbone: what it learned from and how, how good it is, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from selfsight import __version__
from selfsight.checkpoints.export import SMALL_STEMS, name_of, timm_call, to_torchvision
from selfsight.checkpoints.hub import WEIGHTS, built_by_timm
from selfsight.contracts import Backbone
from selfsight.errors import UserError
from selfsight.methods import reference
from selfsight.runs import records
from selfsight.runs.folder import RunFolder

#: figures of a run's last table that a card shows: (key, in words, the evaluator that measured it)
FIGURES = (
    ("knn_top1", "k-nearest neighbours, top-1", "knn"),
    ("linear_top1", "linear probe, top-1", "linear"),
    ("knn_map", "k-nearest neighbours, mean average precision", "knn"),
    ("linear_map", "linear probe, mean average precision", "linear"),
    ("knn_r2", "k-nearest neighbours, R²", "knn"),
    ("linear_r2", "linear probe, R²", "linear"),
    ("rank", "effective rank", "diagnostics"),
)
UNSTATED = "not stated"
STRICT = "net.load_state_dict(load_file(file))\nnet.eval()"


def model_card(
    backbone: Backbone,
    *,
    name: str,
    run: RunFolder | None = None,
    licence: str | None = None,
    data: str | None = None,
    data_licence: str | None = None,
) -> str:
    """Markdown with the Hub's header.

    Args:
        backbone: of `selfsight.load`.
        name: of the repository, for the lines that load it.
        run: the run it comes from, for its figures and its command.
        licence: of the weights, as the Hub names it. data, data_licence: what the images are, and their licence.
    """
    header = ["---", "library_name: timm" if built_by_timm(backbone) else "library_name: selfsight", "tags:"]
    header += [f"- {tag}" for tag in ("image-feature-extraction", "self-supervised-learning", "selfsight")]
    header += ["pipeline_tag: image-feature-extraction", *([f"license: {licence}"] if licence else []), "---"]
    parts = [
        "\n".join(header),
        f"# {name}",
        about(backbone),
        data_section(backbone, data, data_licence, licence),
        training_section(backbone, run),
        figures_section(run),
        "## Intended use\n\nFeatures for nearest-neighbour search, clustering and linear classifiers, and a start for "
        "fine-tuning, on images like those it learned from. It has no classifier. Features carry what is in the images "
        "and how they were chosen; measure it on your own before a decision rests on it.",
        loading_section(backbone, name),
        citation_section(backbone, run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def about(backbone: Backbone) -> str:
    spec = backbone.spec
    method = spec.get("method")
    network = name_of(spec["backbone"])
    parameters = sum(p.numel() for p in backbone.parameters()) / 1e6
    learned = f"pretrained with {method}" if method else "a pretrained network"
    return (
        f"{network}, {learned}: {backbone.num_features} features, {parameters:.1f} M parameters, images of "
        f"{spec.get('image_size', UNSTATED)} pixels. Written by selfsight {__version__}."
    )


def data_section(backbone: Backbone, data: str | None, data_licence: str | None, licence: str | None) -> str:
    spec = backbone.spec
    name = data or spec.get("dataset") or UNSTATED
    images = f"RGB, from 0 to 1, less mean {spec.get('mean')}, divided by std {spec.get('std')}"
    if spec.get("mean") is None:
        images = "from 0 to 1, as they are"
    licences = [("Licence of the images", data_licence), ("Licence of the weights", licence)]
    rows = [("Images", name), *((what, stated or UNSTATED) for what, stated in licences), ("Values", images)]
    if (imported := spec.get("imported")) is not None:
        rows.append(("Imported from", f"{imported['format']}, `{imported['file']}`"))
    return "## Data\n\n" + table(("", ""), rows)


def training_section(backbone: Backbone, run: RunFolder | None) -> str:
    spec = backbone.spec
    rows = [("Method", spec.get("method") or UNSTATED), ("Epochs", spec.get("epochs") or UNSTATED)]
    if run is not None and (run.path / "config.yaml").is_file():
        cfg = run.config()
        chosen = cfg.get("choices") or {}
        if chosen.get("recipe"):
            rows.append(("Recipe", chosen["recipe"]))
        rows += [("Batch", cfg.get("batch_size")), ("Seed", cfg.get("seed"))]
        environment = run.path / "environment.json"
        if environment.is_file():
            known = json.loads(environment.read_text(encoding="utf-8"))
            rows.append(("Command", f"`{' '.join(known.get('command', []))}`"))
            versions = {k: v for k, v in known.get("packages", {}).items() if v and k in ("selfsight", "torch", "timm")}
            rows.append(("Versions", ", ".join(f"{package} {version}" for package, version in versions.items())))
    return "## Training\n\n" + table(("", ""), rows)


def figures_section(run: RunFolder | None) -> str:
    """Figures of the run's last table beside an untrained network, and every evaluation made of it, with protocols."""
    if run is None:
        return ""
    summary = run.read_summary()
    protocols: Mapping[str, str] = summary.get("protocols", {})
    rows = []
    for key, words, evaluator in FIGURES:
        found = [summary.get(row, {}).get(key) for row in ("pretrained", "untrained", "pixels")]
        if found[0] is not None:
            rows.append((words, *(shown(key, value) for value in found), protocols.get(evaluator, "")))
    for name, record in records.read(run).items():
        first = list(records.figures(record["result"]).items())[:3]
        figures = ", ".join(f"{key} {records.number(value)}" for key, value in first)
        rows.append((f"{name}, {record['data']}", figures, "", "", str(record["protocol"])))
    if not rows:
        return ""
    heads = ("Measured", "this network", "untrained", "raw pixels", "protocol")
    return "## How good it is\n\n" + table(heads, rows)


def shown(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if key.endswith("r2") else f"{value:.1%}" if key.endswith(("top1", "map")) else f"{value:.1f}"


def loading_section(backbone: Backbone, name: str) -> str:
    """Lines for three libraries: selfsight, timm, torchvision, or the tensors alone where one has no such network."""
    small = stem(backbone)
    blocks = {"selfsight": f'import selfsight\n\nnet = selfsight.load("hf-hub:{name}")  # frozen, in eval mode'}
    arguments = backbone.spec["backbone"]
    call = timm_call(backbone, arguments)
    if built_by_timm(backbone):
        blocks["timm"] = f'import timm\n\nnet = timm.create_model("hf-hub:{name}", pretrained=True).eval()'
    elif call is not None:
        options = "".join(f", {key}={value!r}" for key, value in call[1].items())
        made = f"net = timm.create_model({call[0]!r}, num_classes=0{options})"
        blocks["timm"] = f"import timm\nimport torch\n{fetched(name)}\n\n{made}\n{small}{STRICT}"
    if (kind := torchvision_name(backbone)) is not None:
        made = f"net = torchvision.models.{kind}()\nnet.fc = torch.nn.Identity()"
        blocks["torchvision"] = f"import torch\nimport torchvision\n{fetched(name)}\n\n{made}\n{small}{STRICT}"
    if call is None:
        options = "".join(f", {k}={value!r}" for k, value in arguments.items() if k not in ("name", "_target_"))
        made = f"net = selfsight.backbone({name_of(arguments)!r}{options})"
        blocks["PyTorch"] = f"import selfsight\n{fetched(name)}\n\n{made}  # to train on\n{STRICT}"
    if len(blocks) < 3:
        blocks["safetensors"] = f"{fetched(name)}\n\nweights = load_file(file)  # by name, for a network of your own"
    lines = "\n\n".join(f"With {library}:\n\n```python\n{code}\n```" for library, code in blocks.items())
    return f"## How to load it\n\n{lines}"


def fetched(name: str) -> str:
    return (
        "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n\n"
        f'file = hf_hub_download("{name}", "{WEIGHTS}")'
    )


def stem(backbone: Backbone) -> str:
    """The lines that give a ResNet of another library the stem for small images; none where it has the usual one."""
    padding = SMALL_STEMS.get(str(backbone.spec["backbone"].get("stem")))
    if padding is None:
        return ""
    channels = ", ".join(map(str, backbone.get_parameter("conv1.weight").shape[1::-1]))
    first = f"net.conv1 = torch.nn.Conv2d({channels}, 3, padding={padding}, bias=False)"
    return f"{first}\nnet.maxpool = torch.nn.Identity()\n"


def torchvision_name(backbone: Backbone) -> str | None:
    """torchvision's name of a ResNet; None where it has no such network, or none under the same name."""
    import torch
    import torchvision

    name = name_of(backbone.spec["backbone"])
    try:
        weights = to_torchvision(backbone)
    except UserError:
        return None
    known = getattr(torchvision.models, name, None)
    if not callable(known):
        return None
    with torch.device("meta"):
        wanted = {key for key in known().state_dict() if not key.startswith("fc.")}
    return name if wanted == weights.keys() else None


def citation_section(backbone: Backbone, run: RunFolder | None) -> str:
    """The reference that stands in the method's own file, which a run's configuration names."""
    cited = reference(str(backbone.spec.get("method")))
    if run is not None and (run.path / "config.yaml").is_file():
        cited = reference(str(run.config().method._target_).split(".")[-2]) or cited
    return f"## Citation\n\n{cited}" if cited else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; bars within a cell would end it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
