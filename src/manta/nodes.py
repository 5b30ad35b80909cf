"""What every node of a joined cluster must be able to do, tried before a model is loaded anywhere."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from manta import __version__, manifest, storage
from manta.cluster import living_nodes
from manta.errors import UserError

_TRY_S = 120


def check_storage(places: Iterable[Path]) -> None:
    """On every node of a cluster of several: Manta is there in our version, and each of `places` can be used.

    That is: what this process wrote is read there, and a file can be written, read back, renamed (on a disk; stores
    cannot) and deleted. Raises UserError that names the nodes and what they said.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = living_nodes()
    if len(nodes) < 2:
        return
    wrong = []
    for place in dict.fromkeys(places):
        storage.make_folder(place)
        mark = place / f".manta-{uuid.uuid4().hex}"
        mark.write_text(mark.name, encoding="utf-8")
        try:
            tries = {}
            for node in nodes:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = ray.remote(try_storage).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
                tries[node["NodeManagerAddress"]] = task.remote(str(place), mark.name)
            for address, answer in tries.items():
                try:
                    version, problem = ray.get(answer, timeout=_TRY_S)
                    if version != __version__:
                        problem = f"has Manta {version}, and here is {__version__}"
                except ray.exceptions.RayError as error:  # also of a node that has no Manta, or no client of the store
                    problem = f"cannot try it: {str(error).strip().splitlines()[-1]}"
                if problem:
                    wrong.append(f"  node {address}: {place} {problem}")
        finally:
            with suppress(OSError):
                mark.unlink()
    if wrong:
        raise UserError(
            "Not every node can use the run's storage:\n"
            + "\n".join(wrong)
            + "\nSet --results_dir and --data_dir to folders that all nodes share, or to a URL such as s3://bucket/runs."
        )


def try_storage(place: str, mark: str) -> tuple[str, str | None]:
    """Manta's version on this node, and what is wrong with `place`, in which another node wrote the file `mark`."""
    try:
        folder = storage.place(place)
        mine = folder / f"{mark}-{uuid.uuid4().hex}"
        if manifest.read_text(folder / mark) != mark:
            return __version__, "does not give back what the driver wrote"
        mine.write_text(mine.name, encoding="utf-8")
        if manifest.read_text(mine) != mine.name:
            return __version__, "does not give back what it was given"
        if not storage.is_remote(folder):
            mine = mine.rename(mine.with_name(f"{mine.name}-renamed"))
        mine.unlink()
    except FileNotFoundError:
        return __version__, "does not hold what the driver wrote: it is another disk there"
    except Exception as error:  # of any store's client
        return __version__, f"cannot be written, read and renamed in: {type(error).__name__}: {error}"
    return __version__, None
