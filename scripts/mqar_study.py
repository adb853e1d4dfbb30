"""The recall study of the README: every mixer at three learning rates and three seeds, equal steps.

    python scripts/mqar_study.py --workdir=runs/mqar

Trains `configs/mqar.py:<mixer>` and prints recall accuracy on the validation examples as a Markdown
table, with the best learning rate per mixer by its mean over the seeds. Runs that are finished are
not run again, so an interrupted study goes on.
"""

import argparse
import os
import platform
import time
from pathlib import Path
from statistics import mean

import jax

from effattn.config import load_config
from effattn.train.loop import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/mqar")
    parser.add_argument("--mixers", nargs="+", default=["based", "attention", "window"])
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[0.005, 0.01, 0.02])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--overrides", nargs="*", default=[], metavar="--config.key=value")
    arguments = parser.parse_args()

    accuracy: dict[str, dict[float, list[float]]] = {}
    started = time.time()
    for mixer in arguments.mixers:
        for rate in arguments.learning_rates:
            for seed in arguments.seeds:
                experiment = load_config(f"mqar:{mixer}", arguments.overrides)
                experiment.optimizer.learning_rate = rate
                experiment.train.seed = seed
                run = Path(arguments.workdir) / f"{mixer}_{rate:g}_{seed}"
                result = train(experiment, run)
                if result["status"] != "finished":
                    raise SystemExit("stopped; the same command goes on")
                found = result["validation"]["accuracy"]
                accuracy.setdefault(mixer, {}).setdefault(rate, []).append(found)
                print(f"{run.name}: accuracy {found:.4f}", flush=True)
    minutes = (time.time() - started) / 60

    rates = arguments.learning_rates
    print(f"\n| mixer | {' | '.join(f'lr {rate:g}' for rate in rates)} | best |")
    print(f"|---|{'---|' * (len(rates) + 1)}")
    for mixer, by_rate in accuracy.items():
        cells = [", ".join(f"{a:.3f}" for a in by_rate[rate]) for rate in rates]
        best = max(rates, key=lambda rate: mean(by_rate[rate]))
        print(f"| {mixer} | {' | '.join(cells)} | {mean(by_rate[best]):.3f} at {best:g} |")
    print(
        f"\nSeeds {arguments.seeds}; {minutes:.1f} minutes on {os.cpu_count()} "
        f"{platform.machine()} {jax.default_backend()} cores, jax {jax.__version__}"
    )


if __name__ == "__main__":
    main()
