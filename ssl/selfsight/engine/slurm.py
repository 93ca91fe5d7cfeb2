"""What is asked of SLURM, where it runs a training."""

from __future__ import annotations

import os
import subprocess


def requeue() -> str:
    """Put the job of this process in SLURM's queue again; one task of an array for itself.

    Returns:
        What has become of it, in a sentence.
    """
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if job is None:
        return "requeue=true puts jobs of SLURM in their queue again, and this run is none: SLURM_JOB_ID is not set"
    name = job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", name], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        return f"scontrol requeue {name} did not put the job in its queue again: {str(said).strip()}"
    return f"SLURM has job {name} in its queue again"
