"""The supervised contrastive loss (Khosla et al. 2020, equations 2 and 3) with the options of both authors' codes."""

from __future__ import annotations

import torch
from torch import Tensor

from selfsight.errors import UserError, nearest
from selfsight.nn.distributed import gather, gather_without_grad, rank
from selfsight.nn.precision import full_precision

CONTRAST_MODES = ("all", "one")
SUMMATIONS = ("out", "in")
DENOMINATORS = ("all", "one_positive", "only_negatives")


def supcon(features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None, **options: object) -> Tensor:
    """Mean of `supcon_per_anchor` over all anchors; those without a positive are 0 and count.

    Processes with equal shares: the mean of their losses is the loss of one process with the whole batch, and so are
    the gradients after data-parallel averaging.
    """
    return supcon_per_anchor(features, labels, mask, **options).mean()  # type: ignore[arg-type]


@full_precision
def supcon_per_anchor(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float,
    base_temperature: float | None,
    contrast_mode: str = "all",
    summation: str = "out",
    denominator: str = "all",
    positives_cap: int | None = None,
) -> Tensor:
    """Every anchor has to be nearer to all views of all images of its class than to the rest.

    With ``s(a,c) = f_a . f_c / T``, ``w(a,c)`` the weight of the pair (1 where the labels are equal, 0 else and for
    ``c = a``), ``W(a) = sum_c w(a,c)`` and ``A(a)`` everything but a:

    - ``out``: ``l(a) = - T/T_base  sum_c w(a,c) [s(a,c) - log D(a,c)] / W(a)``
    - ``in``:  ``l(a) = - T/T_base  log( sum_c w(a,c) exp s(a,c) / D(a,c) / W(a) )``

    ``D(a,c)`` is the sum of ``exp s(a,.)`` over A(a) (``all``), over c and the negatives (``one_positive``), or over
    the negatives (``only_negatives``). Features are compared as they are: normalise them before. Where all agree, the
    loss of ``all`` is ``T/T_base ln(V N - 1)``. An anchor with nothing to attract it, or nothing to compare with, is 0.

    Args:
        features: ``[N, V, ...]``, V views of the N images of this process, N equal on all; flattened to ``[N, V, D]``.
        labels: ``[N]`` int64; any numbers, only equality counts.
        mask: ``[N, M]`` weights of this process's images as anchors with the M images of all processes, in rank order;
            row: anchor. Entries of 0 are negatives. Neither labels nor mask: the other views of the image alone
            are positives, as in SimCLR.
        temperature, base_temperature: T and T_base, a mere scale of the loss; None is T_base = T, the plain equation.
        contrast_mode: anchors are ``all`` views, or ``one``: the first. Both are compared with all views.
        summation: ``out`` (equation 2, the better one) or ``in`` (equation 3).
        denominator: ``all``, ``one_positive`` or ``only_negatives``.
        positives_cap: most views of *other* images that are positives, a multiple of V; those of the first images of
            the class are kept, the rest is left out of the denominator too. None: all.

    Returns:
        ``[V, N]``, or ``[1, N]`` with ``contrast_mode="one"``.

    Raises:
        UserError: labels and mask together, wrong shapes, unknown options, a temperature that is not positive.
    """
    _check(features, labels, mask, temperature, base_temperature, positives_cap)
    _check_words(contrast_mode=contrast_mode, summation=summation, denominator=denominator)
    f = features.flatten(2)  # [N, V, D]
    keys = gather(f)  # [M, V, D]
    views = f.shape[1] if contrast_mode == "all" else 1
    anchors = f[:, :views].transpose(0, 1).flatten(0, 1)  # [A N, D], view by view
    s = anchors @ keys.transpose(0, 1).flatten(0, 1).T / temperature  # [A N, V M]

    m = _weights(labels, mask, len(f), len(keys), s.device)  # [N, M]
    w, negative = _of_views(m.to(s.dtype), views, f.shape[1], positives_cap)  # [A N, V M]
    log_p = s - log_denominator(s, w, negative, denominator)
    loss = equation_2(log_p, w) if summation == "out" else equation_3(log_p, w)  # [A N]

    defined = (w != 0).any(1)
    if denominator == "only_negatives":
        defined = defined & negative.any(1)
    scale = 1.0 if base_temperature is None else temperature / base_temperature
    return scale * loss.where(defined, torch.zeros_like(loss)).view(views, len(f))


def log_denominator(s: Tensor, w: Tensor, negative: Tensor, over: str) -> Tensor:
    """``log D(a,c)``: ``[R, 1]``, or ``[R, C]`` where it depends on c; of a row with nothing to sum over, any number.

    Args:
        s: ``[R, C]`` similarities divided by the temperature.
        w: ``[R, C]`` weights of the positives.
        negative: bool ``[R, C]``.
        over: see ``denominator`` of `supcon_per_anchor`.
    """
    if over == "all":
        return _logsumexp(s, negative | (w != 0))
    log_negatives = _logsumexp(s, negative)
    if over == "only_negatives":
        return log_negatives
    return torch.where(negative.any(1, keepdim=True), torch.logaddexp(s, log_negatives), s)


def equation_2(log_p: Tensor, w: Tensor) -> Tensor:
    """``- sum_c w(a,c) log p(a,c) / W(a)``: the mean over positives stands outside the logarithm.

    Args:
        log_p: ``[R, C]``, log-probability of each pair: rows are anchors, columns what they are compared with.
        w: ``[R, C]`` weights of the pairs.

    Returns:
        ``[R]``.
    """
    return -(w * log_p).sum(1) / _total(w)


def equation_3(log_p: Tensor, w: Tensor) -> Tensor:
    """``- log( sum_c w(a,c) p(a,c) / W(a) )``: the mean over positives stands inside. See `equation_2`."""
    attracted = w > 0
    return _total(w).log() - _logsumexp(log_p + w.where(attracted, torch.ones_like(w)).log(), attracted)[:, 0]


def _total(w: Tensor) -> Tensor:
    """W ``[R]``; 1 for an anchor without positives."""
    W = w.sum(1)
    return W.where(W >= 1e-6, torch.ones_like(W))


def by_image(rows: Tensor, views: int) -> Tensor:
    """``[V N, D]``, view by view as networks see a batch, to ``[N, V, D]``."""
    return rows.unflatten(0, (views, -1)).transpose(0, 1)


def _own(N: int, device: torch.device) -> Tensor:
    """``[N]``: where this process's images stand among those of all."""
    return torch.arange(N, device=device) + rank() * N


def _weights(labels: Tensor | None, mask: Tensor | None, N: int, M: int, device: torch.device) -> Tensor:
    """``[N, M]``: how much each image of all processes attracts each image of this one."""
    if mask is not None:
        if mask.shape[1] != M:
            raise UserError(
                f"SupCon's mask is {[*mask.shape]} and {M} images are compared; give a column for each, in rank order."
            )
        return mask
    if labels is not None:
        return labels[:, None] == gather_without_grad(labels)
    return _own(N, device)[:, None] == torch.arange(M, device=device)


def _of_views(m: Tensor, anchors: int, views: int, cap: int | None) -> tuple[Tensor, Tensor]:
    """From images ``m [N, M]`` to their views ``[A N, V M]``: weights w, and bool: which are negatives.

    A view is neither for itself. Positives beyond ``cap`` views of other images are neither, too.
    """
    own = _own(len(m), m.device)
    kept = m if cap is None else m * _first(m, own, cap // views)
    itself = (own + m.shape[1] * torch.arange(anchors, device=m.device)[:, None]).flatten()  # [A N]
    w = kept.repeat(anchors, views).scatter(1, itself[:, None], 0.0)
    negative = (m == 0).repeat(anchors, views).scatter(1, itself[:, None], False)
    return w, negative


def _first(m: Tensor, own: Tensor, count: int) -> Tensor:
    """Bool ``[N, M]``: each image itself, and its first ``count`` other positives."""
    itself = torch.zeros_like(m, dtype=torch.bool).scatter(1, own[:, None], True)
    other = (m != 0) & ~itself
    return itself | (other & (other.cumsum(1) <= count))


def _logsumexp(s: Tensor, among: Tensor) -> Tensor:
    """``[R, 1]`` over the entries of each row that ``among`` names; of a row without any, a number without meaning."""
    none = ~among.any(1, keepdim=True)
    return s.masked_fill(~(among | none), -torch.inf).logsumexp(1, keepdim=True)


def _check_words(**chosen: str) -> None:
    known = {"contrast_mode": CONTRAST_MODES, "summation": SUMMATIONS, "denominator": DENOMINATORS}
    for name, value in chosen.items():
        if value not in known[name]:
            words = known[name]
            raise UserError(f"SupCon's {name} is '{value}'; one of {', '.join(words)}.{nearest(value, words)}")


def _check(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    base_temperature: float | None,
    positives_cap: int | None,
) -> None:
    if features.ndim < 3:
        raise UserError(
            f"SupCon was given features {[*features.shape]}; it needs [N, V, D], with V views of each image: "
            "`by_image` brings [V N, D] into that order."
        )
    N, V = features.shape[:2]
    if labels is not None and mask is not None:
        raise UserError("SupCon was given labels and a mask; both say which images belong together, so give one.")
    if labels is not None and labels.shape != (N,):
        raise UserError(f"SupCon was given labels {[*labels.shape]} for {N} images; give one label an image, [{N}].")
    if mask is not None and (mask.ndim != 2 or len(mask) != N):
        raise UserError(f"SupCon was given a mask {[*mask.shape]} for {N} images; give one row an image.")
    if temperature <= 0 or (base_temperature is not None and base_temperature <= 0):
        raise UserError(
            f"SupCon's temperature is {temperature} and its base_temperature {base_temperature}; both have to be above "
            "0 (0.1 and 0.07 in the authors' CIFAR recipe), or the latter null."
        )
    if positives_cap is not None and (positives_cap < 0 or positives_cap % V):
        raise UserError(
            f"SupCon's positives_cap is {positives_cap}; it counts views, so give a multiple of the {V} views, or null."
        )
