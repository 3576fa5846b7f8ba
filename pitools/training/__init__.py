"""Training: what a loop needs that torch does not have. Sees Protocols only."""

from pitools.training.ema import EMA as EMA
from pitools.training.random import keyed_generator as keyed_generator
