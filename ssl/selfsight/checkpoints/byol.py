"""The BYOL authors' checkpoints in (google-deepmind/deepmind-research, ``pretrain_res50x1.pkl``).

A pickle of arrays in classes of JAX, Haiku and Optax, which are not needed: what they hold is read, their code never
runs. Names are Haiku's. Running statistics are bias-corrected averages of biased variances; they are taken as they are.
"""

from __future__ import annotations

import re

from torch import Tensor

from selfsight.checkpoints.format import Converted, Format, State, by_rules, counters, depth_of

ONLINE, TARGET, ONLINE_STATE, TARGET_STATE, OPTIMIZER = (rf"experiment_state\.{i}\." for i in range(5))

_RESNET = r"res_net\d+/~/"
_BLOCK = rf"{_RESNET}block_group_(\d)/~/block_(\d+)/~/"

#: (Haiku's module, ours without the network); the numbers are those of stage, block and layer
_MODULES = (
    (rf"{_RESNET}initial_conv", "conv1"),
    (rf"{_RESNET}initial_batchnorm", "bn1"),
    (rf"{_BLOCK}conv_(\d)", r"layer<\1>.\2.conv<\3>"),
    (rf"{_BLOCK}batchnorm_(\d)", r"layer<\1>.\2.bn<\3>"),
    (rf"{_BLOCK}shortcut_conv", r"layer<\1>.\2.downsample.0"),
    (rf"{_BLOCK}shortcut_batchnorm", r"layer<\1>.\2.downsample.1"),
)
_LAYERS = (("linear", "0"), ("batch_norm", "1"), ("linear_1", "3"))
_TENSORS = (("w", "weight"), ("b", "bias"), ("scale", "weight"), ("offset", "bias"))
_AVERAGES = ((r"/~/mean_ema\.average", "running_mean"), (r"/~/var_ema\.average", "running_var"))


def _rules(parameters: str, state: str, backbone: str, heads: dict[str, str]) -> list[tuple[str, str]]:
    modules = [(theirs, backbone + ours) for theirs, ours in _MODULES]
    modules += [(f"{head}/{layer}", f"{ours}.{i}") for head, ours in heads.items() for layer, i in _LAYERS]
    rules = [(rf"{parameters}{m}\.{w}", f"{ours}.{word}") for m, ours in modules for w, word in _TENSORS]
    return rules + [(f"{state}{m}{w}", f"{ours}.{word}") for m, ours in modules for w, word in _AVERAGES]


_rename = by_rules(
    *_rules(ONLINE, ONLINE_STATE, "backbone.", {"projector": "projector", "predictor": "predictor"}),
    *_rules(TARGET, TARGET_STATE, "target.module.0.", {"projector": "target.module.1"}),
)


def _our_name(name: str) -> str | None:
    found = _rename(name)
    return found and re.sub(r"<(\d)>", lambda number: str(int(number[1]) + 1), found)


def _laid_out(state: State) -> State:
    """Kernels from ``[h, w, in, out]`` and ``[in, out]``; the numbers of a norm in a row."""

    def value(name: str, tensor: Tensor) -> Tensor:
        if re.search(r"(bn\d|downsample\.1|projector\.1|predictor\.1|module\.1\.1)\.\w+$", name):
            return tensor.flatten()
        if tensor.ndim == 4:
            return tensor.permute(3, 2, 0, 1).contiguous()
        return tensor.T.contiguous() if tensor.ndim == 2 else tensor

    return counters({name: value(name, tensor) for name, tensor in state.items()})


class _Haiku(Format):
    def convert(self, state: dict[str, Tensor]) -> Converted:  # type: ignore[override]
        converted = super().convert(state)
        if not converted.unknown:
            depth, _ = depth_of(converted.state, "backbone.")
            width = converted.state["backbone.layer1.0.conv1.weight"].shape[0] // 64
            converted.spec = {"name": f"byol_resnet{depth}"} | ({"width": width} if width > 1 else {})
        return converted


BYOL = _Haiku(
    name="BYOL",
    project="google-deepmind/deepmind-research",
    marks=(rf"{ONLINE}{_RESNET}initial_conv\.w", rf"{ONLINE}predictor/linear_1\.w", rf"{TARGET}projector/linear_1\.w"),
    rename=_our_name,
    unused=(
        (rf"({ONLINE}|{TARGET})classifier\.[wb]", "a classifier"),
        (rf"({TARGET}|{TARGET_STATE})predictor/.+", "the target's predictor, which no loss reads"),
        (r".+_ema\.(counter|hidden)", "what running averages are made of"),
        (rf"{OPTIMIZER}.+", "state of the optimiser"),
        (r"step|rng", "records of the training"),
    ),
    method="byol",
    settings=lambda state: [
        f"method.hidden_dim={len(state['projector.0.weight'])}",
        f"method.dim={len(state['projector.3.weight'])}",
        f"method.predictor_dim={len(state['predictor.0.weight'])}",
    ],
    finish=_laid_out,
)
