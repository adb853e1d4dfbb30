"""ParScale on the sources of the standard library: the quickstart's hybrid, read by P streams.

The argument is P, `parscale_stdlib:4`; 1 is the hybrid by itself. Its window layers get learned
keys and values before the text, its Taylor layers the sums that such keys and values make. A step
takes about P times the quickstart's. To recycle a trained hybrid into streams instead:

    effattn train --config=parscale_stdlib --config.train.init_from=runs/quickstart
"""

from effattn.configs.quickstart import get_config as quickstart
from effattn.experiment import Experiment
from effattn.models.parscale import ParScaleConfig


def get_config(streams: str = "2") -> Experiment:
    if not streams.isdigit():
        raise ValueError(f"streams: got {streams!r}, expected a number such as 2")
    number = int(streams)
    experiment = quickstart()
    experiment.model = ParScaleConfig(
        base=experiment.model, streams=number, prefix_length=0 if number == 1 else 16
    )
    return experiment
