"""Continue prompts with a trained model; several --prompt are continued together, in one batch.

  effattn generate --workdir=runs/quickstart --prompt="def " --temperature=0.7
  effattn generate --workdir=runs/quickstart --prompt="import " --prompt="class " --stop="\\n\\n"

One prompt streams onto a terminal. A run on bare token ids takes and prints numbers.
"""

import argparse
import codecs
import sys

TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's directory")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times; none or an empty one begins a document",
    )
    parser.add_argument("--max_new_tokens", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 is greedy; default: 0.8"
    )
    parser.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the fewest tokens that hold a share P (default: 1)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; \\n is a line's end; may be given several times",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="the most tokens of prompt and continuation (default: the run's data.seq_len)",
    )
    parser.add_argument(
        "--step", metavar="STEP", help="a checkpoint's number, best or latest (default: latest)"
    )


def run(arguments: argparse.Namespace) -> int:
    # Imported here: jax and flax take seconds, and `--help` needs neither.
    import jax.numpy as jnp

    from effattn.commands.run_directory import open_run, tokenizer_of
    from effattn.generate import check_sampling, generate

    stop = [text.replace("\\n", "\n").replace("\\t", "\t") for text in arguments.stop]
    sampling = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "stop": stop,
        "seed": arguments.seed,
    }
    check_sampling(**sampling)  # before the checkpoint is read
    opened = open_run(arguments.workdir, arguments.step)
    tokenizer = tokenizer_of(opened.experiment.data, opened.vocab_size)
    texts = arguments.prompt or [""]
    if tokenizer is not None:
        prompts = [tokenizer.encode(text) or [tokenizer.end_of_document] for text in texts]
    else:
        prompts = [_numbers(text, opened.vocab_size) for text in texts]
    context = opened.experiment.data.seq_len if arguments.context is None else arguments.context
    longest = max(map(len, prompts))
    if longest >= context:
        raise ValueError(
            f"--prompt: got {longest} tokens, expected fewer than the context of {context}; "
            "--context=N allows more than the model was trained on"
        )

    streams = len(prompts) == 1 and tokenizer is not None and sys.stdout.isatty()
    writer = _Writer()
    if streams:
        writer(0, texts[0].encode())
    result = generate(
        opened.model,
        prompts,
        **sampling,
        context=context,
        tokenizer=tokenizer,
        dtype=jnp.dtype(opened.experiment.train.compute_dtype),
        on_text=writer if streams else None,
    )
    if streams:
        writer.close()
    else:
        for index, (text, completion) in enumerate(zip(texts, result.completions, strict=True)):
            if len(texts) > 1:
                print(f"--- prompt {index + 1}")
            if tokenizer is None:
                print(text, *completion.tokens)
            else:
                print(text + completion.text.decode("utf-8", "replace"))
    speed = result.tokens_per_second
    print(
        f"step {opened.step}: {sum(len(c.tokens) for c in result.completions)} tokens"
        + (f", {speed:.0f} tokens/s" if speed is not None else "")
        + f", {result.state_bytes:,} bytes of state; ended by "
        + ", ".join(completion.reason for completion in result.completions),
        file=sys.stderr,
    )
    return 0


def _numbers(text: str, vocab_size: int) -> list[int]:
    try:
        ids = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        ids = []
    if not ids or not all(0 <= token < vocab_size for token in ids):
        raise ValueError(
            f"--prompt: got {text!r}, but this run was trained on bare token ids: expected numbers "
            f"from 0 to {vocab_size - 1}"
        )
    return ids


class _Writer:
    """Writes bytes to stdout as text; a character may come in several pieces."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, row: int, piece: bytes) -> None:
        sys.stdout.write(self._decoder.decode(piece))
        sys.stdout.flush()

    def close(self) -> None:
        print(self._decoder.decode(b"", final=True))
