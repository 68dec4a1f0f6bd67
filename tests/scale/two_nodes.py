"""A harvest on a Ray cluster of two nodes, one of which dies: a row of ``python -m tests.scale --all``."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import graphlens
from graphlens import HookedTransformer
from tests.scale.ray_facts import CORPUS, NAMES, OPTIONS, digest


def row() -> str:
    """A harvest over two nodes has the bytes of one over one node, also when one of them dies while it goes on."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    other = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        model = HookedTransformer.from_pretrained("tiny-gpt2")
        with tempfile.TemporaryDirectory() as root:
            found = {}
            for name, workers in (("one", 1), ("three", 3)):
                out = Path(root) / name
                graphlens.harvest(model, CORPUS, NAMES, out, engine="ray", workers=workers, **OPTIONS)
                found[name] = digest(out)
            out = Path(root) / "died"

            def die() -> None:
                while len(list(out.glob("shard-*.safetensors"))) < 3:
                    time.sleep(0.005)
                cluster.remove_node(other, allow_graceful=False)

            threading.Thread(target=die, daemon=True).start()
            graphlens.harvest(model, CORPUS, NAMES, out, engine="ray", workers=2, **OPTIONS)
            found["died"] = digest(out)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len(set(found.values())) == 1, found
    return f"two nodes, one of which dies: {len(found)} harvests, the same bytes"


if __name__ == "__main__":
    print(row())
