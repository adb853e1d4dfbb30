"""Does a model that learns its chunks read bytes as well as others, and what are the chunks?

    python scripts/hnet_study.py --workdir=runs/hnet_study

Trains `configs/hnet_study.py:<name>` for H-Net, a byte transformer and a transformer on tokens of
byte-pair encoding, all at equal FLOPs per byte on the standard library's sources, scores them on
held-out files, clean and with noise in their characters, compares the learned boundaries with the
starts of words, and writes docs/results/hnet.md with two pictures. Finished runs are not run again.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from result_page import markdown_table, new_figure, save_figure, write_page

from effattn.batch import whole_rows
from effattn.commands.run_directory import open_run
from effattn.config import load_config
from effattn.data.config import DataConfig
from effattn.data.pipeline import Dataset, open_dataset
from effattn.data.tokenizer import ByteTokenizer
from effattn.evaluate import evaluate
from effattn.experiment import Experiment
from effattn.inspection import draw, inspect, on_places, spaces, word_starts
from effattn.train.flops import forward_flops
from effattn.train.loop import train
from effattn.versions import provenance

NAMES = ("hnet", "transformer", "bpe")
WORDS = {"hnet": "H-Net", "transformer": "transformer, bytes", "bpe": "transformer, BPE tokens"}
VOCAB_SIZE = 1024  # of the tokens
NOISE = (0.0, 0.02, 0.05, 0.1)
NOISY_BYTES = 120_000  # of held-out text that noise is put into
ROW = 1024  # bytes that the boundaries are counted in at once
SHOWN = 900  # bytes in the picture

PAGE = """\
# H-Net: learned chunks against bytes and tokens

![bits per byte, clean and under noise]({picture})

Sources of the Python standard library. {steps} steps of Muon, {bytes:.2f} M bytes; all models
spend about {flops:.1f} MFLOP on a byte in a forward pass (H-Net at its target of {target:g} bytes
per chunk). Bits per byte on all held-out files; under noise on {noisy:,} bytes of them, of which a
share of the letters is dropped, doubled or replaced. "BPE" is byte-pair encoding of {vocab:,}
tokens, {per_token:.2f} bytes each on held-out text.

{table}

## Where chunks begin

![chunks]({chunks})

{boundaries}

{made}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/hnet_study"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/hnet.md"))
    parser.add_argument("--steps", type=int, help="default: the config's; another table of runs")
    arguments = parser.parse_args()
    bytes_of_text = open_dataset(load_config("hnet_study:hnet").data)
    tokenizer = train_tokenizer(bytes_of_text, arguments.workdir)
    noisy = {rate: add_noise(bytes_of_text, rate, arguments.workdir) for rate in NOISE}

    found: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        experiment = load_config(f"hnet_study:{name}")
        run = arguments.workdir / name
        if name == "bpe":
            experiment.data.tokenizer = str(tokenizer)
        if arguments.steps is not None:
            experiment.train.steps = arguments.steps
            run = run.with_name(f"{name}_{arguments.steps}")
        result = train(experiment, run)
        if result["status"] != "finished":
            raise SystemExit("stopped; the same command goes on")
        found[name] = measure(experiment, run, result, noisy)
        print(f"{name}: {found[name]}", flush=True)
    model = open_run(str(arguments.workdir / run_name("hnet", arguments.steps)), None).model
    command = "python scripts/hnet_study.py"
    command += "" if arguments.steps is None else f" --steps {arguments.steps}"
    write(found, model, bytes_of_text, arguments.page, provenance(command))


def run_name(name: str, steps: int | None) -> str:
    return name if steps is None else f"{name}_{steps}"


def measure(
    experiment: Experiment, run: Path, result: dict[str, Any], noisy: dict[float, Path]
) -> dict[str, Any]:
    opened = open_run(str(run), None)
    data = experiment.data
    by_noise = [noisy_bits(opened.model, data, folder) for folder in noisy.values()]
    dataset = open_dataset(data)
    per_token = dataset.bytes_per_token("validation")
    flops = forward_flops(experiment.model, vocab_size=opened.vocab_size, seq_len=data.seq_len)
    assert flops is not None and per_token is not None
    return {
        "parameters": result["parameters"],
        "steps": experiment.train.steps,
        "bytes": result["tokens"] * per_token,
        "bytes_per_token": per_token,
        "flops_per_byte": flops / per_token,
        "bits_per_byte": result["validation"]["bits_per_byte"],
        "noise": by_noise,
    }


def noisy_bits(model: Any, data: DataConfig, folder: Path) -> float:
    """Bits per byte of all documents in a folder, to which nothing has been fitted."""
    sizes = {"batch_size": data.batch_size, "seq_len": data.seq_len, "tokenizer": data.tokenizer}
    dataset = open_dataset(DataConfig(source=str(folder), validation_fraction=0.5, **sizes))
    parts = []
    for split in ("train", "validation"):
        bits, size = evaluate(model, dataset, split).bits_per_byte, dataset.num_bytes(split)
        assert bits is not None and size is not None
        parts.append((bits * size, size))
    return sum(bits for bits, _ in parts) / sum(size for _, size in parts)


def train_tokenizer(dataset: Dataset, workdir: Path) -> Path:
    """Byte-pair encoding fitted to the training split; the file is kept and used again."""
    path = workdir / "tokenizer.json"
    if path.exists():
        return path
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text.decode("utf-8", "replace") for text in documents(dataset, "train"))
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def documents(dataset: Dataset, split: str) -> list[bytes]:
    """The documents of a split of a corpus of bytes."""
    tokens = np.asarray(dataset.parts[0].tokens[split])
    ends = np.flatnonzero(tokens == ByteTokenizer.end_of_document)
    return [part[part < 256].astype(np.uint8).tobytes() for part in np.split(tokens, ends)]


def add_noise(dataset: Dataset, rate: float, workdir: Path) -> Path:
    """A folder of held-out documents, a share `rate` of whose letters is tampered with."""
    folder = workdir / f"noise_{rate:g}"
    folder.mkdir(parents=True, exist_ok=True)
    draw, written = np.random.default_rng(0), 0
    for number, document in enumerate(documents(dataset, "validation")):
        text = document[: NOISY_BYTES - written]
        written += len(text)
        if text:
            (folder / f"{number}.txt").write_bytes(tampered(text, rate, draw))
    return folder


def tampered(text: bytes, rate: float, draw: np.random.Generator) -> bytes:
    """Every letter is, with probability `rate`, dropped, doubled or replaced by another."""
    out = bytearray()
    for byte in text:
        if not chr(byte).isalpha() or byte >= 128 or draw.random() >= rate:
            out.append(byte)
            continue
        match int(draw.integers(3)):
            case 1:
                out += bytes([byte, byte])
            case 2:
                out.append(int(draw.choice(list(b"abcdefghijklmnopqrstuvwxyz"))))
    return bytes(out)


def boundary_table(model: Any, text: bytes) -> str:
    """Per stage: bytes per chunk, and how boundaries meet the places where words start."""
    rows = [text[i : i + ROW] for i in range(0, len(text) - ROW + 1, ROW)]
    tokens = np.stack([np.frombuffer(row, np.uint8) for row in rows]).astype(np.int32)
    found = jax.device_get(model.boundaries(tokens, whole_rows(tokens)))
    table = []
    for stage, boundaries in enumerate(found):
        begins = np.asarray(boundaries.begins)
        for name, places_of in (("word starts", word_starts), ("spaces before words", spaces)):
            pairs = [on_places(b, places_of(row)) for b, row in zip(begins, rows, strict=True)]
            hit, chance, covered = np.mean(pairs, axis=0)
            size = begins.size / begins.sum()
            cells = [str(stage), f"{size:.2f}", name]
            table.append([*cells, f"{hit:.3f}", f"{chance:.3f}", f"{covered:.3f}"])
    header = ["stage", "bytes per chunk", "places", "boundaries there", "bytes that are (chance)"]
    return markdown_table([*header, "of them boundaries"], table)


def write(
    found: dict[str, dict[str, Any]], model: Any, dataset: Dataset, page: Path, made: str
) -> None:
    text = max(documents(dataset, "validation"), key=len)
    picture, chunks = page.with_suffix(".png"), page.with_name(f"{page.stem}_chunks.png")
    start = len(text) // 2
    inspected = inspect(model, text[start : start + SHOWN], ByteTokenizer())
    save_figure(draw(inspected), chunks)
    save_figure(curves(found), picture)
    header = ["model", "parameters", "MFLOP per byte", "M bytes seen", "bits per byte"]
    rows = [
        [
            WORDS[name],
            f"{point['parameters']:,}",
            f"{point['flops_per_byte'] / 1e6:.2f}",
            f"{point['bytes'] / 1e6:.2f}",
            f"{point['bits_per_byte']:.3f}",
            *(f"{bits:.3f}" for bits in point["noise"]),
        ]
        for name, point in found.items()
    ]
    one = found["hnet"]
    write_page(
        page,
        PAGE.format(
            picture=picture.name,
            chunks=chunks.name,
            steps=one["steps"],
            bytes=one["bytes"] / 1e6,
            flops=one["flops_per_byte"] / 1e6,
            target=load_config("hnet_study:hnet").model.targets[0],
            noisy=NOISY_BYTES,
            vocab=VOCAB_SIZE,
            per_token=found["bpe"]["bytes_per_token"],
            table=markdown_table([*header, *(f"noise {rate:.0%}" for rate in NOISE)], rows),
            boundaries=boundary_table(model, text[:65536]),
            made=made,
        ),
    )


def curves(found: dict[str, dict[str, Any]]) -> Any:
    figure, axes = new_figure()
    for name, point in found.items():
        axes.plot([100 * rate for rate in NOISE], point["noise"], "o-", label=WORDS[name])
    axes.set_xlabel("letters tampered with, %")
    axes.set_ylabel("bits per byte")
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
