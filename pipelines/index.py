"""Build the index that a trained model is asked through, change it, or look at it.

    python pipelines/index.py build --config CONFIG [--checkpoint DIR] --output INDEX
    python pipelines/index.py build --config CONFIG --corpus photos/ --output INDEX
    python pipelines/index.py add --config CONFIG --corpus more/ --output INDEX
    python pipelines/index.py remove INDEX ID... | compact INDEX | inspect INDEX

Built again, it embeds what is new or has changed alone, and no longer holds what the corpus lacks;
``add`` leaves what is there. Exit status: 0 done; 2 bad input; 75 another process is at it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.runtime.command import run_job, run_main
from qure_core.runtime.settings import load_settings
from qure_core.search.index import INDEX_KIND
from qure_core.storage.lease import hold


def read() -> tuple[Settings, argparse.Namespace]:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--checkpoint", help="checkpoint to embed with (default: run.dir's newest)"
    )
    options.add_argument(
        "--corpus", help="folder of images or of packed shards (default: the configured data's)"
    )
    options.add_argument(
        "--metadata", help="Parquet, CSV or JSONL file with image_id and columns to filter by"
    )
    options.add_argument(
        "--if-newer", action="store_true", help="do nothing if this checkpoint is the index's"
    )
    options.add_argument("--output", help="the index: a path or URI (default: run.dir's index)")
    options.add_argument(
        "--stored",
        choices=("fp16", "fp32"),
        default="fp16",
        help="of embeddings (%(default)s)",
    )
    return load_settings(
        sys.argv[2:], f"pipelines/index.py {sys.argv[1]}", "Index a corpus of images.", options
    )


def build(arguments: tuple[Settings, argparse.Namespace]) -> None:
    from qure_core.model.checkpoint_files import checkpoint_digest, newest_checkpoint
    from qure_core.runtime.in_process import stages_in_process
    from qure_core.runtime.monitor import monitored
    from qure_core.runtime.resources import connect, plan_resources
    from qure_core.search.build import build_index
    from qure_core.search.corpus import read_corpus

    settings, chosen = arguments
    adding = sys.argv[1] == "add"
    if adding and chosen.corpus is None:
        raise InputError("--corpus: say where the images to add are")
    checkpoint = (
        storage.resolve(chosen.checkpoint)
        if chosen.checkpoint
        else newest_checkpoint(settings.run.dir)
    )
    output = storage.resolve(chosen.output or storage.join(settings.run.dir, "index")).rstrip("/")
    storage.check_place(output, INDEX_KIND, "output")
    storage.check_writable(output.rsplit("/", 1)[0], "output")
    source = chosen.corpus and storage.resolve(chosen.corpus)
    metadata = chosen.metadata and storage.resolve(chosen.metadata)
    if source and f"{output}/".startswith(f"{source.rstrip('/')}/"):
        raise InputError(f"output: {output} lies in the corpus {source}; choose a place beside it")
    if chosen.if_newer and storage.is_committed(output):
        manifest = storage.read_manifest(output, INDEX_KIND)
        if manifest["checkpoint_digest"] == checkpoint_digest(checkpoint):
            print(f"[index] made with this checkpoint already: {output}", flush=True)
            return
    connect()
    with (
        hold(output, "indexing") as lease,
        monitored(f"{output}.events.jsonl", "indexing", settings.resolved()),
        stages_in_process(settings.cluster),
    ):
        plan = plan_resources(settings.cluster)
        manifest = build_index(
            settings,
            plan,
            checkpoint,
            read_corpus(settings.data, source, metadata),
            output,
            stored=chosen.stored,
            keep_others=adding,
            check=lease.check,
        )
    print(describe(output, manifest), flush=True)


def describe(uri: str, manifest: dict[str, Any]) -> str:
    """An index in a few lines, for people."""
    each = manifest["tokens"] * manifest["width"] * (2 if manifest["stored"] == "fp16" else 4)
    made = manifest.get("faiss")
    searched = ["  search          exact: every image is scored"]
    if made:
        found = ", ".join(f"{made['recall'][top]:.4f} of the best {top}" for top in made["recall"])
        missed = min(made["recall"].values()) < made["recall_target"] - 0.01
        searched = [
            f"  search          FAISS {made['factory']}, {len(made['positions'])} of "
            f"{manifest['tokens']} vectors an image (they have {made['wins']['share']:.2%} of the "
            f"wins; {made['wins']['ever']} ever win)",
            f"  recall          {found}, by {made['nprobe']:,} of {made['lists']:,} lists, on "
            f"{made['recall_queries']:,} queries"
            + (f"; below search.recall {made['recall_target']}" if missed else ""),
        ]
    return "\n".join(
        [
            f"  images          {manifest['images']:>12,}",
            f"  embedded now    {manifest['embedded']:>12,}  in {manifest['seconds']:,.1f} s",
            f"  segments        {len(manifest['segments']):>12,}",
            f"  an image        [{manifest['tokens']}, {manifest['width']}] {manifest['stored']}, "
            f"{each:,} bytes; {each * manifest['images'] / 2**20:,.1f} MB in all",
            *searched,
            f"  checkpoint      {manifest['checkpoint']} ({manifest['checkpoint_digest'][:16]})",
            f"index: {uri}",
        ]
    )


def _named(verb: str, *ids: str) -> argparse.Namespace:
    """The index that the command names, with what else it names."""
    parser = argparse.ArgumentParser(prog=f"pipelines/index.py {verb}")
    parser.add_argument("index", help="an index: a path or URI")
    for name in ids:
        parser.add_argument(name, nargs="+", help=f"{name} of images")
    chosen = parser.parse_args(sys.argv[2:])
    chosen.index = storage.resolve(chosen.index).rstrip("/")
    chosen.manifest = storage.read_manifest(chosen.index, INDEX_KIND)  # it is one
    return chosen


def inspect() -> None:
    chosen = _named("inspect")
    print(describe(chosen.index, chosen.manifest), flush=True)


def remove() -> None:
    from qure_core.search.build import without_images

    chosen = _named("remove", "ids")
    with hold(chosen.index, "indexing") as lease:
        manifest = without_images(chosen.index, chosen.ids, lease.check)
    print(describe(chosen.index, manifest), flush=True)


def compact() -> None:
    from qure_core.runtime.in_process import stages_in_process
    from qure_core.search.compact import compacted

    uri = _named("compact").index
    # Small segments are little work, which no cluster is started for.
    here = Settings(cluster={"in_process": True, "gpus": "none"}).cluster
    with hold(uri, "indexing") as lease, stages_in_process(here):
        merged, removed = compacted(uri, lease.check)
    print(
        f"merged {merged:,} segment(s); removed {removed:,} part(s) that the newest version does "
        "not need"
    )


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in ("build", "add"):
        run_job("index", read, build)
    elif verb in (others := {"remove": remove, "compact": compact, "inspect": inspect}):
        run_main(others[verb])
    else:
        print(__doc__)
        sys.exit(0 if verb in ("-h", "--help") else 2)


if __name__ == "__main__":
    main()
