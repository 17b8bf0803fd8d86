"""A user's walk through the pipelines with data of their own, well and badly used.

    python tests/support/walkthrough.py [DIRECTORY]

Draws 60 images and writes triplets.jsonl beside them; trains, evaluates, mines and looks at what
came out; and does on the way what people do: names a directory with files in it, damages weights,
misspells, interrupts. Every step has an expected exit status, what must be said, and, where it
fails, at most 12 lines of output. Nothing of the user's may be lost. Prints a line a step; ends
with 1 if one went otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
from forked import run_script
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests/goldens"
MOST_LINES = 12
NOISE = ("core_worker", "TrainingReport", "pid=", "Traceback", "Warning:", "raylet")
COLOURS = {"red": "#c22", "green": "#2a5", "blue": "#35c", "yellow": "#dc4", "grey": "#888"}
SHAPES = ("disc", "square", "bar")


class Walk:
    """The steps, how they went, and the files that must be what they were."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.failed: list[str] = []
        self.kept: dict[Path, bytes] = {}
        self.started = time.monotonic()

    def keep(self, *names: str) -> None:
        """Put files of the user's own there."""
        for name in names:
            path = self.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"mine, {name}".encode())
            self.kept[path] = path.read_bytes()

    def command(self, name: str, *arguments: str) -> list[str]:
        if name.endswith(".py"):
            return [sys.executable, str(ROOT / name), *arguments]
        if name == "convert":
            return [sys.executable, "-m", "qure_core.model.convert", *arguments]
        return [sys.executable, str(ROOT / f"pipelines/{name}.py"), *arguments]

    def step(
        self,
        what: str,
        status: int,
        *command: str,
        says: tuple[str, ...] = (),
        never: tuple[str, ...] = (),
        seconds: float = 240,
        long: bool = False,
        **environment: str,
    ) -> None:
        """Run a command; note whether it ended as it should."""
        began = time.monotonic()
        _, script, *arguments = self.command(*command)
        if script == "-m":
            done = subprocess.run(
                self.command(*command),
                capture_output=True,
                text=True,
                check=False,
                cwd=self.home,
                env=os.environ | environment,
                timeout=seconds + 60,
            )
        else:
            done = run_script(Path(script), arguments, self.home, seconds + 60, environment)
        self.judge(
            *(what, status, done.returncode, done.stdout + done.stderr),
            *(says, never, began, seconds, long),
        )

    def judge(
        self,
        what: str,
        status: int,
        found: int,
        output: str,
        says: tuple[str, ...],
        never: tuple[str, ...],
        began: float,
        seconds: float,
        long: bool = False,
    ) -> None:
        took = time.monotonic() - began
        faults = [] if found == status else [f"status {found}, expected {status}"]
        faults += [f"does not say {text!r}" for text in says if text not in output]
        faults += [f"says {text!r}" for text in (*NOISE, *never) if text in output]
        lines = output.splitlines()
        if long:
            lines = [line for line in lines if not line.startswith("[")]  # what it did before
        if status and len(lines) > MOST_LINES:
            faults.append(f"{len(lines)} lines of output")
        if took > seconds:
            faults.append(f"took {took:.0f} s, at most {seconds:.0f}")
        faults += [
            f"{path} is no longer what it was"
            for path, data in self.kept.items()
            if not path.is_file() or path.read_bytes() != data
        ]
        print(f"{'BAD ' if faults else 'ok  '} {found:>4} {took:6.1f} s  {what}", flush=True)
        if faults:
            self.failed.append(what)
            print("\n".join(f"       {fault}" for fault in faults), flush=True)
            print("\n".join(f"       | {line}" for line in output.splitlines()[-30:]), flush=True)

    def check(self, what: str, good: bool) -> None:
        print(f"{'ok  ' if good else 'BAD '}      {what}", flush=True)
        if not good:
            self.failed.append(what)

    def interrupted(self, what: str, mark: str, says: tuple[str, ...], *command: str) -> None:
        """Start a command, press Ctrl-C a second after it printed ``mark``."""
        process = subprocess.Popen(
            self.command(*command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.home,
            start_new_session=True,
            # A shell gives what it starts in the background a Ctrl-C that does nothing.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if mark in line:
                break
        time.sleep(1)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate()
        last = "interrupted; the same command goes on"
        says = (*says, last)
        self.judge(what, 130, process.returncode, output + rest, says, (), began, 5, True)


def draw(home: Path) -> None:
    """60 images of coloured shapes and triplets that change one thing."""
    images = home / "own/images"
    images.mkdir(parents=True)
    captions: dict[str, str] = {}
    by: dict[tuple[str, str], list[str]] = {}
    for number in range(60):
        colour, shape = list(COLOURS)[number % 5], SHAPES[number // 5 % 3]
        picture = Image.new("RGB", (48, 64), "#eee")
        box = (8 + number % 7, 10, 36, 38 + number % 11)
        {"disc": ImageDraw.Draw(picture).ellipse}.get(shape, ImageDraw.Draw(picture).rectangle)(
            box if shape != "bar" else (4, 24, 44, 32), fill=COLOURS[colour]
        )
        name = f"p{number:02d}"
        picture.save(images / f"{name}.png")
        captions[name] = f"a {colour} {shape}"
        by.setdefault((colour, shape), []).append(name)
    rows = []
    for number in range(56):
        colour, shape = list(COLOURS)[number % 5], SHAPES[number % 3]
        other = list(COLOURS)[(number + 1 + number // 15) % 5]
        split = "val" if number % 4 == 3 else "train"
        # The last of each kind is only ever named by val.
        place = 3 if split == "val" else number % 3
        relevant = by[other, shape]
        rows.append(
            {"reference": by[colour, shape][place], "text": f"in {other}", "split": split}
            | {"target": relevant[place]}
            | {"relevant": relevant if split == "val" else relevant[:3]}
        )
    (home / "own/triplets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "own/descriptions.json").write_text(json.dumps(captions))


def change(home: Path, name: str, alter: Callable[[list[Any]], list[Any]]) -> str:
    """A copy of the data with other rows; returns its data.root."""
    copy = home / name
    shutil.copytree(home / "own", copy)
    file = copy / "triplets.jsonl"
    rows = alter([json.loads(line) for line in file.read_text().splitlines()])
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"--data.root={copy}"


def damaged(checkpoint: Path, copy: Path) -> None:
    """The checkpoint with one NaN, committed again as if it had been trained so."""
    shutil.copytree(checkpoint, copy)
    weights = load_file(copy / "model.safetensors")
    weights["text_proj.weight"][0, 0] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((copy / "manifest.json").read_text())
    data = (copy / "model.safetensors").read_bytes()
    manifest["files"]["model.safetensors"] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (copy / "manifest.json").write_text(json.dumps(manifest))


def walk(home: Path) -> list[str]:
    w = Walk(home)
    draw(home)
    config = ["--config", str(ROOT / "configs/jsonl.yaml"), "--data.root=own"]
    # Small enough for a test; still every stage.
    quick = ["--pretrain.epochs=1", "--train.epochs=2", "--train.warmup_epochs=1"]
    quick += ["--train.mining_definitions=2", "--cluster.gpus=none", "--report.examples=2"]
    run, options = "--run.dir=runs/a", [*config, *quick]
    here = "--cluster.in_process=true"  # one whole run with workers is enough
    checkpoint = "--checkpoint=runs/a/checkpoints/train-0002"

    print("own data from end to end")
    w.step("validate own data", 0, "prepare", "validate", *config, says=("0 problem(s)",))
    w.step(
        "a first attempt with wrong weights",
        *(2, "train", *options, run, "--model.pretrained=nowhere"),
        says=("model.pretrained: cannot load 'nowhere'",),
    )
    w.step(
        "the same run directory with corrected settings",
        *(0, "train", *options, run),
        says=(
            "only other splits name are not in the training corpus",
            "mining rounds: 1",
            "report:        ",
        ),
    )
    rounds = home / "runs/a/rounds/epoch-0001"
    w.check("pyarrow reads a mined set as it lies", pq.read_table(rounds).num_rows == 42)
    evaluate = ["evaluate", "--protocol=own", *config, "--output=results"]
    w.step("evaluate own", 0, *evaluate, checkpoint, says=("relevance", "R@10"))
    w.step("look at a query", *(0, "mine", "inspect", str(rounds), "--query=train.000001"))
    w.step(
        "the finished run again, without its settings",
        *(2, "train", *config, run),
        says=("runs/a/config.yaml",),
        never=("remove",),
    )
    w.step(
        "the finished run again, with its own config",
        *(0, "train", "--config=runs/a/config.yaml"),
        says=("goes on from checkpoint train-0002 of 2 epochs",),
    )
    without = change(home, "noval", lambda rows: [r for r in rows if r["split"] == "train"])
    w.step(
        "no val split",
        *(0, "train", *options, without, "--run.dir=runs/noval", "--train.negatives=random"),
        *("--pretrain.epochs=0", "--train.epochs=1", "--train.mining_definitions=1", here),
        says=("there is no val split: evaluations and their figures are skipped", "report:"),
    )

    print("files of the user's own")
    w.keep("photos/a.jpg", "photos/deep/b.jpg", "round/part-00000.parquet", "round/manifest.json")
    w.keep("proj/data/train/0.png", "proj/data/val/1.png", "proj/tensorboard/e", "proj/config.yaml")
    w.keep("proj/ray_train/x", "results2/own.json", "curve.png", "cirr/data/train/0/x.png")
    mine = ["mine", *config, checkpoint]
    w.step("mine into photos", 2, *mine, "--output=photos", says=("a.jpg",))
    w.step("mine into a look-alike", 2, *mine, "--output=round", says=("manifest.json",))
    w.step("mine into the data", 2, *mine, "--output=own", says=("is not part of a mined set",))
    golden = ["convert", str(GOLDENS / "model_tiny.pth")]
    w.step("convert into photos", 2, *golden, "photos", says=("photos holds", "a.jpg"))
    trained = "runs/a/checkpoints/train-0002"
    w.step("convert over a checkpoint", 2, *golden, trained, says=("holds another checkpoint",))
    w.step("train in a project", *(2, "train", *options, "--run.dir=proj"), says=("config.yaml",))
    cirr = ["--data.format=cirr", "--data.root=cirr/data", "--run.dir=cirr"]
    w.step("train around its data", 2, "train", *cirr, says=("lies where a run",))
    results = [*evaluate[:-1], "--output=results2", checkpoint]
    w.step("results over a file", 2, *results, says=("own.json",))
    world = ["prepare", "world", "--data.root=own"]
    w.step("draw the world over own data", 2, *world, says=("holds files of another dataset",))
    inspect = ["mine", "inspect", str(rounds), "--query=train.000001", "--picture=curve.png"]
    w.step("a picture over a picture", 2, *inspect, says=("curve.png exists already",))

    print("numbers that would be wrong")
    damaged(home / "runs/a/checkpoints/train-0002", home / "nan")
    finite = ("nan: 1 of", "text_proj.weight are not finite")
    w.step("evaluate a NaN", 2, *evaluate, "--checkpoint=nan", says=finite, never=("R@10",))
    w.step(
        "mine a NaN",
        *(2, "mine", *config, "--checkpoint=nan", "--output=from-nan"),
        says=finite,
    )
    w.check("nothing was made of it", not (home / "from-nan/_manifest.json").exists())
    w.step("an infinite rate", *(2, "train", *config, "--train.lr=1e400"), says=("train.lr",))
    astray = ["train", *options, "--run.dir=runs/e", "--pretrain.epochs=0", "--train.lr=1e30"]
    w.step("a rate that leads astray", 2, *astray, here, says=("; lower train.lr",), long=True)
    w.step(
        "a warm-up that takes it all",
        *(2, "train", *config, "--train.warmup_epochs=6", "--data.root=nowhere"),
        says=("warning: no negatives are mined",),
    )
    w.step(
        "a small model at the paper's rate",
        *(2, "train", *config, "--train.lr=5e-6", "--data.root=nowhere"),
        says=("warning: train.lr 5e-06 is a rate for pretrained weights",),
    )
    w.step(
        "categories that are not there",
        *(2, "train", *options, "--run.dir=runs/c", "--data.categories=shoes"),
        says=("data.categories", "no rows of shoes (found: all)"),
    )
    picture = home / "own/images/p00.png"
    whole = picture.read_bytes()
    Image.new("RGB", (48, 64), "#f0f").save(picture)
    w.step(
        "pixels replaced before a resumption",
        *(2, "train", "--config=runs/a/config.yaml"),
        says=("1 image(s) are not what they were when this run began", "p00.png"),
    )
    picture.write_bytes(whole)
    fashion = home / "world"
    small = ["--data.world.images=180", "--data.world.images_per_combination=3"]
    small += ["--data.world.train_triplets=30", "--data.world.val_triplets=12"]
    small += ["--data.world.image_size=32", f"--data.root={fashion}"]
    w.step("draw a small world", 0, "prepare", "world", *small)
    w.step(
        "FashionIQ's protocol on other data",
        *(0, "evaluate", "--protocol=fashioniq", f"--data.root={fashion}", checkpoint),
        *("--output=results3",),
        says=("R@10",),
        never=("published",),
    )

    print("rows as people write them")
    validate = ["prepare", "validate", *config]
    bad = [
        ({"relevant": None}, "[line 1]: relevant is not a list of image names: None"),
        ({"relevant": "p01"}, "[line 2]: relevant is not a list of image names: 'p01'"),
        ({"relevant": []}, "[line 3]: relevant is empty"),
        ({"relevant": ["zz"]}, "[line 4]: relevant names 1 unknown image(s), first 'zz'"),
        ({"split": None}, "[line 5]: 'split' is a NoneType: None"),
        ({"category": None}, "[line 6]: 'category' is a NoneType: None"),
        ({"target": "images/p01"}, "write 'p01': names begin below it"),
    ]

    def wrong(rows: list[Any]) -> list[Any]:
        return [*(row | part for row, (part, _) in zip(rows, bad, strict=False)), *rows[len(bad) :]]

    def odd(rows: list[Any]) -> list[Any]:
        first = "\ufeff" + json.dumps(rows[0] | {"text": "one\u2028two\u0085"}, ensure_ascii=False)
        suffix = rows[3] | {"reference": f"{rows[3]['reference']}.png"}
        some = [rows[1] | {"split": "Train"}, rows[2] | {"split": "valid"}, suffix]
        return [first, *some, *rows[4:]]

    root = change(home, "wrong", wrong)
    texts = tuple(text for _, text in bad)
    w.step("rows of every wrong kind", 65, *validate, root, says=texts, long=True)
    root = change(home, "odd", odd)
    unread = ("0 problem(s)", "not read: 'Train' (1 rows), 'valid' (1 rows)")
    w.step("a byte order mark, odd separators and splits", 0, *validate, root, says=unread)
    odds = {"huge.png": "30000 x 30000 pixels", "page.png": "it is a web page"}
    Image.new("1", (30_000, 30_000)).save(home / "own/images/huge.png")
    (home / "own/images/page.png").write_text("<html>not found</html>")
    w.step(
        "a picture too large and a page for a picture",
        *(65, *validate),
        says=("data.max_image_pixels", *odds, *odds.values()),
        never=("bomb", "BytesIO"),
    )
    for name in odds:
        (home / "own/images" / name).unlink()

    print("failures")
    w.step("a config that is a folder", *(2, "train", "--config=own"), says=("Is a directory",))
    w.step("convert without heads", 2, *golden, "new", says=("-heads: how many",))
    (home / "text.pth").write_text("hello")
    w.step("convert a text file", *(2, "convert", "text.pth", "new"), says=("text.pth: not a",))
    tokenizer = home / "tokenizer"
    make_tokenizer(tokenizer)
    heads = ["--vision-heads=4", "--qformer-heads=4", f"--tokenizer={tokenizer}"]
    w.step("convert with other words", 2, *golden, "new", *heads, says=("[DEC] included",))
    (home / "values.yaml").write_text("schedule: nonsense\n")
    render = ["cluster/render.py", "all", "--values=values.yaml"]
    w.step("render bad values", 2, *render, says=("schedule: not right", "image: Field required"))
    w.step("render nothing", *(2, "cluster/render.py", "all", "--values=none"), says=("No such",))
    w.step(
        "a cluster that nobody answers for",
        *(2, *validate),
        says=("RAY_ADDRESS: no Ray cluster at 127.0.0.1:1 in 30 s",),
        seconds=45,
        RAY_ADDRESS="127.0.0.1:1",
    )
    w.step("no home", *(0, *validate), HOME="/dev/null/home", RAY_ADDRESS="local")
    deleted_while_training(w, [*options, "--run.dir=runs/d"])

    print("interruption")
    w.interrupted(
        "Ctrl-C without a config",
        "[prepare]",
        ("no --config: taking configs/quickstart.yaml",),
        *("train", f"--run.dir={home}/runs/quick", f"--data.root={fashion}-2"),
    )
    print(f"{len(w.failed)} of the steps went otherwise; {time.monotonic() - w.started:.0f} s")
    return w.failed


def make_tokenizer(folder: Path) -> None:
    from qure_core.model import learn_tokenizer

    letters = [chr(97 + number) for number in range(26)]
    texts = [first + second for first in letters for second in letters]
    learn_tokenizer(texts, 700).save_pretrained(folder)


def deleted_while_training(w: Walk, options: list[str]) -> None:
    """Remove an image once the first epoch has been trained on it; nothing is kept in memory."""
    copy = w.home / "gone"
    shutil.copytree(w.home / "own", copy)
    command = w.command(
        *("train", *options, f"--data.root={copy}", "--cluster.image_cache_mb=0"),
        *("--pretrain.epochs=0", "--train.epochs=60", "--train.negatives=random"),
        "--train.warmup_epochs=1",
    )
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=w.home
    )
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if "[train] epoch 3/60: loss" in line:
            (copy / "images/p06.png").unlink()
            break
    began = time.monotonic()
    rest, _ = process.communicate()
    says = ("images/p06.png: image file is missing",)
    w.judge(
        *("an image deleted while training", 2, process.returncode, output + rest),
        *(says, (), began, 60, True),
    )
    w.check("its line comes last", "image file is missing" in (output + rest).splitlines()[-1])


def main() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Every command joins one Ray, as on a standing cluster; those that must start their own do.
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    if sys.argv[1:]:
        home = Path(sys.argv[1]).resolve()
        home.mkdir(parents=True)
        return 1 if walk(home) else 0
    with tempfile.TemporaryDirectory(prefix="walk") as folder:
        return 1 if walk(Path(folder)) else 0


if __name__ == "__main__":
    sys.exit(main())
