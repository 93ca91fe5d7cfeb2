"""All benchmarks, one after the other: all that was found into ``results/<machine>.json`` and, as a table, ``.md``.

``results/latest.json`` holds the ratios that have goals everywhere, whatever the machine: `HEADLINES`.

make bench                                   # its own environment with the peers, then this
python benchmarks/run.py --only views --rounds 9 --images DIR
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any import that starts threads
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("LIGHTLY_DID_VERSION_CHECK", "True")  # it would ask the network at import

RESULTS = Path(__file__).parent / "results"
HEADLINES = (
    "views_2x224_lightly",
    "views_multicrop_lightly",
    "worker_2x224_lightly",
    "worker_multicrop_lightly",
    "cifar_views_lightly",
    "cifar_views_kornia",
    "knn_lightly",
    "probe_sklearn",
    "spark_encoder",
    "spark_step",
    "e2e_simclr32_lightly",
    "e2e_simclr32_bf16_lightly",
    "e2e_multicrop96_lightly",
    "e2e_multicrop96_bf16_lightly",
    "e2e_simclr32_loop",
    "e2e_spark128_official",
    "quality_simclr32_lightly",
    "quality_simclr32_bf16_lightly",
    "quality_multicrop96_lightly",
    "quality_multicrop96_bf16_lightly",
)
FIGURES = ("ours", "peer", "ratio", "unit")
#: what a CPU computes with by Linux's word for it, the fastest first: processors of one name differ in it
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
PACKAGES = (
    "torch",
    "torchvision",
    "opencv-python-headless",
    "pillow",
    "simplejpeg",
    "lightly",
    "kornia",
    "albumentations",
    "scikit-learn",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="groups: " + ", ".join(GROUPS))
    parser.add_argument("--images", default=None, help="folder of JPEG files; without it, images are made up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1, help="of end_to_end's trainings whose quality is measured")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    import torch

    from selfsight.cpu_memory import keep_freed_memory

    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as in every run and its workers; the peers have the good of it, too
    unknown = set(options.only or ()) - set(GROUPS)
    if unknown:
        sys.exit(f"there is no group {', '.join(sorted(unknown))}; the groups are {', '.join(GROUPS)}.")
    everything = options.results / f"{machine_name()}.json"
    found = json.loads(everything.read_text()) if options.only and everything.is_file() else {}
    for name, group in GROUPS.items():
        if options.only and name not in options.only:
            continue
        start = time.perf_counter()
        rows = group(options)
        for row in rows:
            found[row["name"]] = {key: value for key, value in row.items() if key != "name"} | {"on": str(date.today())}
            print(f"{row['name']:<26} {row['ratio']:6.2f} x   {row['check']}", flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        options.results.mkdir(parents=True, exist_ok=True)
        everything.write_text(json.dumps(found, indent=2) + "\n")
        everything.with_suffix(".md").write_text(table(found, options.threads))
        latest = {name: {key: found[name][key] for key in FIGURES} for name in HEADLINES if name in found}
        (options.results / "latest.json").write_text(json.dumps(latest, indent=2) + "\n")


def rows(comparisons: list) -> list[dict]:
    """Comparisons as they stand in latest.json."""
    return [
        {
            "name": one.name, "ours": round(one.ours, 4), "peer": round(one.peer, 4), "ratio": round(one.ratio, 3),
            "unit": one.unit, "wall_ratio": round(one.wall, 3), "spread": round(one.spread, 3),
            "memory_mib": [round(value) for value in one.memory if any(one.memory)],
            "target": one.target, "check": one.check,
        }
        for one in comparisons
    ]  # fmt: skip


def run_views(options: argparse.Namespace) -> list[dict]:
    import cv2
    import views

    cv2.setNumThreads(options.threads)
    return rows(views.run(options.images, options.rounds))


def run_decoding(options: argparse.Namespace) -> list[dict]:
    import cv2
    import decoding

    cv2.setNumThreads(options.threads)
    return rows(decoding.run(options.images, options.rounds))


def run_evaluation(options: argparse.Namespace) -> list[dict]:
    import faiss

    import evaluation

    faiss.omp_set_num_threads(options.threads)
    return rows(evaluation.run(min(options.rounds, 3)))


def run_spark(options: argparse.Namespace) -> list[dict]:
    import spark

    return rows(spark.run("resnet50", "imagenet", 4, 224, 0.6, 768, min(options.rounds, 3)))


def run_step(options: argparse.Namespace) -> list[dict]:
    import step

    return rows([step.run(min(options.rounds, 3))])


def run_end_to_end(options: argparse.Namespace) -> list[dict]:
    import end_to_end

    return end_to_end.run(options.images, min(options.rounds, 2), options.minutes)


def run_gpu(options: argparse.Namespace) -> list[dict]:
    import gpu
    import torch

    if not torch.cuda.is_available():
        print("no GPU here: its throughput is not measured", flush=True)
        return []
    return gpu.run()


GROUPS: dict[str, Callable[[argparse.Namespace], list[dict]]] = {
    "views": run_views, "decoding": run_decoding, "evaluation": run_evaluation, "spark": run_spark, "step": run_step,
    "end_to_end": run_end_to_end, "gpu": run_gpu,
}  # fmt: skip


def machine() -> str:
    """``2-core Intel(R) Xeon(R) ..., AMX``: what it computes with, too, and the GPU's name where there is one."""
    import torch

    model, units = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        told = cpuinfo.read_text()
        names = re.findall(r"model name\s*:\s*(.+)", told)
        model = names[0] if names else model
        units = next((f", {name}" for flag, name in UNITS.items() if flag in told), "")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{len(os.sched_getaffinity(0))}-core {model}{units}{gpu}"


def machine_name() -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)", "", machine()).lower()).strip("-")


def table(found: dict[str, dict], threads: int) -> str:
    """The figures for people."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    lines = [
        f"# {machine()}",
        "",
        f"Medians of alternating rounds: CPU time on {threads} thread; `e2e_*` and `quality_*` wall time on all cores, "
        f"`gpu_*` on the GPU. {versions}.",
        "",
        "| benchmark | ours | peer | ratio | wall | target | MiB ours / peer | on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        memory = "{} / {}".format(*row["memory_mib"]) if row.get("memory_mib") else ""
        spread = f" ± {row['spread']:.2f}" if row.get("spread") else ""
        wall = f"{row['wall_ratio']:.2f}" if row.get("wall_ratio") else ""
        goal = row.get("target") or ""
        lines.append(
            f"| {name} | {row['ours']:.3f} {row['unit']} | {row['peer']:.3f} {row['unit']} "
            f"| {row['ratio']:.2f}{spread} | {wall} | {goal} | {memory} | {row.get('on', '')} |"
        )
    lines += ["", "What was checked before timing:", ""]
    lines += [f"- {name}: {row['check']}" for name, row in found.items()]
    return "\n".join(lines) + "\n"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
