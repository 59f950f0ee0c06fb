"""The options of commands that can run on many machines."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from mergekit_monosoup.cluster.connection import RayOptions


def ray_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--ray`, `--ray-cpus` and `--ray-gpus`, of which it is handed `cluster`, or None."""

    @click.option(
        "--ray", metavar="[ADDRESS|auto|local]", help="Run on a Ray cluster; `local` starts one here."
    )
    @click.option(
        "--ray-cpus", type=click.FloatRange(min=0, min_open=True), help="Processors a worker. [default: 1]"
    )
    @click.option(
        "--ray-gpus",
        type=click.FloatRange(min=0),
        help="GPUs a worker. [default: 1 where the work is done on GPUs]",
    )
    @wraps(command)
    def with_cluster(
        *arguments: Any, ray: str | None, ray_cpus: float | None, ray_gpus: float | None, **options: Any
    ) -> Any:
        if ray is None and (ray_cpus is not None or ray_gpus is not None):
            raise click.UsageError(
                "--ray-cpus and --ray-gpus say what a worker of a cluster takes; pass --ray too"
            )
        cluster = RayOptions(ray, ray_cpus, ray_gpus) if ray is not None else None
        return command(*arguments, cluster=cluster, **options)

    return with_cluster
