"""Training: what a loop needs that torch does not have. Sees Protocols only."""

from pitools.training.ema import EMA as EMA
from pitools.training.interrupt import Interrupt as Interrupt
from pitools.training.interrupt import graceful_interrupt as graceful_interrupt
from pitools.training.random import keyed_generator as keyed_generator
from pitools.training.random import sample_generators as sample_generators
